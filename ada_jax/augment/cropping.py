"""Random crops and flips."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ada_jax import keys


@functools.partial(jax.jit, static_argnames=("pad", "flip"))
def random_crop_flip(
    key: chex.PRNGKey, x: jax.Array, *, pad: int = 4, flip: bool = True
) -> jax.Array:
    """Crops each image at random from its zero-padded version, and flips half of the images.

    Args:
      key: random key, or one per example [B].
      x: [B, H, W, C] float32.
      pad: padding in pixels; the shift is uniform in -pad..pad along both axes, 0 disables it.
      flip: whether to flip each image left to right with probability 1/2.

    Returns:
      [B, H, W, C] float32.
    """
    chex.assert_rank(x, 4)
    chex.assert_type(x, jnp.float32)

    def one(key, image):
        crop_key, flip_key = jax.random.split(key)
        if pad:
            corner = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1, jnp.int32)
            padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
            image = lax.dynamic_slice(padded, (*corner, jnp.int32(0)), image.shape)
        if flip:
            image = jnp.where(
                jax.random.bernoulli(flip_key, np.float32(0.5)), image[:, ::-1], image
            )
        return image

    return jax.vmap(one)(keys.per_example(key, len(x)), x)
