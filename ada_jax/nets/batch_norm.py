"""Batch normalisation whose sums over pixels are fast on CPUs."""

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax

from ada_jax import sharding


class BatchNorm(hk.BatchNorm):
    """`hk.BatchNorm` of images [B,H,W,C], with its parameters, state and results.

    XLA's CPU back end fuses the sums of squares, and the backward pass's sums, with the computation
    of their summands, which keeps them from being vectorised. The forward and backward pass of 32
    images of 32x32 with 16 channels takes 2.7 ms on one core with XLA's sums and 1.2 ms here; of
    16x16 with 32 channels, 1.3 and 0.2 ms.
    """

    def __call__(self, x: jax.Array, is_training: bool, test_local_stats: bool) -> jax.Array:
        """Normalises x by the statistics of the batch, or without either flag by running ones."""
        if is_training or test_local_stats:
            mean, mean_of_squares = _mean(x), _mean(jnp.square(x))
            if self.cross_replica_axis:
                mean, mean_of_squares = lax.pmean((mean, mean_of_squares), self.cross_replica_axis)
            var = mean_of_squares - jnp.square(mean)
        else:
            mean, var = self.mean_ema.average, self.var_ema.average
        if is_training:
            self.mean_ema(mean)
            self.var_ema(var)
        shape = (1, 1, 1, x.shape[-1])
        scale = hk.get_parameter("scale", shape, x.dtype, self.scale_init)
        offset = hk.get_parameter("offset", shape, x.dtype, self.offset_init)
        return _normalise(*sharding.alike(x, mean, scale * lax.rsqrt(var + self.eps), offset))


@jax.custom_vjp
def _mean(x: jax.Array) -> jax.Array:
    """Channel means [1,1,1,C] of images [B,H,W,C]."""
    return _sum(x) / (x.size // x.shape[-1])


def _mean_bwd(x, dy):
    return (jnp.broadcast_to(dy / (x.size // x.shape[-1]), x.shape),)


_mean.defvjp(lambda x: (_mean(x), x), _mean_bwd)


@jax.custom_vjp
def _normalise(x: jax.Array, mean: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
    return (x - mean) * scale + offset


def _normalise_fwd(x, mean, scale, offset):
    return _normalise(x, mean, scale, offset), (x, mean, scale)


def _normalise_bwd(saved, dy):
    (x, mean, scale), total = saved, _sum(dy)
    return dy * scale, -scale * total, _sum(dy * (x - mean)), total


_normalise.defvjp(_normalise_fwd, _normalise_bwd)


def _sum(x: jax.Array) -> jax.Array:
    """Channel sums [1,1,1,C] of images [B,H,W,C]."""
    plain = lambda x: x.sum((0, 1, 2), keepdims=True)  # noqa: E731
    return lax.platform_dependent(x, cpu=_sum_by_products, default=plain)


def _sum_by_products(x: jax.Array) -> jax.Array:
    """A product with a row of ones for each image: XLA runs these at the memory's speed."""
    ones = jnp.ones_like(x[..., 0]).reshape(len(x), 1, -1)
    return (ones @ x.reshape(len(x), -1, x.shape[-1])).sum(0).reshape(1, 1, 1, -1)
