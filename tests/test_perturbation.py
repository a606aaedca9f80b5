"""The geometry of delta against NumPy and SciPy, and the invariants of its balls."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from ada_jax import perturbation
from ada_jax.errors import UserError

SHAPES = {"conv": {"w": (3, 3, 2, 4), "b": (4,)}, "zero": (5,), "scalar": (), "line": (1,)}
EXAMPLES = 6
quick = settings(max_examples=25, deadline=None)
nus = st.just(0.0) | st.floats(1e-6, 10)
seeds = st.integers(0, 2**31 - 1)


def is_shape(node) -> bool:
    return isinstance(node, tuple)


def random_tree(seed: int, *prefix: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(scale * rng.normal(size=(*prefix, *shape)), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=is_shape)


def make_theta(seed: int = 0):
    return {**random_tree(seed), "zero": jnp.zeros(5)}


def keys(seed: int, n: int = EXAMPLES) -> jax.Array:
    return jax.random.split(jax.random.key(seed), n)


def numpy_norms(delta):
    return jax.tree.map(lambda d: np.array([np.linalg.norm(np.ravel(e)) for e in d]), delta)


def assert_inside(delta, radii) -> None:
    chex.assert_tree_all_finite(delta)
    leaves = zip(*map(jax.tree.leaves, (numpy_norms(delta), radii)), strict=True)
    for norm, radius in leaves:
        assert np.all(norm <= radius * (1 + 1e-5))


init, project = jax.jit(perturbation.init), jax.jit(perturbation.project)


# ------------------------------------------------------------------------------- split


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        ("", ["conv/b", "conv/w", "line", "scalar", "zero"]),
        (".*", ["conv/b", "conv/w", "line", "scalar", "zero"]),
        ("^conv/", ["conv/b", "conv/w"]),
        ("b$", ["conv/b"]),
        ("^(line|zero)$", ["line", "zero"]),
    ],
)
def test_split_takes_the_leaves_whose_path_matches(leaves, expected):
    theta = make_theta()
    perturbed, fixed = perturbation.split(theta, leaves)
    everything = {
        **{f"conv/{name}": theta["conv"][name] for name in "bw"},
        **{name: theta[name] for name in ("line", "scalar", "zero")},
    }
    chex.assert_trees_all_equal(jax.tree.leaves(perturbed), [everything[n] for n in expected])
    assert len(jax.tree.leaves(fixed)) == 5 - len(expected)
    chex.assert_trees_all_equal(perturbation.merge(perturbed, fixed), theta)


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ("tail", r"leaves='tail' matches no parameter .* 5 paths, from 'conv/b' to 'zero'"),
        ("(", r"leaves='\(' is not a regular expression"),
        ("a{99999999999}", "is not a regular expression"),
        (3, "leaves=3 is not a regular expression"),
    ],
)
def test_split_names_a_regular_expression_that_matches_nothing(leaves, message):
    with pytest.raises(UserError, match=message):
        perturbation.split(make_theta(), leaves)


# ------------------------------------------------------------------------------- mixing


@quick
@given(seeds, st.floats(-3, 3))
def test_mixed_perturbations_stay_inside_every_ball(seed, shift):
    theta = make_theta()
    radii = perturbation.radii(theta, 0.1)
    delta, weights = init(keys(seed), theta, radii), perturbation.init_weights(keys(seed), theta)
    for w in jax.tree.leaves(weights):
        assert w.shape == (EXAMPLES,) and np.all((w >= 0) & (w < 1))
    moved = jax.tree.map(lambda w: w + jnp.float32(shift), weights)
    clipped = perturbation.clip(moved)
    chex.assert_trees_all_equal(clipped, jax.tree.map(lambda w: np.clip(w, 0, 1), moved))
    mixed = perturbation.mix(delta, clipped)
    assert_inside(mixed, radii)
    np.testing.assert_allclose(
        mixed["conv"]["w"][2], clipped["conv"]["w"][2] * delta["conv"]["w"][2], rtol=1e-6
    )


def test_weights_are_uniform_and_depend_on_an_examples_own_key_only():
    weights = perturbation.init_weights(keys(0, 2000), {"a": jnp.zeros(3), "b": jnp.zeros(())})
    for w in weights.values():
        assert scipy.stats.kstest(w, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(weights["a"], weights["b"])[0, 1]) < 0.1
    alone = perturbation.init_weights(keys(0, 2000)[7:8], {"a": jnp.zeros(3), "b": jnp.zeros(())})
    chex.assert_trees_all_equal(alone, jax.tree.map(lambda w: w[7:8], weights))


# ------------------------------------------------------------------------------- radii


@quick
@given(seeds, nus)
def test_a_radius_is_nu_times_the_norm_of_the_leaf(seed, nu):
    theta = make_theta(seed)
    expected = jax.tree.map(lambda a: np.float32(nu * np.linalg.norm(np.ravel(a))), theta)
    chex.assert_trees_all_close(perturbation.radii(theta, nu), expected, rtol=1e-5)


@quick
@given(st.lists(st.floats(0, 1e3, width=32, allow_subnormal=False), min_size=1, max_size=9))
def test_the_median_of_the_positive_radii_is_numpys(values):
    np.testing.assert_allclose(
        perturbation.median_radius([jnp.float32(v) for v in values]),
        np.median([v for v in values if v] or 0),
        rtol=1e-6,
        atol=1e-37,  # XLA flushes subnormal numbers to zero.
    )


# ------------------------------------------------------------------------------- init


@quick
@given(seeds, nus)
def test_init_stays_inside_every_ball(seed, nu):
    theta = make_theta()
    radii = perturbation.radii(theta, nu)
    delta = init(keys(seed), theta, radii)
    chex.assert_trees_all_equal_shapes_and_dtypes(delta, random_tree(0, EXAMPLES))
    assert_inside(delta, radii)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 5)])
def test_init_is_uniform_in_the_ball(shape):
    """In a d-ball (norm / radius)^d is uniform, and so is the direction's sign."""
    theta, radius = {"a": jnp.zeros(shape)}, 0.37
    delta = init(keys(0, 2000), theta, {"a": radius})["a"].reshape(2000, -1)
    d = delta.shape[1]
    norms = np.linalg.norm(delta, axis=1)
    assert scipy.stats.kstest((norms / radius) ** d, "uniform").pvalue > 0.01
    assert scipy.stats.binomtest(int((delta[:, 0] > 0).sum()), 2000).pvalue > 0.01


