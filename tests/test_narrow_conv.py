"""The CPU's convolutions of few channels and strided gradients against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ada_jax.nets import narrow_conv, per_example


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 8), (1, 9), (8, 3)])
@pytest.mark.parametrize(("height", "width", "padding"), [(8, 8, 1), (7, 5, 0), (4, 9, 2)])
def test_few_channels(inputs, outputs, height, width, padding):
    x, w = random(2, height, width, inputs), random(3, 3, inputs, outputs, seed=1)
    assert narrow_conv.pays(x, w, 1, padding)
    y, transpose = jax.vjp(lambda w: per_example.plain_forward(x, w, 1, padding), w)
    np.testing.assert_allclose(narrow_conv.convolve(x, w, padding), y, atol=1e-4)
    if inputs < outputs:
        dy = random(*y.shape, seed=2)
        dw = narrow_conv.kernel_gradient(x, w, dy, padding)
        np.testing.assert_allclose(dw, transpose(dy)[0], atol=1e-4)


@pytest.mark.parametrize(
    ("size", "k", "stride", "padding"),
    [((8, 8), 3, 2, 1), ((7, 5), 3, 2, 1), ((10, 11), 2, 2, 0), ((12, 13), 5, 3, 2),
     ((9, 9), 3, 3, 1), ((8, 8), 3, 2, 2)],
)  # fmt: skip
def test_the_input_gradient_of_a_strided_convolution(size, k, stride, padding):
    x, w = random(2, *size, 3), random(k, k, 3, 4, seed=1)
    y, transpose = jax.vjp(lambda x: per_example.plain_forward(x, w, stride, padding), x)
    dy = random(*y.shape, seed=2)
    dx = narrow_conv.strided_input_gradient(x, w, dy, stride, padding)
    np.testing.assert_allclose(dx, transpose(dy)[0], atol=1e-4)
