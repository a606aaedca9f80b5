"""AugMix on the device: mixtures of random chains of image operations (Hendrycks et al., 2020).

The operations reproduce Pillow's integer arithmetic, which the published augmentation uses. On TPUs
and GPUs every operation is computed for every example and one is selected; on a CPU only the one
that was drawn is computed, example by example.
"""

import functools
from collections.abc import Callable, Sequence

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
EXTRA_OPS = ("color", "contrast", "brightness", "sharpness")  # They overlap with test corruptions.


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
    """Mixes every image with `width` chains of random operations applied to it.

    The batch may be split over several devices, as for `ada_jax.adversarial_augment`.

    Args:
      key: random key, or one per example [B].
      x: images [B,H,W,3] of any floating type, in [0,1], which the chains round to 8 bits.
      severity: the operations' largest level, from 0.1 to 10.
      width: chains per image.
      depth: operations per chain; -1 draws 1, 2 or 3 for each chain.
      alpha: the chains' weights are Dirichlet(alpha), the mixture's share is Beta(alpha, alpha).
      ops: names from OPS and EXTRA_OPS to draw from.

    Returns:
      Images [B,H,W,3], float32 in [0,1].

    Raises:
      UserError: a parameter or an image is out of range. Inside `jax.jit` such images become NaN.

    Source: Hendrycks et al. (2020), algorithm 1.
    """
    x = checks.as_images(jnp.asarray(x))
    if x.shape[-1] != 3:
        raise UserError(f"Images of shape {list(x.shape)} must have three channels for AugMix.")
    check(severity, width, depth, alpha, ops)
    mix = functools.partial(
        _mix, severity=severity, width=width, depth=depth, alpha=alpha, ops=tuple(ops)
    )
    return sharding.on_mesh(mix, None, x)(x, keys.of_batch(key, x))


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
    """`augment_and_mix` with checked arguments."""
    severity, alpha = checks.float32(severity), checks.float32(alpha)
    most = depth if depth > 0 else 3

    def draw(key):
        names = ("op", "level", "sign", "depth", "weights", "share")
        k = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        levels = jax.random.uniform(k["level"], (width, most), jnp.float32, 0.1, severity)
        signs = jax.random.bernoulli(k["sign"], np.float32(0.5), (width, most))
        signs = jnp.where(signs, -1.0, 1.0).astype(jnp.float32)
        # Index 0 is no operation; it pads chains that are shorter than the longest.
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
    # The weights sum to 1 only up to rounding.
    return jnp.clip((1 - share) * checks.nan_if_invalid(x) + share * mixed, 0.0, 1.0)


def amount(
    name: str, level: jax.Array, sign: jax.Array, height: int, width: int
) -> jax.Array | float:
    """AugMix's parameter of an operation at a level; `apply_ops` lists its meanings."""
    match name:
        case "rotate":
            return sign * jnp.floor(3 * level)
        case "shear_x" | "shear_y":
            return sign * level * 0.03
        case "translate_x":
            return sign * jnp.floor(level * (width / 3) / 10)
        case "translate_y":
            return sign * jnp.floor(level * (height / 3) / 10)
        case "posterize":
            return 4 - jnp.floor(level * 4 / 10)
        case "solarize":
            return 256 - jnp.floor(level * 256 / 10)
        case "color" | "contrast" | "brightness" | "sharpness":
            return level * np.float32(1.8) / 10 + np.float32(0.1)
    return 0.0


def apply_ops(
    images: jax.Array,
    op: jax.Array,
    level: jax.Array,
    sign: jax.Array,
    *,
    ops: Sequence[str],
    amount: Callable[..., jax.Array | float] = amount,
) -> jax.Array:
    """Applies to every image its own operation.

    Args:
      images: [N,H,W,3] int32 in 0..255.
      op: index into `ops` [N].
      level: [N], before the operation's own scaling; AugMix's are in 0.1..10.
      sign: [N], -1 or 1, for rotations, shears and translations.
      ops: names; '' is the identity.
      amount: (name, level, sign, H, W) -> the operation's parameter: degrees to rotate by, pixels
        per pixel to shear by, pixels to translate by, bits to keep (posterize), the smallest
        inverted value (solarize), or the factor of color, contrast, brightness and sharpness.

    Returns:
      [N,H,W,3] int32 in 0..255.
    """
    one = functools.partial(_apply_one, ops=tuple(ops), amount=amount)
    return lax.platform_dependent(
        images,
        op,
        level,
        sign,
        cpu=lambda *a: sharding.map_examples(lambda a: one(*a), a),
        default=jax.vmap(one),
    )


