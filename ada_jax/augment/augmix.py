"""AugMix on the device: random chains of image operations, mixed (Hendrycks et al., 2020).

The operations follow Pillow's integer arithmetic, so that an image comes out as the published
augmentation has it. All examples run the same program whatever they draw: on TPUs and GPUs every
operation is computed and one selected; on a CPU, example by example, only the one that was drawn.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ada_jax import checks, keys, sharding
from ada_jax.errors import UserError

OPS = (
    "autocontrast",
    "equalize",
    "posterize",
    "rotate",
    "solarize",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
EXTRA_OPS = ("color", "contrast", "brightness", "sharpness")  # overlap with test corruptions


def augment_and_mix(
    key: jax.Array,
    x: jax.Array,
    *,
    severity: float = 3.0,
    width: int = 3,
    depth: int = -1,
    alpha: float = 1.0,
    ops: Sequence[str] = OPS,
) -> jax.Array:
    """Mixes every image with `width` chains of random operations on it.

    The batch may be split over several devices, as for `ada_jax.adversarial_augment`.

    Args:
      key: random key, or one per example [B].
      x: images [B,H,W,3] of any floating type, in [0,1]; the chains work on them rounded to 8
        bits.
      severity: upper end of the operations' levels, from 0.1 up to 10.
      width: chains per image.
      depth: operations per chain; -1 draws 1, 2 or 3 for each chain.
      alpha: the chains' weights are Dirichlet(alpha), the mixture's share is Beta(alpha, alpha).
      ops: names of OPS and EXTRA_OPS to draw from.

    Returns:
      Images [B,H,W,3], float32 in [0,1].

    Raises:
      UserError: a parameter or an image out of its range. A traced image out of range becomes NaN.

    Source: Hendrycks et al. (2020), algorithm 1.
    """
    x = checks.as_images(jnp.asarray(x))
    if x.shape[-1] != 3:
        raise UserError(f"Images of shape {list(x.shape)} must have three channels for AugMix.")
    check(severity, width, depth, alpha, ops)
    mix = functools.partial(
        _mix, severity=severity, width=width, depth=depth, alpha=alpha, ops=tuple(ops)
    )
    return sharding.on_mesh(mix, None, x, keys.of_batch(key, x))


def _mix(
    _: None,
    x: jax.Array,
    example_keys: jax.Array,
    *,
    severity: float,
    width: int,
    depth: int,
    alpha: float,
    ops: tuple[str, ...],
) -> jax.Array:
    """`augment_and_mix` of what it has checked."""
    severity, alpha = checks.float32(severity), checks.float32(alpha)
    most = depth if depth > 0 else 3

    def draw(key):
        names = ("op", "level", "sign", "depth", "weights", "share")
        k = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        levels = jax.random.uniform(k["level"], (width, most), jnp.float32, 0.1, severity)
        signs = jax.random.bernoulli(k["sign"], np.float32(0.5), (width, most))
        signs = jnp.where(signs, -1.0, 1.0).astype(jnp.float32)
        # Index 0 is no operation: what is left of a chain shorter than the longest.
        drawn = 1 + jax.random.randint(k["op"], (width, most), 0, len(ops), jnp.int32)
        depths = jax.random.randint(k["depth"], (width, 1), 1, 4, jnp.int32) if depth < 0 else depth
        drawn = jnp.where(jnp.arange(most) < depths, drawn, 0)
        weights = jax.random.dirichlet(k["weights"], jnp.full(width, alpha), dtype=jnp.float32)
        share = jax.random.beta(k["share"], alpha, alpha, dtype=jnp.float32)
        return drawn, levels, signs, weights, share

    drawn, levels, signs, weights, share = jax.vmap(draw)(example_keys)
    pixels = jnp.round(255 * x).astype(jnp.int32)
    chains = jnp.repeat(pixels, width, 0)
    for i in range(most):
        chains = apply_ops(
            chains, *(a[:, :, i].reshape(-1) for a in (drawn, levels, signs)), ops=("", *ops)
        )
    chains = chains.reshape(len(x), width, *x.shape[1:]).astype(jnp.float32) / 255
    mixed = jnp.einsum("bw,bwijc->bijc", weights, chains, precision="highest")
    share = share[:, None, None, None]
    return (1 - share) * checks.nan_if_invalid(x) + share * mixed


def apply_ops(
    images: jax.Array, op: jax.Array, level: jax.Array, sign: jax.Array, *, ops: Sequence[str]
) -> jax.Array:
    """Applies to every image the operation drawn for it.

    Args:
      images: [N,H,W,3] int32 in 0..255.
      op: index into `ops` [N].
      level: [N] in 0.1..10, before an operation's own scale.
      sign: [N] of -1 or 1, for rotations, shears and translations.
      ops: names; '' leaves an image as it is.

    Returns:
      [N,H,W,3] int32 in 0..255.
    """
    one = functools.partial(_apply_one, ops=tuple(ops))
    return lax.platform_dependent(
        images,
        op,
        level,
        sign,
        cpu=lambda *a: sharding.map_examples(lambda a: one(*a), a),
        default=jax.vmap(one),
    )


def _apply_one(
    image: jax.Array, op: jax.Array, level: jax.Array, sign: jax.Array, *, ops: tuple[str, ...]
) -> jax.Array:
    """One operation on one image [H,W,3]; all geometric ones share one branch."""
    height, width = image.shape[:2]
    matrix = jnp.stack([_matrix(name, level, sign, height, width) for name in ops])[op]
    branches = {"": lambda: image, "affine": lambda: affine(image, matrix)}
    # It varies from out here: `jax.vmap` of branches that make a constant vary inside
    # `jax.shard_map` fails in JAX 0.10 to 0.12.
    rounding = sharding.varying(jnp.asarray(_rounding_of_pillow()), image)
    plain = _PLAIN | {"autocontrast": functools.partial(autocontrast, rounding=rounding)}
    branches |= {n: functools.partial(f, image, level) for n, f in plain.items() if n in ops}
    kinds = [name if name in branches else "affine" for name in ops]
    names = sorted(branches)
    return lax.switch(jnp.array([names.index(k) for k in kinds])[op], [branches[n] for n in names])


def _matrix(name: str, level: jax.Array, sign: jax.Array, height: int, width: int) -> jax.Array:
    """The affine map (a,b,c,d,e,f) from output to input pixels; the identity for other names."""
    one, zero = jnp.float32(1), jnp.float32(0)
    match name:
        case "rotate":
            radians = -sign * jnp.deg2rad(jnp.floor(3 * level))
            a, b = jnp.cos(radians), jnp.sin(radians)
            c = width / 2 - a * width / 2 - b * height / 2
            f = height / 2 + b * width / 2 - a * height / 2
            values = (a, b, c, -b, a, f)
        case "shear_x":
            values = (one, sign * level * 0.03, zero, zero, one, zero)
        case "shear_y":
            values = (one, zero, zero, sign * level * 0.03, one, zero)
        case "translate_x":
            values = (one, zero, sign * jnp.floor(level * (width / 3) / 10), zero, one, zero)
        case "translate_y":
            values = (one, zero, zero, zero, one, sign * jnp.floor(level * (height / 3) / 10))
        case _:
            values = (one, zero, zero, zero, one, zero)
    return jnp.stack(values)


# ------------------------------------------------------- operations: [H,W,3] int32 in 0..255


def affine(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """Pillow's bilinear affine transform; what comes from outside the image is black.

    Args:
      image: [H,W,3].
      matrix: (a,b,c,d,e,f): output pixel centre (x,y) shows input (ax+by+c, dx+ey+f).

    Returns:
      [H,W,3].
    """
    height, width, _ = image.shape
    x = jnp.arange(width, dtype=jnp.float32) + 0.5
    y = jnp.arange(height, dtype=jnp.float32)[:, None] + 0.5
    a, b, c, d, e, f = matrix
    xs, ys = a * x + b * y + c, d * x + e * y + f
    inside = (xs >= 0) & (xs < width) & (ys >= 0) & (ys < height)
    left, top = jnp.floor(xs - 0.5), jnp.floor(ys - 0.5)
    across, down = (xs - 0.5 - left)[..., None], (ys - 0.5 - top)[..., None]
    columns = [jnp.clip(left.astype(jnp.int32) + i, 0, width - 1) for i in (0, 1)]
    rows = [jnp.clip(top.astype(jnp.int32) + i, 0, height - 1) for i in (0, 1)]
    # One gather a corner: the three channels travel in one number.
    packed = (image[..., 0] << 16 | image[..., 1] << 8 | image[..., 2]).reshape(-1)

    def corner(row, column):
        value = packed[row * width + column]
        return jnp.stack([value >> 16, value >> 8 & 255, value & 255], -1).astype(jnp.float32)

    upper, lower = (
        corner(row, columns[0]) * (1 - across) + corner(row, columns[1]) * across for row in rows
    )
    value = upper * (1 - down) + lower * down
    return jnp.where(inside[..., None], value, 0).astype(jnp.int32)


def autocontrast(image: jax.Array, level: jax.Array, rounding: jax.Array) -> jax.Array:
    """Stretches every channel to 0..255, rounding as `_rounding_of_pillow` has it."""
    del level

    def one(channel):
        low, high = channel.min(), channel.max()
        table = (jnp.arange(256, dtype=jnp.int32) - low) * 255 // jnp.maximum(high - low, 1)
        octets = rounding[low, high]
        less = (octets[:, None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
        table = jnp.clip(table - less.reshape(256), 0, 255)
        return jnp.where(high > low, table[channel], channel)

    return jax.vmap(one, 2, 2)(image)


@functools.cache
def _rounding_of_pillow() -> np.ndarray:
    """Bits, [low, high, value], of where Pillow's float64 arithmetic falls below a whole number."""
    low, high = np.arange(256.0)[:, None, None], np.arange(256.0)[:, None]
    value = np.arange(256.0)
    width = np.maximum(high - low, 1)
    pillows = np.floor(value * (255.0 / width) - low * (255.0 / width))
    exact = np.floor((value - low) * 255.0 / width)
    return np.packbits((pillows < exact) & (high > low), axis=-1, bitorder="little")


