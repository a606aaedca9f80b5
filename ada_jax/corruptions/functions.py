"""The 15 + 4 common corruptions at five severities, and the binary that writes a "-C" set of them.

    python -m ada_jax.corruptions --data=cifar10 --split=test --out=CIFAR-10-C

Source of every algorithm and parameter: Hendrycks & Dietterich (2019), whose published sets fixed
no seed. Here image i of a set always gets the same numbers, whatever else is corrupted beside it.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import io
import math
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.ndimage
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from ada_jax.corruptions import parameter_tables
from ada_jax.errors import UserError

_CHUNK_PIXELS = 2**16  # Worked on at a time: temporary arrays then stay in the cache.


def corrupt(
    name: str,
    severity: int,
    images: np.ndarray,
    seed: int = 0,
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    table: str = "cifar",
) -> np.ndarray:
    """Corrupts a batch of images, every one with random numbers of its own.

    What becomes of an image depends on the image, (seed, name, severity) and its index, and on the
    versions of NumPy, SciPy and Pillow, never on its neighbours in the batch. Only the elastic
    transform's lengths grow with the image; all others are pixels, meant for 32x32 ('cifar') or
    224x224 ('imagenet').

    Args:
      name: one of NAMES or EXTRA.
      severity: 1, mildest, to 5.
      images: [N, H, W, 3] uint8, H and W at least 8.
      seed: in 0..2**32-1.
      indices: [N] positions of the images in their whole set, at least 0; None means 0..N-1.
      table: whose parameters: 'cifar' (CIFAR-10-C) or 'imagenet' (ImageNet-C).

    Returns:
      [N, H, W, 3] uint8, cut off, not rounded, as the published sets are.

    Raises:
      UserError: if an argument is not as above, or frost has no textures.

    Source: Hendrycks & Dietterich (2019).
    """
    check(name, severity, seed, table)
    check_images(images)
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)
    if indices.shape != images.shape[:1] or (indices < 0).any():
        raise UserError(
            f"indices has the shape {list(indices.shape)} and there are {len(images)} images: give "
            "one index an image, at least 0."
        )
    parameters = parameter_tables.TABLES[table][name][severity - 1]
    step = max(1, _CHUNK_PIXELS // (images.shape[1] * images.shape[2]))
    result = np.empty(images.shape, np.uint8)
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        draws = _Draws(seed, name, severity, indices[part])
        values = _FUNCTIONS[name](images[part], parameters, draws)
        result[part] = _cut_off(values)
    return result


def _cut_off(values: np.ndarray) -> np.ndarray:
    """Clips to 0..255 and cuts off to integers; what rounding alone keeps below one counts as it.

    Else a flat surface would lose a grey level on one machine and not on another.
    """
    return np.clip(values + 3e-5, 0, 255).astype(np.uint8)


def check(name: str, severity: int, seed: int, table: str) -> None:
    """Checks the arguments of `corrupt` but its images."""
    for what, value in {"name": name, "table": table}.items():
        if not isinstance(value, str):
            raise UserError(f"{what} is {type(value).__name__} and must be a name in quotes.")
    if name not in parameter_tables.NAMES + parameter_tables.EXTRA:
        known = ", ".join(parameter_tables.NAMES + parameter_tables.EXTRA)
        raise UserError(f"The corruption {name!r} is unknown: choose from {known}.")
    whole = lambda a: isinstance(a, int | np.integer) and not isinstance(a, bool)  # noqa: E731
    if not whole(severity) or severity not in parameter_tables.SEVERITIES:
        raise UserError(f"The severity {severity!r} does not exist: choose it in 1..5.")
    if table not in parameter_tables.TABLES:
        raise UserError(
            f"The table {table!r} is unknown: choose from {', '.join(parameter_tables.TABLES)}."
        )
    if not whole(seed) or not 0 <= seed < 2**32:
        raise UserError(f"The seed {seed} is out of range: choose it in 0..{2**32 - 1}.")


def check_images(images: np.ndarray) -> None:
    """Checks that images are [N,H,W,3] uint8 and large enough."""
    if not isinstance(images, np.ndarray):
        raise UserError(f"The images to corrupt are {type(images).__name__}: give a NumPy array.")
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


@dataclasses.dataclass
class _Draws:
    """Random numbers for some images of a set, from one stream an image: arrays [N, *shape]."""

    seed: int
    name: str
    severity: int
    indices: np.ndarray

    @functools.cached_property
    def _streams(self) -> list[np.random.Generator]:
        entropy = [self.seed, zlib.crc32(self.name.encode()), self.severity]
        key = np.random.SeedSequence(entropy).generate_state(2, np.uint64)
        # The image's index is the highest word of the counter: streams that never meet.
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


# ----------------------------------------------------------------------------------------- noise
# Every corruption below takes images [N, H, W, 3] uint8, the parameters of one severity and the
# random numbers, and returns [N, H, W, 3] on the same scale, 0..255, as yet neither clipped nor
# cut off to integers.


def _gaussian_noise(x: np.ndarray, sigma: float, draws: _Draws) -> np.ndarray:
    return x + 255 * sigma * draws.normal(*x.shape[1:])


def _speckle_noise(x: np.ndarray, sigma: float, draws: _Draws) -> np.ndarray:
    return x * (1 + sigma * draws.normal(*x.shape[1:]))


def _shot_noise(x: np.ndarray, photons: float, draws: _Draws) -> np.ndarray:
    return draws.poisson(x * (photons / 255)) * (255 / photons)


def _impulse_noise(x: np.ndarray, share: float, draws: _Draws) -> np.ndarray:
    u = draws.uniform(0, 1, *x.shape[1:])
    return np.where(u < share / 2, 0, np.where(u < share, 255, x))


# ------------------------------------------------------------------------------------------ blur


def _defocus_blur(x: np.ndarray, c: tuple[float, float], draws: _Draws) -> np.ndarray:
    del draws
    kernel = _disk(*c)[None, :, :, None]
    return scipy.ndimage.correlate(x, kernel, np.float64, mode="mirror")


@functools.cache
def _disk(radius: float, sigma: float) -> np.ndarray:
    """A disk [2R+1, 2R+1] blurred by a Gaussian of 3x3 pixels, or of 5x5 beyond a radius of 8.

    It is normalised before the blur only, as the authors have it: where the disk touches the rim of
    its array, the reflection there adds up to 1.3%, and images become brighter.
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


