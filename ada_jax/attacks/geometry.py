"""Geometry of the attacks: l-infinity and l2 balls, the box [0,1] of images, hyperplanes.

All functions work per example along the first axis; `norm` is 'linf' or 'l2'.
"""

import jax
import jax.numpy as jnp
from jax import lax

_TINY = 1e-12


def along(scalars: jax.Array, images: jax.Array) -> jax.Array:
    """Reshapes [B] so that it multiplies [B, ...]."""
    return scalars.reshape(-1, *[1] * (images.ndim - 1))


def size(delta: jax.Array, norm: str) -> jax.Array:
    """The norm [B] of every delta [B, ...]."""
    flat = delta.reshape(len(delta), -1)
    return jnp.max(jnp.abs(flat), -1) if norm == "linf" else jnp.sqrt(jnp.sum(flat**2, -1))


def normalise(delta: jax.Array, norm: str) -> jax.Array:
    """delta / ||delta||; zero for zero."""
    return delta / along(jnp.maximum(size(delta, norm), _TINY), delta)


def finite(gradient: jax.Array) -> jax.Array:
    """Replaces NaN and infinity in a gradient by zero."""
    return jnp.where(jnp.isfinite(gradient), gradient, 0)


def steepest(gradient: jax.Array, norm: str) -> jax.Array:
    """The direction of steepest ascent, of unit norm, for this gradient."""
    gradient = finite(gradient)
    return jnp.sign(gradient) if norm == "linf" else normalise(gradient, "l2")


def project(x_new: jax.Array, x: jax.Array, epsilon: jax.Array | float, norm: str) -> jax.Array:
    """Moves images into the intersection of the ball around x and the box.

    For 'linf' the result is the nearest point. For 'l2' it is the nearest point of the ball,
    clipped to the box, which is in the intersection but not always the nearest point of it.

    Args:
      x_new: images [B,H,W,C].
      x: centres of the balls [B,H,W,C] in [0,1].
      epsilon: radius, in units of pixel values.
      norm: 'linf' or 'l2'.
    """
    if norm == "linf":
        return jnp.clip(jnp.clip(x_new, x - epsilon, x + epsilon), 0, 1)
    delta = x_new - x
    shrink = jnp.minimum(1.0, epsilon / jnp.maximum(size(delta, "l2"), _TINY))
    return jnp.clip(x + delta * along(shrink, delta), 0, 1)


def on_sphere(keys: jax.Array, x: jax.Array, epsilon: jax.Array | float, norm: str) -> jax.Array:
    """Random points on the ball's surface, clipped to the box, where APGD starts.

    Args:
      keys: one per example [B].
      x: centres [B,H,W,C] in [0,1].
      epsilon: radius.
      norm: 'linf' (uniform numbers divided by the largest of them) or 'l2' (a uniform direction).
    """
    draw = (lambda k: _uniform(k, x)) if norm == "linf" else (lambda k: _normal(k, x))
    return jnp.clip(x + epsilon * normalise(jax.vmap(draw)(keys), norm), 0, 1)


def in_ball(keys: jax.Array, x: jax.Array, epsilon: jax.Array | float, norm: str) -> jax.Array:
    """Uniformly random points of the ball, clipped to the box."""
    if norm == "linf":
        return jnp.clip(x + epsilon * jax.vmap(lambda k: _uniform(k, x))(keys), 0, 1)
    share_keys, keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    # U^(1/d) is distributed like the distance from the centre of a uniform point in a d-ball.
    share = jax.vmap(lambda k: jax.random.uniform(k, (), jnp.float32))(share_keys)
    share **= 1 / x[0].size
    direction = normalise(jax.vmap(lambda k: _normal(k, x))(keys), "l2")
    return jnp.clip(x + epsilon * along(share, x) * direction, 0, 1)


def to_hyperplane(x: jax.Array, w: jax.Array, c: jax.Array, norm: str) -> jax.Array:
    """The smallest delta with <w, delta> = c and x + delta in the box.

    If the hyperplane does not intersect the box, x + delta is as near to it as possible. If w is
    zero, delta is zero.

    Args:
      x: images [B,H,W,C] in [0,1].
      w: normals of the hyperplanes [B,H,W,C].
      c: offsets [B], the distance in l2 times ||w||_2.
      norm: 'linf' or 'l2', the norm of delta to minimise.

    Returns:
      delta [B,H,W,C].

    Source: the problem is that of Croce and Hein, "Minimally distorted adversarial examples with a
    fast adaptive boundary attack" (2020), section 2; solved here by Newton's method on its dual.
    """
    scale = jnp.maximum(size(w, "l2"), 1e-30)
    w, c = w / along(scale, w), c / scale
    w = w * along(jnp.sign(c), w)  # The constraint becomes <w, delta> = |c|.
    magnitude = jnp.abs(w).reshape(len(w), -1)
    slack = jnp.where(w > 0, 1 - x, x).reshape(len(w), -1)
    # delta_i = sign(w_i) min(t speed_i, slack_i). <w, delta> is increasing, concave and piecewise
    # linear in t, so Newton's steps never overshoot and end on the piece with the solution.
    speed = jnp.sign(magnitude) if norm == "linf" else magnitude

    def newton(carry):
        i, t, _ = carry
        moved = t[:, None] * speed
        free = moved < slack
        missing = jnp.abs(c) - jnp.sum(magnitude * jnp.minimum(moved, slack), -1)
        slope = jnp.sum(jnp.where(free, magnitude * speed, 0), -1)
        step = jnp.where(slope > 0, missing / jnp.maximum(slope, 1e-30), 0)
        return i + 1, t + step, step > 1e-6 * t

    unfinished = lambda carry: (carry[0] < 100) & jnp.any(carry[2])  # noqa: E731
    start = jnp.int32(0), jnp.zeros_like(c), jnp.ones_like(c, bool)
    _, t, _ = lax.while_loop(unfinished, newton, start)
    return jnp.sign(w) * jnp.minimum(t[:, None] * speed, slack).reshape(x.shape)


def _uniform(key: jax.Array, x: jax.Array) -> jax.Array:
    return jax.random.uniform(key, x.shape[1:], jnp.float32, -1.0, 1.0)


def _normal(key: jax.Array, x: jax.Array) -> jax.Array:
    return jax.random.normal(key, x.shape[1:], jnp.float32)
