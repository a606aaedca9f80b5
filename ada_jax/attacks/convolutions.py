"""Faster convolutions on CPUs, for any classifier whose gradient is computed inside a loop.

The gradient to images is a convolution with the mirrored kernel. Inside a loop on a CPU, XLA folds
the mirroring into it and then cannot use its fast kernels, which makes it two to fifteen times
slower. XLA is also slow for convolutions with few channels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

_FEW_CHANNELS = range(1, 5)

Strides = tuple[int, int]
Padding = tuple[tuple[int, int], tuple[int, int]]


def faster(f: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Replaces the ordinary float32 convolutions of images that f computes outside of loops.

    The result's gradient is that to its argument: those to arrays that f closes over are zero.
    """

    def replaced(x):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.explicit_axes or mesh.auto_axes or jax.typeof(x).mat.varying:
            return f(x)  # Not for images on a mesh, whose types name its axes; `pmap`'s do not.
        closed = jax.make_jaxpr(lambda x: f(x))(x)
        (y,) = _evaluate(closed.jaxpr, closed.consts, [x], [True])
        return y

    return replaced


def _evaluate(
    jaxpr: core.Jaxpr, constants: Sequence[Any], args: Sequence[Any], are_of_images: Sequence[bool]
) -> list[Any]:
    """Evaluates a jaxpr with its convolutions replaced, also those in functions under `jax.jit`.

    Args:
      jaxpr: the program.
      constants: values of its constants.
      args: values of its arguments.
      are_of_images: which arguments depend on the images.
    """
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *args], strict=True))
    of_images = {v for v, depends in zip(jaxpr.invars, are_of_images, strict=True) if depends}
    read = lambda v: v.val if isinstance(v, core.Literal) else values[v]  # noqa: E731
    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        depend = [not isinstance(v, core.Literal) and v in of_images for v in equation.invars]
        if any(depend):
            of_images.update(equation.outvars)
        if _is_ordinary(equation) and not depend[1]:  # A kernel has no gradient.
            out = [_convolve_as(equation.params, *inputs)]
        elif equation.primitive is core.primitives.jit_p:
            inner = equation.params["jaxpr"]
            out = _evaluate(inner.jaxpr, inner.consts, inputs, depend)
        else:
            named = {v: values[v] for v in equation.invars if not isinstance(v, core.Literal)}
            alone = jaxpr.replace(
                constvars=[],
                invars=list(named),
                outvars=equation.outvars,
                eqns=[equation],
                debug_info=jaxpr.debug_info._replace(arg_names=None, result_paths=None),
            )
            out = jax.core.eval_jaxpr(alone, (), *named.values())
        values |= zip(equation.outvars, out, strict=True)
    return [read(v) for v in jaxpr.outvars]


def _is_ordinary(equation: core.JaxprEqn) -> bool:
    """Whether it convolves float32 images, without groups or dilation."""
    if equation.primitive is not core.primitives.conv_general_dilated_p:
        return False
    params, (x, w) = equation.params, (v.aval for v in equation.invars)
    groups = params["feature_group_count"], params["batch_group_count"]
    dilation = (*params["lhs_dilation"], *params["rhs_dilation"])
    types = {x.dtype, w.dtype, equation.outvars[0].aval.dtype}
    return x.ndim == 4 and types == {jnp.dtype("float32")} and {*groups, *dilation} == {1}


def _convolve_as(params: dict[str, Any], x: jax.Array, w: jax.Array) -> jax.Array:
    """The convolution with a primitive's parameters, whatever the order of its axes."""
    (n, c, *image), (o, i, *kernel), out = params["dimension_numbers"]
    x, w = x.transpose(n, *image, c), w.transpose(*kernel, i, o)
    strides, padding = tuple(params["window_strides"]), tuple(params["padding"])
    y = _convolve(x, w, strides, padding, params["precision"])
    return y.transpose(np.argsort([out[0], *out[2:], out[1]]))


# ------------------------------- x [B,H,W,C], w [kh,kw,C,O], settings for (height, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(
    x: jax.Array, w: jax.Array, strides: Strides, padding: Padding, precision: Any
) -> jax.Array:
    settings = {"strides": strides, "padding": padding, "precision": precision}
    cpu, default = (functools.partial(f, **settings) for f in (_forward, _plain))
    return lax.platform_dependent(x, w, cpu=cpu, default=default)


def _convolve_fwd(x, w, strides, padding, precision):
    return _convolve(x, w, strides, padding, precision), (x, w)


def _convolve_bwd(strides, padding, precision, saved, dy):
    x, w = saved
    settings = {"strides": strides, "padding": padding, "precision": precision}
    settings |= {"image": x.shape[1:3]}
    cpu, default = (
        functools.partial(f, **settings) for f in (_input_gradient, _plain_input_gradient)
    )
    return lax.platform_dependent(dy, w, cpu=cpu, default=default), None


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _plain(
    x: jax.Array, w: jax.Array, strides: Strides, padding: Padding, precision: Any
) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=numbers, precision=precision
    )


def _plain_input_gradient(
    dy: jax.Array,
    w: jax.Array,
    strides: Strides,
    padding: Padding,
    precision: Any,
    image: tuple[int, int],
) -> jax.Array:
    x = jax.ShapeDtypeStruct((len(dy), *image, w.shape[2]), dy.dtype)
    return jax.linear_transpose(lambda x: _plain(x, w, strides, padding, precision), x)(dy)[0]


