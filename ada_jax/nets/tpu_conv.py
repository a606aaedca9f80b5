"""Per-example convolutions of stride 1 as Pallas kernels for TPUs.

XLA's gradients of them write patch matrices, nine times the image, to HBM. These kernels build the
patches on the chip, and the gradients of the image and the kernel share one patch matrix. Images
are [channels, pixels] there: an array whose last axis is 64 channels would take twice its size.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ada_jax import sharding

_LANES = 128  # The last axis of a block is a multiple of it.
_TILE = 2**18  # Numbers in the largest block of an image: 1 MiB in float32.
_CHUNK = 2**16  # A ninth of the numbers in the largest matrix of patches: 2.25 MiB in float32.
_OUTPUTS = 64  # Output channels of one step of the gradients.


def fits(x: jax.Array, w: jax.Array, stride: int, padding: int) -> bool:
    """Whether the kernels support it: stride 1, 'same' padding, at most 5x5, at most 32 bits."""
    kh, kw = w.shape[:2]
    same = stride == 1 and kh == kw == 2 * padding + 1 <= 5
    return same and x.size > 0 and x.dtype.itemsize <= 4


class _Tiling(NamedTuple):
    """How the pixels of an image are divided.

    Attributes:
      tiles: number of tiles.
      tile: pixels of a tile, the image's part that is on the chip.
      chunk: pixels of a chunk, the tile's part whose patches are on the chip.
      halo: pixels on both sides of a chunk that its patches need; 0 for an image of one chunk.
    """

    tiles: int
    tile: int
    chunk: int
    halo: int


def _tiling(image: tuple[int, int], padding: int, patched: int, largest: int) -> _Tiling:
    """Divides an image, for patches of `patched` channels and at most `largest` channels."""
    size = image[0] * image[1]
    taps = max((2 * padding + 1) ** 2, 9)
    most = min(9 * _CHUNK // (taps * patched), _TILE // largest)
    if (whole := _round_up(size, _LANES)) <= most:
        return _Tiling(1, whole, whole, 0)
    halo = _round_up(padding * (image[1] + 1), _LANES)
    unit = halo or _LANES
    chunk = max(most // unit, 1) * unit
    tiles = pl.cdiv(size, max(_TILE // largest // chunk, 1) * chunk)
    pixels = pl.cdiv(size, tiles)
    chunk = _round_up(pl.cdiv(pixels, pl.cdiv(pixels, chunk)), unit)  # The least padding.
    return _Tiling(tiles, _round_up(pixels, chunk), chunk, halo)


def forward(
    x: jax.Array, w: jax.Array, b: jax.Array | None, padding: int, *, interpret: bool = False
) -> jax.Array:
    """Convolves images [G,H,W,C] with a kernel [k,k,C,O] for which `fits` holds, and adds b [O]."""
    (groups, *image, channels), (k, _, _, out) = x.shape, w.shape
    rows = _sublanes(x.dtype)
    inputs, outputs = _round_up(channels, rows), _round_up(out, rows)
    t = _tiling(image, padding, inputs, max(inputs, outputs))
    flops = 2 * w.size * groups * image[0] * image[1]
    b = jnp.zeros(out, w.dtype) if b is None else b
    x, w, b = _planes(x, inputs, t), _matrix(w, inputs, outputs), _fill(b[None], (rows, outputs))
    y = sharding.output_like(x, (groups, outputs, t.tiles * t.tile), x.dtype)

    def kernel(w_ref, b_ref, *refs):
        *x_refs, y_ref, window_ref, patch_ref = refs
        ones = jnp.ones((rows, t.chunk), jnp.float32)
        bias = _dot(b_ref[...].astype(jnp.float32), ones, 0, 0, precision="highest")
        start = pl.program_id(1) * t.tile
        _fill_window(window_ref, x_refs, t)

        def convolve(i, _):
            _fill_patches(patch_ref, window_ref, i, start, image, padding, t)
            y = _dot(w_ref[...].astype(jnp.float32), patch_ref[...], 0, 0)
            y_ref[:, pl.ds(_aligned(i * t.chunk), t.chunk)] = (y + bias).astype(y_ref.dtype)

        lax.fori_loop(0, t.tile // t.chunk, convolve, None)

    y = pl.pallas_call(
        kernel,
        grid=(groups, t.tiles),
        in_specs=[
            *(pl.BlockSpec(a.shape, lambda g, i: (0, 0)) for a in (w, b)),
            *_with_halo(inputs, t),
        ],
        out_specs=pl.BlockSpec((None, outputs, t.tile), lambda g, i: (g, 0, i)),
        out_shape=y,
        scratch_shapes=_scratch(inputs, k, t),
        cost_estimate=_cost(flops, x, t, w, b, y),
        compiler_params=_fusing(t, 2, 1),
        interpret=interpret,
        name="forward",
    )(w, b, *[x] * _copies(t))
    return _images(y, image, out)


def gradients(
    x: jax.Array, w: jax.Array, dy: jax.Array, padding: int, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients (dx, dw, db) of `forward`, from one matrix of the patches of dy."""
    (groups, *image, channels), (k, _, _, out) = x.shape, w.shape
    rows = _sublanes(x.dtype)
    inputs, outputs = _round_up(channels, rows), _round_up(out, rows)
    outputs = outputs if outputs <= _OUTPUTS else _round_up(outputs, _OUTPUTS)
    part = min(outputs, _OUTPUTS)
    parts = outputs // part
    t = _tiling(image, padding, part, max(inputs, part))
    flops = 4 * w.size * groups * image[0] * image[1]
    x, dy, matrix = _planes(x, inputs, t), _planes(dy, outputs, t), _matrix(w, inputs, outputs)
    bias = jax.ShapeDtypeStruct((rows, outputs), w.dtype)
    whole, whole_bias = (pl.BlockSpec(a.shape, lambda g, i, p: (0, 0)) for a in (matrix, bias))
    tile = pl.BlockSpec((None, inputs, t.tile), lambda g, i, p: (g, 0, i))
    dx, dw, db = pl.pallas_call(
        functools.partial(_gradients_kernel, image=image, padding=padding, t=t),
        grid=(groups, t.tiles, parts),
        in_specs=[whole, tile, *_with_halo(part, t)],
        out_specs=[tile, whole, whole_bias],
        out_shape=[sharding.output_like(x, a.shape, a.dtype) for a in (x, matrix, bias)],
        scratch_shapes=[
            *_scratch(part, k, t),
            pltpu.VMEM((parts, inputs, k * k * part), jnp.float32),
            pltpu.VMEM((inputs, t.tile), jnp.float32),
            pltpu.VMEM((parts, k * k * part, inputs), jnp.float32),
            pltpu.VMEM((parts, rows, part), jnp.float32),
        ],
        cost_estimate=_cost(flops, dy, t, x, matrix, x, matrix, bias),
        compiler_params=_fusing(t, 1, 2),
        interpret=interpret,
        name="gradients",
    )(matrix, x, *[dy] * _copies(t))
    dw = dw.reshape(k, k, inputs, outputs)[:, :, :channels, :out]
    return _images(dx, image, channels), dw, db[0, :out]


