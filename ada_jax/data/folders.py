"""Folders of image files with one folder per class."""

import collections
import hashlib
import os
import pathlib
from typing import Any

from PIL import Image

from ada_jax.data import array_checks, core, photographs
from ada_jax.errors import UserError, first_line

_TRAIN_FOLDERS = ("train", "training")  # In any case.
_HELD_OUT_FOLDERS = ("test", "testing", "val", "valid", "validation", "eval")
_CLUTTER = (  # Files of operating systems and tools; names that start with a dot are also ignored.
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("__macosx", "@eadir", "lost+found", "__pycache__"),
)


def load_folder(split: str, data_dir: Any, image_size: int, encoded: bool) -> core.Dataset:
    """Loads a folder of image files, see `sources.load`."""
    root = core.data_path(data_dir, "folder", "a directory with one folder of images per class")
    if not root.is_dir():
        raise UserError(f"config.data_dir = {str(root)!r} is not a directory: check the path.")
    if folders := _split_folders(root):
        class_names = _folder_classes(root / folders["train"])
        base = folders[core.split_name(split, folders)]
        held_out = base != folders["train"]
        files = _folder_files(root / base, class_names, held_out=held_out)
    else:
        class_names = _folder_classes(root)
        base = core.split_name(split, ("train", "test", "all"))
        every = files = _folder_files(root, class_names)
        if base != "all":
            files = [file for file in files if _is_test(file[0]) == (base == "test")]
        if not files:
            raise UserError(
                f"config.train_split or config.eval_split = {split!r} is empty, because the "
                f"{len(every)} images of {str(root)!r} are too few to hold out a tenth: divide "
                "them between data_dir/train/CLASS and data_dir/test/CLASS."
            )
    rows = core.positions(split, len(files))
    source = photographs.Source(files[rows.start : rows.stop], _read_file, image_size)
    shape = (image_size, image_size, 3)
    if not encoded:
        source = core.in_memory(source, shape, root.name)
    if isinstance(source, core.ArraySource):
        array_checks.check_brightness(source.images, f"config.data_dir = {str(root)!r}")
    members = [str(path) for path, _ in files[rows.start : rows.stop]]
    return core.Dataset(source, len(class_names), class_names, shape, root.name, "folder", members)


def _subfolders(root: pathlib.Path) -> set[str]:
    return {entry.name for entry in _entries(root) if entry.is_dir()}


def _split_folders(root: pathlib.Path) -> dict[str, str]:
    """The folder of each split of a directory; {} if it is not divided into splits."""
    names = sorted(_subfolders(root))
    train, held_out = (
        sorted(
            (name for name in names if name.lower() in usual),
            key=lambda name: (usual.index(name.lower()), name != name.lower()),
        )
        for usual in (_TRAIN_FOLDERS, _HELD_OUT_FOLDERS)
    )
    if not train or not held_out:
        for name in train + held_out:
            images, others = _image_files(root / name)
            if "folders" in others and not images:
                raise UserError(
                    f"config.data_dir: {str(root / name)!r} has folders and no images, and there "
                    f"is no folder with the {'held-out' if train else 'training'} images: call "
                    f"the one {core.quoted(_TRAIN_FOLDERS, ' or ')} and the other "
                    f"{core.quoted(_HELD_OUT_FOLDERS, ' or ')}, or set config.data_dir to "
                    f"{str(root / name)!r} to hold out a tenth of it."
                )
        return {}
    if ignored := sorted(set(names) - {*train, *held_out}):
        core.log_once(
            f"{str(root)!r}: ignored the folders {core.quoted(ignored)}, which are not splits."
        )
    splits = {"train": train[0], "test": held_out[0]}
    for name in train + held_out:
        splits |= {name: name, name.lower(): splits.get(name.lower(), name)}
    return splits


