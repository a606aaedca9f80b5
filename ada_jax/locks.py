"""One lock for all commands that write a folder or a file; whoever comes second is told of it.

The kernel locks a file beside what is written and releases it when its holder ends, however it
ends. Where the file system has no locks, as on some clusters, nothing is locked; nor in buckets.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from typing import IO, Any

from absl import logging

from ada_jax import paths
from ada_jax.errors import UserError

INHERITED = "ADA_JAX_LOCK"  # in the environment: the descriptor of a lock that the parent took
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def of_folder(folder: paths.AnyPath) -> Any:
    """The lock file of a folder, or in a bucket a name that is never made."""
    return paths.at(folder) / ".lock"


def of_file(file: paths.AnyPath) -> Any:
    """The lock file of a single file."""
    return paths.at(file).with_name(f".{paths.at(file).name}.lock")


@contextlib.contextmanager
def hold(what: str, path: paths.AnyPath, *, wait: bool = False) -> Iterator[None]:
    """Keeps other processes of this program out of a folder or a file.

    Args:
      what: names what is locked in messages: a flag and its value.
      path: of `of_folder` or `of_file`; its folder is made if need be, it goes at the end.
      wait: wait for another process to end.

    Raises:
      UserError: another process is at work there, or it cannot be written to.
    """
    if paths.in_bucket(path):
        yield
        return
    path = paths.at(path)
    try:
        paths.make_folder(path.parent)
        file = _inherited(path) or take(path, wait=wait)
        if file:
            _sign(file)
    except OSError as error:
        raise UserError(
            f"{what} cannot be written to ({error.strerror}): mend that, or name another."
        ) from error
    if not file:
        raise UserError(f"{what} is in use by {holder(path)}: wait for it, or name another.")
    try:
        yield
    finally:
        release(path, file)


def take(path: pathlib.Path, *, wait: bool = False) -> IO[str] | None:
    """Locks a file for this process and those that inherit it.

    Args:
      path: the file, made if need be.
      wait: wait for another process to release it.

    Returns:
      The open file, for `release`; None where another process has it.

    Raises:
      OSError: it cannot be made.
    """
    while True:
        file = path.open("a+", encoding="utf-8", errors="backslashreplace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                if isinstance(error, BlockingIOError):
                    return None
                raise
            logging.warning("%s: no locks here (%s); start one command.", path, error.strerror)
            return file
        if _is(path, file.fileno()):
            return file
        file.close()  # The one before has removed it.


def release(path: pathlib.Path, file: IO[str]) -> None:
    """Removes the file, unless another took its place, and its lock."""
    with file:
        if _is(path, file.fileno()):
            path.unlink()


@contextlib.contextmanager
def claim(path: pathlib.Path) -> Iterator[bool]:
    """Holds a lock unless another process does; gives whether it is held."""
    file = take(path)
    try:
        yield file is not None
    finally:
        if file:
            release(path, file)


def holder(path: pathlib.Path) -> str:
    """Who holds a lock, in words."""
    with contextlib.suppress(OSError):
        if said := path.read_text(encoding="utf-8"):
            return said
    return "another process"


def _sign(file: IO[str]) -> None:
    command, now = shlex.join(["python", *sys.orig_argv[1:]]), time.strftime("%Y-%m-%d %H:%M:%S")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}: {command}"[:500])
    file.flush()


def _inherited(path: pathlib.Path) -> IO[str] | None:
    """The file, where the process that started this one has locked it for it."""
    descriptor = int(os.environ.get(INHERITED, -1))
    if descriptor >= 0 and _is(path, descriptor):
        return os.fdopen(descriptor, "a+", encoding="utf-8", errors="backslashreplace")
    return None


def _is(path: pathlib.Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:  # Either is gone.
        return False
