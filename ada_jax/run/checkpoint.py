"""Weights that leave a run (safetensors) and the checkpoints it resumes from (orbax).

Both are verified on loading: a sha256 over names, shapes, dtypes and bytes is stored beside the
arrays, and what does not match it is never returned. Nothing here reads or writes a pickle.

A leaf is named by the keys on its way joined with '//', because Haiku's module names hold '/'
themselves: `{'net/~/conv_0': {'w': ...}}` is stored as `net/~/conv_0//w`. Keys that would not
survive the way back (empty, holding '//', starting or ending with '/') are refused.
"""

import contextlib
import itertools
import json
import os
import re
import tempfile
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from ada_jax import paths
from ada_jax.errors import NotFiniteError, UserError
from ada_jax.nets import weight_files


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
        weight_files.check_utf_8(self._folder)
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

    def save(
        self, step: int, state: weight_files.Tree, extra: Mapping[str, Any], *, wait: bool = False
    ) -> None:
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
            flat = weight_files.host_arrays(state)
            meta = {
                "format": weight_files.FORMAT,
                # A deep copy: it is written in the background while the caller's lists may grow.
                "extra": json.loads(json.dumps(dict(extra))),
                "tree": {name: weight_files.spec(array) for name, array in flat.items()},
                "state_digest": weight_files.state_digest(flat),
            }
            meta["meta_digest"] = weight_files.json_digest(meta)
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
        like_state: weight_files.Tree,
        expect: Mapping[str, Any],
        former: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> tuple[weight_files.Tree, dict[str, Any], int] | None:
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
                f"{weight_files.one_line(error)}): restore the folder from a copy, or use another "
                "--workdir to start anew."
            ) from error
        return None

    def read_latest(self, like: weight_files.Tree) -> tuple[dict[str, Any], int] | None:
        """Reads a part of the newest checkpoint that is undamaged, whatever its configuration.

        Args:
          like: pytree of arrays or `jax.ShapeDtypeStruct`: the names and shapes wanted.

        Returns:
          The wanted arrays as nested dicts of numpy arrays, and the step; or None when there is
          no undamaged checkpoint. None is moved or deleted.

        Raises:
          UserError: the checkpoint does not have these arrays.
        """
        wanted = {name: weight_files.shape(leaf) for name, leaf in weight_files.named(like).items()}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                meta = self._read_meta(step)
                flat = self._read_arrays(
                    step, {n: weight_files.struct(s) for n, s in meta["tree"].items()}
                )
                if weight_files.state_digest(flat) != meta["state_digest"]:
                    raise ValueError("the arrays do not match their sha256")
            except Exception as error:  # As in `restore`: damaged files raise anything.
                logging.warning(
                    "Step %d of %s: %s.", step, self._folder, weight_files.one_line(error)
                )
                continue
            found = {name: weight_files.shape(flat[name]) for name in wanted if name in flat}
            if difference := weight_files.first_difference(found, wanted):
                raise UserError(
                    f"The checkpoint {self._folder / str(step)} does not fit this network "
                    f"({difference}): set the config back to what it was written with."
                )
            return weight_files.nested({name: flat[name] for name in wanted}), step
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
                f"A checkpoint could not be written to {self._folder} "
                f"({weight_files.one_line(error)}): see that the disk has space and the folder may "
                "be written."
            ) from error

    def _read(
        self,
        step: int,
        like_state: weight_files.Tree,
        expect: Mapping[str, Any],
        former: Mapping[str, Any],
    ) -> tuple[weight_files.Tree, dict[str, Any]]:
        meta = self._read_meta(step)
        folder = self._folder / str(step)
        if meta["format"] != weight_files.FORMAT:
            raise UserError(
                f"The checkpoint {folder} has format {meta['format']}, and this version of ada_jax "
                f"reads {weight_files.FORMAT}: use another --workdir, or the version that wrote it."
            )
        _check_expect(folder, meta["extra"].get("expect", {}), expect, former)
        named = weight_files.named(like_state)
        wanted = {name: weight_files.spec(leaf) for name, leaf in named.items()}
        if difference := weight_files.first_difference(meta["tree"], wanted):
            raise UserError(
                f"The checkpoint {folder} is of another architecture ({difference}): "
                "use another --workdir, or set the config back."
            )
        flat = self._read_arrays(step, named)
        if weight_files.state_digest(flat) != meta["state_digest"]:
            raise ValueError("the arrays do not match their sha256")
        leaves = [flat[name] for name in named]
        return jax.tree.unflatten(jax.tree.structure(like_state), leaves), meta["extra"]

    def _read_meta(self, step: int) -> dict[str, Any]:
        args = self._ocp.args
        meta = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
        if meta.pop("meta_digest") != weight_files.json_digest(meta):
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
                    *(folder, weight_files.one_line(error), target.name, good),
                )
                folder.rename(target)
        self._ocp.multihost.sync_global_processes("ada_jax:torn_checkpoints_moved")
        self._manager.reload()

    def _free_name(self, name: str) -> Any:
        names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
        return next(path for path in map(self._folder.joinpath, names) if not path.exists())


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
