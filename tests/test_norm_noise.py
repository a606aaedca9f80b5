"""Noise from norm balls: radii, distributions and independence of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ada_jax.augment import norm_noise
from ada_jax.errors import UserError

KEY = jax.random.key(0)
# The p-mean of the noise of an image, which the radius bounds.
SIZES = {
    "l0": lambda n: (n != 0).mean((1, 2, 3)),
    "l1": lambda n: np.abs(n).mean((1, 2, 3)),
    "l2": lambda n: np.sqrt(np.square(n).mean((1, 2, 3))),
    "linf": lambda n: np.abs(n).max((1, 2, 3)),
}


def noise_of(norm: str, radius: float, count: int = 1000, shape=(8, 9, 3), **options) -> np.ndarray:
    """The noise of grey images."""
    x = jnp.full((count, *shape), 0.5)
    f = jax.jit(
        lambda key: norm_noise.add_noise(
            key, x, norms=(norm,), radii={norm: radius}, share=1.0, **options
        )
    )
    return np.asarray(f(KEY), np.float64) - 0.5


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_sizes_are_uniform_up_to_the_radius(norm):
    found = SIZES[norm](noise_of(norm, 0.02))
    assert found.max() <= 0.02 * (1 + 1e-5)
    # The largest of 216 uniform values is 0.995 of the bound on average.
    assert scipy.stats.kstest(found / 0.02, "uniform").statistic < 0.06


def test_l0_replaces_a_share_of_the_values_by_0_or_1():
    noise = noise_of("l0", 0.3, shape=(16, 16, 3))
    assert set(np.unique(noise)) == {-0.5, 0.0, 0.5}
    assert np.mean(noise > 0) == pytest.approx(np.mean(noise < 0), abs=0.003)
    found = SIZES["l0"](noise)
    assert found.max() <= 0.3 + 4 * np.sqrt(0.3 * 0.7 / noise[0].size)
    assert scipy.stats.kstest(found / 0.3, "uniform").statistic < 0.06


@pytest.mark.parametrize(
    ("norm", "law"),
    [("l1", scipy.stats.laplace()), ("l2", scipy.stats.norm())],
)
def test_the_noise_has_the_generalised_gaussian_s_law(norm, law):
    noise = noise_of(norm, 0.01, count=20, shape=(32, 33, 3))
    noise = noise.reshape(20, -1) / SIZES[norm](noise)[:, None]
    assert scipy.stats.kstest(noise[:, ::5].ravel(), law.cdf).pvalue > 0.01
    correlation = np.corrcoef(noise)
    assert np.abs(correlation - np.eye(20)).max() < 0.08


def test_linf_is_uniform_inside_the_cube():
    noise = noise_of("linf", 0.1, count=20, shape=(32, 33, 3)).reshape(20, -1)
    bound = np.abs(noise).max(1, keepdims=True)
    assert scipy.stats.kstest((noise / bound)[:, ::5].ravel() / 2 + 0.5, "uniform").pvalue > 0.01


def test_the_share_and_the_norms_are_drawn_per_image():
    x = jnp.full((4000, 4, 4, 3), 0.5)
    f = jax.jit(lambda key: norm_noise.add_noise(key, x, norms=("l0", "linf"), share=0.4))
    noise = np.asarray(f(KEY) - 0.5)
    changed = (noise != 0).any((1, 2, 3))
    dense = (noise != 0).mean((1, 2, 3)) > 0.5
    assert dense.mean() == pytest.approx(0.2, abs=0.03)
    # Of l0's images, those with few replaced values show no noise.
    mean_unchanged = np.mean((1 - np.linspace(0, 0.12, 1000)) ** 48)
    assert changed.mean() == pytest.approx(0.2 + 0.2 * (1 - mean_unchanged), abs=0.03)
    nothing = norm_noise.add_noise(KEY, x[:8], share=0.0)
    np.testing.assert_array_equal(nothing, x[:8])


def test_images_stay_in_range_and_sizes_do_not_change_the_strength():
    strength = []
    for shape in ((7, 5, 3), (40, 24, 1)):
        x = jax.random.uniform(KEY, (400, *shape))
        noisy = jax.jit(lambda x: norm_noise.add_noise(KEY, x, share=1.0))(x)
        assert noisy.shape == x.shape and noisy.dtype == jnp.float32
        assert noisy.min() >= 0 and noisy.max() <= 1
        strength.append(np.sqrt(np.square(noisy - x).mean()))
    assert strength[0] == pytest.approx(strength[1], rel=0.1)


def test_an_example_does_not_depend_on_its_neighbours():
    x = jax.random.uniform(KEY, (8, 6, 6, 3))
    key = jax.random.split(jax.random.key(1), 8)
    f = jax.jit(lambda key, x: norm_noise.add_noise(key, x, norms=tuple(norm_noise.RADII)))
    whole = f(key, x)
    np.testing.assert_allclose(f(key[::-1], x[::-1])[::-1], whole, atol=1e-6)
    np.testing.assert_allclose(f(key[2:5], x[2:5]), whole[2:5], atol=1e-6)
    np.testing.assert_allclose(f(jax.random.key(1), x), whole, atol=1e-6)
    assert np.abs(whole - x).max() > 0.01


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("norms", ("l3",), "unknown norm 'l3': choose from l0, l1, l2, linf"),
        ("norms", (), "norms is empty"),
        ("radii", {"l0": 0.1, "l2": 0.1}, "radii.linf=None must be above 0"),
        ("radii", {"l0": 0.1, "l2": 5.0, "linf": 0.1}, "radii.l2=5.0 must be above 0"),
        ("share", 1.5, "share=1.5 must be in 0..1"),
    ],
)
def test_mistakes_are_told(field, value, said):
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        norm_noise.add_noise(KEY, jnp.zeros((1, 8, 8, 3)), **{field: value})


def test_inside_jit_a_wrong_image_becomes_nan():
    x = jnp.stack([jnp.full((8, 8, 3), 0.5), jnp.full((8, 8, 3), 2.0)])
    for norm in norm_noise.NORMS:
        noisy = jax.jit(lambda x, n=norm: norm_noise.add_noise(KEY, x, norms=(n,), share=1.0))(x)
        assert np.isnan(noisy).all((1, 2, 3)).tolist() == [False, True]
