"""Tests of the losses against NumPy and SciPy, and of their properties."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ada_jax import losses
from ada_jax.errors import UserError
from ada_jax.nets import classifiers

EXAMPLES, CLASSES = 3, 5
FLOATS = st.floats(-50, 50, width=32, allow_subnormal=False)
LOGITS = hnp.arrays(np.float32, (EXAMPLES, CLASSES), elements=FLOATS)
LABELS = hnp.arrays(np.int32, EXAMPLES, elements=st.integers(0, CLASSES - 1))
quick = settings(max_examples=50, deadline=None)


@quick
@given(LOGITS, LABELS)
def test_cross_entropy_equals_scipy(logits: np.ndarray, labels: np.ndarray) -> None:
    log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    expected = -log_p[np.arange(EXAMPLES), labels]
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), expected, rtol=1e-5, atol=1e-5)


@quick
@given(LOGITS, LABELS, st.floats(0, 0.875, width=32))
def test_smoothed_cross_entropy_equals_scipy(
    logits: np.ndarray, labels: np.ndarray, smoothing: float
) -> None:
    log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    expected = -(1 - smoothing) * log_p[np.arange(EXAMPLES), labels] - smoothing * log_p.mean(-1)
    found = losses.cross_entropy(logits, labels, smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_smoothing_out_of_range_is_refused() -> None:
    for smoothing in (-0.1, 1.0):
        with pytest.raises(UserError, match=f"smoothing={smoothing} must be"):
            losses.cross_entropy(jnp.zeros((2, 3)), jnp.arange(2), smoothing)


@quick
@given(LOGITS, LOGITS, LOGITS)
def test_jsd_equals_scipy(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    p = scipy.special.softmax(np.stack([a, b, c]).astype(np.float64), axis=-1)
    mixture = np.clip(p.mean(0), 1e-7, 1)
    expected = scipy.special.rel_entr(p, mixture).sum(-1).mean(0)
    np.testing.assert_allclose(losses.jsd(a, b, c), expected, rtol=1e-4, atol=1e-6)


def test_jsd_equals_the_entropy_of_the_mixture_less_the_mean_entropy() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 4, 10))
    p = scipy.special.softmax(logits, axis=-1)
    entropy = scipy.stats.entropy
    expected = entropy(p.mean(0), axis=-1) - entropy(p, axis=-1).mean(0)
    np.testing.assert_allclose(losses.jsd(*jnp.asarray(logits)), expected, rtol=1e-4)


@quick
@given(LOGITS, LOGITS, LOGITS, LABELS)
def test_jsd_properties(a: np.ndarray, b: np.ndarray, c: np.ndarray, labels: np.ndarray) -> None:
    value = losses.jsd(a, b, c)
    assert value.shape == (EXAMPLES,)
    assert np.all(value >= -1e-5)
    assert np.all(value <= np.log(3) + 1e-5)
    np.testing.assert_allclose(losses.jsd(c, a, b), value, atol=1e-5)
    np.testing.assert_allclose(losses.jsd(a, a, a), 0, atol=1e-5)


def test_jsd_is_finite_where_a_class_is_masked() -> None:
    masked = jnp.array([[0.0, 1.0, -jnp.inf]])
    value, gradient = jax.value_and_grad(lambda a: losses.jsd(a, masked, 2 * masked)[0])(masked)
    free = losses.jsd(*(a[:, :2] for a in (masked, masked, 2 * masked)))
    np.testing.assert_allclose(value, free[0], rtol=1e-6)
    assert np.all(np.isfinite(gradient))


def test_jsd_of_three_certain_and_different_predictions_is_log_three() -> None:
    np.testing.assert_allclose(losses.jsd(*(1e3 * np.eye(3, dtype=np.float32))[:, None]), np.log(3))


@quick
@given(LOGITS, LABELS)
def test_margin_equals_a_loop(logits: np.ndarray, labels: np.ndarray) -> None:
    expected = [
        max(v for i, v in enumerate(z) if i != y) - z[y]
        for z, y in zip(logits, labels, strict=True)
    ]
    value = losses.margin(logits, labels)
    np.testing.assert_allclose(value, expected, atol=1e-5)
    clear = np.abs(value) > 1e-5
    np.testing.assert_array_equal((value > 0)[clear], (logits.argmax(-1) != labels)[clear])


@quick
@given(LOGITS, LABELS, st.floats(-20, 20, width=32))
def test_a_constant_added_to_the_logits_changes_nothing(
    logits: np.ndarray, labels: np.ndarray, constant: float
) -> None:
    shifted = logits + np.float32(constant)
    for loss in (losses.cross_entropy, losses.margin):
        np.testing.assert_allclose(loss(shifted, labels), loss(logits, labels), atol=1e-4)
    other = -logits
    np.testing.assert_allclose(
        losses.jsd(shifted, other, logits), losses.jsd(logits, other, logits), atol=1e-4
    )


LOSSES = {
    "cross_entropy": losses.cross_entropy,
    "smoothed": functools.partial(losses.cross_entropy, smoothing=0.1),
    "margin": losses.margin,
    "jsd": lambda logits, labels: losses.jsd(logits, logits[::-1], -logits),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_bfloat16_logits_are_computed_in_float32(loss) -> None:
    logits = jax.random.normal(jax.random.key(0), (4, 10)).astype(jnp.bfloat16)
    labels = jnp.arange(4)
    value = loss(logits, labels)
    assert (value.shape, value.dtype) == ((4,), jnp.float32)
    np.testing.assert_array_equal(value, loss(logits.astype(jnp.float32), labels))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_gradients_are_finite(loss, scale: float) -> None:
    logits = scale * jax.random.normal(jax.random.key(0), (4, 10))
    grads = jax.jit(jax.grad(lambda z: jnp.sum(loss(z, jnp.arange(4)))))(logits)
    chex.assert_tree_all_finite(grads)


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.margin])
def test_wrong_shapes_and_types_are_refused(loss) -> None:
    logits = jnp.zeros((4, 10))
    for labels in (jnp.zeros(3, int), jnp.zeros((4, 1), int), jnp.zeros(4)):
        with pytest.raises(UserError, match="must"):
            loss(logits, labels)


def test_jsd_refuses_logits_of_different_shapes() -> None:
    with pytest.raises(UserError, match="must"):
        losses.jsd(jnp.zeros((4, 10)), jnp.zeros((4, 10)), jnp.zeros((1, 10)))


def test_weight_decay_by_hand() -> None:
    params = {
        "conv": {"w": jnp.full((2, 2), 3.0)},
        "bn": {"scale": jnp.full((1, 2), 5.0), "offset": jnp.full((1, 2), 7.0)},
        "logits": {"w": jnp.full((2,), 2.0), "b": jnp.full((1,), 4.0)},
    }
    assert losses.weight_decay(params) == 0.5 * (36 + 8 + 16)
    assert losses.weight_decay(params, include_bn=True) == 0.5 * (36 + 8 + 16 + 50 + 98)


def test_weight_decay_of_a_network_and_its_gradient() -> None:
    net = classifiers.make("resnet9", 10)
    init = functools.partial(net.init, is_training=True)
    shapes, _ = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0), shapes)
    grads = jax.jit(jax.grad(losses.weight_decay))(params)
    for module, leaves in params.items():
        for name, leaf in leaves.items():
            expected = jnp.zeros_like(leaf) if "bn" in module else leaf
            np.testing.assert_array_equal(grads[module][name], expected)
    channels = 16 + 3 * (32 + 64 + 128)
    assert losses.weight_decay(params) == 0.5 * 4 * (486_938 - 2 * channels)
    assert losses.weight_decay(params, include_bn=True) == 0.5 * 4 * 486_938


def test_weight_decay_of_nothing_is_zero() -> None:
    value = losses.weight_decay({})
    assert (value.shape, value.dtype, float(value)) == ((), jnp.float32, 0.0)
