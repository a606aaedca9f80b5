"""Data sets prepared by TFDS: CIFAR-10, ImageNet, their corrupted versions, DIV2K."""

import dataclasses
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ada_jax.data import core, photographs
from ada_jax.errors import UserError, first_line, require_extra

# Listed, because a set prepared without TFDS's metadata has the class names '0' to '9'.
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
# Corruptions whose names in TFDS and in the published files differ.
TFDS_SPELLINGS = {"glass_blur": "frosted_glass_blur", "elastic_transform": "elastic"}
_IMAGENET_SHARE = 0.875  # Central crop for evaluation, relative to the shorter side (224 of 256).
IMAGENET_SIZES = range(32, 513)  # ResNet50 divides the side by 32; photographs are about 500x375.


def load_cifar10(split: str, data_dir: Any, encoded: bool) -> core.Dataset:
    """Loads CIFAR-10 from TFDS, see `sources.load`."""
    records = _tfds_records("cifar10", split, data_dir, "image")
    return _with_members(_small_images(records, "cifar10", encoded), records)


def _with_members(dataset: core.Dataset, records: Any) -> core.Dataset:
    """Sets a data set's origin and members to TFDS's records."""
    origin, members = _place(records)
    return dataclasses.replace(dataset, origin=origin, members=members)


def _place(records: Any) -> tuple[str, range]:
    """The stored data of records, and their positions in it."""
    base, start, stop = core.SPLIT.fullmatch(records.split).groups()
    return f"{records.dataset_info.full_name}/{base}", range(int(start), int(stop))


def cifar10_1(data_dir: Any = None) -> core.Dataset:
    """Loads CIFAR-10.1 v6, a new test set of 2,000 images for CIFAR-10 (Recht et al., 2018)."""
    records = _tfds_records("cifar10_1/v6", "test", data_dir, "image")
    return _small_images(records, "cifar10_1/v6")


def _small_images(records: Sequence[Any], name: str, encoded: bool = False) -> core.Dataset:
    shape, source = (32, 32, 3), core.EncodedSource(records, _decode_tfds)
    if not encoded:
        source = core.in_memory(source, shape, name)
    return core.Dataset(source, 10, _CIFAR10_CLASSES, shape, name)


def cifar10_corrupted(
    name: str, severity: int, data_dir: Any = None, *, split: str = "test"
) -> core.Dataset:
    """Loads one corruption and severity of CIFAR-10-C from TFDS; images are decoded on access.

    Args:
      name: the corruption, spelled as published or as in TFDS.
      severity: 1 to 5.
      data_dir: TFDS's directory; None means $TFDS_DATA_DIR or TFDS's default.
      split: 'test' or a slice of it.

    Raises:
      UserError: the data is missing.
    """
    full_name = f"cifar10_corrupted/{TFDS_SPELLINGS.get(name, name)}_{severity}"
    records = _tfds_records(full_name, split, data_dir, "image")
    source = core.EncodedSource(records, _decode_tfds)
    return core.Dataset(source, 10, _CIFAR10_CLASSES, (32, 32, 3), full_name)


def load_imagenet2012(split: str, data_dir: Any, image_size: int) -> core.Dataset:
    """Loads ImageNet from TFDS, see `sources.load`."""
    core.split_name(split, ("train", "validation"))  # The test split has no labels.
    found = _photographs("imagenet2012", split, data_dir, image_size, _IMAGENET_SHARE)
    return _with_members(found, found.source.records)


def imagenet2012_corrupted(
    name: str,
    severity: int,
    data_dir: Any = None,
    *,
    split: str = "validation",
    image_size: int = 128,
) -> core.Dataset:
    """Loads one corruption and severity of ImageNet-C from TFDS, see `cifar10_corrupted`.

    The stored images, central squares of 224 pixels, are resized to `image_size` without cropping.
    """
    full_name = f"imagenet2012_corrupted/{name}_{severity}"
    return _photographs(full_name, split, data_dir, image_size, share=1.0)


def _photographs(
    name: str, split: str, data_dir: Any, image_size: int, share: float
) -> core.Dataset:
    """Loads a split of TFDS's photographs, with TFDS's class names."""
    records = _tfds_records(name, split, data_dir, "image")
    class_names = tuple(records.dataset_info.features["label"].names)
    source = photographs.Source(records, _read_tfds, image_size, share)
    return core.Dataset(source, len(class_names), class_names, (image_size, image_size, 3), name)


def resized(dataset: core.Dataset, image_size: int) -> core.Dataset:
    """Changes the image size of a data set whose source is a `photographs.Source`."""
    source = dataclasses.replace(dataset.source, size=image_size)
    return dataclasses.replace(dataset, source=source, image_shape=(image_size, image_size, 3))


def div2k_images(split: str, data_dir: Any = None) -> tuple[str, range, Iterator[np.ndarray]]:
    """Reads the high-resolution photographs of DIV2K (Agustsson and Timofte, 2017) from TFDS.

    Args:
      split: 'train' (800 images) or 'validation' (100), or a slice.
      data_dir: TFDS's directory; None means $TFDS_DATA_DIR or TFDS's default.

    Returns:
      The origin and the members of `core.Dataset`, and an iterator of the photographs, [H,W,3]
      uint8 of varying size.

    Raises:
      UserError: the data or the split is missing.
    """
    records = _tfds_records("div2k", split, data_dir, "hr")
    opened = (Image.open(io.BytesIO(record["hr"])) for record in records)
    return *_place(records), (np.asarray(image.convert("RGB")) for image in opened)


def _tfds_records(name: str, split: str, data_dir: Any, image_key: str) -> Sequence[Any]:
    """The records of a split or a slice of it, with encoded images."""
    require_extra(f"The data set {name}", "tensorflow_datasets")
    import tensorflow_datasets as tfds

    builder = _tfds_builder(name, data_dir or os.environ.get("TFDS_DATA_DIR") or None)
    sizes = {key: info.num_examples for key, info in builder.info.splits.items()}
    base = core.split_name(split, sizes, round(0.9 * next(iter(sizes.values()))))
    rows = core.positions(split, sizes[base])
    return builder.as_data_source(
        split=f"{base}[{rows.start}:{rows.stop}]",
        decoders={image_key: tfds.decode.SkipDecoding()},
    )


def _tfds_builder(name: str, data_dir: Any) -> Any:
    import tensorflow_datasets as tfds

    if data_dir is not None:
        data_dir = os.path.expanduser(data_dir)
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except ValueError as error:
        raise UserError(
            f"config.data_dir = {str(data_dir)!r} holds {name} in a format without random access "
            f"({first_line(error.__cause__ or error)}): prepare it in another directory with "
            f"{_prepare_command(name, 'ANOTHER_DIRECTORY')}."
        ) from error
    if not builder.info.splits:
        raise UserError(
            f"The data set {name!r} is not in {str(builder.data_dir)!r}: prepare it with "
            f"{_prepare_command(name, data_dir)}, or give the directory that has it with "
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
