"""Photographs of any size, decoded in parallel on access and resized to squares."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from PIL import ExifTags, Image

# The image formats that Pillow decodes itself. It runs Ghostscript for EPS, and cannot decode some
# formats that it identifies, such as MPEG and HDF5.
_FORMATS = (
    *("AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "GIF"),
    *("ICNS", "ICO", "IM", "JPEG", "JPEG2000", "MPO", "MSP", "PCD", "PCX", "PIXAR", "PNG", "PPM"),
    *("PSD", "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM"),
)
_TURNS = {  # The inverse of each EXIF orientation.
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Photographs of any size, decoded by all cores on access.

    `[i]` gives the central square, resized; `random_crops` gives random crops.

    Attributes:
      records: the encoded photographs.
      read: converts a record to (RGB image, label).
      size: side of the resized squares in pixels.
      share: side of the central square, relative to the image's shorter side.
    """

    records: Sequence[Any]
    read: Callable[[Any], tuple[Image.Image, int]]
    size: int
    share: float = 1.0

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self._square(self.records[int(i)])

    def __getitems__(self, indices: Sequence[int]) -> Iterable[tuple[np.ndarray, int]]:
        return _threads().map(self._square, get_many(self.records, indices))

    def random_crops(
        self,
        indices: Sequence[int],
        generators: Sequence[np.random.RandomState],
        scale: tuple[float, float],
        ratio: tuple[float, float],
    ) -> Iterable[tuple[np.ndarray, int]]:
        """Crops each example with its own generator, see `batching.train_batches`."""

        def crop(record: Any, generator: np.random.RandomState) -> tuple[np.ndarray, int]:
            image, label = self.read(record)
            box = random_box(generator, *image.size, scale=scale, ratio=ratio)
            return resize(image, box, self.size), label

        return _threads().map(crop, get_many(self.records, indices), generators)

    def _square(self, record: Any) -> tuple[np.ndarray, int]:
        image, label = self.read(record)
        side = round(self.share * min(image.size))
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return resize(image, (left, top, left + side, top + side), self.size), label


@functools.cache
def suffixes() -> frozenset[str]:
    """The suffixes of image files that `open_file` reads, such as '.png'."""
    extensions = Image.registered_extensions()
    return frozenset(suffix for suffix, name in extensions.items() if name in _FORMATS)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name in _FORMATS)


def open_file(path: str | os.PathLike[str]) -> Image.Image:
    """Opens an image file of a format that Pillow decodes itself."""
    return Image.open(path, formats=_formats())


def upright(image: Image.Image) -> Image.Image:
    """The first frame of an opened image in RGB, rotated by its EXIF orientation."""
    rgb = image.convert("RGB")
    try:
        # After decoding, during which Pillow already rotates TIFF files.
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises errors of many types for damaged EXIF data.
        return rgb
    turn = _TURNS.get(orientation)
    return rgb if turn is None else rgb.transpose(turn)


def get_many(records: Sequence[Any], indices: Sequence[int]) -> Iterable[Any]:
    """The records at some positions, read together if the source supports it."""
    # array_record reads many records at once four times as fast as one by one.
    getitems = getattr(records, "__getitems__", None)
    return getitems(indices) if getitems else (records[i] for i in indices)


@functools.cache  # Threads suffice: Pillow releases the GIL while it decodes and resizes.
def _threads() -> futures.ThreadPoolExecutor:
    return futures.ThreadPoolExecutor(os.cpu_count())


def resize(image: Image.Image, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """Crops the box (left, top, right, bottom) and resizes it to [size, size, 3] uint8."""
    return np.asarray(image.crop(box).resize((size, size), Image.Resampling.BICUBIC))


def shrunk(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes images [N,H,W,3] uint8 in the same way to [N,size,size,3]."""
    box = (0, 0, images.shape[2], images.shape[1])
    return np.stack([resize(Image.fromarray(image), box, size) for image in images])


def random_box(
    generator: np.random.RandomState,
    width: int,
    height: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draws the box of a random resized crop.

    Args:
      generator: random number generator.
      width: of the image, in pixels.
      height: of the image, in pixels.
      scale: range of the share of the image's area, uniform.
      ratio: range of width over height, log-uniform.

    Returns:
      (left, top, right, bottom). After ten draws that do not fit, it is the largest centred box
      with an allowed ratio.

    Source: Szegedy et al., "Going deeper with convolutions" (2015), section 6.
    """
    for _ in range(10):
        area = width * height * generator.uniform(*scale)
        shape = np.exp(generator.uniform(*np.log(ratio)))
        w, h = round(np.sqrt(area * shape)), round(np.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = generator.randint(width - w + 1), generator.randint(height - h + 1)
            return left, top, left + w, top + h
    w = max(1, min(width, round(height * ratio[1])))
    h = max(1, min(height, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
