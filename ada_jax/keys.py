"""One random key per example, so that an example's draw does not depend on its batch."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ada_jax import sharding
from ada_jax.errors import UserError


def per_example(key: jax.Array, count: int) -> jax.Array:
    """Splits a key into one per example.

    Args:
      key: one key, typed or raw (threefry's uint32[2]), or one per example [B], which is returned.
        `jax.vmap` of keys of other implementations, such as 'rbg', draws for the whole batch: then
        an example's draw depends on its batch.
      count: B.

    Returns:
      Keys [B].

    Raises:
      UserError: `key` is not a key, or there are neither 1 nor B of them.
    """
    if is_single(key):
        return jax.random.split(key, count)
    if key.ndim > _dimensions(key) + 1:
        raise UserError(f"The keys have shape {list(key.shape)}: give one key, or one per image.")
    if len(key) != count:
        raise UserError(
            f"The batch of keys has {len(key)} for {count} images: give one key, without a batch "
            f"axis, or {count}."
        )
    return key


def of_batch(key: jax.Array, x: jax.Array) -> jax.Array:
    """Splits a key into one per example of images x [B,H,W,C].

    Inside `jax.shard_map`, where x is a device's shard, a key that is equal on all devices is split
    over the whole batch. Every example then gets the key that it would get on one device.

    Args:
      key: as for `per_example`.
      x: images.

    Returns:
      Keys [B].
    """
    if is_single(key):
        index, parts = sharding.shard_index(x, key)
        all_keys = jax.random.split(key, parts * len(x))
        return lax.dynamic_slice_in_dim(all_keys, index * len(x), len(x))
    return sharding.varying(per_example(key, len(x)), x)


def is_single(key: jax.Array) -> bool:
    """Whether `key` is one key, typed or raw, not several.

    Raises:
      UserError: it is not a key.
    """
    check(key)
    return key.ndim == _dimensions(key)


def check(key: jax.Array) -> None:
    """Raises UserError unless `key` is one or several random keys, typed or raw."""
    dtype, shape = getattr(key, "dtype", np.dtype(object)), np.shape(key)
    typed = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and not (dtype == np.uint32 and shape[-1:] == (2,)):
        raise UserError(
            f"key={key!r} is neither a typed random key nor a raw one of threefry (uint32[2]): "
            "give jax.random.key(0), for example."
        )


def of_positions(key: jax.Array, start: jax.Array | int, count: int) -> jax.Array:
    """Keys of the examples at positions start, ..., start + count - 1 of the global batch.

    They do not depend on the number of devices that the batch is split over.

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
    """Number of dimensions of a single key: 0 if typed, 1 if raw."""
    return 0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1
