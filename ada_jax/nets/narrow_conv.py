"""Convolutions with three or so input or output channels, and strided ones' input gradients.

XLA's convolutions are slow there on a CPU. Matrix products of longer rows are two to four times as
fast: 32 images of 32x32, 3 to 16 channels, take 0.6 ms on one core and took 2.1; 16 to 3 channels,
0.9 and 3.1. In a program for two devices, XLA's input gradient of a convolution from 16 to 32
channels at stride 2 took 7.9 ms of such a batch, and this one takes about 2.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_NARROW = 4  # Most channels on the narrower side.
# Channels on the wider side; 3 to 64 channels take 139 us here and 111 us in XLA.
_WIDE = range(8, 33)
_STRIDED = 32  # With more channels XLA's gradient of a strided convolution is faster.


def pays(x: jax.Array, w: jax.Array, stride: int, padding: int) -> bool:
    """Whether `convolve` is faster than XLA's convolution of images [G,H,W,C], on a CPU."""
    few, many = sorted(w.shape[2:])
    return (
        w.shape[:2] == (3, 3)
        and stride == 1
        and padding <= 2
        and x.dtype == w.dtype == jnp.float32
        and few <= _NARROW
        and many in _WIDE
        and min(x.shape[1:3]) >= 3
    )


def convolve(x: jax.Array, w: jax.Array, padding: int) -> jax.Array:
    """Convolves images [G,H,W,C] with a kernel [3,3,C,O] at stride 1."""
    if w.shape[2] > w.shape[3]:
        return _few_outputs(x, w, padding)
    pairs = _pairs(x, padding)
    y = pairs.reshape(-1, pairs.shape[-1]) @ _pair_kernel(w)
    width = x.shape[2] + 2 * padding - 2
    return y.reshape(*pairs.shape[:2], -1, w.shape[-1])[:, :, :width]


def kernel_gradient(x: jax.Array, w: jax.Array, dy: jax.Array, padding: int) -> jax.Array:
    """The gradient [3,3,C,O] with respect to a kernel of few inputs."""
    pairs = _pairs(x, padding)
    dy = jnp.pad(dy, [(0, 0), (0, 0), (0, dy.shape[2] % 2), (0, 0)])
    dw = pairs.reshape(-1, pairs.shape[-1]).T @ dy.reshape(-1, 2 * dy.shape[-1])
    return jax.linear_transpose(_pair_kernel, w)(dw)[0]


def _pairs(x: jax.Array, padding: int) -> jax.Array:
    """The 3x4 pixels that two neighbouring results need, [G,h,w/2,12C]."""
    height, width = (n + 2 * padding - 2 for n in x.shape[1:3])
    columns = (padding, padding + width % 2)
    x = jnp.pad(x, [(0, 0), (padding, padding), columns, (0, 0)])
    x = x.reshape(*x.shape[:2], -1, 2 * x.shape[-1])
    n = x.shape[2] - 1
    return jnp.concatenate([x[:, i : i + height, j : j + n] for i in range(3) for j in (0, 1)], -1)


def _pair_kernel(w: jax.Array) -> jax.Array:
    """The kernel [12C,2O] of two neighbouring results."""
    shifted = [jnp.pad(w, [(0, 0), (i, 1 - i), (0, 0), (0, 0)]) for i in (0, 1)]
    return jnp.stack(shifted, 3).reshape(-1, 2 * w.shape[-1])


def _few_outputs(x: jax.Array, w: jax.Array, padding: int) -> jax.Array:
    """Sums the products of all pixels with the kernel's taps, as images of one channel each."""
    x = jnp.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    taps = jnp.einsum("ijco,ghwc->gijohw", w, x)
    height, width = (n - 2 for n in x.shape[1:3])
    shifted = [taps[:, i, j, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return sum(shifted[1:], shifted[0]).transpose(0, 2, 3, 1)


def strided_pays(w: jax.Array, stride: int) -> bool:
    """Whether `strided_input_gradient` is faster than XLA's, on a CPU."""
    return stride > 1 and min(w.shape[:2]) > 1 and min(w.shape[2:]) < _STRIDED


def strided_input_gradient(
    x: jax.Array, w: jax.Array, dy: jax.Array, stride: int, padding: int
) -> jax.Array:
    """The gradient dx of a strided convolution, by one product for stride x stride pixels."""
    height, width = (-(-n // stride) for n in x.shape[1:3])  # In blocks of such pixels.
    (i, top), (j, left) = (_block_taps(k, stride, padding) for k in w.shape[:2])
    # [e,p,f,q,C,O] of block pixel (p,q) and the output at (e,f) from the block.
    w = jnp.pad(w, [(0, 1), (0, 1), (0, 0), (0, 0)])[i][:, :, j]
    bottom, right = (
        n + len(t) - 1 - before - size
        for n, t, before, size in zip(
            (height, width), (i, j), (top, left), dy.shape[1:3], strict=True
        )
    )
    none = jnp.zeros((), dy.dtype)
    dy = lax.pad(dy, none, [(0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0)])
    near = [dy[:, e : e + height, f : f + width] for e in range(len(i)) for f in range(len(j))]
    kernel = w.transpose(0, 2, 5, 1, 3, 4).reshape(-1, stride * stride * x.shape[-1])
    dx = jnp.concatenate(near, -1).reshape(-1, len(kernel)) @ kernel
    dx = dx.reshape(len(x), height, width, stride, stride, -1).transpose(0, 1, 3, 2, 4, 5)
    dx = dx.reshape(len(x), height * stride, width * stride, -1)
    return dx[:, : x.shape[1], : x.shape[2]]


def _block_taps(k: int, stride: int, padding: int) -> tuple[np.ndarray, int]:
    """Taps [e,p] by which pixel p of a block reads the output e - before; k means none."""
    before, after = (k - 1 - padding) // stride, (stride - 1 + padding) // stride
    taps = [[p + padding - stride * e for p in range(stride)] for e in range(-before, after + 1)]
    taps = np.array(taps)
    return np.where((taps >= 0) & (taps < k), taps, k), before
