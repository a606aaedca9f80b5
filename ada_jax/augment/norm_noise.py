"""Noise drawn per image from a mix of p-norm balls (Siedel et al., 2024)."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ada_jax import checks, keys, sharding
from ada_jax.errors import UserError

NORMS = ("l0", "l2", "linf")
RADII = {"l0": 0.12, "l1": 0.065, "l2": 0.09, "linf": 0.15}


def add_noise(
    key: jax.Array,
    x: jax.Array,
    *,
    norms: Sequence[str] = NORMS,
    radii: Mapping[str, float] = RADII,
    share: float = 0.5,
) -> jax.Array:
    """Adds noise from a randomly drawn norm ball to a share of the images.

    The norm is uniform among `norms`, and the radius uniform from 0 to the norm's largest. 'linf'
    is uniform inside the ball. 'l1' and 'l2' are uniform on its surface, which a sample from inside
    is close to in so many dimensions. 'l0' replaces values by 0 or 1, independently for each
    channel.

    Radii do not depend on the image size, because they are means over an image's values: the
    expected share of replaced values (l0), the mean absolute noise (l1), its root mean square (l2)
    and its bound (linf). For images of 32x32x3, 0.065 and 0.09 are an l1 norm of 200 and an l2 norm
    of 5.0. Clipping to [0,1] makes the noise smaller.

    'l2' is in effect the test corruption Gaussian noise and 'l0' impulse noise; all resemble shot
    noise. The batch may be split over several devices, as for `ada_jax.adversarial_augment`.

    Args:
      key: random key, or one per example [B].
      x: images [B,H,W,C] of any floating type, in [0,1].
      norms: names from RADII to draw from.
      radii: the largest radius of each of `norms`, {norm: radius}, in (0, 1].
      share: an image's probability of getting noise, in 0..1.

    Returns:
      Images [B,H,W,C], float32 in [0,1].

    Raises:
      UserError: a parameter or an image is out of range. Inside `jax.jit` such images become NaN.

    Source: Siedel et al., "Investigating the corruption robustness of image classifiers with random
    p-norm corruptions" (2024), with the norms and largest radii of its code for training on CIFAR;
    that of l1 is the largest that it tests with. The published noise is shared by a minibatch, and
    its sampling on the sphere is that of Calafiore et al., "Uniform sample generation in l_p balls"
    (1998).
    """
    x = checks.as_images(jnp.asarray(x))
    check(norms, radii, share)
    largest = tuple(float(radii[norm]) for norm in norms)
    add = functools.partial(_add, norms=tuple(norms), radii=largest, share=share)
    return sharding.on_mesh(add, None, x)(x, keys.of_batch(key, x))


def _add(
    _: None,
    x: jax.Array,
    example_keys: jax.Array,
    *,
    norms: tuple[str, ...],
    radii: tuple[float, ...],
    share: float,
) -> jax.Array:
    """`add_noise` with checked arguments."""

    def one(key, image):
        names = ("share", "norm", "radius", "values")
        k = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        norm = jax.random.randint(k["norm"], (), 0, len(norms), jnp.int32)
        radius = jnp.asarray(radii, jnp.float32)[norm] * jax.random.uniform(
            k["radius"], (), jnp.float32
        )
        # All norms transform the same uniform values, because only one is selected.
        above = np.nextafter(np.float32(-1), np.float32(0))
        values = jax.random.uniform(k["values"], image.shape, jnp.float32, above, 1.0)
        noisy = lax.select_n(norm, *(_NOISY[name](image, values, radius) for name in norms))
        chosen = jax.random.bernoulli(k["share"], checks.float32(share))
        return jnp.where(chosen, jnp.clip(noisy, 0.0, 1.0), image)

    return jax.vmap(one)(example_keys, checks.nan_if_invalid(x))


# ------------------- (image [H,W,C], values [H,W,C] uniform in (-1,1), radius) -> noisy image


def _l0(image: jax.Array, values: jax.Array, radius: jax.Array) -> jax.Array:
    extreme = (values > 0) + 0 * image  # NaN stays NaN.
    return jnp.where(jnp.abs(values) > 1 - radius, extreme, image)


def _l1(image: jax.Array, values: jax.Array, radius: jax.Array) -> jax.Array:
    laplacian = -jnp.sign(values) * jnp.log1p(-jnp.abs(values))
    return image + radius * laplacian / jnp.mean(jnp.abs(laplacian))


def _l2(image: jax.Array, values: jax.Array, radius: jax.Array) -> jax.Array:
    gaussian = lax.erf_inv(values)  # The scale cancels.
    return image + radius * gaussian * lax.rsqrt(jnp.mean(jnp.square(gaussian)))


def _linf(image: jax.Array, values: jax.Array, radius: jax.Array) -> jax.Array:
    return image + radius * values


_NOISY = {"l0": _l0, "l1": _l1, "l2": _l2, "linf": _linf}


def check(norms: Sequence[str], radii: Mapping[str, float], share: float) -> None:
    """Raises UserError for the first argument of `add_noise` that is out of range."""
    if unknown := [norm for norm in norms if norm not in RADII]:
        raise UserError(
            f"norms has the unknown norm {unknown[0]!r}: choose from {', '.join(RADII)}."
        )
    if not norms:
        raise UserError("norms is empty: name at least one norm.")
    for norm in norms:
        radius = radii.get(norm)
        if radius is None or not 0 < radius <= 1:
            raise UserError(f"radii.{norm}={radius} must be above 0 and at most 1.")
    if not 0 <= share <= 1:
        raise UserError(f"share={share} must be in 0..1.")
