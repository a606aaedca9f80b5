"""A data set: its examples, its classes, and a digest of both."""

import collections
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent import futures
from typing import Any

import numpy as np
import tqdm
from absl import logging

from ada_jax import paths
from ada_jax.data import photographs
from ada_jax.errors import UserError

_FEW = 4  # Images that may all be black.
_MEMORY_LIMIT = 10**9  # Bytes of decoded images up to which a set is held in memory.
_DECODE_BLOCK = 100  # Examples a thread decodes at a time.
_CONTENTS_LIMIT = 2 * 10**9  # Bytes of files up to which a fingerprint reads all of them.
SPLIT = re.compile(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


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
class EncodedSource:
    """Records that `decode` turns into (image, label) each time they are asked for."""

    records: Sequence[Any]
    decode: Callable[[Any], tuple[np.ndarray, int]]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.decode(self.records[int(i)])

    def __getitems__(self, indices: Sequence[int]) -> Iterable[tuple[np.ndarray, int]]:
        return map(self.decode, photographs.many(self.records, indices))


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
    images, labels = _checked_images(np.asarray(images), name), checked_labels(labels, name)
    if len(images) != len(labels):
        raise UserError(
            f"{name} has {len(images)} images and {len(labels)} labels: make them as many."
        )
    if class_names is None:
        class_names = class_numbers(labels, name)
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
    shards = map(epath.Path, info.splits[SPLIT.fullmatch(records.split)[1]].filepaths)
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


def counted(kinds: collections.Counter[str]) -> str:
    """Counts in words, most first, as '.txt (2), .md (1)'."""
    listed = [f"{kind} ({count})" for kind, count in kinds.most_common(10)]
    return ", ".join(listed + ["..."] * (len(kinds) > 10))


@functools.cache  # For the splits of one folder are loaded one by one.
def log_once(sentence: str) -> None:
    """Logs a sentence the first time that it is said."""
    logging.warning("%s", sentence)


# ---------------------------------------------------------------------------- parts of loading


def split_name(split: str, known: Collection[str], cut: int | str = "90%") -> str:
    """Reads the name in front of a slice, such as 'train' in 'train[:90%]'.

    Args:
      split: of a config.
      known: the names that the data has.
      cut: where to divide the first of them, for advice.
    """
    match = SPLIT.fullmatch(split)
    if match is None:
        raise UserError(
            f"config.train_split or config.eval_split = {split!r} cannot be understood: write the "
            "name of a split or one slice of it, such as 'train', 'train[:90%]' or 'train[500:]'."
        )
    if match[1] not in known:
        first = next(iter(known))
        raise UserError(
            f"config.train_split or config.eval_split = {split!r} names the split {match[1]!r}, "
            f"which this data does not have: choose from {listing(known)}, or two slices that "
            f"share no image, as train_split='{first}[:{cut}]' with eval_split='{first}[{cut}:]'."
        )
    return match[1]


def positions(split: str, size: int) -> slice:
    """Reads the slice of a split of `size` examples: absolute, from the end, or in percent."""
    bounds = SPLIT.fullmatch(split).groups()[1:]
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


def hold_out(size: int) -> dict[str, np.ndarray]:
    """The positions of 'train' and 'test' in the fixed division of `size` examples."""
    # RandomState, whose stream NumPy has promised never to change.
    order = np.random.RandomState(0).permutation(size)
    cut = min(round(0.9 * size), max(size - 1, 1))  # Two examples or more give one to each.
    return {"train": order[:cut], "test": order[cut:]}


def in_memory(source: Any, shape: tuple[int, int, int], name: str) -> Any:
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
    check_brightness(images, where)
    return images


def check_brightness(images: np.ndarray, where: str) -> None:
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


def checked_labels(labels: np.ndarray, where: str) -> np.ndarray:
    """Checks labels and gives them as [N] int32."""
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


def class_numbers(labels: np.ndarray, where: str) -> tuple[str, ...]:
    """Names of classes that are numbers, all of which the labels have to use."""
    present = np.unique(labels)
    if len(present) < 2 or present[-1] != len(present) - 1:
        first = int(present[0]) if len(present) else 0
        shifted = first and present[-1] - first == len(present) - 1
        raise UserError(
            f"{where} has labels of {len(present)} class(es), {listing(present[:10])}"
            f"{' ...' if len(present) > 10 else ''}: there must be at least two, numbered 0, 1, 2, "
            f"... without a gap{f', so subtract {first}' if shifted else ''}."
        )
    return tuple(str(label) for label in present)


def data_path(data_dir: Any, name: str, what: str) -> pathlib.Path:
    """The path that config.data_dir names, checked."""
    if not data_dir:
        raise UserError(
            f"config.data_dir is not set, and config.dataset = {name!r} needs it: give {what}."
        )
    return paths.local(f"config.data_dir = {str(data_dir)!r}", data_dir).absolute()


def listing(names: Iterable[Any], separator: str = ", ") -> str:
    """Names in quotes."""
    return separator.join(repr(str(name)) for name in names)


def listed(names: Sequence[str]) -> str:
    """Names in quotes, at most ten of them."""
    return listing(names[:10]) + (f" ... ({len(names)} in all)" if len(names) > 10 else "")


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
