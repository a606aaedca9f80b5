"""Per-example convolutions of stride 1 as Pallas Triton kernels for NVIDIA GPUs.

XLA's grouped convolutions have slow gradients there, and patch matrices are nine times as large as
the image. These kernels accumulate on the chip, read an image's taps through the caches, and mask
pixels outside the image, so that no padded copy is written. The block sizes were fastest on an
H100; with three stages a program uses 96 KiB of shared memory, which every GPU since Ampere has.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ada_jax import sharding

_PIXELS = 128  # Output pixels of one program of the forward pass.
_PART = 1024  # Output pixels that one program of the kernel's gradient sums over.
_ROW = 128  # Bytes of a row of a block: 64 bfloat16 or 32 float32.
_STAGES = 3  # Blocks loaded ahead.


def fits(x: jax.Array, w: jax.Array, stride: int, padding: int) -> bool:
    """Whether the kernels support a convolution: stride 1, 'same' padding, at most 32 bits."""
    kh, kw = w.shape[:2]
    return x.dtype.itemsize <= 4 and stride == 1 and kh == kw == 2 * padding + 1


def forward(x: jax.Array, w: jax.Array, padding: int, *, interpret: bool = False) -> jax.Array:
    """Convolves images [G,H,W,C] with a kernel [k,k,C,O] for which `fits` holds."""
    (groups, height, width, _), (k, _, _, out) = x.shape, w.shape
    size = height * width
    x, w = _fill(x, 3).reshape(groups, size, -1), _fill(_fill(w, 2), 3)
    w = w.reshape(k * k, x.shape[2], -1)
    inputs = _block(w.shape[1], _ROW // x.dtype.itemsize)
    outputs = _block(w.shape[2], 128)
    parts = w.shape[1] // inputs

    def kernel(x_ref, w_ref, y_ref):
        first = pl.program_id(1) * _PIXELS

        def add(i, total):
            tap, part = _divmod(i, parts)
            row, column = _divmod(tap, k)
            channels = pl.ds(part * inputs, inputs)
            offset = (row - padding, column - padding)
            images = _load(x_ref, first, _PIXELS, (height, width), channels, offset)
            return total + _dot(images, w_ref[tap, channels, :])

        zero = jnp.zeros((_PIXELS, outputs), jnp.float32)
        total = jax.lax.fori_loop(0, k * k * parts, add, zero)
        pixels = first + jnp.arange(_PIXELS, dtype=jnp.int32)
        at = (pixels[:, None], jnp.arange(outputs, dtype=jnp.int32)[None])
        mask = jnp.broadcast_to((pixels < size)[:, None], total.shape)
        triton.store(y_ref.at[at], total.astype(y_ref.dtype), mask=mask)

    y = pl.pallas_call(
        kernel,
        grid=(groups, pl.cdiv(size, _PIXELS), w.shape[2] // outputs),
        in_specs=[
            pl.BlockSpec((None, *x.shape[1:]), lambda g, p, o: (g, 0, 0)),
            pl.BlockSpec((*w.shape[:2], outputs), lambda g, p, o: (0, 0, o)),
        ],
        out_specs=pl.BlockSpec((None, size, outputs), lambda g, p, o: (g, 0, o)),
        out_shape=sharding.output_like(x, (groups, size, w.shape[2]), x.dtype),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=_STAGES),
        interpret=interpret,
    )(x, w)
    return y.reshape(groups, height, width, -1)[..., :out]


def gradients(
    x: jax.Array, w: jax.Array, dy: jax.Array, padding: int, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Gradients (dx, dw) of `forward`."""
    mirrored = jnp.swapaxes(w[::-1, ::-1], 2, 3)
    dx = forward(dy, mirrored, padding, interpret=interpret)
    return dx, kernel_gradient(x, dy, w.shape[0], padding, interpret=interpret).astype(w.dtype)


