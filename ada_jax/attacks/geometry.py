"""The geometry of the attacks: l-infinity and l2 balls, the box of images, hyperplanes.

Everything is per example along the first axis; `norm` is 'linf' or 'l2'.
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
    """delta / ||delta||, of zero zero."""
    return delta / along(jnp.maximum(size(delta, norm), _TINY), delta)


def finite(gradient: jax.Array) -> jax.Array:
    """The gradient, of zero where it is NaN or infinite, so that iterates stay images."""
    return jnp.where(jnp.isfinite(gradient), gradient, 0)


def steepest(gradient: jax.Array, norm: str) -> jax.Array:
    """The direction of unit norm along which a loss of this gradient rises fastest."""
    gradient = finite(gradient)
    return jnp.sign(gradient) if norm == "linf" else normalise(gradient, "l2")


def project(x_new: jax.Array, x: jax.Array, epsilon: jax.Array | float, norm: str) -> jax.Array:
    """Moves images into the ball around x and into the box.

    For 'linf' this is the nearest point of the intersection. For 'l2' it is the nearest point of
    the ball, clipped to the box: inside both, as x is in the box, but not always the nearest.

    Args:
      x_new: images [B,H,W,C].
      x: the balls' centres [B,H,W,C] in [0,1].
      epsilon: radius, in units of pixels.
      norm: 'linf' or 'l2'.
    """
    if norm == "linf":
        return jnp.clip(jnp.clip(x_new, x - epsilon, x + epsilon), 0, 1)
    delta = x_new - x
    shrink = jnp.minimum(1.0, epsilon / jnp.maximum(size(delta, "l2"), _TINY))
    return jnp.clip(x + delta * along(shrink, delta), 0, 1)


def on_sphere(keys: jax.Array, x: jax.Array, epsilon: jax.Array | float, norm: str) -> jax.Array:
    """Random points on the ball's surface, clipped to the box: APGD's start.

    Args:
      keys: one per example [B].
      x: centres [B,H,W,C] in [0,1].
      epsilon: radius.
      norm: 'linf' (uniform numbers over the largest of them) or 'l2' (a uniform direction).
    """
    draw = (lambda k: _uniform(k, x)) if norm == "linf" else (lambda k: _normal(k, x))
    return jnp.clip(x + epsilon * normalise(jax.vmap(draw)(keys), norm), 0, 1)


def in_ball(keys: jax.Array, x: jax.Array, epsilon: jax.Array | float, norm: str) -> jax.Array:
    """Uniformly random points of the ball, clipped to the box."""
    if norm == "linf":
        return jnp.clip(x + epsilon * jax.vmap(lambda k: _uniform(k, x))(keys), 0, 1)
    share_keys, keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    # U^(1/d) makes the distance from the centre that of a uniform point of a d-ball.
    share = jax.vmap(lambda k: jax.random.uniform(k, (), jnp.float32))(share_keys)
    share **= 1 / x[0].size
    direction = normalise(jax.vmap(lambda k: _normal(k, x))(keys), "l2")
    return jnp.clip(x + epsilon * along(share, x) * direction, 0, 1)


def to_hyperplane(x: jax.Array, w: jax.Array, c: jax.Array, norm: str) -> jax.Array:
    """The smallest delta with <w, delta> = c and x + delta in the box.

    Where the box does not reach the hyperplane, delta comes as near to it as possible; where w is
    zero, delta is zero.

    Args:
      x: images [B,H,W,C] in [0,1].
      w: the hyperplanes' normals [B,H,W,C].
      c: how far away they are, times ||w||_2 [B].
      norm: 'linf' or 'l2', what is minimised.

    Returns:
      delta [B,H,W,C].

    Source: the problem is that of Croce and Hein, "Minimally distorted adversarial examples with a
    fast adaptive boundary attack" (2020), section 2; solved here by Newton's method on its dual.
    """
    scale = jnp.maximum(size(w, "l2"), 1e-30)
    w, c = w / along(scale, w), c / scale
    w = w * along(jnp.sign(c), w)  # Now <w, delta> = |c| is wanted.
    magnitude = jnp.abs(w).reshape(len(w), -1)
    room = jnp.where(w > 0, 1 - x, x).reshape(len(w), -1)
    # delta_i = sign(w_i) min(t speed_i, room_i), so <w, delta> rises with t, concave and piecewise
    # linear: Newton's steps never overshoot, and end on the piece that holds the solution.
    speed = jnp.sign(magnitude) if norm == "linf" else magnitude

    def newton(carry):
        i, t, _ = carry
        moved = t[:, None] * speed
        free = moved < room
        missing = jnp.abs(c) - jnp.sum(magnitude * jnp.minimum(moved, room), -1)
        slope = jnp.sum(jnp.where(free, magnitude * speed, 0), -1)
        step = jnp.where(slope > 0, missing / jnp.maximum(slope, 1e-30), 0)
        return i + 1, t + step, step > 1e-6 * t

    unfinished = lambda carry: (carry[0] < 100) & jnp.any(carry[2])  # noqa: E731
    start = jnp.int32(0), jnp.zeros_like(c), jnp.ones_like(c, bool)
    _, t, _ = lax.while_loop(unfinished, newton, start)
    return jnp.sign(w) * jnp.minimum(t[:, None] * speed, room).reshape(x.shape)


def _uniform(key: jax.Array, x: jax.Array) -> jax.Array:
    return jax.random.uniform(key, x.shape[1:], jnp.float32, -1.0, 1.0)


def _normal(key: jax.Array, x: jax.Array) -> jax.Array:
    return jax.random.normal(key, x.shape[1:], jnp.float32)