def test_the_direction_of_init_is_uniform_on_the_sphere():
    """On the 2-sphere every coordinate is uniform in [-1, 1] (Archimedes)."""
    delta = init(keys(1, 2000), {"a": jnp.zeros(3)}, {"a": 1.0})["a"]
    directions = np.asarray(delta) / np.linalg.norm(delta, axis=1, keepdims=True)
    for coordinate in directions.T:
        assert scipy.stats.kstest(coordinate, "uniform", (-1, 2)).pvalue > 0.01


@pytest.mark.parametrize("i", range(EXAMPLES))
def test_an_examples_start_depends_on_its_own_key_only(i):
    theta = make_theta()
    radii = perturbation.radii(theta, 0.1)
    ours = init(keys(0), theta, radii)
    among_others = init(keys(1).at[i].set(keys(0)[i]), theta, radii)
    row = lambda delta: jax.tree.map(lambda d: d[i], delta)  # noqa: E731
    chex.assert_trees_all_equal(row(ours), row(among_others))
    assert jnp.all(ours["conv"]["w"][i - 1] != among_others["conv"]["w"][i - 1])


def test_leaves_and_examples_start_differently():
    theta = [jnp.ones(8), jnp.ones(8)]
    delta = init(keys(0, 2), theta, perturbation.radii(theta, 1.0))
    points = np.concatenate(delta)
    assert len(np.unique(np.round(points, 4))) == points.size


# ------------------------------------------------------------------------------- project


@pytest.mark.accelerator
@quick
@given(seeds, nus, st.floats(1e-6, 1e6))
def test_project_lands_inside_every_ball(seed, nu, scale):
    radii = perturbation.radii(make_theta(), nu)
    assert_inside(project(random_tree(seed, EXAMPLES, scale=scale), radii), radii)


@quick
@given(seeds, st.floats(0.01, 0.999))
def test_project_leaves_inside_points_bitwise_alone(seed, share):
    delta = random_tree(seed, EXAMPLES)
    farthest = jax.tree.map(lambda n: jnp.float32(n.max() / share), numpy_norms(delta))
    chex.assert_trees_all_equal(project(delta, farthest), delta)


