"""TrivialAugment on the device: one random operation per image (Müller and Hutter, 2021)."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ada_jax import checks, keys, sharding
from ada_jax.augment import augmix
from ada_jax.errors import UserError

OPS = ("identity", *augmix.OPS, *augmix.EXTRA_OPS)
MAGNITUDES = 31


def trivial_augment(key: jax.Array, x: jax.Array, *, ops: Sequence[str] = OPS) -> jax.Array:
    """Applies to every image one random operation at one of 31 random magnitudes.

    These are AugMix's operations in the ranges of TrivialAugment's wide search space: rotation by
    up to 135 degrees, shear by up to 0.99, translation by up to 32 pixels at any image size,
    posterisation to 8 to 2 bits, solarisation from 256 down to 0, and factors from 0.01 to 2 for
    color, contrast, brightness and sharpness. These four overlap with test corruptions: leave them
    out of `ops` to train on none.

    Geometric operations interpolate bilinearly, as in AugMix, where the published code takes the
    nearest pixel. Pixels from outside the image are black in both. The batch may be split over
    several devices, as for `ada_jax.adversarial_augment`.

    Args:
      key: random key, or one per example [B].
      x: images [B,H,W,3] of any floating type, in [0,1], which are rounded to 8 bits.
      ops: names from OPS to draw from.

    Returns:
      Images [B,H,W,3], float32 in [0,1].

    Raises:
      UserError: a parameter or an image is out of range. Inside `jax.jit` such images become NaN.

    Source: Müller and Hutter, "TrivialAugment: tuning-free yet state-of-the-art data augmentation"
    (2021), algorithm 1 and table 1, and its code, by which factors rise with the magnitude.
    """
    x = checks.as_images(jnp.asarray(x))
    if x.shape[-1] != 3:
        raise UserError(
            f"Images of shape {list(x.shape)} must have three channels for TrivialAugment."
        )
    augmix.check_ops(ops, OPS)
    augment = functools.partial(_augment, ops=tuple(ops))
    return sharding.on_mesh(augment, None, x)(x, keys.of_batch(key, x))


def _augment(_: None, x: jax.Array, example_keys: jax.Array, *, ops: tuple[str, ...]) -> jax.Array:
    """`trivial_augment` with checked arguments."""

    def draw(key):
        op, magnitude, sign = jax.random.split(key, 3)
        return (
            jax.random.randint(op, (), 0, len(ops), jnp.int32),
            jax.random.randint(magnitude, (), 0, MAGNITUDES, jnp.int32),
            jnp.where(jax.random.bernoulli(sign, np.float32(0.5)), -1, 1).astype(jnp.int32),
        )

    pixels = jnp.round(255 * x).astype(jnp.int32)
    names = ["" if name == "identity" else name for name in ops]
    pixels = augmix.apply_ops(pixels, *jax.vmap(draw)(example_keys), ops=names, amount=amount)
    return pixels.astype(jnp.float32) / 255 + 0 * checks.nan_if_invalid(x)


def amount(
    name: str, magnitude: jax.Array, sign: jax.Array, height: int, width: int
) -> jax.Array | float:
    """The parameter of an operation at a magnitude in 0..30; see `augmix.apply_ops`."""
    del height, width
    steps = MAGNITUDES - 1
    match name:
        case "rotate":
            return sign * (magnitude * 135 // steps)
        case "shear_x" | "shear_y":
            return sign * magnitude * np.float32(0.99 / steps)
        case "translate_x" | "translate_y":
            return sign * (magnitude * 32 // steps)
        case "posterize":
            return 8 - magnitude * 6 // steps
        case "solarize":
            return 256 - magnitude * 256 // steps
        case "color" | "contrast" | "brightness" | "sharpness":
            factors = 0.01 + np.arange(MAGNITUDES) * ((2.0 - 0.01) / steps)
            return jnp.asarray(factors, jnp.float32)[magnitude]
    return 0.0
