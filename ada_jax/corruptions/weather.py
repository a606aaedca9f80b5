"""Weather corruptions: snow, frost, fog and spatter. See `functions` for their arguments."""

import functools
import importlib.util
import math
import pathlib
from typing import Any

import numpy as np
import scipy.ndimage
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from ada_jax.corruptions import filters
from ada_jax.corruptions.filters import Draws
from ada_jax.errors import UserError


def snow(x: np.ndarray, c: tuple[float, ...], draws: Draws) -> np.ndarray:
    """Whitens the images [B,H,W,3] and adds motion-blurred flakes; c holds the parameters."""
    mean, spread, zoom, threshold, radius, sigma, kept = c
    flakes = filters.zoom(mean + spread * draws.normal(1, *x.shape[1:3]), zoom)
    flakes = np.where(flakes < threshold, 0, 255 * np.clip(flakes, 0, 1)).astype(np.uint8)
    flakes = filters.pixels(filters.motion_blur(flakes, radius, sigma, draws.uniform(-135, -45)))
    grey = x @ np.float32([[0.299], [0.587], [0.114]])
    whitened = kept * x.astype(np.float32) + (1 - kept) * np.maximum(x, 1.5 * grey + 127.5)
    return whitened + flakes + flakes[:, ::-1, ::-1].astype(np.float32)


def frost(x: np.ndarray, c: tuple[float, float, float], draws: Draws) -> np.ndarray:
    """Blends the images [B,H,W,3] with crops of photographs of frost."""
    image_share, frost_share, scale = c
    h, w = x.shape[1:3]
    textures = _frost_textures(scale, h, w)
    choice = draws.integers(0, len(textures))
    u = draws.uniform(0, 1, 2)
    ice = np.empty((len(x), 3, h, w), np.uint8)
    for i, texture in enumerate(textures):
        # As in the original code, the last row and column are never drawn.
        crops = sliding_window_view(texture, (h, w), (0, 1))[:-1, :-1]
        top, left = ((u[choice == i] * crops.shape[:2]).astype(int)).T
        ice[choice == i] = crops[top, left]
    return image_share * x.astype(np.float32) + frost_share * filters.pixels(ice)


@functools.cache
def _frost_textures(scale: float, height: int, width: int) -> tuple[np.ndarray, ...]:
    """Photographs of frost [H, W, 3] uint8, scaled, and enlarged to at least the image's size.

    As in the original code, only five of the six photographs are used.
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
        # Bilinear sampling without antialiasing at scale 1/5 reads exactly every fifth pixel.
        s = max(scale, enlarged)
        rows, columns = (
            np.minimum((np.arange(math.ceil(n * s - 0.5)) + 0.5) / s, n - 1).astype(int)
            for n in (image.height, image.width)
        )
        textures.append(np.asarray(image)[rows[:, None], columns])
    return tuple(textures)


def frost_files() -> list[pathlib.Path]:
    """The five photographs of frost in the installed package `imagecorruptions`.

    Raises:
      UserError: the package is not installed, or a photograph is missing.
    """
    # The package is not imported, because its code needs another version of NumPy.
    spec = importlib.util.find_spec("imagecorruptions")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    names = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
    files = [pathlib.Path(folder, "frost", name) for folder in folders[:1] for name in names]
    if not files or not all(file.is_file() for file in files):
        raise UserError(
            "The corruption 'frost' needs the photographs in the package imagecorruptions, which "
            "is not installed or incomplete: pip install --no-deps imagecorruptions, or leave "
            "frost out."
        )
    return files


def fog(x: np.ndarray, c: tuple[float, float], draws: Draws) -> np.ndarray:
    """Blends the images [B,H,W,3] with plasma noise."""
    amount, decay = c
    h, w = x.shape[1:3]
    size = 2 ** math.ceil(math.log2(max(h, w)))
    plasma = _plasma(draws.uniform(-1, 1, size, size), decay)[:, :h, :w, None]
    brightest = x.max((1, 2, 3), keepdims=True).astype(np.float32) / 255
    return (x + 255 * amount * plasma) * (brightest / (brightest + amount))


def _plasma(u: np.ndarray, decay: float) -> np.ndarray:
    """Periodic clouds in [0, 1] by the diamond-square algorithm.

    Args:
      u: [N, S, S] uniform in [-1, 1], S a power of two.
      decay: the displacements shrink by its square from one level to the next.
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


