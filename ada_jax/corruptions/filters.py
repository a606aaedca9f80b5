"""Random numbers per image, and filters that several corruptions share."""

import dataclasses
import functools
import math
import zlib

import numpy as np
import scipy.ndimage
from numpy.lib.stride_tricks import sliding_window_view


@dataclasses.dataclass
class Draws:
    """Random arrays [N, *shape] for N images of a set, with one stream per image."""

    seed: int
    name: str
    severity: int
    indices: np.ndarray

    @functools.cached_property
    def _streams(self) -> list[np.random.Generator]:
        entropy = [self.seed, zlib.crc32(self.name.encode()), self.severity]
        key = np.random.SeedSequence(entropy).generate_state(2, np.uint64)
        # The image's index is the highest word of the counter, so streams do not overlap.
        return [
            np.random.Generator(np.random.Philox(counter=[0, 0, 0, int(i)], key=key))
            for i in self.indices
        ]

    def normal(self, *shape: int) -> np.ndarray:
        return np.stack([s.standard_normal(shape, np.float32) for s in self._streams])

    def uniform(self, low: float, high: float, *shape: int) -> np.ndarray:
        unit = np.stack([s.random(shape, np.float32) for s in self._streams])
        return low + (high - low) * unit

    def integers(self, low: int, high: int, *shape: int) -> np.ndarray:
        """Excludes `high`."""
        return np.stack([s.integers(low, high, shape, np.int32) for s in self._streams])

    def poisson(self, mean: np.ndarray) -> np.ndarray:
        return np.stack([s.poisson(m) for s, m in zip(self._streams, mean, strict=True)])


def truncate(values: np.ndarray) -> np.ndarray:
    """Clips to 0..255 and truncates to integers, with a small tolerance for rounding errors.

    Without it a flat surface could lose a grey level on some machines.
    """
    return np.clip(values + 3e-5, 0, 255).astype(np.uint8)


def planes(x: np.ndarray) -> np.ndarray:
    """Converts [N, H, W, C] to [N, C, H, W] float64, which is faster to filter."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float64)


def pixels(planes: np.ndarray) -> np.ndarray:
    """Channel planes [B,C,H,W] as images [B,H,W,C]."""
    return planes.transpose(0, 2, 3, 1)


def gather(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Gathers pixels of x [N, H, W, 3] at positions [N, H, W] in 0..H*W-1 of each image."""
    n, h, w, channels = x.shape
    offsets = np.arange(0, n * h * w, h * w)[:, None, None]
    return np.take(x.reshape(-1, channels), positions + offsets, axis=0, mode="clip")


def gaussian_blur(
    planes: np.ndarray, sigma: float, mode: str = "nearest", truncate: float = 4
) -> np.ndarray:
    """Gaussian blur of the last two axes.

    Args:
      planes: [...,H,W].
      sigma: standard deviation in pixels.
      mode: border, as for `scipy.ndimage.gaussian_filter`.
      truncate: radius of the kernel in standard deviations.

    Returns:
      [...,H,W].
    """
    rows, columns = (_blur_matrix(n, sigma, mode, truncate) for n in planes.shape[-2:])
    return rows @ planes @ columns.T


# Separable linear filters are products with two small matrices, which SciPy's filters of the
# identity give. In float64, because BLAS's order of summation depends on its threads, and the uint8
# results must not.


@functools.cache
def _blur_matrix(size: int, sigma: float, mode: str, truncate: float) -> np.ndarray:
    return scipy.ndimage.gaussian_filter1d(np.eye(size), sigma, 0, mode=mode, truncate=truncate)


def zoom(planes: np.ndarray, factor: float) -> np.ndarray:
    """Crops the centre of the last two axes and enlarges it linearly to the original size."""
    rows, columns = (_zoom_matrix(n, factor) for n in planes.shape[-2:])
    return rows @ planes @ columns.T


@functools.cache
def _zoom_matrix(size: int, factor: float) -> np.ndarray:
    shown = math.ceil(size / factor)
    top = (size - shown) // 2
    enlarged = scipy.ndimage.zoom(np.eye(size)[top : top + shown], (factor, 1), order=1)
    trim = (len(enlarged) - size) // 2
    return enlarged[trim : trim + size]


def motion_blur(planes: np.ndarray, radius: float, sigma: float, degrees: np.ndarray) -> np.ndarray:
    """ImageMagick's motion blur: half a Gaussian along a line from every pixel.

    Args:
      planes: [N, C, H, W] uint8.
      radius: half the length of the line, in pixels.
      sigma: standard deviation of the Gaussian, in pixels.
      degrees: [N] angles of the line, 0 is to the right and 90 downwards.

    Returns:
      [N, C, H, W] uint8.
    """
    h, w = planes.shape[2:]
    steps = np.arange(2 * math.ceil(radius) + 1)
    taps = np.exp(-(steps**2) / (2 * sigma**2))
    steps, taps = steps[taps > 1e-7], taps[taps > 1e-7]
    angles = np.deg2rad(degrees.astype(np.float64))[:, None]
    right, down = (np.ceil(steps * f(angles) - 0.5).astype(int) for f in (np.cos, np.sin))
    pad = len(steps)
    padded = np.pad(planes, ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode="edge")
    windows = sliding_window_view(padded, (h, w), (2, 3))
    total = np.zeros(planes.shape, np.float32)
    for i, tap in enumerate(taps / taps.sum()):
        shifted = windows[np.arange(len(planes)), :, pad + down[:, i], pad + right[:, i]]
        total += float(tap) * shifted
    return truncate(total)  # As in ImageMagick.