def _gaussian_blur(x: np.ndarray, sigma: float, draws: _Draws) -> np.ndarray:
    del draws
    return _pixels(_blur(_planes(x), sigma))


def _glass_blur(x: np.ndarray, c: tuple[float, int, int], draws: _Draws) -> np.ndarray:
    sigma, delta, rounds = c
    n, h, w, _ = x.shape
    blurred = _cut_off(_pixels(_blur(_planes(x), sigma)))
    shifts = draws.integers(-delta, delta, rounds, h, w, 2)
    source = np.broadcast_to(np.arange(h * w), (n, h * w))
    for i in range(rounds):
        source = np.take_along_axis(source, _displaced(shifts[:, i], delta), 1)
    shuffled = _gather(blurred, source.reshape(n, h, w))
    return _pixels(_blur(_planes(shuffled), sigma))


def _displaced(shifts: np.ndarray, delta: int) -> np.ndarray:
    """Where every pixel's value comes from after one round of glass blur.

    From the bottom right to the top left, every pixel takes the value that the pixel at its shift
    has by then. The authors meant to swap the two, but wrote the one over the other.

    Args:
      shifts: [N, H, W, 2] integers in -delta..delta-1, down and to the right.
      delta: the width of a rim that stays (one less at the bottom and the right), in pixels.

    Returns:
      [N, H*W] positions in the image before the round.
    """
    n, h, w, _ = shifts.shape
    here = np.arange(h * w).reshape(h, w)
    moves = np.zeros((h, w), bool)
    moves[delta + 1 : h - delta + 1, delta + 1 : w - delta + 1] = True
    source = np.where(moves, here + shifts[..., 0] * w + shifts[..., 1], here)
    # A source further down has been written over already: follow it to where its value came from.
    final = np.where((source > here) & moves.ravel()[source], source, here).reshape(n, -1)
    source = source.reshape(n, -1)
    while not np.array_equal(further := np.take_along_axis(final, final, 1), final):
        final = further
    return np.take_along_axis(source, final, 1)


def _motion_blur(x: np.ndarray, c: tuple[float, float], draws: _Draws) -> np.ndarray:
    planes = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return _pixels(_motion(planes, *c, draws.uniform(-45, 45)))


