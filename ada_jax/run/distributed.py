"""Several processes, on one host or many, as one run: meeting, a shared folder, a common end."""

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

_MEETING_SECONDS = 50  # for all processes to find the coordinator
_HEARTBEAT_SECONDS = 60  # after which a process that is silent counts as dead, and the others end


def define_flags() -> None:
    """Defines what `connect` reads."""
    flags.DEFINE_bool(
        "distributed",
        False,
        "Run as one of several processes; a TPU slice and Slurm say themselves which.",
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, with --distributed.")
    flags.DEFINE_integer("processes", None, "How many there are, with --coordinator.")
    flags.DEFINE_integer("process", None, "Which one this is, from 0, with --coordinator.")


def connect(complain: Callable[[str], Any]) -> None:
    """Meets the other processes if --distributed is set; call it before a device is touched.

    Args:
      complain: prints a sentence, where the process has to end at once.

    Raises:
      UserError: flags are missing or contradict each other, or the processes do not find each
        other within a minute.
    """
    f = flags.FLAGS
    given = [name for name in ("coordinator", "processes", "process") if f[name].value is not None]
    if not f.distributed:
        if given:
            raise UserError(f"--{given[0]} has no meaning without --distributed: add it.")
        return
    if given and len(given) < 3:
        missing = {"coordinator", "processes", "process"} - {*given}
        raise UserError(
            f"--{sorted(missing)[0]} is not set beside --{given[0]}: give --coordinator=HOST:PORT, "
            "--processes and --process together, or none of them on a TPU slice or under Slurm."
        )
    if given and not (f.processes >= 1 and 0 <= f.process < f.processes):
        raise UserError(
            f"--process={f.process} and --processes={f.processes} do not fit: processes are "
            "numbered from 0 to one less than there are."
        )
    if given and not re.fullmatch(r".+:[0-9]{1,5}", f.coordinator):
        raise UserError(f"--coordinator={f.coordinator} has no port: write HOST:PORT.")
    sentence = (
        f"--distributed could not bring the processes together within {_MEETING_SECONDS} seconds "
        f"(--coordinator={f.coordinator}, --processes={f.processes}, --process={f.process}): start "
        "all of them with the same --coordinator and --processes, and a number each."
    )

    def give_up() -> None:
        complain(sentence)
        os._exit(2)

    # JAX itself would abort the process, with a stack trace.
    watch = threading.Timer(_MEETING_SECONDS, give_up)
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            f.coordinator,
            f.processes,
            f.process,
            initialization_timeout=2 * _MEETING_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        if given:
            raise UserError(f"{sentence} ({error})") from error
        raise UserError(
            "--distributed finds neither a TPU slice nor Slurm here: give --coordinator=HOST:PORT, "
            "--processes and --process beside it, or leave it out where there is one process."
        ) from error
    except RuntimeError as error:
        raise UserError(f"{sentence} ({' '.join(str(error).split())[:200]})") from error
    finally:
        watch.cancel()


def check_shared(workdir: str) -> None:
    """Finds out whether all processes see the same folder.

    Raises:
      UserError: on every process, if one does not.
    """
    if jax.process_count() == 1:
        return
    from etils import epath
    from jax.experimental import multihost_utils

    folder = epath.Path(workdir)
    drawn = np.asarray(np.random.default_rng().integers(2**31), np.int32)
    mark = folder / f".shared-{int(of_first(drawn))}"
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
            "not see what process 0 writes there): name one on a shared file system, or gs://..."
        )


@contextlib.contextmanager
def alone_in(what: str, folder: str) -> Iterator[None]:
    """Locks a folder by the first process, for all of them; see `locks.hold`.

    Raises:
      UserError: on every process, if it cannot be locked.
    """
    with contextlib.ExitStack() as stack:
        error = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(locks.hold(what, locks.of_folder(folder)))
            except UserError as caught:
                error = caught
        if of_first(np.asarray(error is not None)):
            raise error or UserError(f"{what} cannot be used: process 0 says why.")
        yield


def preempted(step: int) -> bool:
    """Whether to save before this step and leave, after a notice to any of several processes.

    All are told the same step. Every process must ask at every step; `StopSignal` does, and
    notes the signal itself where there is one process.
    """
    if not jax.distributed.is_initialized():
        return False
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def of_first(values: np.ndarray) -> np.ndarray:
    """Process 0's values, for all: what was read from a file that it may be writing."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(values))


# Exit statuses after SIGTERM and Ctrl-C: state saved, start the same command to go on.


class StopSignal:
    """Notes SIGTERM and Ctrl-C while it is open, so that a loop can save before it leaves.

    Ctrl-C a second time raises KeyboardInterrupt.

    Attributes:
      status: the exit status for what came first; 0 where nothing came.
    """

    def __enter__(self) -> "StopSignal":
        self.status = 0
        # Where there are several processes JAX itself listens to SIGTERM, and tells the others.
        several = jax.distributed.is_initialized()
        self._before = {}
        # A shell script starts its background commands with Ctrl-C ignored.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupted)
        if not several:
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, _: Any) -> None:
        self.status = self.status or 128 + number

    def _interrupted(self, number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print: the signal may have come while a line is written.
        os.write(2, b"Ctrl-C: saving; once more leaves at once.\n")
        if jax.distributed.is_initialized():
            signal.raise_signal(signal.SIGTERM)
        else:
            self._note(number, frame)

    def at(self, step: int) -> bool:
        """Whether to save before this step and leave; see `preempted`."""
        if preempted(step):
            self.status = self.status or INTERRUPTED
        return bool(self.status)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