def _forward(
    x: jax.Array, w: jax.Array, strides: Strides, padding: Padding, precision: Any
) -> jax.Array:
    if x.shape[-1] not in _FEW_CHANNELS or strides != (1, 1):
        return _plain(x, w, strides, padding, precision)
    pixels = _pixels_at_a_time(x.shape[1:3], w, strides, padding)
    rows = _windows(x, w.shape[:2], strides, padding, pixels)
    y = jnp.matmul(rows, _joint_kernel(w, strides, pixels), precision=precision)
    return y.reshape(*y.shape[:2], -1, w.shape[-1])


def _input_gradient(
    dy: jax.Array,
    w: jax.Array,
    strides: Strides,
    padding: Padding,
    precision: Any,
    image: tuple[int, int],
) -> jax.Array:
    if w.shape[2] not in _FEW_CHANNELS:
        return _by_phases(dy, w, strides, padding, precision, image)
    x = jax.ShapeDtypeStruct((len(dy), *image, w.shape[2]), dy.dtype)
    pixels = _pixels_at_a_time(image, w, strides, padding)
    windows = lambda x: _windows(x, w.shape[:2], strides, padding, pixels)  # noqa: E731
    dy = dy.reshape(*dy.shape[:2], -1, pixels * w.shape[-1])
    kernel = _joint_kernel(w, strides, pixels).T
    return jax.linear_transpose(windows, x)(jnp.matmul(dy, kernel, precision=precision))[0]


def _by_phases(
    dy: jax.Array,
    w: jax.Array,
    strides: Strides,
    padding: Padding,
    precision: Any,
    image: tuple[int, int],
) -> jax.Array:
    """The gradient of a strided convolution: one of stride 1, whose channels are s x s pixels.

    Pixel s q + r of the padded image is the sum of dy[q - t] w[s t + r] over t.
    """
    (kh, kw, c, out), (sh, sw) = w.shape, strides
    taps = [-(-k // s) for k, s in zip((kh, kw), strides, strict=True)]
    first = [before // s for (before, _), s in zip(padding, strides, strict=True)]
    end = [
        -(-(size + before) // s)
        for size, (before, _), s in zip(image, padding, strides, strict=True)
    ]
    w = jnp.pad(w, ((0, taps[0] * sh - kh), (0, taps[1] * sw - kw), (0, 0), (0, 0)))
    w = w.reshape(taps[0], sh, taps[1], sw, c, out)[::-1, :, ::-1].transpose(0, 2, 5, 1, 3, 4)
    # Otherwise XLA folds the mirroring into the convolution.
    w = lax.optimization_barrier(w.reshape(*taps, out, sh * sw * c))
    around = [
        (t - 1 - q, e - n) for t, q, e, n in zip(taps, first, end, dy.shape[1:3], strict=True)
    ]
    dx = _plain(dy, w, (1, 1), around, precision)
    batch, height, width, _ = dx.shape
    dx = dx.reshape(batch, height, width, sh, sw, c).transpose(0, 1, 3, 2, 4, 5)
    dx = dx.reshape(batch, height * sh, width * sw, c)
    top, left = padding[0][0] % sh, padding[1][0] % sw
    return dx[:, top : top + image[0], left : left + image[1]]


def _pixels_at_a_time(
    image: tuple[int, int], w: jax.Array, strides: Strides, padding: Padding
) -> int:
    """How many neighbouring pixels of the output a row of the matrix product computes."""
    width = _output_size(image, w.shape[:2], strides, padding)[1]
    return 2 if strides[1] == 1 and width % 2 == 0 else 1


def _windows(
    x: jax.Array, kernel: tuple[int, int], strides: Strides, padding: Padding, pixels: int
) -> jax.Array:
    """What `pixels` neighbouring outputs see of the image, [B,h,w / pixels,kh * columns * C].

    Copied in long pieces, because single pixels of few channels are slow to copy.
    """
    (kh, kw), (sh, sw), (batch, _, width, c) = kernel, strides, x.shape
    h, w = _output_size(x.shape[1:3], kernel, strides, padding)
    groups, step, columns = w // pixels, pixels * sw, (pixels - 1) * sw + kw
    pieces = -(-columns // step)
    left, filled = padding[1][0], (groups + pieces - 1) * step
    x = lax.pad(
        x,
        jnp.zeros((), x.dtype),
        [(0, 0, 0), (*padding[0], 0), (left, filled - width - left, 0), (0, 0, 0)],
    )
    x = x.reshape(batch, -1, groups + pieces - 1, step * c)
    return jnp.concatenate(
        [
            x[:, i : i + sh * (h - 1) + 1 : sh, j : j + groups, : (columns - j * step) * c]
            for i in range(kh)
            for j in range(pieces)
        ],
        -1,
    )


def _joint_kernel(w: jax.Array, strides: Strides, pixels: int) -> jax.Array:
    """The kernel [kh * columns * C, pixels * O] that belongs to `_windows`."""
    columns = (pixels - 1) * strides[1] + w.shape[1]
    shifted = [
        jnp.pad(w, ((0, 0), (at, columns - w.shape[1] - at), (0, 0), (0, 0)))
        for at in range(0, pixels * strides[1], strides[1])
    ]
    return jnp.stack(shifted, 3).reshape(-1, pixels * w.shape[-1])


def _output_size(
    image: tuple[int, int], kernel: tuple[int, int], strides: Strides, padding: Padding
) -> tuple[int, int]:
    return tuple(
        (size + sum(around) - k) // s + 1
        for size, k, s, around in zip(image, kernel, strides, padding, strict=True)
    )
