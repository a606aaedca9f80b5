"""Convolutions that are fast when every example has its own kernel.

`jax.vmap` of an ordinary convolution over its kernels becomes one grouped convolution, whose
gradient is slow on every back end: XLA on a CPU runs it at about one percent of the machine's
peak, and the TPU compiler turns it into a dense convolution over all pairs of examples (measured by
`ada_jax.plan`). `conv2d` is an ordinary convolution with its own batching rule and gradient, so
code written for one example is fast under `jax.vmap`. Only first derivatives in reverse mode are
supported (`jax.grad`, `jax.vjp`).

* One kernel per example: on a CPU a loop over the examples, each of which fits in the cache. The
  backward pass builds the patches of the output's gradient once, and computes both gradients from
  them by one matrix product each. On other platforms the lowering that `CHOSEN` names.
* A shared kernel: XLA's convolution and gradients, except that on a CPU the kernel's gradient is
  computed from patches, group by group. Pass all images as one batch: under `jax.vmap` over images
  the backward pass computes one kernel gradient per image.

On a CPU, 3x3 kernels use `winograd` in both cases, or with fewer channels `winograd_rows` or
`narrow_conv`: about twice as fast.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from ada_jax import sharding
from ada_jax.nets import narrow_conv, tpu_conv, triton_conv, winograd, winograd_rows

_ROWS = 4096  # Rows of one patch matrix: a fast matrix product that still fits in the cache.


def conv2d(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array | None = None,
    *,
    stride: int = 1,
    padding: int | None = None,
) -> jax.Array:
    """Convolves images with a kernel; fast also under `jax.vmap` over `w`.

    It has first derivatives in reverse mode only (`jax.grad`, `jax.vjp`).

    Args:
      x: images [B,H,W,C].
      w: kernel [kh,kw,C,O], of the type of x.
      b: bias [O], or None; converted to the type of x.
      stride: stride in pixels, equal for both axes.
      padding: zeros on every side, in pixels; None means kh // 2, also to the left and right.

    Returns:
      [B,H',W',O] with H' = (H + 2 padding - kh) // stride + 1.
    """
    x, w, b = sharding.alike(x, w, None if b is None else b.astype(x.dtype))
    return _conv2d(x, w, b, stride, w.shape[0] // 2 if padding is None else padding)


def conv_transpose2d(x: jax.Array, w: jax.Array, b: jax.Array | None = None) -> jax.Array:
    """Transposed convolution whose stride is the kernel's size; fast also under `jax.vmap`.

    Outputs do not overlap, so it is a matrix product at every pixel.

    Args:
      x: images [B,H,W,C].
      w: kernel [k,k,C,O], of the type of x.
      b: bias [O], or None; converted to the type of x.

    Returns:
      [B,kH,kW,O], with output [kh+i, kw+j] = x[h, w] @ w[i, j] + b.
    """
    k, _, channels, out = w.shape
    y = conv2d(x, w.transpose(2, 0, 1, 3).reshape(1, 1, channels, k * k * out))
    y = interleave(y, k)
    return y if b is None else y + b.astype(y.dtype)


def interleave(y: jax.Array, k: int) -> jax.Array:
    """Moves blocks of k x k pixels, [B,H,W,k*k*C], to their places: [B,kH,kW,C]."""
    batch, height, width, channels = y.shape
    out = channels // k**2
    y = y.reshape(batch, height, width, k, k, out).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(batch, k * height, k * width, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _conv2d(
    x: jax.Array, w: jax.Array, b: jax.Array | None, stride: int, padding: int
) -> jax.Array:
    return _forward_op(stride, padding)(x, w, b)


def _conv2d_fwd(x, w, b, stride, padding):
    return _conv2d(x, w, b, stride, padding), (x, w, b)


def _conv2d_bwd(stride, padding, saved, dy):
    x, w, b = saved
    dx, dw, db = _gradients_op(stride, padding)(x, w, dy)
    return dx, dw, None if b is None else db


_conv2d.defvjp(_conv2d_fwd, _conv2d_bwd)


# -------------------------------------------------------------- the batching rules


@functools.cache
def _forward_op(stride: int, padding: int) -> Callable:
    """The convolution of one kernel, batched over kernels by `_many_op`."""

    @custom_vmap
    def forward(x, w, b):
        cpu, default = (
            functools.partial(f, stride=stride, padding=padding)
            for f in (cpu_forward, plain_forward)
        )
        return _plus(lax.platform_dependent(x, w, cpu=cpu, default=default), b)

    @forward.def_vmap
    def _(size, batched, x, w, b):
        if not batched[1]:
            x, shared = _merge(_repeat(x, batched[0], size)), None if batched[2] else b
            return _plus(_split(forward(x, w, shared), size), b if batched[2] else None), True
        args = map(functools.partial(_repeat, size=size), (x, w, b), batched)
        return _many_op(stride, padding, False)(*args), True

    return forward


@functools.cache
def _gradients_op(stride: int, padding: int) -> Callable:
    """Gradients (dx, dw, db) of one kernel's convolution, batched over kernels in the same way."""

    @custom_vmap
    def gradients(x, w, dy):
        # Separately, so that the compiler can drop a gradient that is not used.
        def one_gradient(cpu, i):
            default = lambda *args: plain_gradients(*args, stride, padding)[i]  # noqa: E731
            cpu = functools.partial(cpu, stride=stride, padding=padding)
            return lax.platform_dependent(x, w, dy, cpu=cpu, default=default)

        dx = one_gradient(mirrored_input_gradient, 0)
        return dx, one_gradient(grouped_kernel_gradient, 1), _bias_gradient(dy)

    @gradients.def_vmap
    def _(size, batched, *args):
        args = map(functools.partial(_repeat, size=size), args, batched)
        return _many_op(stride, padding, True)(*args), (True, True, True)

    return gradients


