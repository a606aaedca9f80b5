"""Files and folders of a run: on this machine, or objects of a bucket, gs://BUCKET/FOLDER.

Both are read and written whole. Buckets go through TensorFlow's client, which TensorBoard's writer
uses too. They have no folders to make, no locks, and nothing can be appended to an object.
"""

import contextlib
import errno
import functools
import json
import os
import pathlib
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from ada_jax.errors import UserError, require_extra

AnyPath = str | os.PathLike[str]

# The repository's folder of configs: inside an installed package, in a clone beside it.
EXPERIMENTS = pathlib.Path(__file__).parent / "experiments"
if not EXPERIMENTS.is_dir():
    EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"

_ANSWER_SECONDS = 50  # for a bucket; without a network Google's libraries take their time
_JOURNAL_SECONDS = 60.0  # between two uploads of a journal: each is paid for, and sends all of it


def in_bucket(path: AnyPath) -> bool:
    """Whether the path is gs://..."""
    return os.fspath(path).startswith("gs://")


def at(path: AnyPath) -> Any:
    """A pathlib.Path, '~' expanded, or for gs:// an epath.Path, which has the same methods."""
    if not in_bucket(path):
        return pathlib.Path(os.path.expanduser(path))
    from etils import epath

    return epath.Path(path)


def local(what: str, path: AnyPath) -> pathlib.Path:
    """The path of a folder that cannot be in a bucket, as its files are mapped or locked.

    Args:
      what: names it in the message: a flag or a field and its value.
      path: its path; '~' is the home folder.

    Raises:
      UserError: it is gs://...
    """
    if in_bucket(path):
        raise UserError(
            f"{what} is in a bucket, from which its files cannot be mapped into memory: name a "
            "folder of this machine, after gcloud storage cp --recursive if it has to be copied."
        )
    return at(path)


def experiment(name: str) -> str:
    """The same file, or the package's own where experiments/... is named outside of a clone.

    Args:
      name: FILE or FILE:WORDS.
    """
    path, colon, words = name.partition(":")
    parts = pathlib.PurePath(path).parts
    if os.path.exists(path) or parts[:1] != ("experiments",):
        return name
    own = EXPERIMENTS.joinpath(*parts[1:])
    return f"{own}{colon}{words}" if own.is_file() else name


def check_bucket(what: str, path: AnyPath) -> None:
    """Finds out within a minute whether the bucket of a path can be used; others pass.

    TensorFlow's client asks for ever where there is no bucket.

    Args:
      what: names the path in the message: a flag or a field and its value.
      path: any path.

    Raises:
      UserError: the bucket is not there, does not let us in, or cannot be reached, the name holds
        characters that stand for others where objects are listed, or a package for buckets is not
        installed.
    """
    if not in_bucket(path):
        return
    require_extra(what, "etils", "google.cloud.storage", "tensorflow")
    if found := re.search(r"[\[\]*?\\]", os.fspath(path)):
        raise UserError(f"{what} holds {found[0]!r}, which cannot be used in a bucket: rename it.")
    bucket = os.fspath(path).removeprefix("gs://").partition("/")[0]
    if problem := _problem(bucket):
        raise UserError(
            f"{what} cannot be used, as asking for its bucket failed ({problem}): see that "
            f"gs://{bucket} exists, that `gcloud auth application-default login` was run outside "
            "of Google Cloud, and that the account has storage.buckets.get and may write objects."
        )


