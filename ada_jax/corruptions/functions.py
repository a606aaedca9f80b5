"""The 15 common corruptions, the extra ones and C-bar's, at five severities.

The algorithms and parameters are those of Hendrycks & Dietterich (2019). The random numbers of an
image depend on its index in the set, not on the other images. Noise, blur and digital corruptions
are here, weather in `weather` and C-bar in `cbar`. To add a corruption, write its function here,
list it in `_FUNCTIONS`, and add its name and parameters to `parameter_tables`.
"""

import functools
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.ndimage
from PIL import Image

from ada_jax.corruptions import cbar, filters, parameter_tables, weather
from ada_jax.corruptions.filters import Draws
from ada_jax.errors import UserError

_CHUNK_PIXELS = 2**16  # Pixels computed at a time, so that temporary arrays stay in the cache.


def corrupt(
    name: str,
    severity: int,
    images: np.ndarray,
    seed: int = 0,
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    table: str = "cifar",
) -> np.ndarray:
    """Corrupts a batch of images, each with its own random numbers.

    The result depends on the image, its index, the seed, the corruption, and the versions of NumPy,
    SciPy and Pillow, but not on the other images. Lengths of the elastic transform and of C-bar
    scale with the image; all others are in pixels, for 32x32 ('cifar') or 224x224 ('imagenet').

    Args:
      name: one of NAMES, EXTRA or CBAR[table].
      severity: 1 (mildest) to 5.
      images: [N, H, W, 3] uint8, H and W at least 8.
      seed: in 0..2**32-1.
      indices: [N] non-negative positions of the images in their set; None means 0..N-1.
      table: the parameters, 'cifar' (CIFAR-10-C) or 'imagenet' (ImageNet-C).

    Returns:
      [N, H, W, 3] uint8, truncated, not rounded, as in the published sets.

    Raises:
      UserError: an argument is not as above, or the photographs for frost are missing.

    Source: Hendrycks & Dietterich (2019); for C-bar Mintun et al. (2021).
    """
    check(name, severity, seed, table)
    check_images(images)
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)
    integers = np.issubdtype(indices.dtype, np.integer)
    if indices.shape != images.shape[:1] or not integers or (indices < 0).any():
        raise UserError(
            f"indices of shape {list(indices.shape)} and type {indices.dtype} must be a "
            f"non-negative integer for each of the {len(images)} images."
        )
    parameters = parameter_tables.TABLES[table][name][severity - 1]
    step = max(1, _CHUNK_PIXELS // (images.shape[1] * images.shape[2]))
    result = np.empty(images.shape, np.uint8)
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        draws = Draws(seed, name, severity, indices[part])
        values = _FUNCTIONS[name](images[part], parameters, draws)
        result[part] = filters.truncate(values)
    return result


def check(name: str, severity: int, seed: int, table: str) -> None:
    """Checks the arguments of `corrupt` except the images."""
    if table not in tuple(parameter_tables.TABLES):
        raise UserError(
            f"The table {table!r} is unknown: choose from {', '.join(parameter_tables.TABLES)}."
        )
    if name not in tuple(parameter_tables.TABLES[table]):
        known = ", ".join(parameter_tables.TABLES[table])
        raise UserError(
            f"The corruption {name!r} is unknown in the table {table!r}: choose from {known}."
        )
    is_integer = lambda a: isinstance(a, int | np.integer) and not isinstance(a, bool)  # noqa: E731
    if not is_integer(severity) or severity not in parameter_tables.SEVERITIES:
        raise UserError(f"The severity {severity!r} does not exist: choose it in 1..5.")
    if not is_integer(seed) or not 0 <= seed < 2**32:
        raise UserError(f"The seed {seed} is out of range: choose it in 0..{2**32 - 1}.")


def check_images(images: np.ndarray) -> None:
    """Checks that images are [N,H,W,3] uint8 and at least 8x8."""
    if not isinstance(images, np.ndarray):
        raise UserError(
            f"The images to corrupt are of type {type(images).__name__}: give a NumPy array."
        )
    shape = images.shape
    if (
        images.dtype != np.uint8
        or len(shape) != 4
        or shape[3] != 3
        or min(shape[1:3]) < parameter_tables.SMALLEST
    ):
        raise UserError(
            f"The images to corrupt have shape {list(shape)} and type {images.dtype}: make them "
            f"[N, H, W, 3] uint8 with sides of at least {parameter_tables.SMALLEST} pixels."
        )


# ----------------------------------------------------------------------------------------- noise
# Every corruption takes images [N, H, W, 3] uint8, the parameters of one severity and random
# numbers, and returns [N, H, W, 3] in 0..255 before clipping and truncation to integers.


def _gaussian_noise(x: np.ndarray, sigma: float, draws: Draws) -> np.ndarray:
    return x + 255 * sigma * draws.normal(*x.shape[1:])


def _speckle_noise(x: np.ndarray, sigma: float, draws: Draws) -> np.ndarray:
    return x * (1 + sigma * draws.normal(*x.shape[1:]))


def _shot_noise(x: np.ndarray, photons: float, draws: Draws) -> np.ndarray:
    return draws.poisson(x * (photons / 255)) * (255 / photons)


def _impulse_noise(x: np.ndarray, share: float, draws: Draws) -> np.ndarray:
    u = draws.uniform(0, 1, *x.shape[1:])
    return np.where(u < share / 2, 0, np.where(u < share, 255, x))


# ------------------------------------------------------------------------------------------ blur


def _defocus_blur(x: np.ndarray, c: tuple[float, float], draws: Draws) -> np.ndarray:
    del draws
    kernel = _disk(*c)[None, :, :, None]
    return scipy.ndimage.correlate(x, kernel, np.float64, mode="mirror")


@functools.cache
def _disk(radius: float, sigma: float) -> np.ndarray:
    """A disk [2R+1, 2R+1] blurred by a Gaussian of 3x3 pixels, or 5x5 if the radius exceeds 8.

    As in the original code it is normalised only before the blur. If the disk touches the border of
    its array, the reflection there adds up to 1.3% and images become brighter.
    """
    half, reach = (8, 1) if radius <= 8 else (math.ceil(radius), 2)
    offsets = np.arange(-half, half + 1)
    disk = (np.hypot(offsets[:, None], offsets) <= radius).astype(np.float64)
    disk /= disk.sum()
    taps = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    for axis in (0, 1):
        disk = scipy.ndimage.correlate1d(disk, taps / taps.sum(), axis, mode="mirror")
    kept = np.flatnonzero(disk.max(0) > 1e-6 * disk.max())
    return disk[kept[0] : kept[-1] + 1, kept[0] : kept[-1] + 1]


def _gaussian_blur(x: np.ndarray, sigma: float, draws: Draws) -> np.ndarray:
    del draws
    return filters.pixels(filters.gaussian_blur(filters.planes(x), sigma))


def _glass_blur(x: np.ndarray, c: tuple[float, int, int], draws: Draws) -> np.ndarray:
    sigma, delta, rounds = c
    n, h, w, _ = x.shape
    blurred = filters.truncate(filters.pixels(filters.gaussian_blur(filters.planes(x), sigma)))
    shifts = draws.integers(-delta, delta, rounds, h, w, 2)
    source = np.broadcast_to(np.arange(h * w), (n, h * w))
    for i in range(rounds):
        source = np.take_along_axis(source, _displaced(shifts[:, i], delta), 1)
    shuffled = filters.gather(blurred, source.reshape(n, h, w))
    return filters.pixels(filters.gaussian_blur(filters.planes(shuffled), sigma))


def _displaced(shifts: np.ndarray, delta: int) -> np.ndarray:
    """The source position of every pixel after one round of glass blur.

    From the bottom right to the top left, every pixel takes the current value of the pixel at its
    shift. As in the original code, values are overwritten where a swap was intended.

    Args:
      shifts: [N, H, W, 2] integers in -delta..delta-1, down and to the right.
      delta: the border that does not change is delta + 1 pixels wide at the top and the left, and
        delta - 1 at the bottom and the right.

    Returns:
      [N, H*W] positions in the image before the round.
    """
    n, h, w, _ = shifts.shape
    here = np.arange(h * w).reshape(h, w)
    moves = np.zeros((h, w), bool)
    moves[delta + 1 : h - delta + 1, delta + 1 : w - delta + 1] = True
    source = np.where(moves, here + shifts[..., 0] * w + shifts[..., 1], here)
    # A source further down has already been overwritten: follow it to the origin of its value.
    final = np.where((source > here) & moves.ravel()[source], source, here).reshape(n, -1)
    source = source.reshape(n, -1)
    while not np.array_equal(further := np.take_along_axis(final, final, 1), final):
        final = further
    return np.take_along_axis(source, final, 1)


def _motion_blur(x: np.ndarray, c: tuple[float, float], draws: Draws) -> np.ndarray:
    planes = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return filters.pixels(filters.motion_blur(planes, *c, draws.uniform(-45, 45)))


def _zoom_blur(x: np.ndarray, c: tuple[float, float], draws: Draws) -> np.ndarray:
    del draws
    end, step = c
    # As in the original code, rounding decides whether arange includes the end.
    factors = np.arange(1, end, step)
    planes = filters.planes(x)
    total = planes.copy()  # The original counts twice: the factors include 1.
    for factor in factors:
        total += filters.zoom(planes, factor)
    return filters.pixels(total / (len(factors) + 1))


# --------------------------------------------------------------------------------------- digital


def _brightness(x: np.ndarray, amount: float, draws: Draws) -> np.ndarray:
    """Adds to the value in HSV; at constant hue and saturation all channels scale equally."""
    del draws
    value = x.max(3, keepdims=True).astype(np.float32)
    brighter = np.minimum(value + 255 * amount, 255)
    return np.where(value > 0, x * (brighter / np.maximum(value, 1)), brighter)


def _saturate(x: np.ndarray, c: tuple[float, float], draws: Draws) -> np.ndarray:
    """Scales the saturation in HSV."""
    del draws
    factor, offset = c
    value = x.max(3, keepdims=True).astype(np.float32)
    range_ = value - x.min(3, keepdims=True)
    saturation = np.clip(factor * range_ / np.maximum(value, 1) + offset, 0, 1)
    # Grey has no hue and turns red, as in the original code.
    below = np.where(range_ > 0, (value - x) / np.maximum(range_, 1), np.float32([0, 1, 1]))
    return value * (1 - saturation * below)


def _contrast(x: np.ndarray, factor: float, draws: Draws) -> np.ndarray:
    del draws
    means = x.mean((1, 2), np.float64, keepdims=True)
    return (x - means) * factor + means


def _elastic_transform(x: np.ndarray, c: tuple[float, float, float], draws: Draws) -> np.ndarray:
    h, w = x.shape[1:3]
    reach, sigma, jitter = (min(h, w) * share for share in c)
    down, right = _affine(h, w, draws.uniform(-jitter, jitter, 3, 2))
    warped = _sample(x, down, right, repeat_edge=False)
    if not reach:
        return warped
    noise = draws.uniform(-1, 1, 2, h, w)
    shifts = reach * filters.gaussian_blur(noise, sigma, "reflect", truncate=3)
    rows, columns = np.indices((h, w), np.float32)
    return _sample(warped, rows + shifts[:, 0], columns + shifts[:, 1], repeat_edge=True)


def _affine(h: int, w: int, jitter: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Source positions of the affine map that moves three corners of a square by `jitter`.

    Args:
      h, w: size of the images.
      jitter: [N, 3, 2] in pixels, to the right and down.

    Returns:
      Rows and columns, [N, H, W] float32 each.
    """
    half = min(h, w) // 3
    corners = np.float64([w // 2, h // 2]) + [[half, half], [half, -half], [-half, -half]]
    moved = np.concatenate([corners + jitter, np.ones((len(jitter), 3, 1))], 2)
    back = np.linalg.solve(moved, np.broadcast_to(corners, jitter.shape))  # [N, 3, 2]
    rows, columns = np.indices((h, w))
    grid = np.stack([columns, rows, np.ones((h, w))], -1).reshape(-1, 3)
    right, down = np.moveaxis((grid @ back).reshape(-1, h, w, 2), -1, 0).astype(np.float32)
    return down, right


def _sample(x: np.ndarray, down: np.ndarray, right: np.ndarray, repeat_edge: bool) -> np.ndarray:
    """Samples images by bilinear interpolation, with reflection at the edges.

    Args:
      x: [N, H, W, 3].
      down, right: [N, H, W], positions to sample, in pixels.
      repeat_edge: whether the reflection repeats the pixels at the edge.

    Returns:
      [N, H, W, 3] float32.
    """
    h, w = x.shape[1:3]
    top, left = np.floor(down).astype(np.int32), np.floor(right).astype(np.int32)
    rows = [_mirrored(top + i, h, repeat_edge) * np.int32(w) for i in (0, 1)]
    columns = [_mirrored(left + i, w, repeat_edge) for i in (0, 1)]
    dy, dx = (down - top)[..., None], (right - left)[..., None]

    def row(i: int) -> np.ndarray:
        a, b = (filters.gather(x, rows[i] + column).astype(np.float32) for column in columns)
        return a + dx * (b - a)

    upper, lower = row(0), row(1)
    return upper + dy * (lower - upper)


def _mirrored(i: np.ndarray, size: int, repeat_edge: bool) -> np.ndarray:
    period = 2 * (size - 1 + repeat_edge)
    i = i % period
    return np.minimum(i, period - repeat_edge - i)


def _pixelate(x: np.ndarray, share: float, draws: Draws) -> np.ndarray:
    del draws
    h, w = x.shape[1:3]
    small, box = (int(w * share), int(h * share)), Image.Resampling.BOX
    return np.stack([Image.fromarray(image).resize(small, box).resize((w, h), box) for image in x])


def _jpeg_compression(x: np.ndarray, quality: int, draws: Draws) -> np.ndarray:
    del draws
    result = np.empty_like(x)
    for i, image in enumerate(x):
        with io.BytesIO() as file:
            Image.fromarray(image).save(file, "JPEG", quality=quality)
            result[i] = Image.open(file)
    return result


_FUNCTIONS: dict[str, Callable[[np.ndarray, Any, Draws], np.ndarray]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "spatter": weather.spatter,
    "saturate": _saturate,
    "blue_noise_sample": cbar.blue_noise_sample,
    "brownish_noise": cbar.brownish_noise,
    "checkerboard_cutout": cbar.checkerboard_cutout,
    "inverse_sparkles": cbar.inverse_sparkles,
    "pinch_and_twirl": cbar.pinch_and_twirl,
    "ripple": cbar.ripple,
    "circular_motion_blur": cbar.circular_motion_blur,
    "lines": cbar.lines,
    "sparkles": cbar.sparkles,
    "transverse_chromatic_abberation": cbar.transverse_chromatic_abberation,
    "caustic_refraction": cbar.caustic_refraction,
    "perlin_noise": cbar.perlin_noise,
    "plasma_noise": cbar.plasma_noise,
    "cocentric_sine_waves": cbar.cocentric_sine_waves,
    "single_frequency_greyscale": cbar.single_frequency_greyscale,
}


def corrupt_task(task: tuple[Any, ...]) -> np.ndarray:
    """Calls `corrupt` for a tuple (name, severity, images, seed, indices, table)."""
    name, severity, images, seed, indices, table = task
    return corrupt(name, severity, images, seed, indices=indices, table=table)