@functools.cache
def _many_op(stride: int, padding: int, gradients: bool) -> Callable:
    """N kernels on N groups of images; further `jax.vmap` axes are merged into N."""

    def one_example(f):
        return lambda *args: f(*args, stride, padding)

    loops = (functools.partial(_one_by_one, one_example(f)) for f in (cpu_forward, cpu_gradients))
    chosen = {"cpu": with_bias(*loops)[gradients]}
    for platform, names in CHOSEN.items():
        chosen[platform] = jax.vmap(one_example(LOWERINGS[names[gradients]][gradients]))

    @custom_vmap
    def many(*args):
        one_device = lambda args: lax.platform_dependent(*args, **chosen)  # noqa: E731
        return sharding.on_own_examples(one_device, args)

    @many.def_vmap
    def _(size, batched, *args):
        args = map(functools.partial(_repeat, size=size), args, batched)
        out = many(*map(_merge, args))
        return jax.tree.map(lambda a: _split(a, size), out), jax.tree.map(lambda a: True, out)

    return many


def _one_by_one(f: Callable[..., Any], *args: jax.Array) -> Any:
    """Applies f to one example at a time.

    Pixels and channels are one axis between the loops: their bodies copy and transform whole rows.
    """

    def flat(tree):
        return jax.tree.map(lambda a: a.reshape(*a.shape[:-2], -1), tree)

    def one(parts):
        return flat(f(*(p.reshape(a.shape[1:]) for p, a in zip(parts, args, strict=True))))

    out = lax.map(one, flat(args))
    return jax.tree.map(lambda a, s: a.reshape(s.shape), out, jax.eval_shape(jax.vmap(f), *args))


def _merge(a: jax.Array | None) -> jax.Array | None:
    return None if a is None else a.reshape(-1, *a.shape[2:])


def _split(a: jax.Array, size: int) -> jax.Array:
    return a.reshape(size, -1, *a.shape[1:])


def _repeat(a: jax.Array | None, is_batched: bool, size: int) -> jax.Array | None:
    return a if a is None or is_batched else jnp.broadcast_to(a, (size, *a.shape))


def _plus(y: jax.Array, b: jax.Array | None) -> jax.Array:
    """Adds biases [...,O] to outputs [...,G,H,W,O]."""
    return y if b is None else y + jnp.expand_dims(b, (-4, -3, -2))


def _bias_gradient(dy: jax.Array) -> jax.Array:
    return dy.sum((-4, -3, -2))


# ------------------------------------------------- lowerings: x [G,H,W,C], w [kh,kw,C,O]