@functools.cache
def _problem(bucket: str) -> str:
    """Why a bucket cannot be used; '' where it can."""
    found = [f"no answer within {_ANSWER_SECONDS} seconds"]

    def ask() -> None:
        from google.cloud import storage

        try:
            storage.Client().get_bucket(bucket, retry=None)
            found.append("")
        except Exception as error:  # Of Google's libraries, of requests, or a name that cannot be.
            found.append(" ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip("."))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    return found[-1]


@contextlib.contextmanager
def os_errors(path: AnyPath) -> Iterator[None]:
    """Raises TensorFlow's errors about a file or an object as OSErrors, and all with its name."""
    name = os.fspath(path)
    try:
        yield
    except OSError as error:
        if in_bucket(path) and isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, "no such object", name) from error
        error.filename = name  # Python itself does not name the file of a full disk.
        raise
    except Exception as error:
        if not type(error).__module__.startswith("tensorflow."):
            raise
        import tensorflow as tf

        if isinstance(error, tf.errors.NotFoundError):
            raise FileNotFoundError(errno.ENOENT, "no such object", name) from error
        said = " ".join(str(getattr(error, "message", error)).split())[:300]
        raise OSError(errno.EIO, said, name) from error


def exists(path: AnyPath) -> bool:
    """Whether there is a file, an object or a folder."""
    with os_errors(path):
        return at(path).exists()


def is_dir(path: AnyPath) -> bool:
    """Whether there is a folder: for a bucket, objects whose names begin with it."""
    with os_errors(path):
        return at(path).is_dir()


def glob(folder: AnyPath, pattern: str) -> list[Any]:
    """The paths in a folder that match, sorted."""
    with os_errors(folder):
        return sorted(at(folder).glob(pattern))


def make_folder(path: AnyPath) -> None:
    """Makes a folder and those above it, where there are folders."""
    if not in_bucket(path):
        at(path).mkdir(parents=True, exist_ok=True)


def read(path: AnyPath) -> bytes:
    """The content of a file or an object.

    Raises:
      OSError: it cannot be read; a FileNotFoundError where it is not there.
    """
    with os_errors(path):
        return at(path).read_bytes()


def read_json(path: AnyPath) -> Any:
    """The content of a JSON file or object.

    Raises:
      OSError: as `read`.
      ValueError: it is not JSON, which has no NaN and no infinity.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"it has {constant}, which is not JSON")

    return json.loads(read(path), parse_constant=refuse)


@contextlib.contextmanager
def local_copy(path: AnyPath) -> Iterator[str]:
    """The name of a local file with the same content: for a local one its own."""
    if not in_bucket(path):
        yield os.fspath(at(path))
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(read(path))
        file.flush()
        yield file.name


def write(path: AnyPath, content: str | bytes) -> None:
    """Writes a file or an object whole or not at all, and for good.

    Raises:
      OSError: it cannot be written; nothing is left behind.
    """
    if isinstance(content, str):  # With names of files that are not UTF-8, perhaps.
        content = content.encode(errors="backslashreplace")
    with os_errors(path):
        if not in_bucket(path):
            return _write_file(at(path), content)
        at(path).write_bytes(content)  # One upload, which counts once it is complete.


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file whole or not at all; NaN and infinity, which JSON lacks, are errors."""
    write(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def _write_file(path: pathlib.Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)  # The rename itself must survive a power cut too.
    finally:
        os.close(handle)


class Journal:
    """A text that grows by lines; a local one has each at once, one in a bucket within a minute."""

    def __init__(self, path: AnyPath, text: str = "") -> None:
        """Starts with a text, which replaces what is there."""
        self._path, self._text, self._file = path, [text], None
        self._uploaded, self._complete = time.monotonic(), True
        write(path, text)
        if not in_bucket(path):
            self._file = at(path).open("a", buffering=1)

    def write(self, line: str) -> None:
        """Adds a line, given with its end."""
        if self._file:
            with os_errors(self._path):
                self._file.write(line)
            return
        self._text.append(line)
        self._complete = False
        if time.monotonic() - self._uploaded > _JOURNAL_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Returns when all lines are in the bucket."""
        if not self._complete:
            write(self._path, "".join(self._text))
            self._uploaded, self._complete = time.monotonic(), True

    def close(self) -> None:
        """Writes what is missing, and closes a local file."""
        self.flush()
        if self._file:
            with os_errors(self._path):
                self._file.close()
