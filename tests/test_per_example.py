"""The fast convolution against XLA's own, alone and under `jax.vmap`, and where it must be fast."""

import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ada_jax.nets import per_example, tpu_conv, triton_conv


def reference(x, w, stride, padding):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def value_and_gradients(f, x, w, dy):
    y, transpose = jax.vjp(f, x, w)
    return y, *transpose(dy)


@settings(max_examples=10, deadline=None)
@given(
    kernel=st.sampled_from([(1, 0), (2, 0), (3, 0), (3, 1), (5, 2)]),
    stride=st.sampled_from([1, 2]),
    examples=st.integers(1, 3),
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
)
def test_one_kernel_per_example_equals_a_loop_of_convolutions(kernel, stride, examples, size):
    k, padding = kernel
    x, w = random(examples, 2, *size, 3), random(examples, k, k, 3, 4, seed=1)
    dy = random(
        *jax.eval_shape(jax.vmap(lambda x, w: reference(x, w, stride, padding)), x, w).shape
    )

    def fast(x, w):
        return jax.vmap(lambda x, w: per_example.conv2d(x, w, stride=stride, padding=padding))(x, w)

    def slow(x, w):
        return jnp.stack([reference(x[i], w[i], stride, padding) for i in range(examples)])

    chex.assert_trees_all_close(
        jax.jit(value_and_gradients, static_argnums=0)(fast, x, w, dy),
        value_and_gradients(slow, x, w, dy),
        rtol=1e-5,
        atol=1e-4,
    )


def test_more_images_per_kernel_than_one_patch_matrix_takes():
    x, w, dy = random(2, 8, 32, 32, 3), random(2, 3, 3, 3, 4, seed=1), random(2, 8, 32, 32, 4)
    slow = jax.vmap(lambda x, w: reference(x, w, 1, 1))
    chex.assert_trees_all_close(
        jax.jit(value_and_gradients, static_argnums=0)(jax.vmap(per_example.conv2d), x, w, dy),
        value_and_gradients(slow, x, w, dy),
        rtol=1e-4,
        atol=2e-3,
    )


def test_a_shared_kernel_s_gradient_in_bfloat16_is_as_exact_for_large_batches():
    x, w, dy = random(256, 32, 32, 4), random(3, 3, 4, 4, seed=1), random(256, 32, 32, 4, seed=2)
    x, w, dy = (a.astype(jnp.bfloat16) for a in (x, w, dy))
    gradient = jax.jit(lambda *args: per_example.grouped_kernel_gradient(*args, 1, 1))
    exact = gradient(*(a.astype(jnp.float32) for a in (x, w, dy)))
    found = gradient(x, w, dy)
    assert found.dtype == jnp.bfloat16
    # bfloat16 has eight bits: its own rounding alone is .0017 of a value, in the mean of squares.
    assert jnp.linalg.norm(found - exact) < 0.004 * jnp.linalg.norm(exact)


def test_no_pixels_have_no_gradient():
    x, w = random(1, 2, 2, 3), random(3, 3, 3, 4)
    y, dx, dw = value_and_gradients(
        lambda x, w: per_example.conv2d(x, w, padding=0), x, w, jnp.zeros((1, 0, 0, 4))
    )
    assert y.size == 0 and not dx.any() and not dw.any()


@pytest.mark.parametrize(("stride", "padding", "batch"), [(1, 1, 6), (2, 1, 5), (1, 0, 1)])
def test_a_shared_kernel_equals_xla(stride, padding, batch):
    x, w = random(batch, 9, 8, 3), random(3, 3, 3, 5, seed=1)
    dy = random(*reference(x, w, stride, padding).shape, seed=2)
    f = lambda x, w: per_example.conv2d(x, w, stride=stride, padding=padding)  # noqa: E731
    g = lambda x, w: reference(x, w, stride, padding)  # noqa: E731
    chex.assert_trees_all_close(
        value_and_gradients(f, x, w, dy), value_and_gradients(g, x, w, dy), rtol=1e-5, atol=1e-4
    )


