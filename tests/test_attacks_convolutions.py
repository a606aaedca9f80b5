"""Convolutions for the attacks on a CPU: the same values and gradients as XLA's."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ada_jax.attacks import convolutions

CASES = [
    # Image, kernel, channels, strides, padding.
    ((8, 8), (3, 3), (3, 4), (1, 1), "SAME"),
    ((7, 5), (3, 3), (3, 4), (1, 1), "SAME"),
    ((7, 6), (5, 2), (1, 4), (1, 1), "VALID"),
    ((9, 8), (3, 3), (3, 4), (2, 2), "SAME"),
    ((8, 8), (3, 3), (6, 4), (1, 1), "SAME"),
    ((8, 9), (3, 3), (6, 4), (2, 2), "SAME"),
    ((8, 9), (1, 1), (6, 4), (2, 2), "VALID"),
    ((11, 8), (4, 5), (6, 4), (3, 2), ((2, 0), (1, 6))),
    ((8, 8), (2, 3), (6, 4), (1, 1), ((3, 2), (0, 4))),
    ((7, 7), (2, 2), (3, 4), (2, 1), ((3, 0), (0, 2))),
    ((7, 7), (2, 2), (2, 4), (3, 3), "VALID"),
]


def value_and_gradient(f, x):
    y = jax.jit(f)(x)
    weights = np.float32(np.random.default_rng(1).normal(size=y.shape))
    return y, jax.jit(jax.grad(lambda x: jnp.sum(weights * f(x))))(x)


def assert_equal(f, x):
    faster = convolutions.faster(f)
    for ours, xlas in zip(value_and_gradient(faster, x), value_and_gradient(f, x), strict=True):
        np.testing.assert_allclose(ours, xlas, rtol=1e-5, atol=2e-5)
    return str(jax.make_jaxpr(faster)(x))


@pytest.mark.accelerator
@pytest.mark.parametrize(("image", "kernel", "channels", "strides", "padding"), CASES)
def test_it_is_xlas_convolution(image, kernel, channels, strides, padding):
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(2, *image, channels[0])))
    w = np.float32(rng.normal(size=(*kernel, *channels)))
    numbers = ("NHWC", "HWIO", "NHWC")
    convolve = lambda x: lax.conv_general_dilated(  # noqa: E731
        x, w, strides, padding, dimension_numbers=numbers
    )
    assert "custom_vjp" in assert_equal(convolve, x)


@pytest.mark.parametrize(
    "numbers", [("NCHW", "OIHW", "NHWC"), ("HWCN", "IOWH", "CWNH"), ("NHWC", "HWIO", "NCHW")]
)
def test_axes_in_any_order(numbers):
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=[{"N": 2, "H": 8, "W": 7, "C": 3}[a] for a in numbers[0]]))
    w = np.float32(rng.normal(size=[{"H": 3, "W": 2, "I": 3, "O": 4}[a] for a in numbers[1]]))
    assert "custom_vjp" in assert_equal(
        lambda x: lax.conv_general_dilated(x, w, (1, 2), "SAME", dimension_numbers=numbers), x
    )


def test_what_it_does_not_replace():
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(2, 8, 8, 4)))
    w = np.float32(rng.normal(size=(3, 3, 4, 4)))
    numbers = ("NHWC", "HWIO", "NHWC")
    for options in ({"lhs_dilation": (2, 2)}, {"rhs_dilation": (2, 1)}, {"feature_group_count": 2}):
        kernel = w[:, :, :2] if "feature_group_count" in options else w
        convolve = lambda x, kernel=kernel, options=options: lax.conv_general_dilated(  # noqa: E731
            x, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=numbers, **options
        )
        assert "custom_vjp" not in assert_equal(convolve, x)


def test_a_kernel_made_from_the_images_has_its_gradient():
    """Templates are compared with one image as the kernel."""
    rng = np.random.default_rng(0)
    templates = np.float32(rng.normal(size=(5, 8, 8, 3)))
    x = np.float32(rng.normal(size=(1, 8, 8, 3)))

    @jax.jit
    def compare(templates, x):
        numbers = ("NHWC", "OHWI", "NHWC")
        return lax.conv_general_dilated(templates, x, (1, 1), "VALID", dimension_numbers=numbers)

    assert "custom_vjp" not in assert_equal(lambda x: compare(templates, x), x)


@pytest.mark.parametrize("channels", [3, 6])
def test_the_precision_is_the_classifiers(channels):
    """On a GPU the default may be TF32."""
    x = jnp.ones((1, 8, 8, channels))
    w = jnp.ones((3, 3, channels, 4))

    def total(x):
        numbers = ("NHWC", "HWIO", "NHWC")
        convolve = functools.partial(lax.conv_general_dilated, precision=lax.Precision.HIGHEST)
        faster = convolutions.faster(
            lambda x: convolve(x, w, (1, 1), "SAME", dimension_numbers=numbers)
        )
        return faster(x).sum()

    program = jax.jit(jax.grad(total)).lower(x).as_text()
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", program)
    assert products and all("HIGHEST" in product for product in products)


def test_it_replaces_inside_pmap():
    w = np.ones((3, 3, 3, 4), np.float32)
    numbers = ("NHWC", "HWIO", "NHWC")
    convolve = lambda x: lax.conv_general_dilated(  # noqa: E731
        x, w, (1, 1), "SAME", dimension_numbers=numbers
    )
    mapped = jax.pmap(convolutions.faster(convolve))
    assert "custom_vjp" in str(jax.make_jaxpr(mapped)(np.ones((1, 2, 8, 8, 3), np.float32)))


def test_convolutions_inside_jitted_functions():
    """With relu, whose gradient is its own, a tuple of results, and a number in the program."""
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(2, 8, 8, 3)))
    w = np.float32(rng.normal(size=(3, 3, 3, 3)))

    @jax.jit
    def layer(x):
        y = lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(y), 2

    def net(x):
        y, two = layer(x)
        top, _ = lax.top_k(layer(y * two)[0], 2)
        return top.reshape(2, -1) + x.max()

    assert assert_equal(net, x).count("custom_vjp_call") >= 2
