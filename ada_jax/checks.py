"""The door of every attack: images that are images, functions without hidden gradients."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ada_jax.errors import UserError


def known(value: jax.Array | float, unknown: float) -> np.ndarray:
    """The value, to be looked at even inside `jax.jit`; of a traced one, `unknown`."""
    return np.asarray(unknown if isinstance(value, jax.core.Tracer) else value)


def number(name: str, value: jax.Array | float, unknown: float) -> float:
    """A knob's value; of a traced one, `unknown`.

    Raises:
      UserError: it is not one number.
    """
    found = known(value, unknown)
    if found.shape or not np.issubdtype(found.dtype, np.number):
        raise UserError(f"{name}={value!r} must be one number.")
    return float(found)


def check_integers(least: int, **values: int) -> None:
    """Refuses what are no integers, or less than `least`.

    Raises:
      UserError: naming the first of them.
    """
    for name, value in values.items():
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
            raise UserError(f"{name}={value!r} must be an integer of at least {least}.")


def float32(value: jax.Array | float) -> jax.Array | np.float32:
    """A knob in float32: a float64 one would make float64 of what it meets under x64."""
    return value.astype(jnp.float32) if isinstance(value, jax.Array) else np.float32(value)


def as_images(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Images [B,H,W,C] of any floating type as float32.

    Raises:
      UserError: a shape, a type or a pixel is wrong; pixels are checked only if not traced.
    """
    if x.ndim != 4 or not len(x):
        raise UserError(f"Images of shape {list(x.shape)} must be [B,H,W,C], with B at least 1.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"Images of {x.dtype} must be floating point in [0, 1]: divide by 255.")
    x = x.astype(jnp.float32)
    pixels = known(x, 0.0)
    if not (pixels.min() >= 0 and pixels.max() <= 1):  # also true of NaN
        raise UserError(f"Pixels from {pixels.min()} to {pixels.max()} must be in [0, 1].")
    return x


def check_labels(
    y: jax.Array, x: jax.Array, logits_fn: Callable, microbatch: int | None = None
) -> int:
    """Checks labels of images x for a classifier; values only where not traced.

    Args:
      y: labels [B].
      x: images [B,H,W,C].
      logits_fn: the classifier.
      microbatch: images that it is given at a time; None gives all.

    Returns:
      The classifier's number of classes.

    Raises:
      UserError: not one integer for each image, or none of the classifier's classes; the classifier
        does not return one array of logits, or only one logit.
    """
    if y.shape != x.shape[:1] or not jnp.issubdtype(y.dtype, jnp.integer):
        raise UserError(
            f"Labels of shape {list(y.shape)} and {y.dtype} must be one integer for each of the "
            f"{len(x)} images."
        )
    count = num_classes(logits_fn, first(x, microbatch))
    if count < 2:
        raise UserError("logits_fn returns logits of one class: it must have two classes or more.")
    if isinstance(y, jax.core.Tracer):
        return count
    y = np.asarray(y)
    if not (y.min() >= 0 and y.max() < count):
        raise UserError(
            f"Labels from {y.min()} to {y.max()} do not fit the classifier's {count} logits."
        )
    return count


def first(x: jax.Array, count: int | None) -> jax.Array | jax.ShapeDtypeStruct:
    """The shape of the first images of x, to trace with; None gives x, whose sharding counts."""
    return jax.ShapeDtypeStruct((min(count, len(x)), *x.shape[1:]), x.dtype) if count else x


def num_classes(logits_fn: Callable, x: jax.Array) -> int:
    """The number of classes K of a classifier of images x, without running it.

    Raises:
      UserError: it does not return one array of logits [B,K].
    """
    # A fresh function, here and below: JAX remembers what it traced by the function's identity,
    # which an object that changes in place keeps.
    logits = jax.eval_shape(lambda x: logits_fn(x), x)
    if getattr(logits, "ndim", None) != 2:
        raise UserError(f"logits_fn returns {logits}: it must return one array of logits [B,K].")
    return logits.shape[-1]


def float32_logits(logits_fn: Callable, x: jax.Array, *, gradients: bool) -> Callable:
    """logits_fn, its logits converted to float32.

    Args:
      logits_fn: the classifier, [b,H,W,C] -> [b,K].
      x: images [b,H,W,C].
      gradients: whether the caller takes gradients of the logits.

    Raises:
      UserError: gradients are needed, and the logits are no floating-point numbers.
    """
    dtype = jax.eval_shape(lambda x: logits_fn(x), x).dtype  # See `num_classes`.
    if gradients and not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(
            f"logits_fn returns logits of {dtype}, which have no gradient: it must return "
            "floating-point logits."
        )
    return lambda x: logits_fn(x).astype(jnp.float32)


def not_finite(logits: jax.Array) -> jax.Array:
    """Whether an example's logits [B,K] have no largest finite one, bool [B].

    Minus infinity, of a class that is masked out, is a logit; NaN and infinity are none.
    """
    largest = jnp.max(logits, -1)  # NaN if any is.
    return ~jnp.isfinite(largest)


def check_finite(bad: int, count: int, what: str) -> None:
    """Checks that a classifier returned only finite logits.

    Args:
      bad: number of images whose logits are not.
      count: number of images.
      what: the images, for the message.

    Raises:
      UserError: some logits are NaN or infinite.
    """
    if bad:
        raise UserError(
            f"The classifier returns NaN or infinity for {bad} of {count} {what}: check its "
            "weights."
        )


def poisoned(x: jax.Array, y: jax.Array | None = None, classes: int = 0) -> jax.Array:
    """Images, of NaN where a pixel is outside [0,1] or the label, if given, none of the classes.

    For `jax.jit`, where nothing can be raised: else training would go on with wrong images.
    """
    rounding = 1e-6
    right = jnp.all((x >= -rounding) & (x <= 1 + rounding), axis=(1, 2, 3))
    if y is not None:
        right &= (y >= 0) & (y < classes)
    return jnp.where(right[:, None, None, None], x, jnp.nan)


def detached(f: Callable, *args: jax.Array) -> Callable:
    """f for arguments of these shapes, in which nothing that f closes over has a gradient.

    Without it a caller who differentiates a whole training step would differentiate the attack.
    Unlike `jax.closure_convert` it remembers nothing from one call to the next.
    """
    closed, shapes = jax.make_jaxpr(lambda *args: f(*args), return_shape=True)(*args)
    constants, tree = lax.stop_gradient(closed.consts), jax.tree.structure(shapes)
    # Constants are arguments of this one: JAX's caches would keep them alive with it.
    inner = closed.jaxpr
    inputs = [*inner.constvars, *inner.invars]
    unnamed = inner.debug_info._replace(arg_names=None)
    jaxpr = inner.replace(constvars=[], invars=inputs, debug_info=unnamed)

    def pure(constants, *args):
        out = jax.core.eval_jaxpr(jaxpr, (), *constants, *jax.tree.leaves(args))
        return jax.tree.unflatten(tree, out)

    return functools.partial(pure, constants)
