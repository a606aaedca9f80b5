"""Random keys, one per example, so that no example's draw depends on the batch around it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ada_jax import sharding
from ada_jax.errors import UserError


def per_example(key: jax.Array, count: int) -> jax.Array:
    """One key per example.

    Args:
      key: one key (typed or raw uint32), or already one per example [B].
      count: B.

    Returns:
      Keys [B].

    Raises:
      UserError: no key, or another number of them.
    """
    check(key)
    if key.ndim == _dimensions(key):
        return jax.random.split(key, count)
    if len(key) != count:
        raise UserError(f"There are {len(key)} keys for {count} images: give one, or as many.")
    return key


def of_batch(key: jax.Array, x: jax.Array) -> jax.Array:
    """One key per example of images x [B,H,W,C].

    Inside `jax.shard_map`, x being a device's part, one key that is the same on all devices is
    split over the whole batch, so that all examples draw what they would draw on one device.

    Args:
      key: as for `per_example`.
      x: images.

    Returns:
      Keys [B].
    """
    check(key)
    if key.ndim == _dimensions(key):
        index, parts = sharding.place(x, key)
        everyone = jax.random.split(key, parts * len(x))
        return lax.dynamic_slice_in_dim(everyone, index * len(x), len(x))
    return sharding.varying(per_example(key, len(x)), x)


def check(key: jax.Array) -> None:
    """Refuses what is no random key, typed or raw, nor several of them.

    Raises:
      UserError: a number, for example.
    """
    dtype, shape = getattr(key, "dtype", np.dtype(object)), np.shape(key)
    typed = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and not (dtype == np.uint32 and shape[-1:] == (2,)):
        raise UserError(f"The key {key!r} is no random key: take jax.random.key(0), for example.")


def of_positions(key: jax.Array, start: jax.Array | int, count: int) -> jax.Array:
    """Keys of the examples at positions start .. start + count - 1 of the global batch.

    A batch split over devices draws what the same batch draws on one device.

    Args:
      key: one key.
      start: position of the first example in the global batch.
      count: B.

    Returns:
      Keys [B].
    """
    positions = start + jnp.arange(count, dtype=jnp.int32)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(positions)


def _dimensions(key: jax.Array) -> int:
    """The dimensions of one key of this kind."""
    return 0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1