def _motion(planes: np.ndarray, radius: float, sigma: float, degrees: np.ndarray) -> np.ndarray:
    """ImageMagick's motion blur: half a Gaussian along a line from every pixel, edges repeated.

    Args:
      planes: [N, C, H, W] uint8.
      radius: half the length of the line, in pixels.
      sigma: of the Gaussian, in pixels.
      degrees: [N] angles of the line, 0 to the right, 90 downwards.

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
    return _cut_off(total)  # As ImageMagick does.


def _zoom_blur(x: np.ndarray, c: tuple[float, float], draws: _Draws) -> np.ndarray:
    del draws
    end, step = c
    # As the authors have it: whether arange reaches the end is left to its rounding.
    factors = np.arange(1, end, step)
    planes = _planes(x)
    total = planes.copy()  # Counts twice: a factor of 1 is among the others.
    for factor in factors:
        total += _zoom(planes, factor)
    return _pixels(total / (len(factors) + 1))


# --------------------------------------------------------------------------------------- weather


def _snow(x: np.ndarray, c: tuple[float, ...], draws: _Draws) -> np.ndarray:
    mean, spread, zoom, threshold, radius, sigma, kept = c
    flakes = _zoom(mean + spread * draws.normal(1, *x.shape[1:3]), zoom)
    flakes = np.where(flakes < threshold, 0, 255 * np.clip(flakes, 0, 1)).astype(np.uint8)
    flakes = _pixels(_motion(flakes, radius, sigma, draws.uniform(-135, -45)))
    grey = x @ np.float32([[0.299], [0.587], [0.114]])
    whitened = kept * x.astype(np.float32) + (1 - kept) * np.maximum(x, 1.5 * grey + 127.5)
    return whitened + flakes + flakes[:, ::-1, ::-1].astype(np.float32)


def _frost(x: np.ndarray, c: tuple[float, float, float], draws: _Draws) -> np.ndarray:
    image_share, frost_share, scale = c
    h, w = x.shape[1:3]
    textures = _frost_textures(scale, h, w)
    choice = draws.integers(0, len(textures))
    u = draws.uniform(0, 1, 2)
    ice = np.empty((len(x), 3, h, w), np.uint8)
    for i, texture in enumerate(textures):
        crops = sliding_window_view(texture, (h, w), (0, 1))[:-1, :-1]  # The last is never drawn.
        top, left = ((u[choice == i] * crops.shape[:2]).astype(int)).T
        ice[choice == i] = crops[top, left]
    return image_share * x.astype(np.float32) + frost_share * _pixels(ice)


@functools.cache
def _frost_textures(scale: float, height: int, width: int) -> tuple[np.ndarray, ...]:
    """Photographs of frost [H, W, 3] uint8, scaled, and enlarged where an image would not fit.

    Five of the six that exist, for the authors' choice leaves out the last.
    """
    textures = []
    for path in frost_files():
        with Image.open(path) as file:
            image = file.convert("RGB")
        enlarged = max((height + 1) / image.height, (width + 1) / image.width)
        if enlarged > max(scale, 1):
            size = math.ceil(enlarged * image.width), math.ceil(enlarged * image.height)
            textures.append(np.asarray(image.resize(size, Image.Resampling.BILINEAR)))
            continue
        # Bilinear sampling by a fifth, without antialiasing, hits every fifth pixel exactly.
        s = max(scale, enlarged)
        rows, columns = (
            np.minimum((np.arange(math.ceil(n * s - 0.5)) + 0.5) / s, n - 1).astype(int)
            for n in (image.height, image.width)
        )
        textures.append(np.asarray(image)[rows[:, None], columns])
    return tuple(textures)


def frost_files() -> list[pathlib.Path]:
    """The five photographs of frost, as files of the installed distribution `imagecorruptions`.

    Raises:
      UserError: if it is not installed, or lacks one of them.
    """
    # Located, never imported: its code needs another NumPy.
    spec = importlib.util.find_spec("imagecorruptions")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    names = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
    files = [pathlib.Path(folder, "frost", name) for folder in folders[:1] for name in names]
    if not files or not all(file.is_file() for file in files):
        raise UserError(
            "The corruption 'frost' needs the photographs in the package imagecorruptions, which "
            "is not installed or not whole: pip install --no-deps imagecorruptions, or leave frost "
            "out."
        )
    return files


def _fog(x: np.ndarray, c: tuple[float, float], draws: _Draws) -> np.ndarray:
    amount, decay = c
    h, w = x.shape[1:3]
    size = 2 ** math.ceil(math.log2(max(h, w)))
    plasma = _plasma(draws.uniform(-1, 1, size, size), decay)[:, :h, :w, None]
    brightest = x.max((1, 2, 3), keepdims=True).astype(np.float32) / 255
    return (x + 255 * amount * plasma) * (brightest / (brightest + amount))


def _plasma(u: np.ndarray, decay: float) -> np.ndarray:
    """Clouds by the diamond-square algorithm, periodic, between 0 and 1.

    Args:
      u: [N, S, S] uniform in [-1, 1], S a power of two.
      decay: its square is by how much the displacements shrink from one level to the next.
    """
    clouds = np.zeros_like(u)
    step, wibble = u.shape[1], 100.0
    while step >= 2:
        at, between = slice(None, None, step), slice(step // 2, None, step)
        corners = clouds[:, at, at]
        rows, columns = (corners + np.roll(corners, -1, axis) for axis in (1, 2))

        def set_to(part, total, u=u, amplitude=wibble**2):
            clouds[part] = total / 4 + amplitude * u[part]

        set_to(np.s_[:, between, between], rows + np.roll(rows, -1, 2))
        centres = clouds[:, between, between]
        set_to(np.s_[:, at, between], centres + np.roll(centres, 1, 1) + columns)
        set_to(np.s_[:, between, at], centres + np.roll(centres, 1, 2) + rows)
        step, wibble = step // 2, wibble / decay
    clouds -= clouds.min((1, 2), keepdims=True)
    return clouds / clouds.max((1, 2), keepdims=True)


def _spatter(x: np.ndarray, c: tuple[Any, ...], draws: _Draws) -> np.ndarray:
    mean, spread, sigma, threshold, strength, kind = c
    liquid = _blur(mean + spread * draws.normal(*x.shape[1:3]), sigma)
    if kind == "water":
        return x + _water(np.where(liquid < threshold, 0, liquid), strength)
    mud = _blur((liquid > threshold).astype(np.float32), strength)
    mud = np.where(mud < 0.8, 0, mud)[..., None]
    return x * (1 - mud) + mud * np.float32([63, 42, 20])


def _water(liquid: np.ndarray, strength: float) -> np.ndarray:
    """What drops add to an image: pale turquoise, brighter away from their lower right edges.

    Args:
      liquid: [N, H, W] in [0, 1], 0 where there is no drop.
      strength: the share of the colour where it is brightest, in [0, 1].

    Returns:
      [N, H, W, 3] on the scale 0..255.
    """
    liquid = np.minimum(255 * liquid, 255).astype(np.uint8)
    depth = np.minimum(_distance(_edges(liquid)), 20)
    depth = _equalised((_neighbours(depth, np.ones((3, 3))) / 9).astype(np.uint8))
    relief = np.clip(_neighbours(depth, [[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]), 0, 255)
    light = liquid * np.rint(_neighbours(relief, np.ones((3, 3))) / 9)
    # Without any drop the authors' 0 / 0 made a black image; here it stays as it is.
    light /= np.maximum(light.max((1, 2), keepdims=True), 1)
    return strength * light[..., None] * np.float32([175, 238, 238])


def _neighbours(x: np.ndarray, weights: Any, mode: str = "mirror") -> np.ndarray:
    """Correlates [N, H, W] with 3x3 weights; mirrored at the edges, which do not repeat."""
    return scipy.ndimage.correlate(x, np.asarray(weights)[None], np.float64, mode=mode)


def _edges(x: np.ndarray) -> np.ndarray:
    """Canny's edges of [N, H, W] uint8, thresholds 50 and 150 on |dx| + |dy| of Sobel's filter."""
    sobel = np.outer([1, 2, 1], [-1, 0, 1])
    dx, dy = (_neighbours(x, weights, "nearest") for weights in (sobel, sobel.T))
    steep, flat = math.tan(math.radians(67.5)), math.tan(math.radians(22.5))
    size = np.abs(dx) + np.abs(dy)
    padded = np.pad(size, ((0, 0), (1, 1), (1, 1)))
    h, w = x.shape[1:]

    def neighbour(down: int, right: int) -> np.ndarray:
        return padded[:, 1 + down : 1 + down + h, 1 + right : 1 + right + w]

    falling = (size > neighbour(-1, -1)) & (size > neighbour(1, 1))
    rising = (size > neighbour(-1, 1)) & (size > neighbour(1, -1))
    ridge = np.where((dx < 0) != (dy < 0), rising, falling)
    upright = (size > neighbour(0, -1)) & (size >= neighbour(0, 1))
    lying = (size > neighbour(-1, 0)) & (size >= neighbour(1, 0))
    ridge = np.where(np.abs(dy) < flat * np.abs(dx), upright, ridge)
    ridge = np.where(np.abs(dy) > steep * np.abs(dx), lying, ridge)
    # Weak edges count if they hang together with a strong one of the same image.
    touching = np.zeros((3, 3, 3))
    touching[1] = 1
    parts, count = scipy.ndimage.label(ridge & (size > 50), touching)
    strong = np.zeros(count + 1, bool)
    strong[parts[ridge & (size > 150)]] = True
    return strong[parts]


def _distance(edges: np.ndarray) -> np.ndarray:
    """Distance of every pixel [N, H, W] to the nearest edge of its image, infinite without one.

    In steps of a 5x5 mask, whose lengths (Borgefors, 1986) come within 2% of the straight line's.
    """
    if not edges.any():
        return np.full(edges.shape, np.inf)
    # Images lie so far apart along the first axis that another's edges are never the nearest.
    nearest = scipy.ndimage.distance_transform_edt(
        ~edges, (1e6, 1, 1), return_distances=False, return_indices=True
    )
    sides = np.abs(nearest[1:] - np.indices(edges.shape)[1:])
    long, short = sides.max(0), sides.min(0)
    straight, diagonal = np.maximum(long - 2 * short, 0), np.maximum(2 * short - long, 0)
    knight = np.minimum(short, long - short)
    distance = straight + 1.4 * diagonal + 2.1969 * knight
    return np.where(edges.any((1, 2), keepdims=True), distance, np.inf)


def _equalised(x: np.ndarray) -> np.ndarray:
    """Histogram equalisation of every image of [N, H, W] uint8; a flat one stays as it is."""
    n = len(x)
    levels = x.reshape(n, -1) + 256 * np.arange(n)[:, None]
    counts = np.bincount(levels.ravel(), minlength=256 * n).reshape(n, 256)
    below = counts.cumsum(1) - np.take_along_axis(counts, x.reshape(n, -1).min(1)[:, None], 1)
    total = below[:, -1:]
    table = np.where(total > 0, np.rint(below * (255 / np.maximum(total, 1))), np.arange(256))
    return table.ravel()[levels].reshape(x.shape)


# ------------------------------------------------------------------------------------- the rest


def _brightness(x: np.ndarray, amount: float, draws: _Draws) -> np.ndarray:
    """Adds to HSV's value: at the same hue and saturation all channels grow in proportion."""
    del draws
    value = x.max(3, keepdims=True).astype(np.float32)
    brighter = np.minimum(value + 255 * amount, 255)
    return np.where(value > 0, x * (brighter / np.maximum(value, 1)), brighter)