def test_groups_of_a_shared_kernel_add_up(monkeypatch):
    x, w, dy = random(12, 8, 8, 3), random(3, 3, 3, 5, seed=1), random(12, 8, 8, 5, seed=2)
    monkeypatch.setattr(per_example, "_ROWS", 3 * 64)
    chex.assert_trees_all_close(
        per_example.grouped_kernel_gradient(x, w, dy, 1, 1),
        per_example.plain_gradients(x, w, dy, 1, 1)[1],
        rtol=1e-5,
        atol=1e-4,
    )


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_nested_and_partial_vmap(axes):
    x = random(*([2, 3] if axes[0] == 0 else []), 1, 6, 6, 2)
    w = random(*([2, 3] if axes[1] == 0 else []), 3, 3, 2, 4, seed=1)

    def nested(conv):
        f = jax.vmap(jax.vmap(conv, in_axes=axes), in_axes=axes)
        return jax.jit(lambda x, w: jax.value_and_grad(lambda *a: (f(*a) ** 2).sum(), (0, 1))(x, w))

    chex.assert_trees_all_close(
        nested(per_example.conv2d)(x, w),
        nested(lambda x, w: reference(x, w, 1, 1))(x, w),
        rtol=1e-4,
    )


def test_bias_and_default_padding():
    x, w, b = random(2, 6, 7, 3), random(3, 3, 3, 5, seed=1), random(5, seed=2)
    chex.assert_trees_all_close(per_example.conv2d(x, w, b), reference(x, w, 1, 1) + b, rtol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("axes", [(None, None, 0), (None, 0, None), (0, None, 0), (0, 0, 0)])
def test_the_bias_under_vmap(axes, platform, monkeypatch):
    shapes = (2, 6, 7, 3), (3, 3, 3, 5), (5,)
    args = [random(*([4] if a == 0 else []), *s) for a, s in zip(axes, shapes, strict=True)]
    if platform == "tpu":  # Its kernels, interpreted.
        monkeypatch.setitem(per_example.CHOSEN, "cpu", per_example.CHOSEN["tpu"])
    per_example._many_op.cache_clear()

    def value_and_gradients(conv):
        f = jax.vmap(conv, in_axes=axes)
        return jax.jit(jax.value_and_grad(lambda *a: (f(*a) ** 2).sum(), (0, 1, 2)))(*args)

    try:
        found = value_and_gradients(lambda x, w, b: per_example.conv2d(x, w, b))
    finally:
        per_example._many_op.cache_clear()
    expected = value_and_gradients(lambda x, w, b: reference(x, w, 1, 1) + b)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-3)


def test_a_bias_of_another_type_does_not_change_the_output_s():
    x, w = (a.astype(jnp.bfloat16) for a in (random(2, 6, 7, 3), random(3, 3, 3, 5)))
    gradient = jax.grad(lambda b: per_example.conv2d(x, w, b).astype(jnp.float32).sum())(
        jnp.ones(5)
    )
    assert per_example.conv2d(x, w, jnp.ones(5)).dtype == jnp.bfloat16
    assert per_example.conv_transpose2d(x, w, jnp.ones(5)).dtype == jnp.bfloat16
    assert gradient.dtype == jnp.float32 and (gradient == 2 * 6 * 7).all()


def test_the_cpu_program_has_no_grouped_convolution():
    """What makes it slow is a convolution with one group per example: none may be left."""
    x, w = random(4, 1, 8, 8, 16), random(4, 3, 3, 16, 16)
    loss = lambda x, w: (jax.vmap(per_example.conv2d)(x, w) ** 2).sum()  # noqa: E731
    program = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile().as_text()
    assert "_group_count" not in program


@pytest.mark.parametrize(("k", "window"), [(3, "pad=1_1x1_1"), (1, "")])
def test_the_cpu_program_has_no_convolution_without_padding(k, window):
    """XLA's CPU code is two to five times slower for one, also for 1x1 kernels."""
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((20, 64, 64, 256), (k, k, 256, 16)))
    f = jax.jit(lambda x, w: per_example.conv2d(x, w, padding=0))
    found = [line for line in f.lower(x, w).compile().as_text().splitlines() if "window=" in line]
    assert bool(found) == bool(window) and all(window in line for line in found)


def test_a_gradient_that_nobody_uses_is_not_computed():
    """The attack needs no gradient of the classifier's kernels: it must not pay for one."""
    x, w = random(4, 8, 8, 16), random(3, 3, 16, 16)
    both = jax.jit(jax.grad(lambda x, w: (per_example.conv2d(x, w) ** 2).sum(), (0, 1)))
    image = jax.jit(jax.grad(lambda x, w: (per_example.conv2d(x, w) ** 2).sum()))
    flops = [f.lower(x, w).compile().cost_analysis()["flops"] for f in (image, both)]
    assert flops[0] < 0.75 * flops[1]


