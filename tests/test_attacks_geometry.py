"""Balls, boxes and hyperplanes against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ada_jax.attacks import geometry

SHAPE = (4, 3, 3, 2)
quick = settings(max_examples=20, deadline=None)
seeds, norms = st.integers(0, 2**31 - 1), st.sampled_from(["linf", "l2"])
project = jax.jit(geometry.project, static_argnames="norm")
to_hyperplane = jax.jit(geometry.to_hyperplane, static_argnames="norm")


def random(seed: int, *, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    return np.float32(np.random.default_rng(seed).uniform(low, high, SHAPE))


def size(delta: np.ndarray, norm: str) -> np.ndarray:
    flat = np.asarray(delta, np.float64).reshape(len(delta), -1)
    return np.linalg.norm(flat, np.inf if norm == "linf" else 2, axis=1)


def scale(images: np.ndarray, factors: np.ndarray) -> np.ndarray:
    return images * factors[:, None, None, None]


@quick
@given(seeds, norms)
def test_sizes_are_the_norms(seed, norm):
    delta = random(seed, low=-3, high=3)
    np.testing.assert_allclose(geometry.size(delta, norm), size(delta, norm), rtol=1e-5)


@quick
@given(seeds, norms, st.floats(1e-3, 3))
def test_a_projection_is_inside_ball_and_box_and_leaves_what_is_inside(seed, norm, epsilon):
    x, far = random(seed), random(seed + 1, low=-2, high=3)
    inside = project(far, x, epsilon, norm)
    assert np.all((inside >= 0) & (inside <= 1))
    assert np.all(size(inside - x, norm) <= epsilon + 1e-6)
    np.testing.assert_allclose(project(inside, x, epsilon, norm), inside, atol=1e-6)


@quick
@given(seeds, norms, st.floats(1e-3, 0.2))
def test_a_projection_is_the_nearest_point_where_the_box_is_far(seed, norm, epsilon):
    """No random point of the ball is nearer."""
    x, far = random(seed, low=0.3, high=0.7), random(seed + 1, low=-2, high=3)
    if norm == "l2":
        x = np.full_like(x, 0.5)
    distance = size(far - project(far, x, epsilon, norm), "l2")
    rng = np.random.default_rng(seed)
    for _ in range(20):
        delta = rng.normal(size=SHAPE)
        other = x + scale(delta, epsilon / size(delta, norm) * rng.uniform(0.5, 1, len(x)))
        assert np.all(distance <= size(far - other, "l2") + 1e-5)


@quick
@given(seeds, norms, st.floats(1e-3, 0.2))
def test_steepest_has_unit_norm_and_no_other_direction_rises_faster(seed, norm, epsilon):
    gradient = random(seed, low=-1)
    steepest = np.asarray(geometry.steepest(gradient, norm))
    np.testing.assert_allclose(size(steepest, norm), 1, rtol=1e-5)
    other = np.random.default_rng(seed + 1).normal(size=SHAPE)
    other = scale(other, 1 / size(other, norm))
    rise = lambda d: np.sum(gradient * d, axis=(1, 2, 3))  # noqa: E731
    assert np.all(rise(steepest) >= rise(other) - 1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_are_on_the_sphere_and_in_the_ball(norm):
    keys, x = jax.random.split(jax.random.key(0), 4), jnp.full(SHAPE, 0.5)
    on, within = (
        jax.jit(functools.partial(f, norm=norm))(keys, x, 0.1)
        for f in (geometry.on_sphere, geometry.in_ball)
    )
    np.testing.assert_allclose(size(on - x, norm), 0.1, rtol=1e-4)
    assert np.all(size(within - x, norm) < 0.1)
    assert len(np.unique(within)) > 0.9 * within.size


def nearest_on_hyperplane(x, w, c, norm) -> np.ndarray:
    """By bisection of the multiplier, in double precision, for one example."""
    x, w = np.float64(x), np.float64(w) * np.sign(c)
    room = np.where(w > 0, 1 - x, x)
    at = lambda t: np.sign(w) * np.minimum(room, t * (abs(w) if norm == "l2" else 1) * (w != 0))  # noqa: E731
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(w * at(middle)) < abs(c) else (low, middle)
    return at(high)


@quick
@given(seeds, norms, st.floats(-1, 1), st.booleans())
def test_the_step_to_a_hyperplane_is_the_shortest_in_the_box(seed, norm, share, sparse):
    x, w = random(seed), random(seed + 1, low=-1)
    w = w * (random(seed + 2) < 0.3) if sparse else w
    # Shares of the way that the box leaves, so that there is a solution.
    way = np.sum(np.where(w * share > 0, abs(w) * (1 - x), abs(w) * x), (1, 2, 3))
    c = np.float32(np.where(np.sum(w**2, (1, 2, 3)) > 0, 0.99 * share * way, 0))
    delta = np.asarray(to_hyperplane(x, w, c, norm))
    assert np.all((x + delta >= -1e-6) & (x + delta <= 1 + 1e-6))
    np.testing.assert_allclose(np.sum(w * delta, (1, 2, 3)), c, atol=1e-4)
    expected = [nearest_on_hyperplane(*each, norm) for each in zip(x, w, c, strict=True)]
    np.testing.assert_allclose(size(delta, norm), size(np.stack(expected), norm), atol=1e-4)


def test_a_hyperplane_out_of_reach_is_approached_and_one_without_direction_is_not():
    x = random(0)
    for norm in ("linf", "l2"):
        corner = x + to_hyperplane(x, np.ones(SHAPE, np.float32), np.full(4, 1e3, np.float32), norm)
        np.testing.assert_allclose(corner, 1, atol=1e-6)
        stay = to_hyperplane(x, np.zeros(SHAPE, np.float32), np.ones(4, np.float32), norm)
        np.testing.assert_array_equal(stay, 0)
