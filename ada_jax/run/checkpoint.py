"""The checkpoints that a run resumes from, written by orbax.

Orbax writes a checkpoint under a temporary name and renames it when it is complete, so a killed run
leaves whole checkpoints only. An array is stored under its keys joined by '//', see
`weight_files.named`.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ada_jax import paths
from ada_jax.errors import NotFiniteError, UserError
from ada_jax.nets import weight_files


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints`; every process must make every call.

    Each is a folder named after its step, with the arrays (`state`) and a JSON file (`meta`) that
    has the tree's shapes and dtypes and the caller's values.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int) -> None:
        """Opens the folder; creates it if it is missing.

        Args:
          workdir: the run's folder, local or gs://...
          keep: number of newest checkpoints kept, at least 1.

        Raises:
          UserError: the folder cannot be created, or orbax does not accept its name.
        """
        import orbax.checkpoint as ocp  # Takes a second, which loading weights does not need.
        from etils import epath

        self._ocp = ocp
        root = epath.Path(paths.at(workdir))  # `absolute` would take 'gs://...' for a local name.
        self._folder = (root if root.is_absolute() else root.absolute()) / "checkpoints"
        paths.check_bucket(f"The folder {self._folder}", self._folder)
        if wildcard := next((c for c in "[*?\\" if c in str(self._folder)), None):
            raise UserError(
                f"The folder {self._folder} has {wildcard!r} in its name, which orbax takes for a "
                "pattern: rename it, or use another --workdir."
            )
        try:
            with paths.os_errors(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The folder {self._folder} cannot be used for checkpoints ({error}): "
                "use another --workdir."
            ) from error
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            lightweight_initialize=True,  # Otherwise a damaged metadata file can fail here.
        )
        self._manager = ocp.CheckpointManager(
            self._folder, item_names=("state", "meta"), options=options
        )

    def save(
        self, step: int, state: weight_files.Tree, extra: Mapping[str, Any], *, wait: bool = False
    ) -> None:
        """Saves a state in the background; a step that was saved before is left as it is.

        The arrays are copied before the call returns and may be donated afterwards.

        Args:
          step: number of updates made, which names the checkpoint.
          state: pytree of host or device arrays of one device (not replicated).
          extra: JSON values to return on restoring; `restore` compares `extra['expect']`.
          wait: return only when the checkpoint is complete on disk.

        Raises:
          UserError: this save, or the one before, could not be written.
        """
        if step not in self._manager.all_steps():
            flat = weight_files.host_arrays(state)
            meta = {
                "format": weight_files.FORMAT,
                # A deep copy: the caller's lists may grow while it is written.
                "extra": json.loads(json.dumps(dict(extra))),
                "tree": {name: weight_files.spec(array) for name, array in flat.items()},
            }
            # Orbax has checksums of the arrays, not of this.
            meta["meta_digest"] = weight_files.json_digest(meta)
            # Orbax does not accept arrays without elements; `tree` describes them fully.
            stored = {name: array for name, array in flat.items() if array.size}
            args = self._ocp.args
            items = args.Composite(state=args.PyTreeSave(stored), meta=args.JsonSave(meta))
            with self._writing():
                self._manager.save(step, args=items, force=True)
        if wait:
            self.wait()

    def restore(
        self, like_state: weight_files.Tree, expect: Mapping[str, Any]
    ) -> tuple[weight_files.Tree, dict[str, Any], int] | None:
        """Reads the newest checkpoint.

        Args:
          like_state: pytree of arrays or `jax.ShapeDtypeStruct` with the wanted shapes and dtypes.
          expect: JSON values that must equal `extra['expect']` of the checkpoint.

        Returns:
          The state, numpy arrays bitwise equal to those saved, `extra` and the step; None without
          a checkpoint.

        Raises:
          UserError: the checkpoint is damaged, or of another configuration or architecture.
        """
        step = self.latest_step()
        if step is None:
            return None
        folder, meta = self._folder / str(step), self._read_meta(step)
        _check_expect(folder, meta["extra"].get("expect", {}), expect)
        named = weight_files.named(like_state)
        wanted = {name: weight_files.spec(leaf) for name, leaf in named.items()}
        if difference := weight_files.first_difference(meta["tree"], wanted):
            raise UserError(
                f"The checkpoint {folder} is of another architecture ({difference}): "
                "use another --workdir, or set the config back."
            )
        flat = self._read_arrays(step, named)
        leaves = [flat[name] for name in named]
        return jax.tree.unflatten(jax.tree.structure(like_state), leaves), meta["extra"], step

    def read_latest(self, like: weight_files.Tree) -> tuple[dict[str, Any], int] | None:
        """Reads a part of the newest checkpoint, whatever its configuration.

        Args:
          like: pytree of arrays or `jax.ShapeDtypeStruct` with the wanted names and shapes.

        Returns:
          The wanted arrays as nested dicts of numpy arrays, and the step; None without a
          checkpoint.

        Raises:
          UserError: the checkpoint is damaged or does not have these arrays.
        """
        step = self.latest_step()
        if step is None:
            return None
        tree = self._read_meta(step)["tree"]
        flat = self._read_arrays(step, {n: weight_files.struct(s) for n, s in tree.items()})
        wanted = {name: weight_files.shape(leaf) for name, leaf in weight_files.named(like).items()}
        found = {name: weight_files.shape(flat[name]) for name in wanted if name in flat}
        if difference := weight_files.first_difference(found, wanted):
            raise UserError(
                f"The checkpoint {self._folder / str(step)} does not fit this network "
                f"({difference}): set the config back to what it was written with."
            )
        return weight_files.nested({name: flat[name] for name in wanted}), step

    def latest_extra(self) -> dict[str, Any]:
        """The `extra` values of the newest checkpoint; {} without one."""
        step = self.latest_step()
        return {} if step is None else self._read_meta(step)["extra"]

    def latest_step(self) -> int | None:
        """The newest step, once a save under way is complete; None without one."""
        self.wait()
        return self._manager.latest_step()

    def wait(self) -> None:
        """Waits for a save under way; raises UserError if it could not be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for a save under way and frees the threads; call it before the process ends.

        Raises:
          UserError: the save could not be written.
        """
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Closes after the block, also if training diverged in it.

        After any other error, which one process alone may have, closing would wait for the others.
        """
        try:
            yield
        except NotFiniteError:
            self.close()
            raise
        self.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # For a full disk, tensorstore raises ValueError.
            raise UserError(
                f"A checkpoint could not be written to {self._folder} "
                f"({weight_files.one_line(error)}): check that the disk has space and the folder "
                "is writable."
            ) from error

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Damaged files make orbax and tensorstore raise anything.
            raise UserError(
                f"The checkpoint {self._folder / str(step)} cannot be read "
                f"({weight_files.one_line(error)}): move this folder away to resume from the "
                "checkpoint before it, or restore it from a copy."
            ) from error

    def _read_meta(self, step: int) -> dict[str, Any]:
        args = self._ocp.args
        with self._reading(step):
            meta = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
            if meta.pop("meta_digest") != weight_files.json_digest(meta):
                raise ValueError("its values do not match their sha256")
            found = meta["format"]
        if found != weight_files.FORMAT:
            raise UserError(
                f"The checkpoint {self._folder / str(step)} has format {found}, and this version "
                f"of ada_jax reads {weight_files.FORMAT}: use another --workdir, or the version "
                "that wrote it."
            )
        return meta

    def _read_arrays(self, step: int, named: Mapping[str, Any]) -> dict[str, np.ndarray]:
        args = self._ocp.args
        as_numpy = self._ocp.RestoreArgs(restore_type=np.ndarray)
        empty = {name: np.zeros(x.shape, x.dtype) for name, x in named.items() if 0 in np.shape(x)}
        restore_args = {name: as_numpy for name in named if name not in empty}
        items = args.Composite(state=args.PyTreeRestore(restore_args=restore_args))
        with self._reading(step):
            return {**self._manager.restore(step, args=items)["state"], **empty}


def _check_expect(folder: Any, stored: Mapping[str, Any], expect: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(dict(expect)))
    for field in dict.fromkeys([*now, *stored]):
        if stored.get(field) != now.get(field):
            raise UserError(
                f"The checkpoint {folder} was written with {field} = "
                f"{json.dumps(stored.get(field))}, but this run has {field} = "
                f"{json.dumps(now.get(field))}: use another --workdir, or set the config back."
            )
