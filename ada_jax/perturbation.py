"""The geometry of delta: one perturbation of theta per example, inside one l2 ball per leaf.

`theta` is any pytree of arrays; `delta` is the same tree with an example axis in front of every
leaf; `radii` is the same tree with one scalar per leaf. No networks here.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ada_jax import checks, sharding

PyTree = object


def radii(theta: PyTree, nu: float) -> PyTree:
    """Radius of every leaf's ball, nu_i = nu * ||theta_i||_2 (paper, section 2).

    Args:
      theta: corruption-network parameters.
      nu: relative radius, no unit; a leaf of zeros gets radius 0 and stays as it is.

    Returns:
      Tree of float32 scalars.
    """
    nu = checks.float32(nu)
    return jax.tree.map(lambda a: nu * jnp.linalg.norm(a.astype(jnp.float32).ravel()), theta)


def median_radius(radii: PyTree) -> jax.Array:
    """Median over all leaves' radii, of which the paper's step size is a quarter (appendix A)."""
    return jnp.median(jnp.stack(jax.tree.leaves(radii)))


def init(keys: jax.Array, theta: PyTree, radii: PyTree) -> PyTree:
    """Draws delta uniformly from the product of balls (paper, appendix A).

    Args:
      keys: one key per example [B]; example i's draw depends on its own key only.
      theta: parameters, for their shapes.
      radii: tree of scalars, in theta's units.

    Returns:
      Tree of float32 leaves [B, *theta_i.shape] with norms at most radii.
    """
    leaves, tree = jax.tree.flatten(theta)
    sizes = np.array([leaf.size for leaf in leaves])

    def one_example(key):
        direction_key, norm_key = jax.random.split(key)
        # One draw for all leaves, not one each: random draws are what takes long to compile.
        numbers = jax.random.normal(direction_key, (sizes.sum(),), jnp.float32)
        directions = jnp.split(numbers, np.cumsum(sizes)[:-1])
        # U^(1/d) makes the distance from the centre that of a uniform point of a d-ball.
        shares = jax.random.uniform(norm_key, (len(leaves),), jnp.float32)
        shares **= np.float32(1 / sizes)
        draws = [
            (d * (share * radius / jnp.maximum(jnp.linalg.norm(d), _TINY))).reshape(leaf.shape)
            for d, share, radius, leaf in zip(
                directions, shares, jax.tree.leaves(radii), leaves, strict=True
            )
        ]
        return jax.tree.unflatten(tree, draws)

    # A loop: under vmap the draws' intermediates would take four times delta's memory. Two at a
    # time: a lone example's random bits take XLA's CPU code four times as long.
    return sharding.map_examples(one_example, keys, batch_size=2)


def norms(delta: PyTree) -> PyTree:
    """l2 norm of every leaf for every example: tree of [B]."""
    return jax.tree.map(lambda d: jnp.sqrt(jnp.sum(jnp.square(d.reshape(len(d), -1)), -1)), delta)


def project(delta: PyTree, radii: PyTree) -> PyTree:
    """Projects every leaf of every example onto its ball; what is inside stays as it is.

    Args:
      delta: tree of [B, *theta_i.shape].
      radii: tree of scalars.

    Returns:
      The nearest point of the product of balls.
    """
    return jax.tree.map(
        lambda d, n, r: d * _along(jnp.minimum(1.0, r / jnp.maximum(n, _TINY)), d),
        delta,
        norms(delta),
        radii,
    )


def on_surface(delta: PyTree, radii: PyTree, tolerance: float = 1e-3) -> jax.Array:
    """Share, for every example [B], of leaves that lie on their ball's surface."""
    at = jax.tree.map(lambda n, r: n >= (1 - tolerance) * r, norms(delta), radii)
    return jnp.mean(jnp.stack(jax.tree.leaves(at)).astype(jnp.float32), 0)


def add(theta: PyTree, delta: PyTree) -> PyTree:
    """theta + delta, for one example (no example axis) or, by broadcasting, for all."""
    return jax.tree.map(jnp.add, theta, delta)


def sign_step(gradient: PyTree, radii: PyTree, scale: float) -> PyTree:
    """Ascent step of iterated FGSM: sign(g) times scale * median radius, for every leaf alike.

    Source: paper, appendix A (scale = 1/4).
    """
    eta = checks.float32(scale) * median_radius(radii)
    return jax.tree.map(lambda g: eta * jnp.sign(g), gradient)


def l2_step(gradient: PyTree, radii: PyTree, scale: float) -> PyTree:
    """Ascent step along the gradient, of length scale * radius in every leaf of every example."""
    scale = checks.float32(scale)
    return jax.tree.map(
        lambda g, n, r: g * _along(scale * r / jnp.maximum(n, _TINY), g),
        gradient,
        norms(gradient),
        radii,
    )


STEP_RULES = {"sign": sign_step, "l2": l2_step}
_TINY = 1e-30


def _along(scalars: jax.Array, leaf: jax.Array) -> jax.Array:
    """Reshapes [B] so that it multiplies [B, ...]."""
    return scalars.reshape(-1, *[1] * (leaf.ndim - 1))