def _gradients_kernel(
    w_ref, x_ref, *refs, image: tuple[int, int], padding: int, t: _Tiling
) -> None:
    """Adds up dw and db over the whole grid, and dx over a tile's parts of the output channels."""
    dy_refs, (dx_ref, dw_ref, db_ref, *refs) = refs[: _copies(t)], refs[_copies(t) :]
    window_ref, patch_ref, mirrored_ref, dx_sum, dw_sum, db_sum = refs
    (parts, rows, part), taps = db_sum.shape, (2 * padding + 1) ** 2
    g, i, p = (pl.program_id(axis) for axis in range(3))
    step, steps = (g * t.tiles + i) * parts + p, pl.num_programs(0) * t.tiles * parts

    @pl.when(step == 0)
    def _():
        dw_sum[...] = jnp.zeros_like(dw_sum)
        db_sum[...] = jnp.zeros_like(db_sum)
        for tap, mirrored, q in _blocks(w_ref, taps, parts):
            mirrored_ref[q, :, mirrored] = w_ref[tap].astype(jnp.float32)

    @pl.when(p == 0)
    def _():
        dx_sum[...] = jnp.zeros_like(dx_sum)

    _fill_window(window_ref, dy_refs, t)

    def add(c, _):
        _fill_patches(patch_ref, window_ref, c, i * t.tile, image, padding, t)
        pixels = pl.ds(_aligned(c * t.chunk), t.chunk)
        dx_sum[:, pixels] += _dot(mirrored_ref[p], patch_ref[...], 1, 0)
        dw_sum[p] += _dot(patch_ref[...], x_ref[:, pixels].astype(jnp.float32), 1, 1)
        ones, center = jnp.ones((rows, t.chunk), jnp.float32), pl.ds(taps // 2 * part, part)
        db_sum[p] += _dot(ones, patch_ref[center], 1, 1, precision="highest")

    lax.fori_loop(0, t.tile // t.chunk, add, None)

    @pl.when(p == parts - 1)
    def _():
        dx_ref[...] = dx_sum[...].astype(dx_ref.dtype)

    @pl.when(step == steps - 1)
    def _():
        for tap, mirrored, q in _blocks(dw_ref, taps, parts):
            dw_ref[tap] = dw_sum[q, mirrored, :].T.astype(dw_ref.dtype)
        for q in range(parts):
            db_ref[:, q * part : (q + 1) * part] = db_sum[q].astype(db_ref.dtype)


# ---------------------------------------------------------------------- inside the kernels


def _blocks(w_ref, taps: int, parts: int) -> Iterator[tuple[Any, pl.Slice, int]]:
    """Blocks of a kernel [taps * C, O], each with its place in the mirrored one and its part."""
    inputs, part = w_ref.shape[0] // taps, w_ref.shape[1] // parts
    for tap, q in itertools.product(range(taps), range(parts)):
        block = pl.ds(tap * inputs, inputs), pl.ds(q * part, part)
        yield block, pl.ds((taps - 1 - tap) * part, part), q


def _fill_window(window_ref, refs, t: _Tiling) -> None:
    """Copies a tile and its halo next to each other; without neighbours the halo is arbitrary."""
    if len(refs) == 3:
        window_ref[:, : t.halo] = refs[1][...].astype(jnp.float32)
        window_ref[:, t.halo + t.tile :] = refs[2][...].astype(jnp.float32)
    window_ref[:, t.halo : t.halo + t.tile] = refs[0][...].astype(jnp.float32)


def _fill_patches(
    patch_ref,
    window_ref,
    index: jax.Array,
    start: jax.Array,
    image: tuple[int, int],
    padding: int,
    t: _Tiling,
) -> None:
    """Writes a chunk's patches [k * k * C, chunk]; pixels outside the image are zero."""
    length, (height, width) = t.chunk + 2 * t.halo, image
    window = window_ref[:, pl.ds(_aligned(index * t.chunk), length)]
    first = start + jnp.int32(index) * t.chunk
    pixel = first + lax.broadcasted_iota(jnp.int32, (1, t.chunk), 1)
    column = lax.rem(pixel, jnp.int32(width))
    offsets = range(-padding, padding + 1)
    for tap, (a, b) in enumerate((a, b) for a in offsets for b in offsets):
        shifted = pltpu.roll(window, -(a * width + b) % length, 1)[:, t.halo : t.halo + t.chunk]
        row = pixel + a * width
        inside = (row >= 0) & (row < height * width) & (column + b >= 0) & (column + b < width)
        rows = slice(tap * len(window), (tap + 1) * len(window))
        patch_ref[rows, :] = jnp.where(inside, shifted, 0)


def _dot(
    a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, precision: str | None = None
) -> jax.Array:
    """Contracts an axis of a with one of b, in float32; 'highest' does not round a and b."""
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _aligned(pixel: jax.Array) -> jax.Array:
    # Loops count in int64 under jax_enable_x64.
    return pl.multiple_of(jnp.int32(pixel), _LANES)


# -------------------------------------------------------------------- blocks and layouts


def _planes(a: jax.Array, channels: int, t: _Tiling) -> jax.Array:
    """[G,H,W,C] to [G,channels,pixels], filled with zeros."""
    a = a.reshape(len(a), -1, a.shape[-1]).swapaxes(1, 2)
    return _fill(a, (len(a), channels, t.tiles * t.tile))


def _images(a: jax.Array, image: tuple[int, int], channels: int) -> jax.Array:
    """Inverse of `_planes`."""
    a = a[:, :channels, : image[0] * image[1]]
    return a.swapaxes(1, 2).reshape(len(a), *image, channels)


def _matrix(w: jax.Array, inputs: int, outputs: int) -> jax.Array:
    """[k,k,C,O] to [k * k * inputs, outputs], filled with zeros."""
    return _fill(w, (*w.shape[:2], inputs, outputs)).reshape(-1, outputs)


def _fill(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.pad(a, [(0, new - old) for old, new in zip(a.shape, shape, strict=True)])


def _with_halo(channels: int, t: _Tiling) -> list[pl.BlockSpec]:
    """Blocks of a tile and, if there are several, of its two neighbours' nearest pixels."""

    def spec(size, index):
        return pl.BlockSpec(
            (None, channels, size), lambda g, i, *p: (g, p[0] if p else 0, index(i))
        )

    if _copies(t) == 1:
        return [spec(t.tile, lambda i: i)]
    halos = t.tile // t.halo
    last = t.tiles * halos - 1
    return [
        spec(t.tile, lambda i: i),
        spec(t.halo, lambda i: jnp.maximum(i * halos - 1, 0)),
        spec(t.halo, lambda i: jnp.minimum((i + 1) * halos, last)),
    ]


def _copies(t: _Tiling) -> int:
    return 3 if t.tiles > 1 and t.halo else 1


def _scratch(channels: int, k: int, t: _Tiling) -> list:
    """Memory for a tile with its halo and for a chunk's patches.

    In float32: lanes of 16 bits cannot be rotated, and a v3 has no products of bfloat16 blocks.
    """
    return [
        pltpu.VMEM((channels, t.tile + 2 * t.halo), jnp.float32),
        pltpu.VMEM((k * k * channels, t.chunk), jnp.float32),
    ]


def _fusing(t: _Tiling, others: int, images: int) -> pltpu.CompilerParams:
    """Lets XLA compute ReLU and the like inside of a kernel, whose last inputs are these images.

    The compiler fails for tiles of which a kernel reads a part at a time.
    """
    inputs = [False] * others + [True] * images
    return pltpu.CompilerParams(allow_input_fusion=inputs if t.tiles * t.tile == t.chunk else None)


def _cost(flops: int, read: jax.Array, t: _Tiling, *others: Any) -> pl.CostEstimate:
    """The flops of the products, and the bytes of all arrays: once, but `read` with its halos."""
    size = sum(a.size * a.dtype.itemsize for a in (read, *others))
    if _copies(t) > 1:
        size += 2 * t.halo * t.tiles * read.shape[0] * read.shape[1] * read.dtype.itemsize
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=size)


def _sublanes(dtype: jnp.dtype) -> int:
    """The last axis but one of a block is a multiple of it."""
    return 32 // dtype.itemsize


def _round_up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple
