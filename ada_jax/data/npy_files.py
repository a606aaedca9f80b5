"""Folders of .npy files that are written whole or not at all, and what they were made from.

A file gets its name once it is complete and on the disk, manifest.json says what the folder holds,
and no other set is ever written beside it.
"""

import io
import itertools
import json
import os
import pathlib
import shutil
import tokenize
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tqdm

from ada_jax import paths
from ada_jax.errors import UserError

# What numpy.load raises for a damaged file, whose header it reads as Python.
DAMAGED = (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError)


def check_folder(out: pathlib.Path) -> None:
    """Refuses a folder that has files in it and no manifest."""
    foreign = any(not path.name.endswith((".partial", ".lock")) for path in out.iterdir())
    if foreign and not (out / "manifest.json").is_file():
        raise UserError(
            f"--out={out} has files in it and no manifest.json, so it was not written by this "
            "program: name a new folder."
        )


def agree(
    out: pathlib.Path,
    manifest: dict[str, Any],
    former: Mapping[str, Any] = types.MappingProxyType({}),
) -> None:
    """Writes the manifest into a new folder; in an old one refuses to make another set.

    Args:
      out: the folder.
      manifest: of the set that is to be made.
      former: what older versions wrote for some of its fields, which is taken for the same.
    """
    path = out / "manifest.json"
    if not path.is_file():
        text = json.dumps(manifest, indent=2).encode() + b"\n"
        put(path, [text])
        return
    try:
        before = dict(paths.read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): name another folder with --out, or rename this one."
        ) from error
    for field in manifest:
        same = manifest[field], former.get(field, manifest[field])
        if field != "data" and before.get(field) not in same:
            raise UserError(
                f"--out={out} has a set whose {field} is {before.get(field)}, and this one would "
                f"have {manifest[field]}: name another folder."
            )


def is_whole(path: pathlib.Path, shape: tuple[int, ...]) -> bool:
    """Whether a file is there; one that is there and is not what it should be, is refused."""
    if not path.exists():
        return False
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        found = f"[{', '.join(map(str, array.shape))}] {array.dtype}"
        if array.shape == shape and (array.dtype == np.uint8 or path.stem == "labels"):
            return True
    except DAMAGED as error:
        found = f"not a whole array ({error})"
    raise UserError(
        f"{path} is {found} and should be [{', '.join(map(str, shape))}] uint8: move it "
        "to another folder to have it made anew."
    )


def check_space(out: pathlib.Path, needed: int) -> None:
    """Refuses a disk that does not have so many bytes left."""
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"--out={out} needs {needed / 1e9:.1f} GB more and its disk has {free / 1e9:.1f} GB "
            "free: make room, or name a folder on another disk."
        )


def counted(blocks: Iterable[np.ndarray], progress: tqdm.tqdm) -> Iterator[np.ndarray]:
    """The blocks, each told to the progress bar once the next is asked for."""
    for block in blocks:
        yield block
        progress.update(len(block))


def write(
    path: pathlib.Path, dtype: Any, shape: tuple[int, ...], blocks: Iterable[np.ndarray]
) -> None:
    """Writes an array that comes in blocks of rows as one .npy file."""
    with io.BytesIO() as file:
        description = {
            "descr": np.dtype(dtype).str,
            "fortran_order": False,
            "shape": tuple(shape),
        }
        np.lib.format.write_array_header_1_0(file, description)
        header = file.getvalue()
    put(path, itertools.chain([header], (np.ascontiguousarray(block) for block in blocks)))


def put(path: pathlib.Path, parts: Iterable[Any]) -> None:
    """Writes a file under another name and renames it once it is whole and on the disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"{partial} cannot be written ({error.strerror}): mend that, or name another folder "
            "with --out, and start the same command again."
        ) from error