def plain_forward(x: jax.Array, w: jax.Array, stride: int, padding: int) -> jax.Array:
    """XLA's convolution."""
    return lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def cpu_forward(x: jax.Array, w: jax.Array, stride: int, padding: int) -> jax.Array:
    """The fastest convolution on a CPU.

    XLA's is two to five times slower without padding, and for 1x1 kernels with few outputs.
    """
    if winograd.pays(x, w, stride, padding):
        return winograd.convolve(x, w, padding)
    if winograd_rows.pays(x, w, stride, padding):
        return winograd_rows.convolve(x, w, padding)
    if narrow_conv.pays(x, w, stride, padding):
        return narrow_conv.convolve(x, w, padding)
    if w.shape[:2] == (1, 1) and padding == 0:
        x = x[:, ::stride, ::stride]
        return (x.reshape(-1, x.shape[-1]) @ w[0, 0]).reshape(*x.shape[:3], -1)
    if stride == 1 and padding == 0:
        return plain_forward(x, w, 1, 1)[:, 1:-1, 1:-1]
    return plain_forward(x, w, stride, padding)


def plain_gradients(
    x: jax.Array, w: jax.Array, dy: jax.Array, stride: int, padding: int
) -> tuple[jax.Array, jax.Array]:
    """XLA's gradients (dx, dw)."""
    return jax.vjp(lambda x, w: plain_forward(x, w, stride, padding), x, w)[1](dy)


def patch_forward(x: jax.Array, w: jax.Array, stride: int, padding: int) -> jax.Array:
    """The convolution by one patch matrix and one matrix product."""
    kernel = w.shape[:2]
    y = patches(x, kernel, stride, padding) @ w.reshape(-1, w.shape[-1])
    return y.reshape(len(x), *_output_size(x, kernel, stride, padding), -1)


