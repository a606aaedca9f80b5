"""EDSR against straightforward statements, and the shipped weights on photographs."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import skimage.data
import skimage.transform
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from ada_jax import ssim
from ada_jax.errors import UserError
from ada_jax.nets import cae, corruption_nets, edsr, layers, per_example, weight_files

SCALES = [1, 2, 4]


def images(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), shape)


def random_theta(init, seed: int = 0):
    """Parameters large enough that every layer can be seen in the output."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda a: jnp.float32(0.2 * rng.normal(size=a.shape)), shapes)


def small(scale: int, seed: int = 0):
    net = edsr.edsr(blocks=2, features=4, scale=scale)
    return net, random_theta(net.init, seed)


# ------------------------------------------------------------------------------- parameters


def test_the_published_network_has_74_leaves_and_1517571_parameters():
    init = corruption_nets.architecture("edsr_baseline_x4").init
    leaves = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0)))
    assert len(leaves) == 74
    assert sum(leaf.size for leaf in leaves) == 1_517_571
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize(("scale", "convolutions"), [(1, 7), (2, 8), (4, 9)])
def test_every_convolution_has_a_kernel_and_a_bias(scale, convolutions):
    _, theta = small(scale)
    assert len(theta) == convolutions
    for name, conv in theta.items():
        chex.assert_shape(conv["w"], (3, 3, 3 if name == "head" else 4, None))
        chex.assert_shape(conv["b"], conv["w"].shape[-1:])


def test_random_parameters_fill_the_range_of_their_fan_in_and_follow_their_key():
    init = jax.jit(edsr.edsr(blocks=1, features=32, scale=1).init)
    theta, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(theta, again)
    for name, conv in theta.items():
        bound = (9 * conv["w"].shape[2]) ** -0.5
        for kind, leaf in conv.items():
            assert np.all(np.abs(leaf) <= bound)
            assert not np.any(leaf == other[name][kind])
        np.testing.assert_allclose(np.std(conv["w"]), bound / 3**0.5, rtol=0.05)
    first, second = theta["block00/conv0"]["w"], theta["block00/conv1"]["w"]
    assert not np.any(first == second)


def test_the_cae_has_42_leaves_and_2241859_parameters():
    leaves = jax.tree.leaves(jax.eval_shape(cae.cae_init, jax.random.key(0)))
    assert (len(leaves), sum(leaf.size for leaf in leaves)) == (42, 2_241_859)


# ------------------------------------------------------------------------------- the function


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_pixel_shuffle_follows_pytorchs_order(height, width, channels):
    x = np.arange(2 * height * width * 4 * channels).reshape(2, height, width, 4 * channels)
    y = np.asarray(edsr.pixel_shuffle(x))
    assert y.shape == (2, 2 * height, 2 * width, channels)
    for b, h, w, c in np.ndindex(2, height, width, channels):
        for i, j in np.ndindex(2, 2):
            assert y[b, 2 * h + i, 2 * w + j, c] == x[b, h, w, 4 * c + 2 * i + j]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 3), (7, 5)])
def test_the_joined_layers_of_edsr_equal_one_after_the_other(size, shuffle):
    """The wide features between them, zeros around these, and the gradients of both layers."""

    def separate(up, conv, x):
        x = edsr.pixel_shuffle(x) if shuffle else x
        return layers.conv(conv, edsr.pixel_shuffle(layers.conv(up, x)))

    def joined(up, conv, x):
        return edsr.pixel_shuffle(edsr.conv_shuffle_conv(up, conv, x, shuffle))

    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 3)
        args = layers.conv_init(keys[0], 6, 24), layers.conv_init(keys[1], 6, 3)
        args = *args, jax.random.normal(keys[2], (2, *size, 24 if shuffle else 6))
        args = jax.tree.map(lambda a: a.astype(float), args)
        y = separate(*args)
        with_gradients = lambda f: (f(*args), jax.vjp(f, *args)[1](y))  # noqa: E731
        found, wanted = jax.jit(lambda: (with_gradients(joined), with_gradients(separate)))()
        chex.assert_trees_all_close(found, wanted, rtol=1e-12, atol=1e-13)