def _apply_one(
    image: jax.Array,
    op: jax.Array,
    level: jax.Array,
    sign: jax.Array,
    *,
    ops: tuple[str, ...],
    amount: Callable[..., jax.Array | float] = amount,
) -> jax.Array:
    """Applies one operation to one image [H,W,3]; geometric operations share one branch."""
    height, width = image.shape[:2]
    amounts = {name: jnp.float32(amount(name, level, sign, height, width)) for name in ops}
    matrix = jnp.stack([_matrix(name, amounts[name], height, width) for name in ops])[op]
    branches = {"": lambda: image, "affine": lambda: affine(image, matrix)}
    # Cast outside of the branches: in JAX 0.10 to 0.12, inside `jax.shard_map`, `jax.vmap` of
    # branches that cast a constant to vary fails.
    rounding = sharding.varying(jnp.asarray(_rounding_of_pillow()), image)
    plain = _PLAIN | {"autocontrast": functools.partial(autocontrast, rounding=rounding)}
    branches |= {n: functools.partial(f, image, amounts[n]) for n, f in plain.items() if n in ops}
    kinds = [name if name in branches else "affine" for name in ops]
    names = sorted(branches)
    return lax.switch(jnp.array([names.index(k) for k in kinds])[op], [branches[n] for n in names])


def _matrix(name: str, amount: jax.Array, height: int, width: int) -> jax.Array:
    """The affine map (a,b,c,d,e,f) from output to input pixels; the identity for other names."""
    one, zero = jnp.float32(1), jnp.float32(0)
    match name:
        case "rotate":
            radians = -jnp.deg2rad(amount)
            a, b = jnp.cos(radians), jnp.sin(radians)
            a = jnp.where(jnp.abs(a) < 1e-6, 0.0, a)  # of 90 degrees, where float32 has -4e-8
            c = width / 2 - a * width / 2 - b * height / 2
            f = height / 2 + b * width / 2 - a * height / 2
            values = (a, b, c, -b, a, f)
        case "shear_x":
            values = (one, amount, zero, zero, one, zero)
        case "shear_y":
            values = (one, zero, zero, amount, one, zero)
        case "translate_x":
            values = (one, zero, amount, zero, one, zero)
        case "translate_y":
            values = (one, zero, zero, zero, one, amount)
        case _:
            values = (one, zero, zero, zero, one, zero)
    return jnp.stack(values)


# ------------------------------------------------------- operations: [H,W,3] int32 in 0..255


