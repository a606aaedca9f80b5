"""Per-example convolutions of stride 1 as Triton kernels, by Pallas, for NVIDIA GPUs.

XLA's grouped convolutions have no fast gradients there, and patches of an image are nine times its
size. A program of these kernels keeps what it accumulates on the chip and reads an image's taps
through the caches, so that device memory is read about once.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

_PIXELS = 128  # outputs of one program
_CHANNELS = 64  # of them at most, and of inputs in one product


def fits(x: jax.Array, w: jax.Array, stride: int, padding: int) -> bool:
    """Whether there is a kernel for these shapes: [G,H,W,C] with a width of two's powers."""
    kh, kw = w.shape[:2]
    height, width = (x.shape[i + 1] + 2 * padding - w.shape[i] + 1 for i in (0, 1))
    same = (height, width) == x.shape[1:3] and kh == kw
    return stride == 1 and same and width in (16, 32, 64, 128) and height % _rows(width) == 0


def forward(x: jax.Array, w: jax.Array, padding: int, *, interpret: bool = False) -> jax.Array:
    """The convolution of images [G,H,W,C] with a kernel [k,k,C,O], see `fits`."""
    (groups, height, width, _), (k, _, _, out) = x.shape, w.shape
    rows = _rows(width)
    x = jnp.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, -x.shape[3] % 16)])
    w = _fill(_fill(w, 2), 3).reshape(k * k, x.shape[3], -1)
    inputs, outputs = _block(w.shape[1]), _block(w.shape[2])

    def kernel(x_ref, w_ref, y_ref):
        first = pl.program_id(1) * rows

        def add(i, total):
            tap, part = _divmod(i, w.shape[1] // inputs)
            row, column = _divmod(tap, k)
            channels = pl.ds(part * inputs, inputs)
            images = x_ref[pl.ds(first + row, rows), pl.ds(column, width), channels]
            return total + _dot(images.reshape(rows * width, inputs), w_ref[tap, channels, :])

        zero = jnp.zeros((rows * width, outputs), jnp.float32)
        total = jax.lax.fori_loop(0, k * k * w.shape[1] // inputs, add, zero)
        y_ref[...] = total.reshape(rows, width, outputs).astype(y_ref.dtype)

    y = pl.pallas_call(
        kernel,
        grid=(groups, height // rows, w.shape[2] // outputs),
        in_specs=[
            pl.BlockSpec((None, *x.shape[1:]), lambda g, r, o: (g, 0, 0, 0)),
            pl.BlockSpec((*w.shape[:2], outputs), lambda g, r, o: (0, 0, o)),
        ],
        out_specs=pl.BlockSpec((None, rows, width, outputs), lambda g, r, o: (g, r, 0, o)),
        out_shape=jax.ShapeDtypeStruct((groups, height, width, w.shape[2]), x.dtype),
        compiler_params=_options(),
        interpret=interpret,
    )(x, w)
    return y[..., :out]


def gradients(
    x: jax.Array,
    w: jax.Array,
    dy: jax.Array,
    padding: int,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Its gradients (dx, dw)."""
    mirrored = jnp.swapaxes(w[::-1, ::-1], 2, 3)
    dx = forward(dy, mirrored, w.shape[0] - 1 - padding, interpret=interpret)
    return dx, kernel_gradient(x, dy, w.shape[0], padding, interpret=interpret).astype(w.dtype)


def kernel_gradient(
    x: jax.Array, dy: jax.Array, k: int, padding: int, *, interpret: bool = False
) -> jax.Array:
    """The gradient [k,k,C,O] of images [G,H,W,C] and their outputs' gradients [G,H,W,O]."""
    (groups, height, width, channels), out = x.shape, dy.shape[3]
    rows = _rows(width)
    x = jnp.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, -channels % 16)])
    dy = _fill(dy, 3)
    inputs, outputs = _block(x.shape[3]), _block(dy.shape[3])

    def kernel(x_ref, dy_ref, dw_ref):
        row, column = _divmod(pl.program_id(0), k)

        def add(i, total):
            group, part = _divmod(i, height // rows)
            images = x_ref[group, pl.ds(part * rows + row, rows), pl.ds(column, width), :]
            above = dy_ref[group, pl.ds(part * rows, rows), :, :]
            images, above = (a.reshape(rows * width, -1) for a in (images, above))
            return total + _dot(images, above, 0)

        zero = jnp.zeros((inputs, outputs), jnp.float32)
        dw_ref[...] = jax.lax.fori_loop(0, groups * height // rows, add, zero)

    dw = pl.pallas_call(
        kernel,
        grid=(k * k, x.shape[3] // inputs, dy.shape[3] // outputs),
        in_specs=[
            pl.BlockSpec((*x.shape[:3], inputs), lambda t, c, o: (0, 0, 0, c)),
            pl.BlockSpec((*dy.shape[:3], outputs), lambda t, c, o: (0, 0, 0, o)),
        ],
        out_specs=pl.BlockSpec((None, inputs, outputs), lambda t, c, o: (t, c, o)),
        out_shape=jax.ShapeDtypeStruct((k * k, x.shape[3], dy.shape[3]), jnp.float32),
        compiler_params=_options(),
        interpret=interpret,
    )(x, dy)
    return dw[:, :channels, :out].reshape(k, k, channels, out)


def _rows(width: int) -> int:
    """Rows of one program."""
    return max(_PIXELS // width, 1)


def _block(channels: int) -> int:
    """Channels of one program: the largest power of two that divides them, up to 64."""
    return min(channels & -channels, _CHANNELS)


def _fill(a: jax.Array, axis: int) -> jax.Array:
    """Adds zeros until an axis is a multiple of 16, the least that a matrix product takes."""
    return jnp.pad(a, [(0, -size % 16 if i == axis else 0) for i, size in enumerate(a.shape)])


def _options() -> triton.CompilerParams:
    return triton.CompilerParams(num_warps=4, num_stages=3)


def _dot(a: jax.Array, b: jax.Array, axis: int = 1) -> jax.Array:
    """Sums over this axis of a and the first of b, in float32."""
    return jax.lax.dot_general(
        a, b, (((axis,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


def _divmod(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
    """Of numbers from 0 on: Triton has no `//` of JAX, which rounds negative ones down."""
    return jax.lax.div(a, jnp.int32(b)), jax.lax.rem(a, jnp.int32(b))
