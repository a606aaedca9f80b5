"""Winograd's 3x3 convolutions, with a quarter of the multiplications, for XLA's CPU back end.

F(4x4, 3x3) of Lavin and Gray, "Fast algorithms for convolutional neural networks" (2016): images
are cut into 6x6 tiles that overlap by two, tiles and kernels are transformed, and 36 matrix
products over all tiles replace nine per pixel. The result differs from a direct convolution only
by rounding errors: about 1e-5 of the output's size, against 1e-7 to 1e-6 for a direct sum.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_PIXELS = 2048  # Transformed at a time, so that the 36 matrices stay in a core's cache.
_LEAST_CHANNELS = 32  # With fewer, the transforms cost more than the products save.
_LEAST_PIXELS = 1024  # With fewer, the kernel's transform costs more.

# Transforms for interpolation at 0, 1, -1, 2, -2 and infinity: of six image values, three kernel
# values and four results.
IMAGE = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
KERNEL = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
RESULT = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)


def pays(x: jax.Array, w: jax.Array, stride: int, padding: int) -> bool:
    """Whether a convolution of images [G,H,W,C] is faster by this algorithm, measured on a CPU."""
    return (
        w.shape[:2] == (3, 3)
        and stride == 1
        and padding <= 2
        and x.dtype == w.dtype == jnp.float32
        and min(w.shape[2:]) >= _LEAST_CHANNELS
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
    size = [n + 2 * padding - 2 for n in x.shape[1:3]]
    kernel = _both(KERNEL, w.reshape(9, *w.shape[2:]))
    y = lax.map(lambda x: _result(_tiles(x, size, padding) @ kernel, size), groups(x))
    return y.reshape(-1, *y.shape[2:])[: len(x)]


def kernel_gradient(x: jax.Array, dy: jax.Array, padding: int) -> jax.Array:
    """The kernel's gradient [3,3,C,O], from images x and the gradient dy of `convolve`'s output."""

    def add(total, pair):
        x, dy = pair
        # The gradient with respect to x needs the same tiles; the compiler shares them.
        tiles = _tiles(dy, x.shape[1:3], 2 - padding)
        return total + jnp.swapaxes(_spread(x), 1, 2) @ tiles, None

    zero = jnp.zeros_like(dy, jnp.float32, shape=(36, x.shape[-1], dy.shape[-1]))
    total = lax.scan(add, zero, (groups(x), groups(dy, x)))[0]
    return _both(KERNEL.T, total).reshape(3, 3, *total.shape[1:])[::-1, ::-1]


def groups(a: jax.Array, like: jax.Array | None = None) -> jax.Array:
    """Reshapes images [G,...] to [n,g,...], padded with zeros, where g have about `_PIXELS` pixels.

    The pixels are those of `like`, if it is given.
    """
    count = -(-math.prod((a if like is None else like).shape[:3]) // _PIXELS)
    group = -(-len(a) // count)
    a = jnp.pad(a, [(0, -len(a) % group), *[(0, 0)] * (a.ndim - 1)])
    return a.reshape(-1, group, *a.shape[1:])


def _tiles(x: jax.Array, size: Sequence[int], padding: int) -> jax.Array:
    """Transformed tiles [36,T,C] of images [G,H,W,C], for results of size (h, w)."""
    h, w = (-(-n // 4) for n in size)
    after = [4 * n + 2 - padding - side for n, side in zip((h, w), x.shape[1:3], strict=True)]
    x = jnp.pad(x, [(0, 0), (padding, after[0]), (padding, after[1]), (0, 0)])
    rows = combine(IMAGE, lambda k: x[:, k : k + 4 * h - 3 : 4])
    tiles = combine(IMAGE, lambda k: rows[:, :, :, k : k + 4 * w - 3 : 4], axis=1)
    return tiles.reshape(36, -1, x.shape[-1])


def _result(products: jax.Array, size: Sequence[int]) -> jax.Array:
    """Transforms products [36,T,O] to images [G,h,w,O] of size (h, w)."""
    h, w = (-(-n // 4) for n in size)
    y = _both(RESULT, products).reshape(4, 4, -1, h, w, products.shape[-1])
    y = y.transpose(2, 3, 0, 4, 1, 5).reshape(-1, 4 * h, 4 * w, products.shape[-1])
    return y[:, : size[0], : size[1]]


def _spread(x: jax.Array) -> jax.Array:
    """The transpose of `_result`: images [G,h,w,C] to [36,T,C]."""
    h, w = (-(-n // 4) for n in x.shape[1:3])
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % 4), (0, -x.shape[2] % 4), (0, 0)])
    x = x.reshape(-1, h, 4, w, 4, x.shape[-1]).transpose(2, 4, 0, 1, 3, 5)
    return _both(RESULT.T, x.reshape(16, -1, x.shape[-1]))


def _both(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """Applies a matrix [q,p] along both axes of tiles, [p^2,...] to [q^2,...], as one product.

    It compiles faster than `combine` and runs as fast unless there are many tiles.
    """
    both = np.kron(matrix, matrix).astype(np.float32)
    return (both @ x.reshape(both.shape[1], -1)).reshape(-1, *x.shape[1:])


def combine(matrix: np.ndarray, part: Callable[[int], jax.Array], axis: int = 0) -> jax.Array:
    """Stacks the sums of parts weighted by the rows of a matrix, leaving out zero weights."""
    parts = [part(k) for k in range(matrix.shape[1])]
    sums = [sum(float(m) * p for m, p in zip(row, parts, strict=True) if m) for row in matrix]
    return jnp.stack(sums, axis)