def affine(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """Pillow's bilinear affine transform; pixels from outside the image are black.

    Args:
      image: [H,W,3].
      matrix: (a,b,c,d,e,f); the output at pixel centre (x,y) is the input at (ax+by+c, dx+ey+f).

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
    # The three channels are packed into one integer, so that each corner needs one gather.
    packed = (image[..., 0] << 16 | image[..., 1] << 8 | image[..., 2]).reshape(-1)

    def corner(row, column):
        value = packed[row * width + column]
        return jnp.stack([value >> 16, value >> 8 & 255, value & 255], -1).astype(jnp.float32)

    upper, lower = (
        corner(row, columns[0]) * (1 - across) + corner(row, columns[1]) * across for row in rows
    )
    value = upper * (1 - down) + lower * down
    return jnp.where(inside[..., None], value, 0).astype(jnp.int32)


def autocontrast(image: jax.Array, amount: jax.Array, rounding: jax.Array) -> jax.Array:
    """Stretches every channel to 0..255, rounded as in Pillow (`_rounding_of_pillow`)."""
    del amount

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
    """Packed bits [low, high, value]: where Pillow's float64 arithmetic rounds one too low."""
    low, high = np.arange(256.0)[:, None, None], np.arange(256.0)[:, None]
    value = np.arange(256.0)
    width = np.maximum(high - low, 1)
    pillows = np.floor(value * (255.0 / width) - low * (255.0 / width))
    exact = np.floor((value - low) * 255.0 / width)
    return np.packbits((pillows < exact) & (high > low), axis=-1, bitorder="little")


def equalize(image: jax.Array, amount: jax.Array) -> jax.Array:
    """Equalises every channel's histogram."""
    del amount

    def one(channel):
        counts = lax.platform_dependent(
            channel, cpu=_histogram_by_scatter, default=_histogram_by_product
        )
        step = (channel.size - counts[channel.max()]) // 255
        below = jnp.cumsum(counts, dtype=jnp.int32) - counts
        table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
        return jnp.where(step > 0, table[channel], channel)

    return jax.vmap(one, 2, 2)(image)


def _histogram_by_scatter(values: jax.Array) -> jax.Array:
    """Histogram [256] of integers in 0..255, fastest on a CPU."""
    return jnp.zeros(256, jnp.int32).at[values].add(1)


def _histogram_by_product(values: jax.Array) -> jax.Array:
    """The same histogram by a matrix product of the integers' hexadecimal digits."""
    digits = jnp.stack([values.reshape(-1) // 16, values.reshape(-1) % 16])
    high, low = (digits[..., None] == jnp.arange(16)).astype(jnp.float32)
    return jnp.matmul(high.T, low, precision="highest").reshape(256).astype(jnp.int32)


def posterize(image: jax.Array, bits: jax.Array) -> jax.Array:
    """Keeps the highest bits."""
    return image & (256 - (1 << (8 - bits.astype(jnp.int32))))


def solarize(image: jax.Array, threshold: jax.Array) -> jax.Array:
    """Inverts values from a threshold on."""
    return jnp.where(image < threshold.astype(jnp.int32), image, 255 - image)


def color(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Reduces saturation, or increases it with a factor above 1."""
    return _blend(_grey(image)[..., None], image, factor)


def contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends the image with its mean grey."""
    grey = _grey(image)
    return _blend((2 * grey.sum(dtype=jnp.int32) + grey.size) // (2 * grey.size), image, factor)


def brightness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends the image with black."""
    return _blend(jnp.zeros_like(image), image, factor)


def sharpness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends the image with a smoothed copy."""
    height, width, _ = image.shape
    around = sum(image[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3))
    smooth = (2 * (around + 4 * image[1:-1, 1:-1]) + 13) // 26
    return _blend(image.at[1:-1, 1:-1].set(smooth), image, factor)


def _grey(image: jax.Array) -> jax.Array:
    return (19595 * image[..., 0] + 38470 * image[..., 1] + 7471 * image[..., 2] + 32768) >> 16


def _blend(degenerate: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """Pillow's blend."""
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
    """Raises UserError for the first argument of `augment_and_mix` that is out of range."""
    check_ops(ops, (*OPS, *EXTRA_OPS))
    checks.check_integers(1, width=width)
    checks.check_integers(-1, depth=depth)
    if not 0.1 <= severity <= 10:
        raise UserError(f"severity={severity} must be in 0.1..10 (AugMix uses 3).")
    if depth == 0:
        raise UserError("depth=0 must be at least 1, or -1 to draw it at random.")
    if not 0 < alpha < np.inf:
        raise UserError(f"alpha={alpha} must be positive and finite (AugMix uses 1).")


def check_ops(ops: Sequence[str], known: Sequence[str]) -> None:
    """Raises UserError unless `ops` are some of the known operations."""
    if unknown := [name for name in ops if name not in known]:
        raise UserError(
            f"ops has the unknown operation {unknown[0]!r}: choose from {', '.join(known)}."
        )
    if not ops:
        raise UserError("ops is empty: name at least one operation.")
