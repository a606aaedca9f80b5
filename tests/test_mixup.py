"""Mixup and its noise against NumPy statements and their distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from ada_jax.augment import mixup
from ada_jax.errors import UserError
from ada_jax.nets import classifiers

KEYS = jax.random.split(jax.random.key(0), 3000)


def test_no_draw_is_1_where_noise_would_be_infinite(monkeypatch):
    extremes = lambda key, shape, dtype, low, high: jnp.full(shape, low)  # noqa: E731
    monkeypatch.setattr(jax.random, "uniform", extremes)
    draw = jax.jit(mixup._sparse_uniform, static_argnums=(1, 2))
    drawn = [draw(KEYS[0], (2,), sparsity) for sparsity in (0.0, 0.07, 0.35, 0.48, 0.65)]
    assert np.all(np.isfinite(scipy.special.erfinv(np.float32(drawn))))


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_partners_are_a_permutation_and_shares_are_beta(alpha):
    f = jax.jit(jax.vmap(lambda key: mixup.pair(key, 5, alpha=alpha)))
    partner, share = map(np.asarray, f(KEYS))
    np.testing.assert_array_equal(np.sort(partner, 1), np.broadcast_to(np.arange(5), (3000, 5)))
    assert np.abs(np.bincount(partner[:, 0]) / 3000 - 0.2).max() < 0.03
    assert scipy.stats.kstest(share, scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_views_are_mixed_with_views_of_the_same_partner():
    x = np.float32(np.random.default_rng(0).normal(size=(6, 2, 3)))
    partner, share = jnp.array([2, 0, 1]), jnp.float32(0.3)
    expected = np.concatenate([0.3 * v + 0.7 * v[[2, 0, 1]] for v in (x[:3], x[3:])])
    np.testing.assert_allclose(mixup.mix(x, partner, share), expected, atol=1e-6)
    assert mixup.mix(jnp.bfloat16(x), partner, share).dtype == jnp.bfloat16


def test_the_levels_of_the_noise_are_beta_per_batch():
    f = jax.jit(
        jax.vmap(
            lambda key: mixup.noisy(key, jnp.zeros((6, 500)), additive=0.7, sparsity=0.0, views=3)
        )
    )
    noise = np.asarray(f(KEYS[:1000])).reshape(1000, 3, 1000)
    level = noise.std(-1) / 0.7
    np.testing.assert_allclose(level[:, 1:].mean(0) / level[:, 0].mean(), [2, 3], rtol=0.02)
    assert scipy.stats.kstest(level[:, 0], scipy.stats.beta(2, 5).cdf).statistic < 0.06
    normal = noise[:20] / noise[:20].std(-1, keepdims=True)
    assert scipy.stats.kstest(normal[:, 0, ::10].ravel(), "norm").pvalue > 0.01


def test_multiplicative_noise_is_uniform_around_one():
    f = lambda key: mixup.noisy(key, jnp.full((2, 500), 2.0), additive=0.0, sparsity=0.0)  # noqa: E731
    change = np.asarray(jax.jit(jax.vmap(f))(KEYS[:1000])).reshape(1000, -1) / 2 - 1
    level = np.abs(change).max(-1, keepdims=True)
    assert scipy.stats.kstest(level[:, 0] / 0.5, scipy.stats.beta(2, 5).cdf).statistic < 0.06
    uniform = (change / level)[:20, ::10].ravel()
    assert scipy.stats.kstest(uniform, scipy.stats.uniform(-1, 2).cdf).pvalue > 0.01


def test_noise_is_sparse():
    f = lambda **levels: np.asarray(  # noqa: E731
        mixup.noisy(KEYS[0], jnp.ones((40, 500)), sparsity=0.65, **levels)
    )
    added, factor = f(multiplicative=0.0) != 1, f(additive=0.0) != 1
    assert added.mean() == pytest.approx(0.35, abs=0.015)
    assert factor.mean() == pytest.approx(0.35, abs=0.015)
    assert (added & factor).mean() == pytest.approx(0.35**2, abs=0.01)
    np.testing.assert_array_equal(f(additive=0.0, multiplicative=0.0), 1.0)


def test_one_layer_of_a_classifier_is_changed():
    net = classifiers.make("resnet9", 10)
    x = jax.random.uniform(KEYS[0], (3, 8, 8, 3))
    params, state = jax.jit(net.init, static_argnames="is_training")(KEYS[1], x, is_training=True)
    layers = ("input", "stage1", "stage3")
    partner = jnp.array([2, 0, 1])

    @jax.jit
    def run(key, share):
        change = lambda h: mixup.mix(h, partner, share)  # noqa: E731
        perturbations = mixup.at_one_layer(key, layers, change)
        options = {"is_training": False, "with_features": True}
        return net.apply(params, state, None, x, perturbations=perturbations, **options)[0]

    logits, clean = run(KEYS[2], jnp.float32(1))
    drawn = set()
    for key in KEYS[:12]:
        turned, features = run(key, jnp.float32(0))  # A share of 0 swaps the examples.
        np.testing.assert_allclose(turned, logits[partner], atol=1e-4)
        drawn.add(sum(np.allclose(features[k], clean[k], atol=1e-4) for k in clean))
    assert drawn == {0, 1, 3}  # The unchanged layers: none, the stem, all but the last.


def test_mixed_cross_entropy_is_that_of_the_mixed_labels():
    rng = np.random.default_rng(0)
    logits, labels = np.float32(rng.normal(size=(4, 5))), np.array([0, 3, 2, 4])
    partner, share = np.array([1, 3, 0, 2]), np.float32(0.3)
    one_hot = 0.9 * np.eye(5)[labels] + 0.1 / 5
    target = 0.3 * one_hot + 0.7 * one_hot[partner]
    expected = -(target * scipy.special.log_softmax(logits, axis=-1)).sum(-1)
    found = mixup.cross_entropy(logits, jnp.asarray(labels), partner, share, smoothing=0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_mistakes_are_told():
    with pytest.raises(UserError, match=r"alpha=0\.0 must be positive"):
        mixup.pair(KEYS[0], 4, alpha=0.0)
    for field, value in (("additive", -1.0), ("multiplicative", np.inf), ("sparsity", 1.0)):
        with pytest.raises(UserError, match=f"{field}={value} must be at least 0"):
            mixup.noisy(KEYS[0], jnp.ones((2, 2)), **{field: value})
    with pytest.raises(UserError, match="views=2 does not divide the 3 features"):
        mixup.noisy(KEYS[0], jnp.ones((3, 2)), views=2)
    pixels = jnp.ones((2, 2), jnp.uint8)
    for change in (
        lambda: mixup.mix(pixels, np.arange(2), 0.3),
        lambda: mixup.noisy(KEYS[0], pixels),
    ):
        with pytest.raises(UserError, match="type uint8 cannot be mixed: convert"):
            change()