@pytest.mark.parametrize("bias", [False, True])
def test_the_transposed_convolution_equals_xla_and_is_batched_over_kernels(bias):
    x, w = random(3, 1, 4, 5, 6), random(3, 2, 2, 6, 7, seed=1)
    b = random(3, 7, seed=2) if bias else jnp.zeros((3, 7))

    def slow(x, w, b):
        # XLA's transposed convolution mirrors the kernel.
        flipped = w[::-1, ::-1]
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_transpose(x, flipped, (2, 2), "VALID", dimension_numbers=numbers) + b

    def fast(x, w, b):
        return per_example.conv_transpose2d(x, w, b if bias else None)

    expected = jax.vmap(slow)(x, w, b)
    dy = random(*expected.shape, seed=3)
    for a, f in zip(
        (expected, *jax.vjp(jax.vmap(slow), x, w, b)[1](dy)[:2]),
        (jax.vmap(fast)(x, w, b), *jax.vjp(jax.vmap(fast), x, w, b)[1](dy)[:2]),
        strict=True,
    ):
        np.testing.assert_allclose(f, a, atol=1e-4)


def exact(x, w, b, dy, stride, padding):
    """The convolution of [N,G,H,W,C] and its gradients (y, dx, dw, db), by NumPy in float64."""
    x, w, b, dy = (np.asarray(a, np.float64) for a in (x, w, b, dy))
    k, border = w.shape[1], [(0, 0)] * 2 + [(padding, padding)] * 2 + [(0, 0)]
    padded = np.pad(x, border)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), (2, 3))
    windows = windows[:, :, ::stride, ::stride]  # [N,G,h,w,C,k,k]
    y = np.einsum("nghwcij,nijco->nghwo", windows, w) + b[:, None, None, None]
    dw = np.einsum("nghwcij,nghwo->nijco", windows, dy)
    dx, (rows, columns) = np.zeros_like(padded), dy.shape[2:4]
    for i, j in np.ndindex(k, k):
        at = np.s_[:, :, i : i + stride * rows : stride, j : j + stride * columns : stride]
        dx[at] += np.einsum("nghwo,nco->nghwc", dy, w[:, i, j])
    crop = np.s_[padding : -padding or None]
    return y, dx[:, :, crop, crop], dw, dy.sum((1, 2, 3))


# The relative error in the mean of squares: of float32, and of bfloat16.
TYPES = {"float32": 1e-6, "bfloat16": 1e-2}


@pytest.mark.accelerator
@pytest.mark.parametrize("kind", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["chosen", *per_example.LOWERINGS])
@pytest.mark.parametrize(
    ("channels", "size", "k", "stride", "padding"),
    [((3, 64), 32, 3, 1, 1), ((64, 3), 32, 3, 1, 1), ((5, 7), 9, 3, 2, 1), ((5, 12), 8, 2, 1, 0)],
)
def test_every_lowering_is_as_exact_as_its_type(channels, size, k, stride, padding, name, kind):
    platform = jax.default_backend()
    if platform != "cpu" and per_example.KERNELS.get(name, platform) != platform:
        pytest.skip(f"{name} has kernels for another accelerator")
    inputs, outputs = channels
    x, w = random(3, 1, size, size, inputs), random(3, k, k, inputs, outputs, seed=1)
    b = random(3, outputs, seed=3)
    out = (size + 2 * padding - k) // stride + 1
    dy = random(3, 1, out, out, outputs, seed=2)
    x, w, b, dy = (a.astype(kind) for a in (x, w, b, dy))
    options = {"stride": stride, "padding": padding}

    @jax.jit
    def found(x, w, b, dy):
        if name == "chosen":
            conv = jax.vmap(lambda x, w, b: per_example.conv2d(x, w, b, **options))
            y, transpose = jax.vjp(conv, x, w, b)
            return y, *transpose(dy)
        forward, gradients = per_example.LOWERINGS[name]
        y = jax.vmap(lambda *a: forward(*a, stride, padding))(x, w, b)
        return y, *jax.vmap(lambda *a: gradients(*a, stride, padding))(x, w, dy)

    for value, expected in zip(
        found(x, w, b, dy), exact(x, w, b, dy, stride, padding), strict=True
    ):
        assert value.dtype == kind and value.shape == expected.shape
        error = np.linalg.norm(np.asarray(value, np.float64) - expected)
        assert error < TYPES[kind] * np.linalg.norm(expected)


