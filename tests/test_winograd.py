"""The convolutions by transformed tiles and by transformed rows against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ada_jax.nets import per_example, winograd, winograd_rows


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.asarray(b).std())


@settings(max_examples=10, deadline=None)
@given(
    images=st.integers(1, 5),
    size=st.tuples(st.integers(3, 13), st.integers(3, 13)),
    padding=st.integers(0, 2),
    pixels=st.sampled_from([1, 100, 2048]),
)
def test_it_equals_xla_for_any_size_and_grouping(images, size, padding, pixels):
    x, w = random(images, *size, 7), random(3, 3, 7, 5, seed=1)
    y, transpose = jax.vjp(lambda w: per_example.plain_forward(x, w, 1, padding), w)
    dy = random(*y.shape, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "_PIXELS", pixels)
        close(winograd.convolve(x, w, padding), y)
        close(winograd.kernel_gradient(x, dy, padding), transpose(dy)[0])
        close(winograd_rows.convolve(x, w, padding), y)


@settings(max_examples=5, deadline=None)
@given(
    images=st.integers(1, 3),
    size=st.tuples(st.integers(3, 13), st.integers(3, 13)),
    padding=st.integers(0, 2),
)
def test_the_gradients_by_rows_equal_xla(images, size, padding):
    x, w = random(images, *size, 7), random(3, 3, 7, 5, seed=1)
    y, transpose = jax.vjp(lambda x, w: per_example.plain_forward(x, w, 1, padding), x, w)
    dy = random(*y.shape, seed=2)
    for a, b in zip(winograd_rows.gradients(x, w, dy, padding), transpose(dy), strict=True):
        close(a, b)


def test_its_rounding_is_small():
    x, w = random(4, 32, 32, 128), random(3, 3, 128, 128, seed=1)
    with jax.enable_x64(True):
        exact = per_example.plain_forward(x.astype(float), w.astype(float), 1, 1)
    exact = np.asarray(exact)
    error = np.asarray(winograd.convolve(x, w, 1)) - exact
    assert error.std() < 1e-5 * exact.std()


@pytest.mark.parametrize(
    ("x", "w", "stride", "padding", "dtype", "pays"),
    [
        ((1, 32, 32, 32), (3, 3, 32, 64), 1, 1, "float32", True),
        ((64, 4, 4, 128), (3, 3, 128, 128), 1, 0, "float32", True),
        ((1, 8, 8, 128), (3, 3, 128, 128), 1, 1, "float32", False),
        ((1, 32, 32, 16), (3, 3, 16, 64), 1, 1, "float32", False),
        ((1, 32, 32, 32), (5, 5, 32, 64), 1, 2, "float32", False),
        ((1, 32, 32, 32), (3, 3, 32, 64), 2, 1, "float32", False),
        ((1, 32, 32, 32), (3, 3, 32, 64), 1, 3, "float32", False),
        ((1, 32, 32, 32), (3, 3, 32, 64), 1, 1, "bfloat16", False),
    ],
)
def test_winograd_is_chosen_for_suitable_shapes(x, w, stride, padding, dtype, pays):
    x, w = (jax.ShapeDtypeStruct(shape, dtype) for shape in (x, w))
    assert winograd.pays(x, w, stride, padding) == pays


@pytest.mark.parametrize(
    ("inputs", "outputs", "pixels", "pays"),
    [(16, 16, 32, True), (8, 64, 32, True), (32, 32, 32, False), (3, 16, 32, False),
     (16, 256, 32, False), (16, 16, 8, False)],
)  # fmt: skip
def test_rows_are_chosen_for_suitable_shapes(inputs, outputs, pixels, pays):
    x, w = jnp.zeros((1, pixels, pixels, inputs)), jnp.zeros((3, 3, inputs, outputs))
    assert winograd_rows.pays(x, w, 1, 1) == pays
    assert not winograd_rows.pays(x, w, 2, 1)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 32), (16, 16), (3, 16), (16, 3)])
def test_the_cpu_program_of_a_training_step_has_no_convolution(own, inputs, outputs):
    """Forward and both gradients, with a shared kernel and with one for every example."""
    x, w = random(2, 1, 32, 32, inputs), random(2, 3, 3, inputs, outputs, seed=1)
    w = w if own else w[0]

    def gradients(conv):
        conv = jax.vmap(conv, in_axes=(0, 0 if own else None))
        return jax.jit(jax.grad(lambda x, w: (conv(x, w) ** 2).sum(), (0, 1)))

    fast = gradients(per_example.conv2d).lower(x, w).compile()
    assert "window=" not in fast.as_text()
    plain = gradients(lambda x, w: per_example.plain_forward(x, w, 1, 1))(x, w)
    for a, b in zip(fast(x, w), plain, strict=True):
        close(a, b)