def spatter(x: np.ndarray, c: tuple[Any, ...], draws: Draws) -> np.ndarray:
    """Adds drops of water or mud to the images [B,H,W,3]."""
    mean, spread, sigma, threshold, strength, kind = c
    liquid = filters.gaussian_blur(mean + spread * draws.normal(*x.shape[1:3]), sigma)
    if kind == "water":
        return x + _water(np.where(liquid < threshold, 0, liquid), strength)
    mud = filters.gaussian_blur((liquid > threshold).astype(np.float32), strength)
    mud = np.where(mud < 0.8, 0, mud)[..., None]
    return x * (1 - mud) + mud * np.float32([63, 42, 20])


def _water(liquid: np.ndarray, strength: float) -> np.ndarray:
    """The light that water drops add to an image: pale turquoise, darker at their lower right.

    Args:
      liquid: [N, H, W] in [0, 1], 0 where there is no drop.
      strength: share of the colour at the brightest pixel, in [0, 1].

    Returns:
      [N, H, W, 3] on the scale 0..255.
    """
    liquid = np.minimum(255 * liquid, 255).astype(np.uint8)
    depth = np.minimum(_distance(_edges(liquid)), 20)
    depth = _equalised((_neighbours(depth, np.ones((3, 3))) / 9).astype(np.uint8))
    relief = np.clip(_neighbours(depth, [[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]), 0, 255)
    light = liquid * np.rint(_neighbours(relief, np.ones((3, 3))) / 9)
    # Without a drop the original code divides 0 by 0 and the image is black; here it is unchanged.
    light /= np.maximum(light.max((1, 2), keepdims=True), 1)
    return strength * light[..., None] * np.float32([175, 238, 238])


def _neighbours(x: np.ndarray, weights: Any, mode: str = "mirror") -> np.ndarray:
    """Correlates [N, H, W] with 3x3 weights, with reflection at the edges."""
    return scipy.ndimage.correlate(x, np.asarray(weights)[None], np.float64, mode=mode)


def _edges(x: np.ndarray) -> np.ndarray:
    """Canny edges of [N, H, W] uint8, with thresholds 50 and 150 on Sobel's |dx| + |dy|."""
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
    # Weak edges count if they are connected to a strong one of the same image.
    touching = np.zeros((3, 3, 3))
    touching[1] = 1
    parts, count = scipy.ndimage.label(ridge & (size > 50), touching)
    strong = np.zeros(count + 1, bool)
    strong[parts[ridge & (size > 150)]] = True
    return strong[parts]


def _distance(edges: np.ndarray) -> np.ndarray:
    """Distance of every pixel [N, H, W] to the nearest edge of its image, infinite without one.

    Distances are those of a 5x5 chamfer mask (Borgefors, 1986), within 2% of Euclidean ones.
    """
    if not edges.any():
        return np.full(edges.shape, np.inf)
    # The large spacing along the first axis excludes the edges of other images.
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
    """Equalises the histogram of every image [N, H, W] uint8; constant images are unchanged."""
    n = len(x)
    levels = x.reshape(n, -1) + 256 * np.arange(n)[:, None]
    counts = np.bincount(levels.ravel(), minlength=256 * n).reshape(n, 256)
    below = counts.cumsum(1) - np.take_along_axis(counts, x.reshape(n, -1).min(1)[:, None], 1)
    total = below[:, -1:]
    table = np.where(total > 0, np.rint(below * (255 / np.maximum(total, 1))), np.arange(256))
    return table.ravel()[levels].reshape(x.shape)