@quick
@given(seeds)
def test_project_shortens_outside_points_along_their_ray(seed):
    delta, radii = random_tree(seed, EXAMPLES), perturbation.radii(make_theta(), 0.5)
    for d, n, r, p in zip(
        *map(jax.tree.leaves, (delta, numpy_norms(delta), radii, project(delta, radii))),
        strict=True,
    ):
        for i in range(EXAMPLES):
            expected = d[i] if n[i] <= r else np.asarray(d[i]) * (r / n[i])
            np.testing.assert_allclose(p[i], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.accelerator
def test_project_gives_the_nearest_point_that_scipy_finds():
    point, radius = np.array([[0.5, -0.7, 1.1, 0.2]]), 0.3
    best = scipy.optimize.minimize(
        lambda p: np.sum((p - point[0]) ** 2),
        np.zeros(4),
        constraints={"type": "ineq", "fun": lambda p: radius**2 - np.sum(p**2)},
    )
    assert best.success
    np.testing.assert_allclose(project([jnp.asarray(point)], [radius])[0][0], best.x, atol=1e-4)


@quick
@given(seeds)
def test_no_point_of_the_ball_is_nearer_than_the_projection(seed):
    """The variational inequality: the angle at the projection is never acute."""
    theta = make_theta()
    radii = perturbation.radii(theta, 0.3)
    delta, other = random_tree(seed, EXAMPLES), init(keys(seed), theta, radii)
    inner = jax.tree.map(lambda d, p, q: (d - p) * (q - p), delta, project(delta, radii), other)
    for leaf in jax.tree.leaves(inner):
        assert np.all(np.asarray(leaf).reshape(EXAMPLES, -1).sum(1) <= 1e-4)


@pytest.mark.parametrize("step", perturbation.STEP_RULES.values(), ids=perturbation.STEP_RULES)
def test_a_zero_leaf_keeps_a_zero_delta_through_init_step_and_project(step):
    theta = make_theta()
    radii = perturbation.radii(theta, 0.1)
    delta = init(keys(0), theta, radii)
    np.testing.assert_array_equal(radii["zero"], 0)
    np.testing.assert_array_equal(delta["zero"], 0)
    moved = perturbation.add(delta, step(random_tree(1, EXAMPLES), radii, 0.25))
    delta = project(moved, radii)
    chex.assert_tree_all_finite(delta)
    np.testing.assert_array_equal(delta["zero"], 0)


# ------------------------------------------------------------------------------- steps


@quick
@given(seeds, st.floats(0.01, 2))
def test_the_sign_step_is_numpys(seed, scale):
    radii = perturbation.radii(make_theta(), 0.1)
    gradient = random_tree(seed, EXAMPLES)
    eta = scale * np.median([r for r in jax.tree.leaves(radii) if r])
    expected = jax.tree.map(lambda g: np.float32(eta) * np.sign(g), gradient)
    chex.assert_trees_all_close(perturbation.sign_step(gradient, radii, scale), expected, rtol=1e-5)


@quick
@given(seeds, st.floats(0.01, 2), st.sampled_from([1e-25, 1e-12, 1.0, 1e6, 1e25]))
def test_the_l2_step_is_along_the_gradient_and_as_long_as_told(seed, scale, size):
    radii = perturbation.radii(make_theta(), 0.1)
    gradient = random_tree(seed, EXAMPLES, scale=size)
    step = perturbation.l2_step(gradient, radii, scale)
    for g, s, r in zip(*map(jax.tree.leaves, (gradient, step, radii)), strict=True):
        for i in range(EXAMPLES):
            expected = np.float64(g[i]) / np.linalg.norm(np.float64(np.ravel(g[i]))) * scale * r
            np.testing.assert_allclose(s[i], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("step", perturbation.STEP_RULES.values(), ids=perturbation.STEP_RULES)
def test_no_gradient_makes_no_step(step):
    gradient = jax.tree.map(jnp.zeros_like, random_tree(0, EXAMPLES))
    chex.assert_trees_all_equal(
        step(gradient, perturbation.radii(make_theta(), 0.1), 0.25), gradient
    )


# ------------------------------------------------------------------------------- the rest


@pytest.mark.accelerator
def test_norms_are_numpys():
    delta = random_tree(0, EXAMPLES)
    chex.assert_trees_all_close(
        perturbation.norms(delta), jax.tree.map(np.float32, numpy_norms(delta)), rtol=1e-5
    )


def test_on_surface_counts_the_leaves_whose_norm_is_the_radius():
    delta = {"a": jnp.array([[3.0, 4.0], [3.0, 0.0]]), "b": jnp.array([[-2.0], [2.0]])}
    share = perturbation.on_surface(delta, {"a": jnp.float32(5.0), "b": jnp.float32(2.0)})
    np.testing.assert_array_equal(share, [1.0, 0.5])


def test_leaves_of_zeros_and_empty_leaves_are_not_perturbed():
    theta = {"a": jnp.ones(2), "zeros": jnp.zeros(3), "empty": jnp.zeros((0, 2))}
    perturbed, fixed = perturbation.split(theta, "")
    assert perturbed["empty"] is None and fixed["empty"] is theta["empty"]
    radii = perturbation.radii(perturbed, 0.1)
    delta = jax.tree.map(lambda a, r: jnp.stack([a * r / jnp.sqrt(2), 0 * a]), perturbed, radii)
    np.testing.assert_array_equal(perturbation.on_surface(delta, radii), [1.0, 0.0])


def test_on_surface_has_a_relative_tolerance():
    delta = [jnp.array([[0.9995], [0.99]])]
    np.testing.assert_array_equal(perturbation.on_surface(delta, [jnp.float32(1.0)]), [1.0, 0.0])


def test_add_works_for_one_example_and_for_all():
    theta, delta = make_theta(), random_tree(1, EXAMPLES)
    everyone = perturbation.add(theta, delta)
    third = perturbation.add(theta, jax.tree.map(lambda d: d[3], delta))
    chex.assert_trees_all_equal(third, jax.tree.map(lambda a: a[3], everyone))
    np.testing.assert_array_equal(
        everyone["conv"]["w"][2], theta["conv"]["w"] + delta["conv"]["w"][2]
    )
