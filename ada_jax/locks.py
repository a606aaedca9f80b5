"""Locks that keep two commands from writing to the same folder or file.

The kernel locks a file beside the output and releases it when its holder ends, even if it is
killed. File systems without locks, as on some clusters, and buckets are not locked.
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

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def of_folder(folder: paths.AnyPath) -> Any:
    """The lock file of a folder."""
    return paths.at(folder) / ".lock"


def of_file(file: paths.AnyPath) -> Any:
    """The lock file of a single file."""
    return paths.at(file).with_name(f".{paths.at(file).name}.lock")


@contextlib.contextmanager
def hold(what: str, path: paths.AnyPath, *, wait: bool = False) -> Iterator[None]:
    """Locks a folder or a file against other processes.

    Args:
      what: a flag and its value, for messages.
      path: of `of_folder` or `of_file`; its folder is made if necessary.
      wait: whether to wait for another process to end.

    Raises:
      UserError: another process holds the lock, or the folder cannot be written to.
    """
    if paths.in_bucket(path):
        yield
        return
    path = paths.at(path)
    with contextlib.ExitStack() as stack:
        try:
            paths.make_folder(path.parent)
            held = stack.enter_context(claim(path, wait=wait))
        except OSError as error:
            raise UserError(
                f"{what} cannot be written to ({error.strerror}): make it writable, or name "
                "another."
            ) from error
        if not held:
            raise UserError(f"{what} is in use by {_holder(path)}: wait for it, or name another.")
        yield


@contextlib.contextmanager
def claim(path: pathlib.Path, *, wait: bool = False) -> Iterator[bool]:
    """Tries to lock a file; yields whether it is locked.

    Args:
      path: the lock file; it is made, and removed at the end.
      wait: whether to wait for another process to release it.
    """
    with contextlib.ExitStack() as stack:
        file = _lock(path, wait, stack)
        if file:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            command = shlex.join(["python", *sys.orig_argv[1:]])
            file.truncate(0)
            file.write(
                f"process {os.getpid()} on {socket.gethostname()}, since {now}: {command}"[:500]
            )
            file.flush()
            stack.callback(_remove, path, file)
        yield file is not None


def _lock(path: pathlib.Path, wait: bool, stack: contextlib.ExitStack) -> IO[str] | None:
    """The locked file; None if another process has it."""
    while True:
        file = stack.enter_context(path.open("a+", encoding="utf-8", errors="backslashreplace"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logging.warning("%s: no locks here (%s); start one command.", path, error.strerror)
            return file
        if _is(path, file):
            return file
        # The former holder has removed the file: lock a new one.


def _remove(path: pathlib.Path, file: IO[str]) -> None:
    if _is(path, file):
        path.unlink()


def _holder(path: pathlib.Path) -> str:
    """The text that the holder of a lock has written."""
    with contextlib.suppress(OSError):
        if text := path.read_text(encoding="utf-8"):
            return text
    return "another process"


def _is(path: pathlib.Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:  # The file was removed.
        return False
