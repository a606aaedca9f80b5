"""Checks and conversions of arguments, shared by AdA, the attacks and the augmentations."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ada_jax.errors import UserError

_ROUNDING = 1e-6  # how far rounding may put a pixel outside of [0,1]


def concrete(value: jax.Array | float, default: float) -> np.ndarray:
    """The value as an array; `default` if it is traced."""
    return np.asarray(default if isinstance(value, jax.core.Tracer) else value)


def scalar(name: str, value: jax.Array | float, default: float) -> float:
    """An argument's value; `default` if it is traced.

    Raises:
      UserError: it is not one number.
    """
    found = concrete(value, default)
    if np.shape(value) or not np.issubdtype(found.dtype, np.number):
        raise UserError(f"{name}={value!r} must be one number.")
    return float(found)


def check_integers(least: int, **values: int) -> None:
    """Raises UserError for the first value that is not an integer of at least `least`."""
    for name, value in values.items():
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
            raise UserError(f"{name}={value!r} must be an integer of at least {least}.")


def check_positive(**values: jax.Array | float) -> None:
    """Raises UserError for the first value that is not positive and finite, unless it is traced."""
    for name, value in values.items():
        if not 0 < scalar(name, value, 1.0) < np.inf:
            raise UserError(f"{name}={value!r} must be positive and finite.")


def float32(value: jax.Array | float) -> jax.Array | np.float32:
    """Converts an argument to float32; under x64 a float64 one would promote other arrays."""
    return value.astype(jnp.float32) if isinstance(value, jax.Array) else np.float32(value)


def as_images(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Converts images [B,H,W,C] of any floating type to float32.

    Raises:
      UserError: the shape or the type is wrong, or pixels that are not traced are out of [0, 1].
    """
    if x.ndim != 4 or not len(x):
        raise UserError(f"Images of shape {list(x.shape)} must be [B,H,W,C] with B at least 1.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(
            f"Images of type {x.dtype} must be floating point in [0, 1]: divide by 255."
        )
    x = x.astype(jnp.float32)
    pixels = concrete(x, 0.0)
    if not (pixels.min() >= -_ROUNDING and pixels.max() <= 1 + _ROUNDING):  # Also true of NaN.
        raise UserError(
            f"Pixels from {pixels.min()} to {pixels.max()} must be in [0, 1]: rescale the images."
        )
    return x


def check_labels(
    y: jax.Array, x: jax.Array, logits_fn: Callable, microbatch: int | None = None
) -> int:
    """Checks the labels of images x against a classifier; values only if not traced.

    Args:
      y: labels [B].
      x: images [B,H,W,C].
      logits_fn: the classifier.
      microbatch: number of images that it gets at a time; None means all.

    Returns:
      The classifier's number of classes.

    Raises:
      UserError: the labels are not integers [B] in 0..K-1, or the classifier does not return one
        array of logits [B,K] with K at least 2.
    """
    if y.shape != x.shape[:1] or not jnp.issubdtype(y.dtype, jnp.integer):
        raise UserError(
            f"Labels of shape {list(y.shape)} and type {y.dtype} must be one integer for each of "
            f"the {len(x)} images."
        )
    count = num_classes(logits_fn, microbatch_spec(x, microbatch))
    if count < 2:
        raise UserError("logits_fn returns logits of one class: it must have at least two.")
    if isinstance(y, jax.core.Tracer):
        return count
    y = np.asarray(y)
    if not (y.min() >= 0 and y.max() < count):
        raise UserError(
            f"Labels from {y.min()} to {y.max()} do not fit the classifier's {count} logits: "
            f"labels must be in 0..{count - 1}."
        )
    return count


def microbatch_spec(x: jax.Array, microbatch: int | None) -> jax.Array | jax.ShapeDtypeStruct:
    """Shape and type of a microbatch of x, for tracing; None returns x with its sharding."""
    if not microbatch:
        return x
    return jax.ShapeDtypeStruct((min(microbatch, len(x)), *x.shape[1:]), x.dtype)


def num_classes(logits_fn: Callable, x: jax.Array) -> int:
    """Number of classes K of a classifier of images x, found without running it.

    Raises:
      UserError: it does not return one array of logits [B,K].
    """
    # A new function object, here and below: JAX caches traces by the function's identity, which
    # does not change when an object is modified in place.
    logits = jax.eval_shape(lambda x: logits_fn(x), x)
    if getattr(logits, "ndim", None) != 2:
        raise UserError(f"logits_fn returns {logits}: it must return one array of logits [B,K].")
    return logits.shape[-1]


def float32_logits(logits_fn: Callable, x: jax.Array, *, gradients: bool) -> Callable:
    """Converts the logits of logits_fn to float32.

    Args:
      logits_fn: the classifier, [b,H,W,C] -> [b,K].
      x: images [b,H,W,C].
      gradients: whether the caller takes gradients of the logits.

    Raises:
      UserError: gradients are needed and the logits are not floating point.
    """
    dtype = jax.eval_shape(lambda x: logits_fn(x), x).dtype  # See `num_classes`.
    if gradients and not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(
            f"logits_fn returns logits of {dtype}, which have no gradient: it must return "
            "floating-point logits."
        )
    return lambda x: logits_fn(x).astype(jnp.float32)


def not_finite(logits: jax.Array) -> jax.Array:
    """Whether an example's logits [B,K] contain NaN or infinity, bool [B].

    Minus infinity, the logit of a masked class, is allowed unless all logits are.
    """
    largest = jnp.max(logits, -1)  # NaN if any logit is.
    return ~jnp.isfinite(largest)


def check_finite(bad: int, count: int, what: str) -> None:
    """Raises UserError if the logits of `bad` of `count` images, named `what`, are not finite."""
    if bad:
        raise UserError(
            f"The classifier returns NaN or infinity for {bad} of {count} {what}: check its "
            "weights."
        )


def nan_if_invalid(x: jax.Array, y: jax.Array | None = None, classes: int = 0) -> jax.Array:
    """Clips rounding errors, and replaces images outside [0,1] or with a wrong label by NaN.

    Inside `jax.jit`, where no error can be raised, this keeps training from going on with them.
    """
    valid = jnp.all((x >= -_ROUNDING) & (x <= 1 + _ROUNDING), axis=(1, 2, 3))
    if y is not None:
        valid &= (y >= 0) & (y.astype(jnp.int32) < classes)  # As int8 `classes` may wrap around.
    return jnp.where(valid[:, None, None, None], jnp.clip(x, 0, 1), jnp.nan)


def detached(f: Callable, *args: jax.Array) -> Callable:
    """f for arguments of these shapes, without gradients to the arrays that f closes over.

    Otherwise differentiating a training step would differentiate the attack inside it. Unlike
    `jax.closure_convert`, nothing is cached from one call to the next.
    """
    closed, shapes = jax.make_jaxpr(lambda *args: f(*args), return_shape=True)(*args)
    constants, tree = lax.stop_gradient(closed.consts), jax.tree.structure(shapes)
    # The constants become arguments; otherwise JAX's caches would keep them alive.
    inner = closed.jaxpr
    inputs = [*inner.constvars, *inner.invars]
    unnamed = inner.debug_info._replace(arg_names=None)
    jaxpr = inner.replace(constvars=[], invars=inputs, debug_info=unnamed)

    def pure(constants, *args):
        out = jax.core.eval_jaxpr(jaxpr, (), *constants, *jax.tree.leaves(args))
        return jax.tree.unflatten(tree, out)

    return functools.partial(pure, constants)
