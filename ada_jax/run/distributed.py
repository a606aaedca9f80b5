"""Several processes as one run: connecting, locking the shared folder, stopping at one step."""

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

from ada_jax import locks
from ada_jax.errors import INTERRUPTED, UserError

_CONNECT_SECONDS = 50  # until all processes have found the coordinator
_HEARTBEAT_SECONDS = 60  # a process that is silent for so long counts as dead; the others end
_MEMBERS = ("coordinator", "processes", "process")  # flags that describe the processes


def define_flags() -> None:
    """Defines the flags that `connect` reads."""
    flags.DEFINE_bool(
        "distributed",
        False,
        "Run as one of several processes. TPU slices and Slurm need no other flag.",
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, with --distributed.")
    flags.DEFINE_integer("processes", None, "Number of processes, with --coordinator.")
    flags.DEFINE_integer("process", None, "Index of this process, with --coordinator.")


def connect(print_error: Callable[[str], Any]) -> None:
    """Connects to the other processes if --distributed is set; call it before using a device.

    Args:
      print_error: prints a message if the process must exit at once.

    Raises:
      UserError: flags are missing or contradict each other, or the processes do not find each
        other within a minute.
    """
    f = flags.FLAGS
    given = [name for name in _MEMBERS if f[name].value is not None]
    _check_flags(given)
    if not f.distributed:
        return
    failure = (
        f"--distributed could not connect the processes within {_CONNECT_SECONDS} seconds "
        f"(--coordinator={f.coordinator}, --processes={f.processes}, --process={f.process}): start "
        "all of them with the same --coordinator and --processes, each with its own --process."
    )

    def give_up() -> None:
        print_error(failure)
        os._exit(2)

    # JAX itself would abort the process with a stack trace.
    watch = threading.Timer(_CONNECT_SECONDS, give_up)
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            f.coordinator,
            f.processes,
            f.process,
            initialization_timeout=2 * _CONNECT_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        if given:
            raise UserError(f"{failure} ({error})") from error
        raise UserError(
            "--distributed finds neither a TPU slice nor Slurm here: give --coordinator=HOST:PORT, "
            "--processes and --process too, or omit it for a single process."
        ) from error
    except RuntimeError as error:
        raise UserError(f"{failure} ({' '.join(str(error).split())[:200]})") from error
    finally:
        watch.cancel()


def _check_flags(given: list[str]) -> None:
    f = flags.FLAGS
    if not f.distributed:
        if given:
            raise UserError(f"--{given[0]} has no meaning without --distributed: add it.")
        return
    if given and len(given) < len(_MEMBERS):
        missing = {*_MEMBERS} - {*given}
        raise UserError(
            f"--{sorted(missing)[0]} is not set beside --{given[0]}: give --coordinator=HOST:PORT, "
            "--processes and --process together, or none of them on a TPU slice or under Slurm."
        )
    if given and not (f.processes >= 1 and 0 <= f.process < f.processes):
        raise UserError(
            f"--process={f.process} and --processes={f.processes} do not fit: number the processes "
            "from 0 to --processes minus 1."
        )
    if given and not re.fullmatch(r".+:[0-9]{1,5}", f.coordinator):
        raise UserError(f"--coordinator={f.coordinator} has no port: write HOST:PORT.")


@contextlib.contextmanager
def lock_workdir(workdir: str) -> Iterator[None]:
    """Locks a workdir that all processes share; see `locks.hold`.

    Raises:
      UserError: in every process, if the folder is not shared or cannot be locked.
    """
    what = f"--workdir={workdir}"
    with contextlib.ExitStack() as stack:
        error = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(locks.hold(what, locks.of_folder(workdir)))
            except UserError as caught:
                error = caught
        if broadcast(np.asarray(error is not None)):
            raise error or UserError(f"{what} cannot be used: see the message of process 0.")
        # After process 0 has made the folder: an error of one alone would leave the others waiting.
        if jax.process_count() > 1:
            _check_shared(workdir)
        yield


def _check_shared(workdir: str) -> None:
    """Raises UserError, in every process, unless all see the same folder."""
    from etils import epath
    from jax.experimental import multihost_utils

    number = broadcast(np.int32(np.random.default_rng().integers(2**31)))
    folder = epath.Path(workdir)
    mark = folder / f".shared-{int(number)}"
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text("")
    multihost_utils.sync_global_devices("workdir marked")
    seen = multihost_utils.process_allgather(np.asarray(mark.exists()))
    if jax.process_index() == 0:
        mark.unlink()
    if not seen.all():
        blind = ", ".join(str(i) for i in np.flatnonzero(~seen.ravel()))
        raise UserError(
            f"--workdir={workdir} is not the same folder for all processes (process {blind} does "
            "not see what process 0 writes there): use a shared file system, or gs://..."
        )


def broadcast(values: np.ndarray) -> np.ndarray:
    """The values of process 0, in every process."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(values))


class StopSignal:
    """Records SIGTERM and Ctrl-C within a block, so that a loop can save before it stops.

    A second Ctrl-C raises KeyboardInterrupt. With several processes, a signal to one of them stops
    all at the same step.

    Attributes:
      status: the exit status of the first signal, 128 plus its number; 0 without one.
    """

    def __enter__(self) -> "StopSignal":
        self.status = 0
        self._distributed = jax.distributed.is_initialized()
        self._before = {}
        # Background commands of shell scripts start with Ctrl-C ignored.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupted)
        if not self._distributed:  # Else JAX handles SIGTERM, and informs the other processes.
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._record)
        return self

    def _record(self, number: int, _: Any) -> None:
        self.status = self.status or 128 + number

    def _interrupted(self, number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print: the signal may arrive while a line is being written.
        os.write(2, b"Ctrl-C: saving; press it again to stop at once.\n")
        if self._distributed:
            signal.raise_signal(signal.SIGTERM)
        else:
            self._record(number, frame)

    def at(self, step: int) -> bool:
        """Whether to save before this step and stop; every process must ask at every step."""
        if self._distributed:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.status = self.status or INTERRUPTED
        return bool(self.status)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