def shifted_forward(x: jax.Array, w: jax.Array, stride: int, padding: int) -> jax.Array:
    """The convolution by one matrix product per tap of the kernel, summed in float32 at least."""
    kh, kw, _, out = w.shape
    taps, dtype = _taps(x, (kh, kw), stride, padding), jnp.promote_types(x.dtype, jnp.float32)
    products = (
        jnp.matmul(tap, w[i // kw, i % kw], preferred_element_type=dtype)
        for i, tap in enumerate(taps)
    )
    zero = jnp.zeros((*taps[0].shape[:3], out), dtype)
    return sum(products, zero).astype(jnp.result_type(x, w))


def shifted_gradients(
    x: jax.Array, w: jax.Array, dy: jax.Array, stride: int, padding: int
) -> tuple[jax.Array, jax.Array]:
    """The gradients (dx, dw) by two matrix products per tap, summed in float32 at least."""
    kh, kw = w.shape[:2]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    dw = [
        jnp.einsum("ghwc,ghwo->co", tap, dy, preferred_element_type=dtype)
        for tap in _taps(x, (kh, kw), stride, padding)
    ]
    dw = jnp.stack(dw).reshape(w.shape).astype(w.dtype)
    if stride == 1 and kh == kw and padding < kh:
        mirrored = jnp.swapaxes(w[::-1, ::-1], 2, 3)
        return shifted_forward(dy, mirrored, 1, kh - 1 - padding), dw
    return jax.vjp(lambda x: shifted_forward(x, w, stride, padding), x)[1](dy)[0], dw


def triton_forward(x: jax.Array, w: jax.Array, stride: int, padding: int) -> jax.Array:
    """The convolution by a Triton kernel if it supports the shapes, else by taps."""
    if not triton_conv.fits(x, w, stride, padding):
        return shifted_forward(x, w, stride, padding)
    return _by_kernel(triton_conv.forward, padding, x, w)


def triton_gradients(
    x: jax.Array, w: jax.Array, dy: jax.Array, stride: int, padding: int
) -> tuple[jax.Array, jax.Array]:
    """The gradients (dx, dw) by Triton kernels if they support the shapes, else by taps."""
    if not triton_conv.fits(x, w, stride, padding):
        return shifted_gradients(x, w, dy, stride, padding)
    return _by_kernel(triton_conv.gradients, padding, x, w, dy)


def mosaic_forward(
    x: jax.Array, w: jax.Array, b: jax.Array | None, stride: int, padding: int
) -> jax.Array:
    """The convolution with its bias by a TPU kernel if it supports the shapes, else XLA's."""
    if not tpu_conv.fits(x, w, stride, padding):
        return _plus(plain_forward(x, w, stride, padding), b)
    return _by_kernel(tpu_conv.forward, padding, x, w, b)


def mosaic_gradients(
    x: jax.Array, w: jax.Array, dy: jax.Array, stride: int, padding: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients (dx, dw, db) by a TPU kernel if it supports the shapes, else by patches."""
    if not tpu_conv.fits(x, w, stride, padding):
        return *patch_gradients(x, w, dy, stride, padding), _bias_gradient(dy)
    return _by_kernel(tpu_conv.gradients, padding, x, w, dy)


def _by_kernel(kernel: Callable[..., Any], padding: int, *args: jax.Array | None) -> Any:
    """Runs a Pallas kernel, on a CPU by its interpreter."""
    kernel = functools.partial(kernel, padding=padding)
    interpreted = functools.partial(kernel, interpret=True)
    return lax.platform_dependent(*args, cpu=interpreted, default=kernel)


def patch_gradients(
    x: jax.Array, w: jax.Array, dy: jax.Array, stride: int, padding: int
) -> tuple[jax.Array, jax.Array]:
    """The gradients (dx, dw) by one patch matrix and two matrix products."""
    kh, kw, c, out = w.shape
    if stride == 1 and kh == kw and padding < kh:
        # Both gradients use one patch matrix, of dy: building it costs as much as the products.
        p = patches(dy, (kh, kw), 1, kh - 1 - padding)
        dx = p @ jnp.swapaxes(w[::-1, ::-1], 2, 3).reshape(-1, c)
        return dx.reshape(x.shape), _mirror((x.reshape(-1, c).T @ p).reshape(c, kh, kw, out))
    p, transpose = jax.vjp(lambda x: patches(x, (kh, kw), stride, padding), x)
    dy = dy.reshape(-1, out)
    return transpose(dy @ w.reshape(-1, out).T)[0], (p.T @ dy).reshape(w.shape)


def cpu_gradients(
    x: jax.Array, w: jax.Array, dy: jax.Array, stride: int, padding: int
) -> tuple[jax.Array, jax.Array]:
    """The fastest gradients (dx, dw) of one example's kernel on a CPU."""
    if winograd.pays(x, w, stride, padding):
        return mirrored_input_gradient(x, w, dy, stride, padding), winograd.kernel_gradient(
            x, dy, padding
        )
    if _images_in_cache(dy) == len(x):
        return _gradients_in_cache(x, w, dy, stride, padding)

    def add(dw, part):
        dx, more = _gradients_in_cache(part[0], w, part[1], stride, padding)
        return dw + more, dx

    dw, dx = lax.scan(add, _float32_zeros(dy, w), _parts(x, dy))
    return dx.reshape(x.shape), dw.astype(w.dtype)


def _gradients_in_cache(
    x: jax.Array, w: jax.Array, dy: jax.Array, stride: int, padding: int
) -> tuple[jax.Array, jax.Array]:
    """The fastest gradients (dx, dw) of few images and channels on a CPU."""
    if winograd_rows.pays(x, w, stride, padding):
        return winograd_rows.gradients(x, w, dy, padding)
    if narrow_conv.pays(x, w, stride, padding) and w.shape[2] < w.shape[3]:
        dx = mirrored_input_gradient(x, w, dy, stride, padding)
        return dx, narrow_conv.kernel_gradient(x, w, dy, padding)
    return patch_gradients(x, w, dy, stride, padding)


def mirrored_input_gradient(
    x: jax.Array, w: jax.Array, dy: jax.Array, stride: int, padding: int
) -> jax.Array:
    """The gradient dx as a convolution of dy with the mirrored kernel.

    The barrier keeps XLA from folding the mirroring into the convolution, which made a small
    classifier's gradient five times slower inside a loop on a CPU.
    """
    mirrored = lax.optimization_barrier(jnp.swapaxes(w[::-1, ::-1], 2, 3))
    if stride == 1 and w.shape[0] == w.shape[1] and padding < w.shape[0]:
        return cpu_forward(dy, mirrored, 1, w.shape[0] - 1 - padding)
    if narrow_conv.strided_pays(w, stride):
        return narrow_conv.strided_input_gradient(x, w, dy, stride, padding)
    before = [k - 1 - padding for k in w.shape[:2]]
    after = [
        size + padding - 1 - (out - 1) * stride
        for size, out in zip(x.shape[1:3], dy.shape[1:3], strict=True)
    ]
    return lax.conv_general_dilated(
        dy,
        mirrored,
        (1, 1),
        list(zip(before, after, strict=True)),
        lhs_dilation=(stride, stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def grouped_kernel_gradient(
    x: jax.Array, w: jax.Array, dy: jax.Array, stride: int, padding: int
) -> jax.Array:
    """The gradient dw of a shared kernel, summed over groups of images that fit in the cache."""
    if winograd.pays(x, w, stride, padding):
        return winograd.kernel_gradient(x, dy, padding)

    def add(dw, part):
        return dw + _gradients_in_cache(part[0], w, part[1], stride, padding)[1], None

    return lax.scan(add, _float32_zeros(dy, w), _parts(x, dy))[0].astype(w.dtype)


def _parts(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits G images into parts [n,g,...] whose patch matrices fit in the cache."""
    size = _images_in_cache(dy)
    return tuple(a.reshape(len(a) // size, size, *a.shape[1:]) for a in (x, dy))


def _images_in_cache(dy: jax.Array) -> int:
    """The largest divisor of G images whose patch matrix fits in the cache."""
    rows = dy.shape[1] * dy.shape[2]
    divisors = (g for g in range(1, len(dy) + 1) if len(dy) % g == 0)
    return max((g for g in divisors if g * rows <= _ROWS), default=1)


def _float32_zeros(like: jax.Array, w: jax.Array) -> jax.Array:
    """Zeros of the kernel's shape for a sum, on the mesh axes of `like`."""
    return jnp.zeros_like(like, jnp.promote_types(w.dtype, jnp.float32), shape=w.shape)


def patches(x: jax.Array, kernel: tuple[int, int], stride: int, padding: int) -> jax.Array:
    """Patch matrix [G * h * w, kh * kw * C] of the zero-padded images, one row per output pixel."""
    return jnp.concatenate(_taps(x, kernel, stride, padding), -1).reshape(
        -1, math.prod(kernel) * x.shape[-1]
    )


def _taps(x: jax.Array, kernel: tuple[int, int], stride: int, padding: int) -> list[jax.Array]:
    """The input pixels of each of the kernel's taps, [G,h,w,C] each, row by row."""
    (kh, kw), (h, w) = kernel, _output_size(x, kernel, stride, padding)
    x = jnp.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    rows, columns = (h - 1) * stride + 1, (w - 1) * stride + 1
    return [
        x[:, i : i + rows : stride, j : j + columns : stride] for i in range(kh) for j in range(kw)
    ]


def _output_size(
    x: jax.Array, kernel: tuple[int, int], stride: int, padding: int
) -> tuple[int, int]:
    return tuple((x.shape[i + 1] + 2 * padding - kernel[i]) // stride + 1 for i in (0, 1))


def _mirror(dw: jax.Array) -> jax.Array:
    """Converts a mirrored kernel gradient [C,kh,kw,O] to [kh,kw,C,O]."""
    return dw[:, ::-1, ::-1].transpose(1, 2, 0, 3)


# ------------------------------------------------------- lowerings by platform


def with_bias(
    forward: Callable[..., Any], gradients: Callable[..., Any]
) -> tuple[Callable, Callable]:
    """Adds the bias to y = forward(x, w, ...), and its gradient to gradients(x, w, dy, ...)."""

    def forward_with_bias(x, w, b, *rest):
        return _plus(forward(x, w, *rest), b)

    def gradients_with_bias(x, w, dy, *rest):
        return *gradients(x, w, dy, *rest), _bias_gradient(dy)

    return forward_with_bias, gradients_with_bias


# Functions (forward, gradients) of one example's images, kernel and bias, which can be None:
# y = forward(x, w, b, stride, padding) and dx, dw, db = gradients(x, w, dy, stride, padding).
LOWERINGS = {
    "grouped": (plain_forward, plain_gradients),
    "patches": (patch_forward, patch_gradients),
    "shifted": (shifted_forward, shifted_gradients),
    "triton": (triton_forward, triton_gradients),
}
LOWERINGS = {name: with_bias(*pair) for name, pair in LOWERINGS.items()}
LOWERINGS["mosaic"] = (mosaic_forward, mosaic_gradients)
# The platform of a lowering's kernels, which a CPU interprets.
KERNELS = {"triton": "gpu", "mosaic": "tpu"}
# Lowerings (forward, gradients) by platform, named as in `lax.platform_dependent`.
CHOSEN = {
    "default": ("grouped", "patches"),
    # Grouped gradients become dense over all pairs of examples there, and patches are written to
    # HBM (measured by `ada_jax.plan`, see launch/README.md).
    "tpu": ("mosaic", "mosaic"),
    # On an H100 in bfloat16 the training step of cifar10.py:ada,gpu takes 25.8 ms with 'triton',
    # 27.1 with 'grouped' forward, and 36.1 with the default (launch/README.md).
    "cuda": ("triton", "triton"),
}