@pytest.mark.parametrize(("k", "height", "width"), [(1, 16, 128), (3, 16, 128), (3, 37, 29)])
def test_triton_s_kernels_are_exact_where_several_blocks_are_needed(k, height, width):
    x, w = random(2, 2, height, width, 80), random(2, k, k, 80, 96, seed=1)
    dy, padding = random(2, 2, height, width, 96, seed=2), k // 2
    assert triton_conv.fits(x[0], w[0], 1, padding)
    y = jax.vmap(lambda x, w: per_example.triton_forward(x, w, 1, padding))(x, w)
    gradients = jax.vmap(lambda *a: per_example.triton_gradients(*a, 1, padding))(x, w, dy)
    *values, _ = exact(x, w, jnp.zeros((2, 96)), dy, 1, padding)
    for value, expected in zip((y, *gradients), values, strict=True):
        error = np.linalg.norm(np.asarray(value, np.float64) - expected)
        assert error < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 2, 1), (2, 1, 1), (3, 1, 0), (1, 1, 1)]
)
def test_triton_has_kernels_for_outputs_of_the_images_size_alone(kernel, stride, padding):
    x, w = jnp.zeros((1, 32, 32, 16)), jnp.zeros((kernel, kernel, 16, 16))
    assert not triton_conv.fits(x, w, stride, padding)


@pytest.mark.parametrize("kind", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("groups", "size", "channels", "k"),
    [
        (1, (32, 32), (64, 64), 3),  # EDSR's layers, the CAE's, and their smallest channels.
        (1, (16, 16), (64, 256), 3),
        (1, (8, 8), (128, 32), 3),
        (2, (8, 8), (256, 16), 1),
        (3, (7, 5), (16, 3), 3),
        (2, (33, 47), (3, 16), 3),  # Several tiles of several chunks each.
        (1, (33, 47), (8, 130), 3),
        (2, (37, 29), (16, 32), 1),
        (1, (4, 300), (3, 8), 3),  # A halo of more than one block of lanes.
        (1, (32, 32), (64, 12), 5),  # EDSR's last two layers as one.
        (2, (13, 9), (16, 12), 5),
    ],
)
def test_the_tpu_s_kernels_are_as_exact_as_their_type(groups, size, channels, k, kind, monkeypatch):
    monkeypatch.setattr(tpu_conv, "_TILE", 2**14)
    monkeypatch.setattr(tpu_conv, "_CHUNK", 2**12)
    (inputs, outputs), padding = channels, k // 2
    x, w = random(2, groups, *size, inputs), random(2, k, k, inputs, outputs, seed=1)
    dy, b = random(2, groups, *size, outputs, seed=2), random(2, outputs, seed=3)
    x, w, b, dy = (a.astype(kind) for a in (x, w, b, dy))
    assert tpu_conv.fits(x[0], w[0], 1, padding)
    y = jax.jit(jax.vmap(lambda *a: per_example.mosaic_forward(*a, 1, padding)))(x, w, b)
    gradients = jax.vmap(lambda *a: per_example.mosaic_gradients(*a, 1, padding))
    values = (y, *jax.jit(gradients)(x, w, dy))
    for value, expected in zip(values, exact(x, w, b, dy, 1, padding), strict=True):
        assert value.dtype == kind and value.shape == expected.shape
        error = np.linalg.norm(np.asarray(value, np.float64) - expected)
        assert error < TYPES[kind] * np.linalg.norm(expected)


def test_the_readme_s_per_example_gradient_norms():
    text = (pathlib.Path(per_example.__file__).parents[1] / "README.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "conv2d" in b)
    params = {"w0": random(3, 3, 3, 4), "w1": random(3, 3, 4, 5), "v": random(5, 10)}
    given = {"x": random(2, 1, 8, 8, 3), "w": random(2, 3, 3, 3, 4), "b": random(2, 4)}
    given |= {"params": params, "images": random(20, 8, 8, 3), "labels": jnp.arange(20) % 10}
    exec(block, given)
    assert given["y"].shape == (2, 1, 8, 8, 4)

    def loss(params, image, label):
        h = jax.nn.relu(reference(image[None], params["w0"], 2, 1))
        h = jax.nn.relu(reference(h, params["w1"], 1, 1))
        return -jax.nn.log_softmax(h.mean((1, 2)) @ params["v"])[0, label]

    gradient = jax.jit(jax.grad(loss))
    for i in range(20):
        one = gradient(params, given["images"][i], given["labels"][i])
        norms = jax.tree.map(np.linalg.norm, jax.tree.map(np.ravel, one))
        found = jax.tree.map(lambda a, i=i: a[i], given["found"])
        chex.assert_trees_all_close(found, norms, rtol=1e-4)
