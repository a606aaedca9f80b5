"""Files of a run, on this machine or in a bucket, gs://BUCKET/FOLDER.

Files are read and written whole. Buckets are accessed through TensorFlow's client, as TensorBoard's
writer does. They have no folders and no locks, and objects cannot be appended to.
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

# The folder of configs: inside an installed package, beside it in a clone.
EXPERIMENTS = pathlib.Path(__file__).parent / "experiments"
if not EXPERIMENTS.is_dir():
    EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"

_ANSWER_SECONDS = 50  # for a bucket; without a network Google's libraries retry for long
_JOURNAL_SECONDS = 60.0  # between uploads of a journal: each one is billed and sends the whole file


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
    """The path of a folder that must be local, as its files are mapped or locked.

    Args:
      what: a flag or field and its value, for the message.
      path: its path; '~' is the home folder.

    Raises:
      UserError: it is gs://...
    """
    if in_bucket(path):
        raise UserError(
            f"{what} is in a bucket, whose files cannot be mapped into memory: name a local "
            "folder, to which gcloud storage cp --recursive copies it."
        )
    return at(path)


def experiment(name: str) -> str:
    """Finds a config file: experiments/... outside of a clone is the package's own.

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
    """Checks within a minute that the bucket of a path can be used; TensorFlow would retry forever.

    Args:
      what: a flag or field and its value, for the message.
      path: any path; local ones pass.

    Raises:
      UserError: the bucket does not exist or cannot be used, the name has wildcards, or a package
        for buckets is missing.
    """
    if not in_bucket(path):
        return
    require_extra(what, "etils", "google.cloud.storage", "tensorflow")
    if found := re.search(r"[\[\]*?\\]", os.fspath(path)):
        raise UserError(f"{what} holds {found[0]!r}, which cannot be used in a bucket: rename it.")
    bucket = os.fspath(path).removeprefix("gs://").partition("/")[0]
    if problem := _problem(bucket):
        raise UserError(
            f"{what} cannot be used, as asking for its bucket failed ({problem}): check that "
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
        except Exception as error:  # of Google's libraries or of requests
            found.append(" ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip("."))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    return found[-1]


@contextlib.contextmanager
def os_errors(path: AnyPath) -> Iterator[None]:
    """Converts TensorFlow's errors about files to OSErrors, and adds the file's name to all."""
    name = os.fspath(path)
    try:
        yield
    except OSError as error:
        if in_bucket(path) and isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, "no such object", name) from error
        error.filename = name  # Python does not name the file on a full disk.
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
    """Makes a folder and its parents; does nothing for buckets."""
    if not in_bucket(path):
        at(path).mkdir(parents=True, exist_ok=True)


def read(path: AnyPath) -> bytes:
    """The content of a file or an object.

    Raises:
      OSError: it cannot be read; FileNotFoundError if it does not exist.
    """
    with os_errors(path):
        return at(path).read_bytes()


def read_json(path: AnyPath) -> Any:
    """The content of a JSON file or object.

    Raises:
      OSError: as `read`.
      ValueError: it is not JSON, or holds NaN or infinity.
    """

    def reject(constant: str) -> None:
        raise ValueError(f"it has {constant}, which is not JSON")

    return json.loads(read(path), parse_constant=reject)


@contextlib.contextmanager
def local_copy(path: AnyPath) -> Iterator[str]:
    """The name of a local file with the same content; a local file's own name."""
    if not in_bucket(path):
        yield os.fspath(at(path))
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(read(path))
        file.flush()
        yield file.name


def write(path: AnyPath, content: str | bytes) -> None:
    """Writes a file or an object whole or not at all.

    Raises:
      OSError: it cannot be written; nothing is left behind.
    """
    if isinstance(content, str):  # Names of files in it may not be UTF-8.
        content = content.encode(errors="backslashreplace")
    with os_errors(path):
        if not in_bucket(path):
            return _write_file(at(path), content)
        at(path).write_bytes(content)  # one atomic upload


def check_name(field: str, name: str) -> None:
    """Raises UserError if the value of a field cannot name a file or a folder."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise UserError(
            f"{field}={name!r} cannot name a file or a folder: use one word, such as 'cifar10_ada'."
        )


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file whole or not at all; NaN and infinity are errors."""
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


class Journal:
    """A file that grows by lines; in a bucket it is uploaded about once a minute."""

    def __init__(self, path: AnyPath, text: str = "") -> None:
        """Starts with a text, which replaces an existing file."""
        self._path, self._text, self._file = path, [text], None
        self._uploaded, self._complete = time.monotonic(), True
        write(path, text)
        if not in_bucket(path):
            self._file = at(path).open("a", buffering=1)

    def write(self, line: str) -> None:
        """Adds a line, which ends with a newline."""
        if self._file:
            with os_errors(self._path):
                self._file.write(line)
            return
        self._text.append(line)
        self._complete = False
        if time.monotonic() - self._uploaded > _JOURNAL_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Uploads the missing lines."""
        if not self._complete:
            write(self._path, "".join(self._text))
            self._uploaded, self._complete = time.monotonic(), True

    def close(self) -> None:
        """Uploads the missing lines, or closes the local file."""
        self.flush()
        if self._file:
            with os_errors(self._path):
                self._file.close()