def _folder_classes(root: pathlib.Path) -> tuple[str, ...]:
    names = sorted(_subfolders(root))
    if len(names) < 2:
        images, _ = _image_files(root)
        loose = f" and {len(images)} image(s) outside of them" if images else ""
        raise UserError(
            f"config.data_dir: {str(root)!r} has {len(names)} folder(s) of images{loose}, and "
            "needs at least two, one per class: move the images to data_dir/CLASS, or to "
            "data_dir/train/CLASS and data_dir/test/CLASS."
        )
    return tuple(names)


def _folder_files(
    root: pathlib.Path, class_names: tuple[str, ...], held_out: bool = False
) -> list[tuple[pathlib.Path, int]]:
    """Lists (file, label) in the order of the names' hashes, so that slices have all classes.

    Args:
      root: a folder with one folder per class.
      class_names: the classes.
      held_out: whether classes may have no images, as in a test set.
    """
    if unknown := _subfolders(root) - set(class_names):
        raise UserError(
            f"config.data_dir: {str(root)!r} has the classes {core.quoted(sorted(unknown))}, "
            "which the training folder lacks: add them there, or move them out of this folder."
        )
    files, left_out = [], collections.Counter()
    for label, name in enumerate(class_names):
        found, others = _image_files(root / name)
        left_out.update(others)
        if not found and not held_out:
            raise UserError(
                f"config.data_dir: the class {str(root / name)!r} has no image that Pillow reads"
                f"{' but ' * bool(others)}{core.format_counts(others)}: add images, or move the "
                f"folder out of {str(root)!r} if it is not a class."
            )
        files += [(path, label) for path in found]
    if not files:
        raise UserError(
            f"config.data_dir: {str(root)!r} has no image that Pillow reads: add images."
        )
    loose, others = _image_files(root)
    del others["folders"]  # The classes.
    left_out.update(others)
    if loose:
        left_out["images outside of the classes' folders"] = len(loose)
    if left_out:
        core.log_once(
            f"{str(root)!r}: ignored everything except images in a class's folder: "
            f"{core.format_counts(left_out)}."
        )
    return sorted(files, key=lambda file: _name_hash(file[0]))


def _entries(folder: pathlib.Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, without hidden files and clutter; [] if it does not exist."""
    try:
        with os.scandir(folder) as entries:
            return [
                entry
                for entry in entries
                if not entry.name.startswith(".") and entry.name.lower() not in _CLUTTER
            ]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"config.data_dir: the folder {str(folder)!r} cannot be read ({error.strerror}): "
            "change its permissions, or use another directory."
        ) from error


def _image_files(folder: pathlib.Path) -> tuple[list[pathlib.Path], collections.Counter[str]]:
    """The images in a folder, and the numbers of other entries by kind."""
    images, others = [], collections.Counter()
    for entry in _entries(folder):
        path = pathlib.Path(entry.path)
        suffix = path.suffix.lower()
        if entry.is_dir():
            others["folders"] += 1
        elif suffix in photographs.suffixes():
            images.append(path)
        else:
            others[repr(suffix) if suffix else "without a suffix"] += 1
    return images, others


def _name_hash(path: pathlib.Path) -> bytes:
    # With the class, because all classes may have a file of the same name.
    return hashlib.sha256(os.fsencode(f"{path.parent.name}/{path.name}")).digest()


def _is_test(path: pathlib.Path) -> bool:
    """Whether a file is in the test split, a tenth of all files, whatever the other files are."""
    return int.from_bytes(_name_hash(path)[-8:]) % 10 == 0


def _read_file(file: tuple[pathlib.Path, int]) -> tuple[Image.Image, int]:
    path, label = file
    try:
        with photographs.open_file(path) as image:
            mode = image.mode
            if not mode.startswith(("I", "F")):  # Pillow would clip these silently to white.
                return photographs.upright(image), label
    except Exception as error:  # Pillow's decoders raise errors of many types for damaged files.
        raise UserError(
            f"config.data_dir: the image {str(path)!r} cannot be read ({first_line(error)}): "
            "replace it, or move it to another directory."
        ) from error
    raise UserError(
        f"config.data_dir: the image {str(path)!r} has more than 8 bits per channel (mode {mode}): "
        "convert it to 8 bits."
    )
