"""Folders of .npy files that are written atomically, with a manifest.

A file is renamed to its final name when it is complete and on the disk. manifest.json describes the
set that a folder holds; no other set is written to it.
"""

import io
import itertools
import json
import os
import pathlib
import shutil
import tokenize
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tqdm

from ada_jax import paths
from ada_jax.errors import UserError

# Errors of numpy.load for damaged files, whose header it parses as Python.
DAMAGED = (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError)


def check_folder(out: pathlib.Path) -> None:
    """Raises UserError for a folder that has files but no manifest."""
    foreign = any(not path.name.endswith((".partial", ".lock")) for path in out.iterdir())
    if foreign and not (out / "manifest.json").is_file():
        raise UserError(
            f"--out={out} has files but no manifest.json, so it is not a folder of this program: "
            "give a new folder."
        )


def check_manifest(out: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest to a new folder, or checks that it matches that of an old one.

    Args:
      out: the folder.
      manifest: that of the set to write.

    Raises:
      UserError: the folder holds another set.
    """
    path = out / "manifest.json"
    if not path.is_file():
        text = json.dumps(manifest, indent=2).encode() + b"\n"
        write_file(path, [text])
        return
    try:
        before = dict(paths.read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): give another folder with --out, or rename this one."
        ) from error
    for field in manifest:
        if field != "data" and before.get(field) != manifest[field]:
            raise UserError(
                f"--out={out} has a set whose {field} is {before.get(field)}, not "
                f"{manifest[field]}: give another folder."
            )


def is_complete(path: pathlib.Path, shape: tuple[int, ...]) -> bool:
    """Whether a file exists; raises UserError if it exists and is not an array of this shape."""
    if not path.exists():
        return False
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        found = f"[{', '.join(map(str, array.shape))}] {array.dtype}"
        if array.shape == shape and (array.dtype == np.uint8 or path.stem == "labels"):
            return True
    except DAMAGED as error:
        found = f"not a complete array ({error})"
    raise UserError(
        f"{path} is {found} and should be [{', '.join(map(str, shape))}] "
        f"{'integers' if path.stem == 'labels' else 'uint8'}: move it to another "
        "folder, and the same command writes it again."
    )


def check_space(out: pathlib.Path, needed: int) -> None:
    """Raises UserError if the disk has fewer bytes left than needed."""
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"--out={out} needs {needed / 1e9:.1f} GB more and its disk has {free / 1e9:.1f} GB "
            "free: free some space, or give a folder on another disk."
        )


def with_progress(blocks: Iterable[np.ndarray], progress: tqdm.tqdm) -> Iterator[np.ndarray]:
    """Yields the blocks, and updates the progress bar after each."""
    for block in blocks:
        yield block
        progress.update(len(block))


def write(
    path: pathlib.Path, dtype: Any, shape: tuple[int, ...], blocks: Iterable[np.ndarray]
) -> None:
    """Writes an array as one .npy file.

    Args:
      path: the file.
      dtype: the array's type.
      shape: the array's shape, [N,...].
      blocks: its rows in order, [n,...] each.
    """
    with io.BytesIO() as file:
        description = {
            "descr": np.dtype(dtype).str,
            "fortran_order": False,
            "shape": tuple(shape),
        }
        np.lib.format.write_array_header_1_0(file, description)
        header = file.getvalue()
    write_file(path, itertools.chain([header], (np.ascontiguousarray(block) for block in blocks)))


def write_file(path: pathlib.Path, parts: Iterable[Any]) -> None:
    """Writes a file under a temporary name, and renames it when it is complete and on the disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.filename not in (None, os.fspath(partial)):  # An input could not be read.
            raise
        raise UserError(
            f"{partial} cannot be written ({error.strerror}): fix that, or give another folder "
            "with --out, and run the same command again."
        ) from error