def _saturate(x: np.ndarray, c: tuple[float, float], draws: _Draws) -> np.ndarray:
    """Scales HSV's saturation, which is how far a channel may lie below the largest one."""
    del draws
    factor, offset = c
    value = x.max(3, keepdims=True).astype(np.float32)
    range_ = value - x.min(3, keepdims=True)
    saturation = np.clip(factor * range_ / np.maximum(value, 1) + offset, 0, 1)
    # Grey has no hue; as for the authors it then turns red.
    below = np.where(range_ > 0, (value - x) / np.maximum(range_, 1), np.float32([0, 1, 1]))
    return value * (1 - saturation * below)


def _contrast(x: np.ndarray, factor: float, draws: _Draws) -> np.ndarray:
    del draws
    means = x.mean((1, 2), np.float64, keepdims=True)
    return (x - means) * factor + means


def _elastic_transform(x: np.ndarray, c: tuple[float, float, float], draws: _Draws) -> np.ndarray:
    h, w = x.shape[1:3]
    reach, sigma, jitter = (min(h, w) * share for share in c)
    down, right = _affine(h, w, draws.uniform(-jitter, jitter, 3, 2))
    warped = _sample(x, down, right, repeat_edge=False)
    if not reach:
        return warped
    noise = draws.uniform(-1, 1, 2, h, w)
    shifts = reach * _blur(noise, sigma, "reflect", truncate=3)
    rows, columns = np.indices((h, w), np.float32)
    return _sample(warped, rows + shifts[:, 0], columns + shifts[:, 1], repeat_edge=True)