def equalize(image: jax.Array, level: jax.Array) -> jax.Array:
    """Flattens every channel's histogram."""
    del level

    def one(channel):
        counts = lax.platform_dependent(channel, cpu=_scattered, default=_multiplied)
        step = (channel.size - counts[channel.max()]) // 255
        below = jnp.cumsum(counts, dtype=jnp.int32) - counts
        table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
        return jnp.where(step > 0, table[channel], channel)

    return jax.vmap(one, 2, 2)(image)


def _scattered(values: jax.Array) -> jax.Array:
    """Counts [256] of integers in 0..255, the quickest way on a CPU."""
    return jnp.zeros(256, jnp.int32).at[values].add(1)


def _multiplied(values: jax.Array) -> jax.Array:
    """The same as a matrix product of the integers' two hexadecimal digits."""
    digits = jnp.stack([values.reshape(-1) // 16, values.reshape(-1) % 16])
    high, low = (digits[..., None] == jnp.arange(16)).astype(jnp.float32)
    return jnp.matmul(high.T, low, precision="highest").reshape(256).astype(jnp.int32)


def posterize(image: jax.Array, level: jax.Array) -> jax.Array:
    """Keeps the upper 4 bits or less."""
    bits = 4 - (level * 4 / 10).astype(jnp.int32)
    return image & (256 - (1 << (8 - bits)))


def solarize(image: jax.Array, level: jax.Array) -> jax.Array:
    """Inverts what is bright."""
    threshold = 256 - (level * 256 / 10).astype(jnp.int32)
    return jnp.where(image < threshold, image, 255 - image)


def color(image: jax.Array, level: jax.Array) -> jax.Array:
    """Takes colour away, or adds some above level 5."""
    return _blend(_grey(image)[..., None], image, level)


def contrast(image: jax.Array, level: jax.Array) -> jax.Array:
    """Draws the image towards its mean grey."""
    grey = _grey(image)
    return _blend((2 * grey.sum(dtype=jnp.int32) + grey.size) // (2 * grey.size), image, level)


def brightness(image: jax.Array, level: jax.Array) -> jax.Array:
    """Draws the image towards black."""
    return _blend(jnp.zeros_like(image), image, level)


def sharpness(image: jax.Array, level: jax.Array) -> jax.Array:
    """Draws the image towards a smoothed copy of it."""
    height, width, _ = image.shape
    around = sum(image[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3))
    smooth = (2 * (around + 4 * image[1:-1, 1:-1]) + 13) // 26
    return _blend(image.at[1:-1, 1:-1].set(smooth), image, level)


def _grey(image: jax.Array) -> jax.Array:
    return (19595 * image[..., 0] + 38470 * image[..., 1] + 7471 * image[..., 2] + 32768) >> 16


def _blend(degenerate: jax.Array, image: jax.Array, level: jax.Array) -> jax.Array:
    """Pillow's blend with the factor that belongs to a level."""
    factor = level * np.float32(1.8) / 10 + np.float32(0.1)
    degenerate = degenerate.astype(jnp.float32)
    value = degenerate + factor * (image.astype(jnp.float32) - degenerate)
    return jnp.clip(value.astype(jnp.int32), 0, 255)


_PLAIN = {
    "autocontrast": autocontrast,
    "equalize": equalize,
    "posterize": posterize,
    "solarize": solarize,
    "color": color,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
}


def check(severity: float, width: int, depth: int, alpha: float, ops: Sequence[str]) -> None:
    """Refuses settings of `augment_and_mix` that are out of their range.

    Raises:
      UserError: naming the first of them.
    """
    known = (*OPS, *EXTRA_OPS)
    if unknown := [name for name in ops if name not in known]:
        raise UserError(
            f"ops has {unknown[0]!r}, which is unknown: choose from {', '.join(known)}."
        )
    if not ops:
        raise UserError("ops is empty: name at least one operation of AugMix.")
    if not 0.1 <= severity <= 10:
        raise UserError(f"severity={severity} must be in 0.1..10 (AugMix's own is 3).")
    if width < 1 or (depth < 1 and depth != -1):
        raise UserError(
            f"width={width} and depth={depth} must be 1 or more, or depth -1 to draw it."
        )
    if not 0 < alpha < np.inf:
        raise UserError(f"alpha={alpha} must be positive and finite (AugMix's own is 1).")
