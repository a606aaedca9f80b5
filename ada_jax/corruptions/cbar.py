"""The corruptions of CIFAR-10-C-bar and ImageNet-C-bar. See `functions` for their arguments.

Their parameters are the authors' levels, on a scale to 10. Lengths scale with the smaller side of
the images. Odd sizes and images that are not square, which the published sets do not have, are
handled as simply as possible.

Source: Mintun, Kirillov & Xie (2021) and facebookresearch/augmentation-corruption.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import scipy.fft
import scipy.ndimage
import scipy.sparse

from ada_jax.corruptions import filters
from ada_jax.corruptions.filters import Draws

# ----------------------------------------------------------------------------------------- noise


def blue_noise_sample(x: np.ndarray, level: float, draws: Draws) -> np.ndarray:
    """Blackens the pixels where blue noise is below a threshold."""
    noise = _coloured_noise(x, draws, 1, lambda distance: distance)
    return x * (noise > 0.3 * level - 2.5)


def brownish_noise(x: np.ndarray, level: float, draws: Draws) -> np.ndarray:
    """Adds noise of low frequencies to every channel."""
    noise = _coloured_noise(x, draws, 3, lambda distance: 1 / (distance**2 + 1))
    return x + 6.4 * level * noise


def _coloured_noise(
    x: np.ndarray, draws: Draws, channels: int, spectrum: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Noise of unit variance with random phases.

    Args:
      x: [N, H, W, 3].
      channels: C.
      spectrum: amplitude as a function of the distance from frequency 0, in cycles per image.

    Returns:
      [N, H, W, C], cut from a square whose side is even.
    """
    h, w = x.shape[1:3]
    size = max(h, w) + max(h, w) % 2
    phases = draws.uniform(0, 2 * np.pi, channels, size, size // 2)
    # As in the original code the phases are mirrored without a change of sign, about a point
    # between two frequencies.
    phases = np.concatenate([phases, phases[..., ::-1, ::-1]], -1)
    steps = np.arange(size) - size / 2
    amplitudes = spectrum(np.hypot(steps[:, None], steps))
    noise = scipy.fft.ifft2(scipy.fft.ifftshift(amplitudes * np.exp(1j * phases), (-2, -1))).real
    noise /= noise.std((-2, -1), keepdims=True)
    return filters.pixels(noise[..., :h, :w])


def perlin_noise(x: np.ndarray, level: float, draws: Draws) -> np.ndarray:
    """Blends images with grey Perlin noise, five octaves of absolute values."""
    h, w = x.shape[1:3]
    scale = 7 / min(h, w)  # cells of the first octave per pixel
    nodes = math.ceil(16 * scale * max(h, w)) + 1
    # The original code draws 256 gradients and hashes the nodes to them.
    gradients = draws.uniform(-1, 1, 2, nodes, nodes)
    gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
    octaves = [2**i for i in range(5)]
    noise = sum(
        np.abs(_gradient_noise(gradients, f * scale * np.arange(h), f * scale * np.arange(w))) / f
        for f in octaves
    )
    grey = np.minimum(0.5 * noise + 0.5, 1)[..., None]
    share = 0.05 * level
    return (1 - share) * x.astype(np.float32) + 255 * share * grey


def _gradient_noise(gradients: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Perlin noise [N, H, W] at rows [H] and columns [W], with gradients [N, 2, nodes, nodes]."""
    i, j = rows.astype(int), columns.astype(int)
    dy, dx = np.float32(rows - i)[:, None], np.float32(columns - j)

    def corner(down: int, right: int) -> np.ndarray:
        at = gradients[:, :, (i + down)[:, None], j + right]
        return at[:, 0] * (dy - down) + at[:, 1] * (dx - right)

    sy, sx = (t**2 * (3 - 2 * t) for t in (dy, dx))
    upper, lower = (corner(k, 0) + sx * (corner(k, 1) - corner(k, 0)) for k in (0, 1))
    return 1.5 * (upper + sy * (lower - upper))


def plasma_noise(x: np.ndarray, level: float, draws: Draws) -> np.ndarray:
    """Adds coloured plasma, sines of coordinates that are distorted four to six times."""
    n, h, w, _ = x.shape
    phase = draws.uniform(0, 6 * np.pi)[:, None, None]
    rounds = draws.integers(4, 7)[:, None, None]
    shrink = 2.25 - draws.uniform(0.5, 1)[:, None, None]
    scale = (draws.uniform(0.075, 0.2) * min(h, w))[:, None, None]
    v, u = np.broadcast_to(np.indices((h, w))[:, None], (2, n, h, w)) / scale
    for k in range(6):
        a = np.cos(v * 1.93**k + phase / 1.15**k)
        b = np.sin(u * 1.93**k + phase / 1.15**k)
        size = np.where(k < rounds, 1 / shrink**k, 0)
        u, v = u + size * (a - 0.3 * b), v + size * (b + 0.3 * a)
    waves = np.sin(u - phase), np.sin((u + v + np.sin(phase)) / 2), np.sin(v + phase)
    strength = 6.4 * level
    return (1 - strength / 255) * x + strength * np.stack(waves, -1)


def single_frequency_greyscale(x: np.ndarray, level: float, draws: Draws) -> np.ndarray:
    """Adds a grey plane wave."""
    h, w = x.shape[1:3]
    larger, smaller = draws.uniform(-np.pi, np.pi), draws.uniform(-1, 1)
    frequencies = np.stack([larger, smaller * np.abs(larger)], -1)  # radians per pixel
    swapped = draws.integers(0, 2)[:, None] == 1
    down, right = np.where(swapped, frequencies, frequencies[:, ::-1]).T[..., None, None]
    phase = draws.uniform(0, 2 * np.pi)[:, None, None]
    wave = np.sin(down * np.arange(h)[:, None] + right * np.arange(w) + phase)
    return x + 19.6 * level * wave[..., None]


def cocentric_sine_waves(x: np.ndarray, level: float, draws: Draws) -> np.ndarray:
    """Adds grey rings with wavy edges."""
    h, w = x.shape[1:3]
    size = min(h, w)
    centre = draws.uniform(0, 1, 2) * (h, w)
    petals = draws.uniform(0, 10)[:, None, None]
    height, width = (draws.uniform(0, size / 10, 2).T)[..., None, None].astype(np.float64)
    dy = np.arange(h)[:, None] - centre[:, 0, None, None]
    dx = np.arange(w) - centre[:, 1, None, None]
    distance = np.hypot(dy, dx) + height * np.sin(petals * np.arctan2(dx, dy))
    return x + 12.8 * level * (distance / width % 1 - 0.5)[..., None]


# -------------------------------------------------------------------------------------- drawings


def checkerboard_cutout(x: np.ndarray, level: float, draws: Draws) -> np.ndarray:
    """Greys random white squares of a rotated checkerboard."""
    n, h, w, _ = x.shape
    size = min(h, w)
    angle = draws.uniform(0, 2 * np.pi)[:, None, None]
    side = np.maximum(draws.uniform(0.1, 0.25) * size, 1)[:, None, None]
    rows, columns = np.indices((h, w))
    down = (np.cos(angle) * rows + np.sin(angle) * columns) / side
    right = (np.cos(angle) * columns - np.sin(angle) * rows) / side
    white = np.floor(down) % 2 == np.floor(right) % 2
    # As in the original code the squares are counted by truncation, so that squares on both sides
    # of the coordinates' origin share their number.
    reach = math.ceil(math.hypot(h, w) / max(0.1 * size, 1))
    grid = draws.uniform(0, 1, 2 * reach + 1, 2 * reach + 1) < 0.1 * level
    i, j = (positions.astype(int) + reach for positions in (down, right))
    cut = white & grid[np.arange(n)[:, None, None], i, j]
    return np.where(cut[..., None], 128, x)


def lines(x: np.ndarray, level: float, draws: Draws) -> np.ndarray:
    """Draws antialiased grey lines, all at about the same angle."""
    size = min(x.shape[1:3])
    count = int(level / 10 * size)
    angle = draws.uniform(0, 2 * np.pi)
    spread = draws.uniform(0.1, 1)
    u = draws.uniform(0, 1, count, 3)
    for k in range(count):
        turn = angle + 2 * np.pi * spread * (u[:, k, 2] - 0.5)
        middle = u[:, k, :2] * x.shape[1:3]
        half = size * np.stack([np.cos(turn), np.sin(turn)], -1)
        cover = _line(middle - half, middle + half, *x.shape[1:3])[..., None]
        x = filters.truncate((1 - cover) * x + 128 * cover)
    return x


def _line(start: np.ndarray, end: np.ndarray, h: int, w: int) -> np.ndarray:
    """Share of every pixel that a line between two pixels covers, as scikit-image's `line_aa`.

    Args:
      start, end: [N, 2] rows and columns, truncated to integers.
      h, w: size of the images.

    Returns:
      [N, H, W]: 1 minus the distance to the line, inside of the box that the pixels span.
    """
    start, end = start.astype(int)[..., None, None], end.astype(int)[..., None, None]
    rows, columns = np.indices((h, w))
    dy, dx = end[:, 0] - start[:, 0], end[:, 1] - start[:, 1]
    distance = np.abs(dy * (columns - start[:, 1]) - dx * (rows - start[:, 0])) / np.hypot(dy, dx)
    low, high = np.minimum(start, end), np.maximum(start, end)
    inside = (rows >= low[:, 0]) & (rows <= high[:, 0])
    inside &= (columns >= low[:, 1]) & (columns <= high[:, 1])
    return np.where(inside, np.maximum(1 - distance, 0), 0)


_SPARKLES, _RAYS = 5, (50, 200)  # Number of rays, the second exclusive.


def sparkles(x: np.ndarray, level: float, draws: Draws) -> np.ndarray:
    """Draws five white stars with rays of random length."""
    h, w = x.shape[1:3]
    centres = draws.uniform(0, 1, _SPARKLES, 2) * np.float32([h, w])
    rays = draws.integers(*_RAYS, _SPARKLES)
    radius = level / 100 * min(h, w)
    lengths = radius * (1 + 0.25 * draws.normal(_SPARKLES, _RAYS[1] - 1))
    light = _star(centres, rays, np.maximum(lengths, 1), 1, h, w)
    return 255 - (255 - x.astype(np.float32)) * np.prod(1 - light, 1)[..., None]


def inverse_sparkles(x: np.ndarray, level: float, draws: Draws) -> np.ndarray:
    """Shows the image inside of one large star only, on white."""
    h, w = x.shape[1:3]
    centre = draws.uniform(0.25, 0.75, 1, 2) * np.float32([h, w])
    rays = draws.integers(*_RAYS, 1)
    lengths = 0.25 * min(h, w) * (1 + 0.25 * draws.normal(1, _RAYS[1] - 1))
    light = _star(centre, rays, lengths, 0.13 * level, h, w)[:, 0, ..., None]
    return 255 + light * (x.astype(np.float32) - 255)


def _star(
    centres: np.ndarray, rays: np.ndarray, lengths: np.ndarray, power: float, h: int, w: int
) -> np.ndarray:
    """Light of K stars in [0, 1], by the squared ratio of a ray's length to the distance.

    Args:
      centres: [N, K, 2], in pixels.
      rays: [N, K], number of rays.
      lengths: [N, K, R] in pixels, of which the first `rays` are used.
      power: exponent of the ratio.
      h, w: size of the images.

    Returns:
      [N, K, H, W].
    """
    dy = np.arange(h, dtype=np.float32)[:, None] - centres[..., 0, None, None]
    dx = np.arange(w, dtype=np.float32) - centres[..., 1, None, None]
    rays = rays[..., None, None].astype(np.int32)
    turns = (np.arctan2(dx, dy) + np.float32(np.pi)) * (rays / np.float32(2 * np.pi))
    ray = turns.astype(np.int32)
    between = turns - ray

    def length(i: np.ndarray) -> np.ndarray:
        flat = (i % rays).reshape(*i.shape[:2], -1)
        return np.take_along_axis(lengths, flat, 2).reshape(i.shape)

    a, b = length(ray), length(ray + 1)
    ratio = (a + between * (b - a)) ** 2 / (dy**2 + dx**2 + np.float32(1e-4))
    return np.clip((1 - (between - 0.5) ** 2) * ratio**power, 0, 1)


# ------------------------------------------------------------------------------------ distortion


def pinch_and_twirl(x: np.ndarray, level: float, draws: Draws) -> np.ndarray:
    """Pinches and twirls the images in the circles of a grid of squares."""
    h, w = x.shape[1:3]
    side = min(h, w) // (5 if min(h, w) >= 224 else 3)
    radius = side / 2
    cells = h // side, w // side
    angles = (2 * draws.integers(0, 2, *cells) - 1) * (level * np.pi / 20)
    angles = np.repeat(np.repeat(angles, side, 1), side, 2)  # [N, covered rows and columns]
    covered = angles.shape[1:]
    dy, dx = (np.arange(n) % side - radius for n in covered)
    dy, dx = np.broadcast_arrays(dy[:, None], dx)
    distance = np.hypot(dy, dx)
    moved = (distance > 0) & (distance <= radius)
    share = np.where(moved, distance / radius, 1)
    pinch = np.sin(np.pi / 2 * share) ** -(0.04 * level + 0.1)
    twirl = angles * (1 - share) ** 2
    rows, columns = np.broadcast_to(np.indices((h, w))[:, None], (2, len(x), h, w)).astype(float)
    part = np.s_[:, : covered[0], : covered[1]]
    rows[part] += pinch * (dy * np.cos(twirl) - dx * np.sin(twirl)) - dy
    columns[part] += pinch * (dy * np.sin(twirl) + dx * np.cos(twirl)) - dx
    return _sample(x, rows, columns)


def ripple(x: np.ndarray, level: float, draws: Draws) -> np.ndarray:
    """Shifts rows and columns by sine waves."""
    h, w = x.shape[1:3]
    size = min(h, w)
    wavelengths = draws.uniform(0.1, 0.3, 2) * size
    phases = draws.uniform(0, 2 * np.pi, 2)

    def shifted(axis: int, n: int) -> np.ndarray:
        waves = 2 * np.pi * np.arange(n) / wavelengths[:, axis, None] + phases[:, axis, None]
        return np.arange(n) + 0.0025 * level * size * np.sin(waves)

    return _sample(x, shifted(0, h)[:, :, None], shifted(1, w)[:, None, :])


def caustic_refraction(x: np.ndarray, level: float, draws: Draws) -> np.ndarray:
    """Refracts and lights images as if seen through a surface of moving water."""
    h, w = x.shape[1:3]
    size = min(h, w)
    time = draws.uniform(0.5, 2)[:, None, None]
    period = (draws.uniform(0.75, 1.25) * size)[:, None, None]
    surface = filters.gaussian_blur(_caustics(h, w, time, period), 1, "reflect")
    padded = np.pad(surface, ((0, 0), (1, 1), (1, 1)))
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    right = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    slope = np.hypot(down, right)
    angle = np.arctan(slope)  # of the incident ray
    bend = np.sin(angle - np.arcsin(np.sin(angle) / 4))
    bend = np.where(np.cos(angle) < 0.999, 0.05 * level * size * bend / np.maximum(slope, 1e-9), 0)
    rows, columns = np.indices((h, w))
    shifted = [axis + np.round(bend * s, 3) for axis, s in ((rows, down), (columns, right))]
    return _sample(x, *shifted) + (51 * level * (down - right))[..., None]


def _caustics(h: int, w: int, time: np.ndarray, period: np.ndarray) -> np.ndarray:
    """Light in [0, 1] on the ground of water, [N, H, W], for times and periods [N, 1, 1]."""
    y, x = (t / period % 1 * 6.28318530718 - 250 for t in np.indices((h, w)))
    v, u, total = y, x, 1.0
    for k in range(5):
        t = time * (1 - 3.5 / (k + 1))
        v, u = y + np.cos(t - v) + np.sin(t + u), x + np.sin(t - u) + np.cos(t + v)
        total = total + 200 / np.hypot(y / np.sin(v + t), x / np.cos(u + t))
    return np.minimum(np.abs(1.17 - (total / 5) ** 1.4) ** 8, 1)


def _sample(x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Samples images [N, H, W, 3] at rows and columns [N, H, W], bilinearly, black outside."""
    h, w = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    dy, dx = (rows - top)[..., None], (columns - left)[..., None]

    def row(i: int) -> np.ndarray:
        at = np.clip(top + i + 1, 0, h + 1) * (w + 2)
        a, b = (
            filters.gather(padded, at + np.clip(left + j + 1, 0, w + 1)).astype(np.float64)
            for j in (0, 1)
        )
        return a + dx * (b - a)

    upper = row(0)
    return upper + dy * (row(1) - upper)


# ------------------------------------------------------------------------------------------ blur


def circular_motion_blur(x: np.ndarray, level: float, draws: Draws) -> np.ndarray:
    """Averages rotations about the centre by up to `1.5 * level` degrees either way."""
    del draws
    n, h, w, _ = x.shape
    coefficients = x.astype(np.float64)
    for axis in (1, 2):
        coefficients = scipy.ndimage.spline_filter1d(coefficients, 3, axis, mode="mirror")
    columns = coefficients.transpose(1, 2, 0, 3).reshape(h * w, -1)
    return (_rotations(h, w, 1.5 * level) @ columns).reshape(h, w, n, 3).transpose(2, 0, 1, 3)


@functools.lru_cache(maxsize=2)  # 0.1 GB each at 224x224
def _rotations(h: int, w: int, degrees: float) -> scipy.sparse.csr_matrix:
    """The weighted mean of 21 rotations by cubic splines, black outside, as [H*W, H*W].

    It is the mean of `scipy.ndimage.rotate(image, angle, reshape=False)`, with Gaussian weights.
    """
    total = scipy.sparse.csr_matrix((h * w, h * w))
    rows, columns = np.indices((h, w)).reshape(2, -1, 1)
    centre = (h - 1) / 2, (w - 1) / 2
    y, x = rows - centre[0], columns - centre[1]
    positions = np.linspace(-1, 1, 21)
    weights = np.exp(-2 * positions**2)
    for position, weight in zip(positions, weights / weights.sum(), strict=True):
        angle = math.radians(position * degrees)
        down = centre[0] + math.cos(angle) * y + math.sin(angle) * x
        right = centre[1] - math.sin(angle) * y + math.cos(angle) * x
        inside = (down >= 0) & (down <= h - 1) & (right >= 0) & (right <= w - 1)
        row_taps, row_weights = _cubic_taps(down, h)
        column_taps, column_weights = _cubic_taps(right, w)
        taps = row_taps[:, :, None] * w + column_taps[:, None]
        values = (weight * inside)[..., None] * row_weights[:, :, None] * column_weights[:, None]
        indptr = np.arange(0, 16 * h * w + 1, 16)
        total += scipy.sparse.csr_matrix((values.ravel(), taps.ravel(), indptr), total.shape)
    return total


def _cubic_taps(positions: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The four pixels around positions [P, 1], mirrored at the edges, and B-spline weights."""
    first = np.floor(positions).astype(int) - 1
    taps = first + np.arange(4)
    far = np.abs(positions - taps)
    weights = np.where(far < 1, 2 / 3 - far**2 + far**3 / 2, np.maximum(2 - far, 0) ** 3 / 6)
    taps = np.abs(taps)
    return np.minimum(taps, 2 * (size - 1) - taps), weights


def transverse_chromatic_abberation(x: np.ndarray, level: float, draws: Draws) -> np.ndarray:
    """Enlarges the channels by three scales, in random order."""
    scales = np.argsort(draws.uniform(0, 1, 3), 1)  # [N, 3]
    factors = (1, 1 + level / 40, 1 + level / 20)
    rows, columns = (
        np.stack([_enlargement(n, factor) for factor in factors])[scales] for n in x.shape[1:3]
    )
    enlarged = rows @ filters.planes(x) @ columns.swapaxes(2, 3)
    return filters.pixels(enlarged + 0.5)  # Rounded, where other corruptions are truncated.


@functools.cache
def _enlargement(size: int, factor: float) -> np.ndarray:
    """Cubic enlargement, cropped to the centre, as [size, size].

    As in the original code the spline is not prefiltered, which blurs all channels slightly.
    """
    columns = [scipy.ndimage.zoom(unit, factor, prefilter=False) for unit in np.eye(size)]
    enlarged = np.stack(columns, 1)
    edge = (len(enlarged) - size) // 2
    return enlarged[edge : edge + size]