def kernel_gradient(
    x: jax.Array, dy: jax.Array, k: int, padding: int, *, interpret: bool = False
) -> jax.Array:
    """The kernel's gradient [k,k,C,O], from images [G,H,W,C] and output gradients [G,H,W,O].

    A program sums one row of the kernel's taps over a part of an image.
    """
    (groups, height, width, channels), out = x.shape, dy.shape[3]
    size = height * width
    x, dy = (_fill(a, 3).reshape(groups, size, -1) for a in (x, dy))
    inputs, outputs = (_block(a.shape[2], 64) for a in (x, dy))
    pixels = _ROW // x.dtype.itemsize
    parts = pl.cdiv(size, _PART)
    load = functools.partial(_load, size=pixels, image=(height, width))

    def kernel(x_ref, dy_ref, dw_ref):
        row, part = pl.program_id(0), pl.program_id(2)

        def add(i, totals):
            first = part * _PART + i * pixels
            above = load(dy_ref, first, channels=pl.ds(0, outputs))
            taps = (
                load(x_ref, first, channels=pl.ds(0, inputs), offset=(row - padding, c - padding))
                for c in range(k)
            )
            return tuple(t + _dot(tap, above, 0) for t, tap in zip(totals, taps, strict=True))

        zero = jnp.zeros((inputs, outputs), jnp.float32)
        steps = pl.cdiv(min(_PART, size), pixels)
        for column, total in enumerate(jax.lax.fori_loop(0, steps, add, (zero,) * k)):
            dw_ref[column] = total

    blocks = dy.shape[2] // outputs
    dw = pl.pallas_call(
        kernel,
        grid=(k, groups, parts, x.shape[2] // inputs * blocks),
        in_specs=[
            pl.BlockSpec((None, size, inputs), lambda t, g, p, b: (g, 0, b // blocks)),
            pl.BlockSpec((None, size, outputs), lambda t, g, p, b: (g, 0, b % blocks)),
        ],
        out_specs=pl.BlockSpec(
            (None, None, k, inputs, outputs), lambda t, g, p, b: (g, p, t, b // blocks, b % blocks)
        ),
        out_shape=sharding.output_like(
            x, (groups, parts, k * k, x.shape[2], dy.shape[2]), jnp.float32
        ),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=_STAGES),
        interpret=interpret,
    )(x, dy)
    return dw.sum((0, 1))[:, :channels, :out].reshape(k, k, channels, out)


def _load(
    ref: jax.Array,
    first: jax.Array,
    size: int,
    image: tuple[int, int],
    channels: pl.Slice,
    offset: tuple[jax.Array | int, jax.Array | int] = (0, 0),
) -> jax.Array:
    """Loads pixels first, ..., first + size - 1 of an image shifted by an offset; zero outside."""
    pixels = first + jnp.arange(size, dtype=jnp.int32)
    row, column = (a + b for a, b in zip(_divmod(pixels, image[1]), offset, strict=True))
    inside = (row >= 0) & (row < image[0]) & (column >= 0) & (column < image[1])
    at = pixels + (offset[0] * image[1] + offset[1])
    columns = channels.start + jnp.arange(channels.size, dtype=jnp.int32)
    mask = jnp.broadcast_to(inside[:, None], (size, channels.size))
    return triton.load(ref.at[at[:, None], columns[None]], mask=mask, other=0)


def _block(channels: int, most: int) -> int:
    """Channels of one program: the largest power of two, up to `most`, that divides them."""
    return min(channels & -channels, most)


def _fill(a: jax.Array, axis: int) -> jax.Array:
    """Pads an axis with zeros to a multiple of 16, the smallest size of a Triton product."""
    return jnp.pad(a, [(0, -size % 16 if i == axis else 0) for i, size in enumerate(a.shape)])


def _dot(a: jax.Array, b: jax.Array, axis: int = 1) -> jax.Array:
    """Contracts an axis of a with the first axis of b, in float32."""
    return jax.lax.dot_general(
        a, b, (((axis,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


def _divmod(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
    """divmod of non-negative numbers; JAX's `//` does not lower to Triton."""
    a, b = jnp.int32(a), jnp.int32(b)  # Loops count in int64 under jax_enable_x64.
    return jax.lax.div(a, b), jax.lax.rem(a, b)