def _affine(h: int, w: int, jitter: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where an affine map, which moves three corners of a square by `jitter`, reads its pixels.

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
    """Interpolates linearly, mirrored beyond the edges, which are or are not repeated.

    Args:
      x: [N, H, W, 3].
      down, right: [N, H, W], where to read, in pixels.
      repeat_edge: whether the pixel beyond an edge is the edge's once more.

    Returns:
      [N, H, W, 3] float32.
    """
    h, w = x.shape[1:3]
    top, left = np.floor(down).astype(np.int32), np.floor(right).astype(np.int32)
    rows = [_mirrored(top + i, h, repeat_edge) * np.int32(w) for i in (0, 1)]
    columns = [_mirrored(left + i, w, repeat_edge) for i in (0, 1)]
    below, beside = (down - top)[..., None], (right - left)[..., None]

    def row(i: int) -> np.ndarray:
        a, b = (_gather(x, rows[i] + column).astype(np.float32) for column in columns)
        return a + beside * (b - a)

    upper, lower = row(0), row(1)
    return upper + below * (lower - upper)


def _mirrored(i: np.ndarray, size: int, repeat_edge: bool) -> np.ndarray:
    period = 2 * (size - 1 + repeat_edge)
    i = i % period
    return np.minimum(i, period - repeat_edge - i)


def _pixelate(x: np.ndarray, share: float, draws: _Draws) -> np.ndarray:
    del draws
    h, w = x.shape[1:3]
    small, box = (int(w * share), int(h * share)), Image.Resampling.BOX
    return np.stack([Image.fromarray(image).resize(small, box).resize((w, h), box) for image in x])


def _jpeg_compression(x: np.ndarray, quality: int, draws: _Draws) -> np.ndarray:
    del draws
    result = np.empty_like(x)
    for i, image in enumerate(x):
        with io.BytesIO() as file:
            Image.fromarray(image).save(file, "JPEG", quality=quality)
            result[i] = Image.open(file)
    return result


# ------------------------------------------------------------------------------ parts of several


def _planes(x: np.ndarray) -> np.ndarray:
    """[N, H, W, C] to [N, C, H, W] float64, which is quicker to filter."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float64)


def _pixels(planes: np.ndarray) -> np.ndarray:
    return planes.transpose(0, 2, 3, 1)


def _gather(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Reads pixels of x [N, H, W, 3] at positions [N, H, W] in 0..H*W-1, each in its image."""
    n, h, w, channels = x.shape
    offsets = np.arange(0, n * h * w, h * w)[:, None, None]
    return np.take(x.reshape(-1, channels), positions + offsets, axis=0, mode="clip")


def _blur(
    planes: np.ndarray, sigma: float, mode: str = "nearest", truncate: float = 4
) -> np.ndarray:
    """Gaussian blur of the last two axes."""
    rows, columns = (_blur_matrix(n, sigma, mode, truncate) for n in planes.shape[-2:])
    return rows @ planes @ columns.T


# What is linear and separable is a product with two small matrices; SciPy's own filters of the
# identity are those matrices. In float64, for the order in which BLAS adds varies with its threads,
# and that must not show in the bytes.


@functools.cache
def _blur_matrix(size: int, sigma: float, mode: str, truncate: float) -> np.ndarray:
    return scipy.ndimage.gaussian_filter1d(np.eye(size), sigma, 0, mode=mode, truncate=truncate)


def _zoom(planes: np.ndarray, factor: float) -> np.ndarray:
    """Enlarges the middle of the last two axes, linearly, to the size they have."""
    rows, columns = (_zoom_matrix(n, factor) for n in planes.shape[-2:])
    return rows @ planes @ columns.T


@functools.cache
def _zoom_matrix(size: int, factor: float) -> np.ndarray:
    shown = math.ceil(size / factor)
    top = (size - shown) // 2
    enlarged = scipy.ndimage.zoom(np.eye(size)[top : top + shown], (factor, 1), order=1)
    trim = (len(enlarged) - size) // 2
    return enlarged[trim : trim + size]


_FUNCTIONS: dict[str, Callable[[np.ndarray, Any, _Draws], np.ndarray]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "spatter": _spatter,
    "saturate": _saturate,
}


def corrupt_task(task: tuple[Any, ...]) -> np.ndarray:
    """`corrupt` of (name, severity, images, seed, indices, table), for a worker process."""
    name, severity, images, seed, indices, table = task
    return corrupt(name, severity, images, seed, indices=indices, table=table)