def straightforward_edsr(theta, x, blocks: int, upsamplers: int):
    """The published code's forward pass on 0..255, channels first as in PyTorch."""
    mean = 255 * jnp.array([0.4488, 0.4371, 0.4040]).reshape(3, 1, 1)

    def conv(name, x):
        w = theta[name]["w"].transpose(3, 2, 0, 1)
        return lax.conv(x, w, (1, 1), "SAME") + theta[name]["b"].reshape(-1, 1, 1)

    def shuffle(x):
        b, c, h, w = x.shape
        x = x.reshape(b, c // 4, 2, 2, h, w).transpose(0, 1, 4, 2, 5, 3)
        return x.reshape(b, c // 4, 2 * h, 2 * w)

    x = conv("head", 255 * x.transpose(0, 3, 1, 2) - mean)
    skip = x
    for i in range(blocks):
        x = x + conv(f"block{i:02d}/conv1", jnp.maximum(conv(f"block{i:02d}/conv0", x), 0))
    x = skip + conv("body_end", x)
    for i in range(upsamplers):
        x = shuffle(conv(f"up{i}", x))
    return (conv("tail", x) + mean).transpose(0, 2, 3, 1) / 255


@pytest.mark.parametrize(("scale", "upsamplers"), [(1, 0), (2, 1), (4, 2)])
def test_edsr_equals_a_straightforward_statement(scale, upsamplers):
    _, theta = small(scale)
    x = images(2, 7, 10, 3)
    y = jax.jit(edsr.edsr_apply)(theta, x)
    assert y.shape == (2, 7 * scale, 10 * scale, 3)
    np.testing.assert_allclose(y, straightforward_edsr(theta, x, 2, upsamplers), atol=2e-5)


@pytest.mark.parametrize("scale", SCALES)
def test_the_output_has_the_inputs_size_even_if_it_is_odd(scale):
    net, theta = small(scale)
    y = jax.jit(net.apply)(theta, images(2, 33, 40, 3), jax.random.key(0))
    assert (y.shape, y.dtype) == ((2, 33, 40, 3), jnp.float32)
    assert np.all(np.isfinite(y))


@pytest.mark.parametrize("scale", [2, 4])
def test_the_output_is_brought_back_by_pillows_bicubic_filter(scale):
    net, theta = small(scale)
    x = images(1, 13, 10, 3)
    large = np.asarray(jax.jit(edsr.edsr_apply)(theta, x))[0]
    expected = [
        PIL.Image.fromarray(channel).resize((10, 13), PIL.Image.Resampling.BICUBIC)
        for channel in large.transpose(2, 0, 1)
    ]
    np.testing.assert_allclose(jax.jit(net.apply)(theta, x)[0], np.stack(expected, -1), atol=1e-4)


@pytest.mark.parametrize("scale", SCALES)
def test_one_network_per_example_equals_a_loop(scale):
    net, _ = small(scale)
    thetas = [small(scale, seed)[1] for seed in range(3)]
    x = images(3, 6, 9, 3)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *thetas)
    together = jax.jit(jax.vmap(lambda t, x: net.apply(t, x[None])[0]))(stacked, x)
    apply = jax.jit(net.apply)
    alone = [apply(t, x[i : i + 1])[0] for i, t in enumerate(thetas)]
    np.testing.assert_allclose(together, jnp.stack(alone), atol=2e-5)


def test_large_images_have_the_gradient_of_the_straightforward_statement():
    """One image of 132x160 pixels (at four times the scale) is more than one group of patches."""
    _, theta = small(4)
    x, direction = images(2, 33, 40, 3), images(2, 132, 160, 3, seed=1) / 1e4
    ours = lambda t: (edsr.edsr_apply(t, x) * direction).sum()  # noqa: E731
    reference = lambda t: (straightforward_edsr(t, x, 2, 2) * direction).sum()  # noqa: E731
    chex.assert_trees_all_close(
        jax.jit(jax.grad(ours))(theta), jax.jit(jax.grad(reference))(theta), rtol=1e-3, atol=1e-3
    )


# ------------------------------------------------------------------------------- presets


def test_unknown_names_are_refused_with_the_names_there_are():
    for refuse in (corruption_nets.make, corruption_nets.architecture):
        with pytest.raises(UserError, match=r"'edsr_tiny'.*edsr_baseline_x4.*edsr_small"):
            refuse("edsr_tiny")


def test_a_preset_without_shipped_weights_says_how_to_get_some(monkeypatch, tmp_path):
    monkeypatch.setattr(corruption_nets, "WEIGHTS", tmp_path)
    with pytest.raises(UserError, match=r"no shipped weights.*pretrain.*corruption_weights"):
        corruption_nets.make("edsr_small")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        corruption_nets.make("edsr_small", str(tmp_path / "nowhere.safetensors"))


def test_weights_of_ones_own_are_loaded(tmp_path):
    theta = random_theta(corruption_nets.architecture("edsr_small").init)
    path = str(tmp_path / "mine.safetensors")
    weight_files.save_weights(path, theta, {})
    net = corruption_nets.make("edsr_small", path)
    chex.assert_trees_all_equal(net.theta, theta)
    x = images(1, 12, 12, 3)
    apply = corruption_nets.architecture("edsr_small").apply
    np.testing.assert_array_equal(jax.jit(net.apply)(theta, x), jax.jit(apply)(theta, x))


def test_weights_of_another_network_are_refused(tmp_path):
    path = str(tmp_path / "other.safetensors")
    weight_files.save_weights(path, small(1)[1], {})
    with pytest.raises(UserError, match="does not fit"):
        corruption_nets.make("edsr_small", path)


# ------------------------------------------------------------------------------- shipped weights

SHIPPED = sorted(path.stem for path in corruption_nets.WEIGHTS.glob("*.safetensors"))


def photographs() -> jax.Array:
    """Eight 32x32 patches of photographs, each shrunk from 128x128 pixels."""
    sources = [skimage.data.astronaut(), skimage.data.chelsea()]
    corners = [(0, 150), (100, 10), (120, 200), (40, 300)]
    crops = [image[i : i + 128, j : j + 128] for image in sources for i, j in corners]
    resize = functools.partial(skimage.transform.resize, anti_aliasing=True)
    return jnp.asarray([resize(crop, (32, 32)) for crop in crops], jnp.float32)


def test_the_default_corruption_network_is_shipped_and_nothing_without_a_name():
    assert set(SHIPPED) == {"edsr_small", "edsr_medium", "edsr_baseline_x4", "cae"}
    assert set(SHIPPED) <= set(corruption_nets.names())
    sizes = [path.stat().st_size for path in corruption_nets.WEIGHTS.iterdir()]
    assert max(sizes) < 6e6


@pytest.mark.parametrize(
    ("name", "enlarge", "least"),
    [("edsr_small", 1, 0.98), ("edsr_medium", 1, 0.98), ("edsr_baseline_x4", 1, 0.98)]
    + [("cae", 1, 0.75), ("cae", 2, 0.88)],
)
def test_shipped_weights_are_nearly_the_identity_on_photographs(name, enlarge, least):
    net = corruption_nets.make(name, enlarge=enlarge)
    x = photographs()
    y = jnp.clip(jax.jit(net.apply)(net.theta, x, jax.random.key(0)), 0, 1)
    assert np.mean(jax.jit(ssim.ssim)(x, y)) >= least


# --------------------------------------------------------------------------------- the CAE


@pytest.fixture(scope="module")
def cae_theta():
    return cae.cae_init(jax.random.key(0))


def test_the_cae_keeps_sizes_and_has_two_bits_a_pixel(cae_theta):
    x = images(2, 24, 16, 3)
    latent = cae.cae_encode(cae_theta, x)
    assert latent.shape == (2, 6, 4, 32)
    bits = cae.binarise(jax.random.key(1), latent)
    np.testing.assert_allclose(np.abs(bits), 1, atol=1e-6)
    y = cae.cae_decode(cae_theta, bits)
    assert y.shape == x.shape
    whole = cae.cae().apply(cae_theta, x, jax.random.key(1))
    np.testing.assert_allclose(whole, y, atol=1e-6)


def test_the_joined_layers_of_the_cae_equal_one_after_the_other(cae_theta):
    """The wide features between them, and the gradients of both layers."""
    up, conv = cae_theta["d_up_conv_2/up"], cae_theta["d_up_conv_3/conv0"]
    up, conv = ({"w": layer["w"], "b": layer["b"] + 0.1} for layer in (up, conv))
    x = jax.random.normal(jax.random.key(1), (2, 6, 8, 32))

    def separate(up, conv, x):
        wide = per_example.conv_transpose2d(x, up["w"], up["b"])
        return per_example.conv2d(wide, conv["w"], conv["b"], padding=0)

    y, transpose = jax.vjp(separate, up, conv, x)
    joined, joined_transpose = jax.vjp(layers.conv_after_up, up, conv, x)
    chex.assert_trees_all_close(
        (joined, joined_transpose(y)), (y, transpose(y)), rtol=1e-4, atol=1e-4
    )


def test_sizes_that_the_cae_cannot_halve_twice_are_refused(cae_theta):
    for height, width in ((30, 32), (32, 33), (8, 32), (4, 4)):  # 8x8 came out as one grey
        with pytest.raises(UserError, match=r"multiples of 4 and at least 12, not \("):
            cae.cae_encode(cae_theta, images(1, height, width, 3))


@pytest.mark.parametrize(
    ("nets", "enlarge", "size", "said"),
    [
        (("edsr_small", "cae"), (1, 1), (33, 47), r"nets=\('edsr_small', 'cae'\) .* of 33x47, "),
        (("cae",), (2,), (33, 47), "sides, 2 times enlarged, must be multiples of 4"),
        (("cae",), (1,), (8, 8), "of 8x8, whose sides must be .* at least 12 for 'cae'"),
        (("cae",), (2,), (30, 6), None),
        (("cae", "cae"), (1, 4), (12, 32), None),
        (("edsr_baseline_x4",), (1,), (5, 7), None),
    ],
)
def test_sizes_are_checked_for_all_networks_and_agree_with_them(nets, enlarge, size, said):
    check = functools.partial(corruption_nets.check_sizes, "config.nets", nets, enlarge)
    if said:
        with pytest.raises(UserError, match=said):
            check((*size, 3))
        return
    check((*size, 3))
    for name, factor in zip(nets, enlarge, strict=True):
        net = corruption_nets.make(name, enlarge=factor)
        y = jax.eval_shape(net.apply, net.theta, jnp.zeros((1, *size, 3)), jax.random.key(0))
        assert y.shape == (1, *size, 3)


@pytest.mark.parametrize("enlarge", [0, -1, 1.5, "2", True, None])
def test_factors_that_enlarge_nothing_are_refused(enlarge):
    with pytest.raises(UserError, match=r"enlarge=.* must be an integer of at least 1"):
        corruption_nets.make("cae", enlarge=enlarge)


def test_bits_have_the_latent_as_their_mean_and_pass_gradients_straight_through():
    latent = jnp.linspace(-1, 1, 5)
    draw = jax.vmap(cae.binarise, (0, None))(jax.random.split(jax.random.key(0), 4000), latent)
    np.testing.assert_allclose(draw.mean(0), latent, atol=0.05)
    assert (draw[:, 0] == -1).all() and (draw[:, -1] == 1).all()
    gradient = jax.grad(lambda e: jnp.sum(e * 0 + 3 * cae.binarise(jax.random.key(0), e)))
    np.testing.assert_allclose(gradient(latent), 3)
    half = cae.binarise(jax.random.key(0), jnp.linspace(-1, 1, 99, dtype=jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and (jnp.abs(half) == 1).all()


@pytest.mark.slow
def test_the_cae_per_example_equals_one_at_a_time(cae_theta):
    x, keys = images(2, 12, 16, 3), jax.random.split(jax.random.key(3), 2)
    thetas = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), cae_theta)
    one = lambda theta, x, key: cae.cae().apply(theta, x[None], key)[0]  # noqa: E731
    together = jax.jit(jax.vmap(one))(thetas, x, keys)
    for i in range(2):
        alone = one(jax.tree.map(lambda a, i=i: a[i], thetas), x[i], keys[i])
        np.testing.assert_allclose(together[i], alone, atol=1e-5)


@pytest.mark.parametrize("factor", [1, 4])
def test_an_enlarged_network_sees_larger_images(factor):
    seen = []

    def identity(theta, x, key):
        seen.append(x.shape)
        return x

    ramp = jnp.linspace(0, 1, 16)[:, None] * jnp.linspace(1, 0, 12)
    x = jnp.broadcast_to(ramp[..., None], (2, 16, 12, 3))
    y = corruption_nets.enlarged(identity, factor)(None, x, None)
    assert seen == [(2, 16 * factor, 12 * factor, 3)]
    np.testing.assert_allclose(y, x, atol=0.02 if factor > 1 else 0)
