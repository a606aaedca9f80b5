"""Random keys, one per example, so that no example's draw depends on the batch around it."""

import jax
import jax.numpy as jnp


def per_example(key: jax.Array, count: int) -> jax.Array:
    """One key per example.

    Args:
      key: one key (typed or raw uint32), or already one per example [B].
      count: B.

    Returns:
      Keys [B].
    """
    single = 0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1
    return jax.random.split(key, count) if key.ndim == single else key


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
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(start + jnp.arange(count))
