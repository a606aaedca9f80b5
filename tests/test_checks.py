"""Checks of arguments that AdA and the attacks share, traced or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ada_jax import checks
from ada_jax.errors import UserError

IMAGES = jnp.full((2, 4, 4, 3), 0.5)


@pytest.mark.parametrize("value", ["0.02", None, [0.1, 0.2], jnp.ones(1)])
def test_an_option_is_one_number(value):
    with pytest.raises(UserError, match=r"nu=.* must be one number"):
        checks.scalar("nu", value, 0.0)


def test_a_traced_option_is_one_number():
    with pytest.raises(UserError, match=r"nu=.* must be one number"):
        jax.jit(lambda nu: checks.scalar("nu", nu, 0.0))(jnp.ones(2))


def test_a_traced_option_is_taken_as_it_is():
    assert checks.scalar("nu", np.float32(0.5), 0.0) == 0.5
    jax.jit(lambda nu: jnp.float32(checks.scalar("nu", nu, 7.0)))(0.5)


@pytest.mark.parametrize("value", [0, -1, 2.0, "3", True, None])
def test_a_count_is_an_integer(value):
    with pytest.raises(UserError, match=r"steps=.* must be an integer of at least 1"):
        checks.check_integers(1, restarts=2, steps=value)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (jnp.array([0, 3]), "Labels from 0 to 3 do not fit the classifier's 3 logits"),
        (jnp.array([-1, 2]), "Labels from -1 to 2"),
        (jnp.eye(2), "must be one integer for each"),
        (jnp.array([1.0, 2.0]), "must be one integer for each"),
    ],
    ids=["large", "negative", "one-hot", "float"],
)
def test_labels_are_classes(labels, said):
    with pytest.raises(UserError, match=said):
        checks.check_labels(labels, IMAGES, lambda x: x.mean((1, 2)))


def test_what_cannot_be_refused_while_tracing_becomes_nan():
    x = jnp.stack([IMAGES[0], IMAGES[0].at[1, 2, 0].set(1.1), IMAGES[0], IMAGES[0] - 0.6])
    for images in (checks.nan_if_invalid(x), jax.jit(checks.nan_if_invalid)(x)):
        assert np.isnan(images).all((1, 2, 3)).tolist() == [False, True, False, True]
        np.testing.assert_array_equal(images[0], x[0])
    y = jnp.array([-1, 0, 3, 2])
    every = checks.nan_if_invalid(x, y, 3)
    assert np.isnan(every).all((1, 2, 3)).tolist() == [True, True, True, True]
    assert np.isnan(checks.nan_if_invalid(x, y + 1, 3)).any((1, 2, 3)).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32"])
def test_more_classes_than_the_labels_type_has_numbers(dtype):
    y = jnp.array([0, 100, 127], dtype)
    assert not np.isnan(checks.nan_if_invalid(jnp.stack([IMAGES[0]] * 3), y, 300)).any()


def test_rounding_errors_are_clipped():
    x = jnp.stack([IMAGES[0].at[0, 0].set(-1e-7), IMAGES[0].at[0, 0].set(1 + 5e-7)])
    images = np.asarray(checks.nan_if_invalid(x))
    assert images.min() == 0 and images.max() == 1


def test_what_a_function_closes_over_has_no_gradient():
    def loss(scale):
        f = checks.detached(lambda x: (scale * x).sum(), IMAGES)
        return f(IMAGES) + scale

    assert jax.grad(loss)(3.0) == 1.0
