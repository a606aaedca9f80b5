"""Weights that leave a run (safetensors) and the checkpoints it resumes from (orbax).

Both are verified on loading: a sha256 over names, shapes, dtypes and bytes is stored beside the
arrays, and what does not match it is never returned. Nothing here reads or writes a pickle.

A leaf is named by the keys on its way joined with '//', because Haiku's module names hold '/'
themselves: `{'net/~/conv_0': {'w': ...}}` is stored as `net/~/conv_0//w`. Keys that would not
survive the way back (empty, holding '//', starting or ending with '/') are refused.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import tempfile
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ada_jax import paths
from ada_jax.errors import NotFiniteError, UserError

Tree = Any  # A pytree of arrays.

_FORMAT = 1
_SEPARATOR = "//"
_OWN_METADATA = ("format", "digest", "metadata_digest")
# What safetensors' numpy reader gives back with the dtype it was given.
_WEIGHT_DTYPES = frozenset(
    {"bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"}
    | {"float16", "bfloat16", "float32", "float64", "complex64"}
)


def digest(tree: Tree) -> str:
    """Names a tree of arrays by its content.

    Args:
      tree: pytree of arrays; the order of its dicts does not matter.

    Returns:
      sha256 in hex over the sorted names and the shape, dtype and bytes of each array.

    Raises:
      UserError: a key cannot be part of a name (see the module's docstring).
    """
    return _digest(_host_arrays(tree))


def save_weights(path: str | os.PathLike, tree: Tree, metadata: Mapping[str, Any]) -> str:
    """Writes weights as one safetensors file, whole or not at all.

    The file's own metadata holds `format`, `digest`, `metadata_digest` and the given fields, each
    as JSON.

    Args:
      path: the file to write or replace, local or gs://...; missing folders are made.
      tree: pytree of finite arrays, returned by `load_weights` as nested dicts.
      metadata: what a reader must know: classifier, number of classes, ...; values as JSON has.

    Returns:
      The `digest` of the tree.

    Raises:
      UserError: an array is not finite or of a dtype the format lacks, a key or a metadata field
        cannot be stored, or the file cannot be written. Nothing is left behind.
    """
    import safetensors.numpy

    path = os.fspath(path)
    flat = _host_arrays(tree)
    for name, array in flat.items():
        if array.dtype.name not in _WEIGHT_DTYPES:
            raise UserError(
                f"The weights for {path} were not written because '{name}' has dtype "
                f"{array.dtype.name}, which a safetensors file cannot hold: convert it to float32."
            )
    if bad := _first_not_finite(flat):
        raise UserError(
            f"The weights for {path} were not written because '{bad}' holds NaN or infinity: "
            "lower the learning rate or go back to an earlier checkpoint."
        )
    if taken := sorted(set(metadata) & set(_OWN_METADATA)):
        raise UserError(
            f"The metadata field '{taken[0]}' for {path} is one the file writes itself: rename it."
        )
    tree_digest = _digest(flat)
    fields = {**metadata, "format": _FORMAT, "digest": tree_digest}
    fields["metadata_digest"] = _json_digest(fields)
    encoded = {name: json.dumps(value, allow_nan=False) for name, value in fields.items()}
    try:
        paths.make_folder(os.path.dirname(path) or ".")
        paths.write(path, safetensors.numpy.save(flat, encoded))
    except OSError as error:
        raise UserError(
            f"The weights could not be written to {path} ({error}): "
            "free some space or choose a folder you may write to."
        ) from error
    return tree_digest


def load_weights(
    path: str | os.PathLike, like: Tree | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads weights written by `save_weights` and verifies all of them.

    A safetensors file of another program is read where `like` is given and fits; only its names,
    shapes and finite values can then be verified.

    Args:
      path: the safetensors file, local or gs://...
      like: pytree of arrays or `jax.ShapeDtypeStruct` whose names and shapes the file must have.
        Floating-point arrays are converted to its dtypes.

    Returns:
      The weights as nested dicts of numpy arrays (a tree without arrays is `{}`), and the metadata
      given to `save_weights`.

    Raises:
      UserError: the file is missing, damaged, foreign, not finite, or does not fit `like`.
    """
    path = os.fspath(path)
    paths.check_bucket(f"The weights file {path}", path)
    if not paths.exists(path):
        raise UserError(f"There is no weights file {path}: check the path.")
    flat, fields = read_safetensors(path)
    foreign = _is_foreign(fields)
    if foreign and like is not None:
        fields = {}
    else:
        _check_sealed(path, flat, fields)
    given = {name: value for name, value in fields.items() if name not in _OWN_METADATA}
    if like is not None:
        wanted = {name: _shape(leaf) for name, leaf in _named(like).items()}
        found = {name: _shape(array) for name, array in flat.items()}
        if difference := _difference(found, wanted):
            other = ", or import PyTorch's with python -m ada_jax.import_weights" if foreign else ""
            raise UserError(
                f"The weights file {path} does not fit this network ({difference}): give the file "
                f"of the same architecture, or configure the one it was saved from{other}."
            )
        flat = {name: _as_floating(flat[name], leaf) for name, leaf in _named(like).items()}
    if bad := _first_not_finite(flat):
        raise UserError(
            f"The weights file {path} holds NaN or infinity in '{bad}': use another file."
        )
    return _nested(flat), given


def metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata given to `save_weights`; {} of a file of another program.

    Raises:
      UserError: the file cannot be read, or is damaged.
    """
    path = os.fspath(path)
    return {} if _is_foreign(read_safetensors(path)[1]) else load_weights(path)[1]


def _is_foreign(fields: Mapping[str, Any]) -> bool:
    """Whether another program wrote a file: it has no format, or a word, as PyTorch's 'pt'."""
    unsealed = not fields.keys() & {"digest", "metadata_digest"}
    return unsealed and not isinstance(fields.get("format"), int)


def _check_sealed(path: str, flat: Mapping[str, np.ndarray], fields: Mapping[str, Any]) -> None:
    """Checks that `save_weights` wrote a file and that nothing in it has changed since."""
    if fields.get("format") != _FORMAT:
        raise UserError(
            f"The file {path} is not a weights file of this version of ada_jax (it says format = "
            f"{fields.get('format')}, not {_FORMAT}): save it again with "
            "ada_jax.checkpoint.save_weights, or take a network of another program into a training "
            "loop of your own, with ada_jax.adversarial_augment."
        )
    sealed = {name: value for name, value in fields.items() if name != "metadata_digest"}
    if fields.get("metadata_digest") != _json_digest(sealed) or fields.get("digest") != _digest(
        flat
    ):
        raise UserError(
            f"The weights file {path} is damaged (its content does not match its sha256): "
            "copy or save it again."
        )


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints`; every process must make every call.

    Each is a folder named by its step, with the arrays (`state`) and a JSON file (`meta`) that
    holds what the caller adds, the tree and the digests of both. A folder found damaged is moved
    to `torn-<step>` once an older one has been read.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int) -> None:
        """Opens the folder, and makes it when missing.

        Args:
          workdir: the run's folder, local or any that orbax knows (`gs://...`).
          keep: number of newest checkpoints kept, at least 1.

        Raises:
          UserError: `keep` is below 1 or the folder cannot be made.
        """
        import orbax.checkpoint as ocp  # Takes a second: who only loads weights does not pay.
        from etils import epath

        if keep < 1:
            raise UserError(f"The number of checkpoints to keep is {keep}: make it at least 1.")
        self._ocp = ocp
        root = epath.Path(paths.at(workdir))  # Its `absolute` takes 'gs://...' for a local name.
        self._folder = (root if root.is_absolute() else root.absolute()) / "checkpoints"
        paths.check_bucket(f"The folder {self._folder}", self._folder)
        _check_utf_8(self._folder)
        self._links = contextlib.ExitStack()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            lightweight_initialize=True,  # Else a damaged metadata file can fail the opening.
        )
        try:
            with paths.os_errors(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The folder {self._folder} cannot be used for checkpoints ({error}): "
                "use another --workdir."
            ) from error
        self._manager = ocp.CheckpointManager(
            self._plain_name(), item_names=("state", "meta"), options=options
        )

    def save(self, step: int, state: Tree, extra: Mapping[str, Any], *, wait: bool = False) -> None:
        """Saves a state in the background; a step that is there already is left as it is.

        The arrays are copied before the call returns, so they may be donated afterwards.

        Args:
          step: number of updates made, which names the checkpoint.
          state: pytree of host or device arrays of one device (not replicated).
          extra: JSON values to find again; `extra['expect']` is what `restore` compares.
          wait: return only when the checkpoint is complete on disk.

        Raises:
          UserError: a key of the state cannot be part of a name, or this save or the one before
            could not be written.
        """
        if step not in self._manager.all_steps():
            flat = _host_arrays(state)
            meta = {
                "format": _FORMAT,
                # A deep copy: it is written in the background while the caller's lists may grow.
                "extra": json.loads(json.dumps(dict(extra))),
                "tree": {name: _spec(array) for name, array in flat.items()},
                "state_digest": _digest(flat),
            }
            meta["meta_digest"] = _json_digest(meta)
            # Orbax refuses arrays without elements; `tree` says all there is to know of them.
            stored = {name: array for name, array in flat.items() if array.size}
            args = self._ocp.args
            items = args.Composite(state=args.PyTreeSave(stored), meta=args.JsonSave(meta))
            with self._failing_as_user_error():
                self._manager.save(step, args=items, force=True)
        if wait:
            self.wait()

    def restore(
        self,
        like_state: Tree,
        expect: Mapping[str, Any],
        former: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> tuple[Tree, dict[str, Any], int] | None:
        """Reads the newest checkpoint that is undamaged.

        Args:
          like_state: pytree of arrays or `jax.ShapeDtypeStruct`: the tree, shapes and dtypes
            wanted.
          expect: JSON values that must equal `extra['expect']` of the checkpoint.
          former: what older versions wrote for some of them, which is taken for the same.

        Returns:
          The state with numpy arrays bitwise equal to those saved, `extra` and the step; or None
          when there is no checkpoint.

        Raises:
          UserError: the checkpoint is of another configuration or architecture, or each one
            present is damaged (none is then moved or deleted).
        """
        self.wait()
        torn: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, extra = self._read(step, like_state, expect, former)
            except UserError:
                raise
            except Exception as error:
                # Damaged files make orbax and tensorstore raise anything, and now and then print
                # tracebacks of their own threads, which mean nothing more.
                torn[step] = error
                continue
            self._move_aside(torn, step)
            return state, extra, step
        if torn:
            step, error = next(iter(torn.items()))
            raise UserError(
                f"No checkpoint in {self._folder} can be read (steps {sorted(torn)}; step {step}: "
                f"{_one_line(error)}): restore the folder from a copy, or use another --workdir "
                "to start anew."
            ) from error
        return None

    def read_latest(self, like: Tree) -> tuple[dict[str, Any], int] | None:
        """Reads a part of the newest checkpoint that is undamaged, whatever its configuration.

        Args:
          like: pytree of arrays or `jax.ShapeDtypeStruct`: the names and shapes wanted.

        Returns:
          The wanted arrays as nested dicts of numpy arrays, and the step; or None when there is
          no undamaged checkpoint. None is moved or deleted.

        Raises:
          UserError: the checkpoint does not have these arrays.
        """
        wanted = {name: _shape(leaf) for name, leaf in _named(like).items()}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                meta = self._read_meta(step)
                flat = self._read_arrays(step, {n: _struct(s) for n, s in meta["tree"].items()})
                if _digest(flat) != meta["state_digest"]:
                    raise ValueError("the arrays do not match their sha256")
            except Exception as error:  # As in `restore`: damaged files raise anything.
                logging.warning("Step %d of %s: %s.", step, self._folder, _one_line(error))
                continue
            found = {name: _shape(flat[name]) for name in wanted if name in flat}
            if difference := _difference(found, wanted):
                raise UserError(
                    f"The checkpoint {self._folder / str(step)} does not fit this network "
                    f"({difference}): set the config back to what it was written with."
                )
            return _nested({name: flat[name] for name in wanted}), step
        return None

    def latest_extra(self) -> dict[str, Any]:
        """Reads what was saved beside the newest undamaged state; {} where there is none."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            with contextlib.suppress(Exception):  # As in `restore`: damaged files raise anything.
                return self._read_meta(step)["extra"]
        return {}

    def latest_step(self) -> int | None:
        """Returns the newest step on disk, or None; waits for a save under way."""
        self.wait()
        return self._manager.latest_step()

    def wait(self) -> None:
        """Returns when the save under way, if any, is complete on disk.

        Raises:
          UserError: it could not be written.
        """
        with self._failing_as_user_error():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save under way and frees the threads; call it before the process ends.

        Raises:
          UserError: the save could not be written.
        """
        with self._failing_as_user_error(), self._links:
            self._manager.close()

    def _plain_name(self) -> Any:
        """The folder's name, or a link to it where orbax would take the name for a pattern."""
        if paths.in_bucket(self._folder) or not re.search(r"[\[*?\\]", str(self._folder)):
            return self._folder
        folder = self._links.enter_context(tempfile.TemporaryDirectory(prefix="ada_jax-"))
        link = type(self._folder)(folder) / "checkpoints"
        os.symlink(self._folder, link)
        return link

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Closes after the block, also where training diverged in it, to keep the save under way.

        Any other error may be one process's alone, and closing would wait for the rest.
        """
        try:
            yield
        except NotFiniteError:
            self.close()
            raise
        self.close()

    @contextlib.contextmanager
    def _failing_as_user_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # A full disk is a ValueError of tensorstore.
            raise UserError(
                f"A checkpoint could not be written to {self._folder} ({_one_line(error)}): "
                "see that the disk has space and the folder may be written."
            ) from error

    def _read(
        self,
        step: int,
        like_state: Tree,
        expect: Mapping[str, Any],
        former: Mapping[str, Any],
    ) -> tuple[Tree, dict[str, Any]]:
        meta = self._read_meta(step)
        folder = self._folder / str(step)
        if meta["format"] != _FORMAT:
            raise UserError(
                f"The checkpoint {folder} has format {meta['format']}, and this version of ada_jax "
                f"reads {_FORMAT}: use another --workdir, or the version that wrote it."
            )
        _check_expect(folder, meta["extra"].get("expect", {}), expect, former)
        named = _named(like_state)
        wanted = {name: _spec(leaf) for name, leaf in named.items()}
        if difference := _difference(meta["tree"], wanted):
            raise UserError(
                f"The checkpoint {folder} is of another architecture ({difference}): "
                "use another --workdir, or set the config back."
            )
        flat = self._read_arrays(step, named)
        if _digest(flat) != meta["state_digest"]:
            raise ValueError("the arrays do not match their sha256")
        leaves = [flat[name] for name in named]
        return jax.tree.unflatten(jax.tree.structure(like_state), leaves), meta["extra"]

    def _read_meta(self, step: int) -> dict[str, Any]:
        args = self._ocp.args
        meta = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
        if meta.pop("meta_digest") != _json_digest(meta):
            raise ValueError("the metadata does not match its sha256")
        return meta

    def _read_arrays(self, step: int, named: Mapping[str, Any]) -> dict[str, np.ndarray]:
        args = self._ocp.args
        as_numpy = self._ocp.RestoreArgs(restore_type=np.ndarray)
        empty = {name: np.zeros(x.shape, x.dtype) for name, x in named.items() if 0 in np.shape(x)}
        restore_args = {name: as_numpy for name in named if name not in empty}
        items = args.Composite(state=args.PyTreeRestore(restore_args=restore_args))
        return {**self._manager.restore(step, args=items)["state"], **empty}

    def _move_aside(self, torn: Mapping[int, Exception], good: int) -> None:
        """Renames damaged checkpoints, so that their steps can be saved again."""
        if not torn:
            return
        if jax.process_index() == 0:
            for step, error in torn.items():
                folder, target = self._folder / str(step), self._free_name(f"torn-{step}")
                logging.warning(
                    "The checkpoint %s is damaged (%s), so it is moved to %s and the run goes on "
                    "from step %d.",
                    *(folder, _one_line(error), target.name, good),
                )
                folder.rename(target)
        self._ocp.multihost.sync_global_processes("ada_jax:torn_checkpoints_moved")
        self._manager.reload()

    def _free_name(self, name: str) -> Any:
        names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
        return next(path for path in map(self._folder.joinpath, names) if not path.exists())


def _check_utf_8(folder: Any) -> None:
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"The folder {os.fsencode(folder)!r} has a name that is not UTF-8, in which no "
            "checkpoint can be written: rename it, or use another --workdir."
        ) from error


def _named(tree: Tree) -> dict[str, Any]:
    """The leaves by name, in the order of `jax.tree.leaves`."""
    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
        name = _SEPARATOR.join(keys)
        # safetensors keeps its metadata under the name of one entry.
        if not keys or not all(map(_survives, keys)) or name in named or name == "__metadata__":
            raise UserError(
                f"An array of the tree cannot be stored under the name '{name}': use non-empty, "
                f"distinct keys that neither hold '{_SEPARATOR}' nor start or end with '/'."
            )
        named[name] = leaf
    return named


def _survives(key: str) -> bool:
    return bool(key) and _SEPARATOR not in key and key == key.strip("/")


def _nested(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in flat.items():
        *keys, last = name.split(_SEPARATOR)
        node = tree
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = array
    return tree


def _host_arrays(tree: Tree) -> dict[str, np.ndarray]:
    """Copies of the leaves by name: contiguous, of native byte order, safe from donation."""
    flat = {}
    for name, leaf in _named(tree).items():
        array = np.asarray(leaf)
        flat[name] = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    return flat


def _digest(flat: Mapping[str, np.ndarray]) -> str:
    sha = hashlib.sha256()
    for name, array in sorted(flat.items()):
        sha.update(f"{json.dumps(name)} {_spec(array)}\n".encode())
        sha.update(array.reshape(-1).view(np.uint8))
    return sha.hexdigest()


def _json_digest(value: Any) -> str:
    # Through JSON and back, as tuples and integer keys change on the way to disk.
    there_and_back = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(there_and_back, sort_keys=True).encode()).hexdigest()


def _shape(leaf: Any) -> str:
    return f"[{','.join(map(str, np.shape(leaf)))}]"


def _spec(leaf: Any) -> str:
    """Shape and dtype of an array, a ShapeDtypeStruct or a number, as in 'float32[3,3]'."""
    return f"{_dtype(leaf).name}{_shape(leaf)}"


def _dtype(leaf: Any) -> np.dtype:
    return np.dtype(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype)


def _as_floating(array: np.ndarray, like: Any) -> np.ndarray:
    """The array in the floating-point type of `like`; as it is where one of the two is no float."""
    types = array.dtype, _dtype(like)
    if not all(jnp.issubdtype(t, jnp.floating) for t in types):
        return array
    with np.errstate(over="ignore"):  # Infinities are found afterwards.
        return array.astype(types[1])


def _struct(spec: str) -> jax.ShapeDtypeStruct:
    """What `_spec` says of an array."""
    dtype, _, sides = spec.rstrip("]").partition("[")
    return jax.ShapeDtypeStruct([int(n) for n in sides.split(",") if n], dtype)


def _first_not_finite(flat: Mapping[str, np.ndarray]) -> str | None:
    return next((name for name, array in flat.items() if not np.isfinite(array).all()), None)


def _difference(found: Mapping[str, str], wanted: Mapping[str, str]) -> str | None:
    """Says how many arrays differ between two {name: shape} and what the first one does."""
    names = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    if not names:
        return None
    first = names[0]
    if first not in found:
        what = f"is missing, {wanted[first]} is wanted"
    elif first not in wanted:
        what = f"of {found[first]} is not wanted"
    else:
        what = f"is {found[first]} where {wanted[first]} is wanted"
    return f"{len(names)} of {len({*found, *wanted})} arrays differ; the first, '{first}', {what}"


def _check_expect(
    folder: Any, stored: Mapping[str, Any], expect: Mapping[str, Any], former: Mapping[str, Any]
) -> None:
    now = json.loads(json.dumps(dict(expect)))
    for field in dict.fromkeys([*now, *stored]):
        if stored.get(field) not in (now.get(field), former.get(field, now.get(field))):
            raise UserError(
                f"The checkpoint {folder} was written with {field} = "
                f"{json.dumps(stored.get(field))}, but this run has {field} = "
                f"{json.dumps(now.get(field))}: use another --workdir, or set the config back."
            )


def _one_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else f"{text[:60]} ... {text[-135:]}"  # The cause is last.


def read_safetensors(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All arrays of a safetensors file by name, and its metadata, of any program.

    Metadata that are not JSON are strings, as in PyTorch's {'format': 'pt'}.

    Raises:
      UserError: it cannot be read as such a file.
    """
    import safetensors

    try:
        with (
            paths.local_copy(path) as copy,
            safetensors.safe_open(copy, framework="np") as file,
        ):
            fields = {name: _from_json(text) for name, text in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, fields  # noqa: SIM118
    except Exception as error:  # Its parts raise whatever the damaged bytes lead them to.
        raise UserError(
            f"The file {path} is not a whole safetensors file ({_one_line(error)}): "
            "copy it again, or save it with ada_jax.checkpoint.save_weights (pickles are not read)."
        ) from error


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
