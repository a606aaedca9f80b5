"""Winograd's 3x3 convolutions along the height only, for few channels on XLA's CPU back end.

F(4, 3) of Lavin and Gray, "Fast algorithms for convolutional neural networks" (2016): six rows of
an image are transformed, and six matrix products of three neighbouring pixels replace twelve. That
is half of the multiplications. `winograd` needs a quarter, but with few channels its transforms
cost more than that saves. Here they are sums of whole rows: images are [G,H,WC].
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ada_jax.nets import winograd

# Channels on the narrower side; with more, `winograd` is faster. On one core, 32x32 pixels and 16
# channels take 50 us forward and 110 for both gradients; XLA's convolution takes 109, and
# `patch_gradients` 150.
_CHANNELS = range(8, 32)
_MOST_CHANNELS = 64  # On the wider side.
_LEAST_PIXELS = 256  # With fewer, the kernel's transform costs more.
_KERNEL = winograd.KERNEL.astype(np.float32)  # A product with float64 would be float64 under x64.


def pays(x: jax.Array, w: jax.Array, stride: int, padding: int) -> bool:
    """Whether a convolution of images [G,H,W,C] is fastest by this algorithm, measured on a CPU."""
    return (
        w.shape[:2] == (3, 3)
        and stride == 1
        and padding <= 2
        and x.dtype == w.dtype == jnp.float32
        and min(w.shape[2:]) in _CHANNELS
        and max(w.shape[2:]) <= _MOST_CHANNELS
        and math.prod(x.shape[:3]) >= _LEAST_PIXELS
    )


def convolve(x: jax.Array, w: jax.Array, padding: int) -> jax.Array:
    """Convolves images with one 3x3 kernel at stride 1.

    Args:
      x: images [G,H,W,C].
      w: kernel [3,3,C,O].
      padding: zeros on every side, 0 to 2.

    Returns:
      [G,H',W',O] with H' = H + 2 padding - 2.
    """
    height, width = (n + 2 * padding - 2 for n in x.shape[1:3])
    kernel, groups = _kernel(w), winograd.groups(x)
    y = lax.map(lambda x: _result(_tiles(x, height, width, padding) @ kernel, width), groups)
    return y.reshape(-1, -(-height // 4) * 4, width, w.shape[-1])[: len(x), :height]


def gradients(
    x: jax.Array, w: jax.Array, dy: jax.Array, padding: int
) -> tuple[jax.Array, jax.Array]:
    """The gradients (dx, dw) of `convolve` from that of its output [G,H',W',O]."""
    tiles = _tiles(dy, *x.shape[1:3], 2 - padding)
    dx = _result(tiles @ _kernel(jnp.swapaxes(w[::-1, ::-1], 2, 3)), x.shape[2])
    dw = jnp.swapaxes(_spread(x), 1, 2) @ tiles
    dw = (_KERNEL.T @ dw.reshape(6, -1)).reshape(3, w.shape[2], 3, -1)
    dx = dx.reshape(len(x), -1, *x.shape[2:])[:, : x.shape[1]]
    return dx, dw.swapaxes(1, 2)[::-1, ::-1]


def _tiles(x: jax.Array, height: int, width: int, padding: int) -> jax.Array:
    """Transformed rows of three pixels [6,T,3C] of images [G,H,W,C], for results [G,h,w]."""
    n = -(-height // 4)
    after = 4 * n + 2 - padding - x.shape[1]
    rows = jnp.pad(x.reshape(*x.shape[:2], -1), [(0, 0), (padding, after), (0, 0)])
    rows = winograd.combine(winograd.IMAGE, lambda k: rows[:, k : k + 4 * n - 3 : 4])
    rows = rows.reshape(6, len(x), n, *x.shape[2:])
    rows = jnp.pad(rows, [(0, 0), (0, 0), (0, 0), (padding, padding), (0, 0)])
    three = jnp.concatenate([rows[:, :, :, j : j + width] for j in range(3)], -1)
    return three.reshape(6, -1, three.shape[-1])


def _result(products: jax.Array, width: int) -> jax.Array:
    """Transforms products [6,T,O] to images [h/4,4,wO], or of several images together."""
    products = products.reshape(6, -1, width * products.shape[-1])
    return winograd.combine(winograd.RESULT, lambda k: products[k], axis=1)


def _spread(x: jax.Array) -> jax.Array:
    """The transpose of `_result`: images [G,h,w,C] to [6,T,C]."""
    rows = jnp.pad(x.reshape(*x.shape[:2], -1), [(0, 0), (0, -x.shape[1] % 4), (0, 0)])
    rows = rows.reshape(-1, 4, rows.shape[-1])
    return winograd.combine(winograd.RESULT.T, lambda k: rows[:, k]).reshape(6, -1, x.shape[-1])


def _kernel(w: jax.Array) -> jax.Array:
    """Transforms kernels [3,3,C,O] to [6,3C,O]."""
    return (_KERNEL @ w.reshape(3, -1)).reshape(6, -1, w.shape[-1])
