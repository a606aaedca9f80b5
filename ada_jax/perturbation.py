"""Geometry of delta, the per-example perturbations of theta inside one l2 ball per leaf.

`theta` is any pytree of arrays, `delta` the same tree with a leading example axis on every leaf,
and `radii` the same tree with one scalar per leaf. Leaves that are not perturbed are None in all
three, see `split`.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from ada_jax import checks, sharding
from ada_jax.errors import UserError

PyTree = object


def split(theta: PyTree, leaves: str) -> tuple[PyTree, PyTree]:
    """Splits theta into the leaves to be perturbed and the others.

    Args:
      theta: parameters.
      leaves: regular expression, searched for in the path of every leaf, such as
        'block00/conv0/w'; '' matches all leaves. Empty leaves never match.

    Returns:
      The leaves that match and those that do not: two trees with None for the leaves of the other.

    Raises:
      UserError: the regular expression is invalid or matches no leaf.
    """
    try:
        pattern = re.compile(leaves)
    except (re.error, TypeError, OverflowError) as error:
        raise UserError(
            f"leaves={leaves!r} is not a regular expression ({error}): correct it, or use '' for "
            "all leaves."
        ) from error
    paths, tree = jax.tree_util.tree_flatten_with_path(theta)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    matches = [
        pattern.search(name) is not None and a.size > 0
        for name, (_, a) in zip(names, paths, strict=True)
    ]
    if not any(matches):
        raise UserError(
            f"leaves={leaves!r} matches no parameter of the corruption network: use a regular "
            f"expression that is found in some of its {len(names)} paths, from {names[0]!r} to "
            f"{names[-1]!r}."
        )
    parts = (
        [a if m == wanted else None for (_, a), m in zip(paths, matches, strict=True)]
        for wanted in (True, False)
    )
    perturbed, fixed = (jax.tree.unflatten(tree, part) for part in parts)
    return perturbed, fixed


def merge(perturbed: PyTree, fixed: PyTree) -> PyTree:
    """The inverse of `split`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, perturbed, fixed, is_leaf=lambda a: a is None
    )


def radii(theta: PyTree, nu: float) -> PyTree:
    """Radius of every leaf's ball, nu_i = nu * ||theta_i||_2 (paper, section 2), in float32.

    A leaf of zeros gets radius 0 and is not perturbed.
    """
    nu = checks.float32(nu)
    return jax.tree.map(lambda a: nu * jnp.linalg.norm(a.astype(jnp.float32).ravel()), theta)


def median_radius(radii: PyTree) -> jax.Array:
    """Median of the leaves' positive radii; the paper's step size is a quarter of it (appendix A).

    Leaves of zeros are not perturbed. With them the median, and thus the step, could be zero.
    """
    ordered = jnp.sort(jnp.stack(jax.tree.leaves(radii)))
    last = jnp.maximum(jnp.sum(ordered > 0) - 1, 0)  # Of the positive ones, counted from the end.
    middle = len(ordered) - 1 - jnp.stack([last // 2, (last + 1) // 2])
    return ordered[middle].mean()


def init(keys: jax.Array, theta: PyTree, radii: PyTree) -> PyTree:
    """Draws delta uniformly from the product of balls (paper, appendix A).

    Args:
      keys: one key per example [B]; an example's draw depends only on its own key.
      theta: parameters, for their shapes.
      radii: tree of scalars.

    Returns:
      Tree of float32 leaves [B, *theta_i.shape] with norms at most radii.
    """
    leaves, tree = jax.tree.flatten(theta)
    sizes = np.array([leaf.size for leaf in leaves])

    def one_example(key):
        direction_key, norm_key = jax.random.split(key)
        # One draw for all leaves: each call of jax.random adds to the compile time.
        numbers = jax.random.normal(direction_key, (sizes.sum(),), jnp.float32)
        directions = jnp.split(numbers, np.cumsum(sizes)[:-1])
        # U^(1/d) is distributed like the distance from the centre of a uniform point in a d-ball.
        shares = jax.random.uniform(norm_key, (len(leaves),), jnp.float32)
        shares **= np.float32(1 / sizes)
        draws = [
            (d * (share * radius / jnp.maximum(jnp.linalg.norm(d), _TINY))).reshape(leaf.shape)
            for d, share, radius, leaf in zip(
                directions, shares, jax.tree.leaves(radii), leaves, strict=True
            )
        ]
        return jax.tree.unflatten(tree, draws)

    # A loop, because under vmap the intermediates would take four times delta's memory. Two
    # examples at a time, because XLA on a CPU draws random bits for one four times more slowly.
    return sharding.map_examples(one_example, keys, batch_size=2)


def init_weights(keys: jax.Array, theta: PyTree) -> PyTree:
    """Draws one weight in [0,1) per example and leaf, uniformly: a tree of float32 [B]."""
    tree = jax.tree.structure(theta)
    draw = lambda key: jax.random.uniform(key, (tree.num_leaves,), jnp.float32)  # noqa: E731
    return jax.tree.unflatten(tree, list(jax.vmap(draw)(keys).T))


def mix(delta: PyTree, weights: PyTree) -> PyTree:
    """Multiplies every leaf of every example by its weight."""
    return jax.tree.map(lambda d, w: d * _along(w, d), delta, weights)


def clip(weights: PyTree) -> PyTree:
    """Projects weights onto [0,1]."""
    return jax.tree.map(lambda w: jnp.clip(w, 0.0, 1.0), weights)


def norms(delta: PyTree) -> PyTree:
    """l2 norm of every leaf for every example: tree of [B]."""
    return jax.tree.map(lambda d: jnp.sqrt(jnp.sum(jnp.square(d.reshape(len(d), -1)), -1)), delta)


def project(delta: PyTree, radii: PyTree) -> PyTree:
    """Projects every leaf [B, *theta_i.shape] of every example onto its ball."""
    return jax.tree.map(
        lambda d, n, r: d * _along(jnp.minimum(1.0, r / jnp.maximum(n, _TINY)), d),
        delta,
        norms(delta),
        radii,
    )


def on_surface(delta: PyTree, radii: PyTree) -> jax.Array:
    """Share of the leaves with a positive radius that lie on their ball's surface [B]."""
    at = jax.tree.map(lambda n, r: (r > 0) & (n >= (1 - 1e-3) * r), norms(delta), radii)
    balls = sum(jnp.float32(r > 0) for r in jax.tree.leaves(radii))
    return jnp.stack(jax.tree.leaves(at)).sum(0) / jnp.maximum(balls, 1)


def add(theta: PyTree, delta: PyTree) -> PyTree:
    """theta + delta, for one example (no example axis) or, by broadcasting, for all."""
    return jax.tree.map(jnp.add, theta, delta)


def sign_step(gradient: PyTree, radii: PyTree, scale: float) -> PyTree:
    """Ascent step of iterated FGSM: sign(g) times scale * median radius, equal for all leaves.

    Source: paper, appendix A (scale = 1/4).
    """
    eta = checks.float32(scale) * median_radius(radii)
    return jax.tree.map(lambda g: eta * jnp.sign(g), gradient)


def l2_step(gradient: PyTree, radii: PyTree, scale: float) -> PyTree:
    """Ascent step along the gradient, of length scale * radius in every leaf of every example."""
    scale = checks.float32(scale)
    # The squares of very small or large gradients would not be float32 numbers.
    largest = jax.tree.map(
        lambda g: jnp.max(jnp.abs(g), tuple(range(1, g.ndim)), keepdims=True), gradient
    )
    gradient = jax.tree.map(lambda g, m: g / jnp.where(m > 0, m, 1), gradient, largest)
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
