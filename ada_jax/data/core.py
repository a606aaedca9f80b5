"""The data set class, digests, class names and splits."""

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
from ada_jax.data import array_checks, photographs
from ada_jax.errors import UserError

_MEMORY_LIMIT = 10**9  # Largest size in bytes of a decoded set that is kept in memory.
_DECODE_BLOCK = 100  # Examples that a thread decodes at a time.
_CONTENTS_LIMIT = 2 * 10**9  # Largest size in bytes of files that a fingerprint reads completely.
SPLIT = re.compile(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images of one size, with random access.

    Attributes:
      source: a sequence of (image [H, W, 3], uint8 in 0..255 or float32 in [0, 1]; int label in
        0..num_classes-1).
      num_classes: the number of classes, which need not all occur in this split.
      class_names: one name per class, in the order of the labels.
      image_shape: (H, W, 3), in pixels.
      name: name of the data in messages and results.
      origin: name of the stored data that the examples are from; '' if unknown.
      members: positions or file names of the examples in the stored data.
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

        Sets that are not in memory and larger than 2 GB are not read completely. For TFDS's records
        (ImageNet) the digest then covers the builder's version, the slice, the names and sizes of
        the shards and 256 evenly spaced examples; for a folder it covers the names, sizes and
        labels of all files and the contents of 2 GB of evenly spaced ones.
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
    """Examples in memory: images [N, H, W, 3] uint8 or float32, labels [N] int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.images[i], int(self.labels[i])


@dataclasses.dataclass(frozen=True, eq=False)
class _Renumbered:
    """The examples of another source, with label numbers[y] instead of y."""

    source: Any
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        image, label = self.source[i]
        return image, int(self.numbers[label])

    def __getitems__(self, indices: Sequence[int]) -> Iterable[tuple[np.ndarray, int]]:
        examples = photographs.get_many(self.source, indices)
        return ((image, int(self.numbers[label])) for image, label in examples)


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSource:
    """Records that `decode` converts to (image, label) on every access."""

    records: Sequence[Any]
    decode: Callable[[Any], tuple[np.ndarray, int]]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.decode(self.records[int(i)])

    def __getitems__(self, indices: Sequence[int]) -> Iterable[tuple[np.ndarray, int]]:
        return map(self.decode, photographs.get_many(self.records, indices))


def from_arrays(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    class_names: Sequence[str] | None = None,
    name: str = "arrays",
) -> Dataset:
    """Makes a data set from arrays in memory.

    Args:
      images: [N, H, W, 3], or [N, H, W] or [N, H, W, 1] for grey; uint8, or floating point in
        [0, 1].
      labels: [N] or [N, 1] integers in 0..K-1, of any numeric type.
      class_names: K names; None means '0', '1', ... up to the largest label, and every class must
        then have an example.
      name: name of the data in messages and results.

    Returns:
      The data set; floating-point images are converted to float32.

    Raises:
      UserError: shapes, lengths, types or values are not as above.
    """
    images, labels = (
        array_checks.checked_images(np.asarray(images), name),
        array_checks.checked_labels(labels, name),
    )
    if len(images) != len(labels):
        raise UserError(
            f"{name} has {len(images)} images and {len(labels)} labels: give one label per image."
        )
    if class_names is None:
        class_names = array_checks.class_numbers(labels, name)
    elif labels.max() >= len(class_names):
        raise UserError(
            f"{name} has the label {labels.max()} and only {len(class_names)} classes: labels must "
            f"be in 0..{len(class_names) - 1}."
        )
    source = ArraySource(images, labels)
    return Dataset(source, len(class_names), tuple(class_names), images.shape[1:], name)


def _spread(size: int) -> np.ndarray:
    return np.unique(np.linspace(0, size - 1, 256).astype(int))


def _update_with_examples(digest: Any, dataset: Dataset, indices: Iterable[int]) -> None:
    for i in indices:
        image, label = dataset.source[int(i)]
        digest.update(f"{image.dtype} {int(label)}".encode())
        digest.update(np.ascontiguousarray(image))


def _update_with_shards(digest: Any, records: Any) -> None:
    """Adds the names and sizes of TFDS's shards, and the contents of all or some records."""
    from etils import epath

    info = records.dataset_info
    digest.update(f"{info.full_name} {records.split}".encode())
    shards = map(epath.Path, info.splits[SPLIT.fullmatch(records.split)[1]].filepaths)
    sizes = {path.name: path.stat().length for path in shards}
    digest.update(" ".join(f"{name} {size}" for name, size in sizes.items()).encode())
    few = sum(sizes.values()) <= _CONTENTS_LIMIT
    chosen = np.arange(len(records)) if few else _spread(len(records))
    for record in photographs.get_many(records, chosen.tolist()):
        digest.update(record["image"] + str(int(record["label"])).encode())


def _update_with_files(digest: Any, files: Sequence[tuple[pathlib.Path, int]]) -> None:
    """Adds the names, sizes and labels of all files, and the contents of evenly spaced ones."""
    sizes = [path.stat().st_size for path, _ in files]
    for (path, label), size in zip(files, sizes, strict=True):
        digest.update(os.fsencode(f"{path.parent.name}/{path.name} {size} {label}\n"))
    for path, _ in files[:: -(-max(sum(sizes), 1) // _CONTENTS_LIMIT)]:
        digest.update(path.read_bytes())


def same_classes(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two lists of class names are equal; '0', '1', ... match any list of that length."""
    numbers = list(map(str, range(len(one))))
    unnamed = numbers in (list(one), list(other))
    return list(one) == list(other) or (unnamed and len(one) == len(other))


def renumbered(dataset: Dataset, class_names: Sequence[str]) -> Dataset:
    """Maps the labels of a data set to a classifier's classes by name.

    Args:
      dataset: images of some or all of the classes.
      class_names: the classifier's K classes. If only one of the two has names, and both have K
        classes, labels are matched by number and a warning is logged.

    Returns:
      The data set with labels in 0..K-1 and these class names.

    Raises:
      UserError: the data set has a class that the classifier does not have.
    """
    class_names, own = tuple(class_names), dataset.class_names
    if same_classes(own, class_names):
        if own != class_names:
            log_once(
                f"{dataset.name} has the classes {quoted_some(own)}; they are matched by number to "
                f"the classifier's classes, {quoted_some(class_names)}."
            )
        return dataclasses.replace(dataset, class_names=class_names)
    if unknown := [name for name in own if name not in class_names]:
        raise UserError(
            f"{dataset.name} has the class(es) {quoted_some(unknown)}, and the classifier was "
            f"trained on {quoted_some(class_names)}: evaluate on images of these classes, under "
            "the same names."
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
    """Counts the images of an evaluation set that are training images.

    Returns:
      The number that are the same stored examples, if both sets know their members, and the number
      with equal pixels, if both sets are in memory.
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
    """Checks that an evaluation set has no training images.

    A few images with equal pixels, such as duplicates in collected data, are only logged.

    Raises:
      UserError: some are the same stored examples, or more than half have equal pixels.
    """
    stored, equal = overlap(train_set, eval_set)
    if stored or 2 * equal > len(eval_set):
        raise UserError(
            f"{max(stored, equal)} of the {len(eval_set)} images of config.eval_split="
            f"{eval_split!r} are among the training images of config.train_split={train_split!r}: "
            "choose disjoint splits, such as 'train' and 'test', or 'train[:90%]' and "
            "'train[90%:]'."
        )
    if equal:
        logging.warning(
            "%d of the %d images of config.eval_split=%r have the same pixels as a training image.",
            *(equal, len(eval_set), eval_split),
        )


def format_counts(kinds: collections.Counter[str]) -> str:
    """Formats counts, most frequent first, such as '.txt (2), .md (1)'."""
    shown = [f"{kind} ({count})" for kind, count in kinds.most_common(10)]
    return ", ".join(shown + ["..."] * (len(kinds) > 10))


@functools.cache
def log_once(sentence: str) -> None:
    """Logs a warning once per process, even if several splits of a folder are loaded."""
    logging.warning("%s", sentence)


# ---------------------------------------------------------------------------- parts of loading


def split_name(split: str, known: Collection[str], cut: int | str = "90%") -> str:
    """Parses the name in a slice, such as 'train' in 'train[:90%]'.

    Args:
      split: a split or slice.
      known: the names of the data's splits.
      cut: where the error message suggests to divide the first of them.
    """
    match = SPLIT.fullmatch(split)
    if match is None:
        raise UserError(
            f"config.train_split or config.eval_split = {split!r} is not a split: write the name "
            "of a split or one slice of it, such as 'train', 'train[:90%]' or 'train[500:]'."
        )
    if match[1] not in known:
        first = next(iter(known))
        raise UserError(
            f"config.train_split or config.eval_split = {split!r} names the split {match[1]!r}, "
            f"which this data does not have: choose from {quoted(known)}, or two disjoint slices "
            f"such as train_split='{first}[:{cut}]' with eval_split='{first}[{cut}:]'."
        )
    return match[1]


def positions(split: str, size: int) -> slice:
    """Parses the slice of a split of `size` examples: absolute, from the end, or in percent."""
    bounds = SPLIT.fullmatch(split).groups()[1:]
    start, stop = (
        _position(bound, size) if bound else default
        for bound, default in zip(bounds, (0, size), strict=True)
    )
    if not 0 <= start < stop <= size:
        raise UserError(
            f"config.train_split or config.eval_split = {split!r} is {start}:{stop} of {size} "
            "examples: choose a non-empty slice inside that range."
        )
    return slice(start, stop)


def _position(bound: str, size: int) -> int:
    position = round(int(bound[:-1]) * size / 100) if bound.endswith("%") else int(bound)
    return position + size if bound.startswith("-") else position


def hold_out(size: int) -> dict[str, np.ndarray]:
    """Positions of 'train' (90%) and 'test' in the fixed random division of `size` examples."""
    # NumPy guarantees that RandomState's stream never changes.
    order = np.random.RandomState(0).permutation(size)
    cut = min(round(0.9 * size), max(size - 1, 1))  # With two or more, neither split is empty.
    return {"train": order[:cut], "test": order[cut:]}


def in_memory(source: Any, shape: tuple[int, int, int], name: str) -> Any:
    """Decodes the source into memory if it is small enough; else returns it."""
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


def data_path(data_dir: Any, name: str, what: str) -> pathlib.Path:
    """The absolute path of config.data_dir; raises UserError if it is not set or not local."""
    if not data_dir:
        raise UserError(
            f"config.data_dir is not set, and config.dataset = {name!r} needs it: give {what}."
        )
    return paths.local(f"config.data_dir = {str(data_dir)!r}", data_dir).absolute()


def quoted(names: Iterable[Any], separator: str = ", ") -> str:
    """Joins names in quotes."""
    return separator.join(repr(str(name)) for name in names)


def quoted_some(names: Sequence[str]) -> str:
    """Joins names in quotes, at most ten of them."""
    return quoted(names[:10]) + (f" ... ({len(names)} in all)" if len(names) > 10 else "")
