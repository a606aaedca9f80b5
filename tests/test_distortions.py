"""DeepAugment's distortions, each against a few lines in PyTorch's order of axes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import scipy.stats

from ada_jax.augment import feature_distortions as features
from ada_jax.augment import weight_distortions as weights
from ada_jax.nets import cae
from ada_jax.nets import edsr as edsr_net

BLOCKS, FEATURES = 4, 6


@pytest.fixture
def edsr():
    net = edsr_net.edsr(blocks=BLOCKS, features=FEATURES, scale=1)
    return jax.tree.map(np.array, net.init(jax.random.key(0)))


@pytest.fixture(scope="module")
def cae_theta():
    return jax.tree.map(np.array, cae.cae_init(jax.random.key(0)))


def oihw(w):
    """A kernel in PyTorch's order of axes."""
    return np.asarray(w).transpose(3, 2, 0, 1)


def changed(before, after):
    """Names of layers that are not as they were."""
    return [
        name
        for name in before
        if not all(np.array_equal(before[name][k], after[name][k]) for k in "wb")
    ]


def distorted(function, theta, seed=0, quirks=False):
    """A distorted copy, and the layers that changed."""
    after = {name: {k: a.copy() for k, a in layer.items()} for name, layer in theta.items()}
    args = () if function in weights.CAE_DISTORTIONS else (quirks,)
    function(np.random.default_rng(seed), after, *args)
    return after, changed(theta, after)


def test_there_are_as_many_as_published():
    assert len(weights.EDSR_DISTORTIONS) == 17
    assert len(weights.CAE_DISTORTIONS) == 8
    assert len(features._LATENT_DISTORTIONS) + 1 == 9


# ------------------------------------------------------------------------ EDSR's weights


def kernels(edsr, function, seed=0, quirks=False):
    """Both kernels of the block that a distortion took, before and after, and its biases."""
    after, names = distorted(function, edsr, seed, quirks)
    block = {name.partition("/")[0] for name in names}.pop()
    return [
        (oihw(edsr[f"{block}/conv{i}"]["w"]), oihw(after[f"{block}/conv{i}"]["w"]),
         edsr[f"{block}/conv{i}"]["b"], after[f"{block}/conv{i}"]["b"])
        for i in (0, 1)
    ]  # fmt: skip


def test_reverse_filters(edsr):
    for w, out, b, bias in kernels(edsr, weights.reverse_filters):
        np.testing.assert_array_equal(out, w[::-1])
        np.testing.assert_array_equal(bias, b[::-1])


def test_negate_and_zero_first(edsr):
    (w, out, b, bias), (second, same, _, _) = kernels(edsr, weights.negate_first)
    assert (out == -w).all() and (bias == -b).all() and (second == same).all()
    (_, out, _, bias), (second, same, _, _) = kernels(edsr, weights.zero_first)
    assert not out.any() and not bias.any() and (second == same).all()


def test_gelu_weights(edsr):
    for w, out, b, bias in kernels(edsr, weights.gelu_weights):
        np.testing.assert_allclose(out, -w * scipy.stats.norm.cdf(w), rtol=1e-5)
        np.testing.assert_array_equal(bias, b)


@pytest.mark.parametrize(
    ("function", "taps"),
    [
        (weights.laplace, [[0, 1, 0], [1, -4, 1], [0, 1, 0]]),
        (weights.outline, [[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]]),
    ],
)
def test_taps_are_multiplied(edsr, function, taps):
    (w, out, _, _), (second, same, _, _) = kernels(edsr, function)
    np.testing.assert_array_equal(out, w * np.float32(taps))
    np.testing.assert_array_equal(second, same)


def test_amplify(edsr):
    (first, same, _, _), (w, out, _, _) = kernels(edsr, weights.amplify)
    ratio = out / w
    assert ratio.min() >= 1 and 1.01 < ratio.max() <= 5 and len(np.unique(ratio)) > 100
    np.testing.assert_array_equal(first, same)


def test_mirror_and_negate(edsr):
    (w, out, _, _), (second, negated, _, _) = kernels(edsr, weights.mirror_and_negate)
    np.testing.assert_array_equal(out, w[:, :, :, ::-1])
    np.testing.assert_array_equal(negated, -second)


def convolved(w, z):
    """Output filters as images: [O,I,3,3] under taps z [I',I,3,3], zero padding."""
    return np.array(
        [
            [
                sum(scipy.signal.correlate2d(f[j], tap[j], "same") for j in range(len(f)))
                for tap in z
            ]
            for f in w
        ]
    )


def test_kernels_are_convolved_as_a_layer_convolves_images():
    rng = np.random.default_rng(0)
    w, z = rng.normal(size=(4, 5, 3, 3)), rng.normal(size=(6, 5, 3, 3))
    ours = weights.convolve_kernels(
        np.float32(w.transpose(2, 3, 1, 0)), np.float32(z.transpose(2, 3, 1, 0))
    )
    np.testing.assert_allclose(oihw(ours), convolved(w, z), atol=1e-4)


def test_shifted_kernels_are_shifts_and_with_the_quirk_all_alike(edsr):
    (w, out, _, _), _ = kernels(edsr, weights.shift_kernels)
    for i in range(FEATURES):
        shifts = [
            sign * convolved(w[:, i : i + 1], np.eye(9)[k].reshape(1, 1, 3, 3))[:, 0]
            for k in range(9)
            for sign in (-1, 1)
        ]
        assert min(np.abs(out[:, i] - shifted).max() for shifted in shifts) < 1e-6
    (_, out, _, _), _ = kernels(edsr, weights.shift_kernels, quirks=True)
    np.testing.assert_allclose(out, np.repeat(out[:, :1], FEATURES, 1), atol=1e-6)


def drawn_block(rng, blocks):
    """The first draw of every distortion of one block."""
    return int(rng.choice([i for i in blocks if i < BLOCKS]))


def test_convolve_noise(edsr):
    (w, out, _, _), (second, same, _, _) = kernels(edsr, weights.convolve_noise)
    rng = np.random.default_rng(0)
    drawn_block(rng, (0, 3, 6, 9))
    r = rng.random((3, 3, FEATURES, FEATURES), np.float32)
    z = oihw((2 * r * rng.random() - 1) / 6)
    np.testing.assert_allclose(out, convolved(w, z), atol=1e-5)
    np.testing.assert_array_equal(second, same)


def test_convolve_dirichlet(edsr):
    (first, same, _, _), (w, out, _, _) = kernels(edsr, weights.convolve_dirichlet)
    rng = np.random.default_rng(0)
    drawn_block(rng, (1, 5, 9))
    z = rng.dirichlet(np.full(9, 0.1), (FEATURES, FEATURES)).reshape(FEATURES, FEATURES, 3, 3)
    np.testing.assert_allclose(out, convolved(w, z.swapaxes(0, 1)), atol=1e-5)
    np.testing.assert_array_equal(first, same)


def test_add_noise(edsr):
    (first, same, _, _), (w, out, _, _) = kernels(edsr, weights.add_noise)
    difference = out - w
    assert -0.5 <= difference.min() < -0.45 and 0.45 < difference.max() <= 0.5
    np.testing.assert_array_equal(first, same)


def test_rotated_kernels_keep_their_numbers(edsr):
    seen = set()
    for seed in range(8):
        after, names = distorted(weights.rotate_kernels, edsr, seed)
        assert names and not any(name.startswith(f"block{BLOCKS - 1:02d}") for name in names)
        for name in names:
            w, out = oihw(edsr[name]["w"]), oihw(after[name]["w"])
            np.testing.assert_array_equal(np.sort(w.ravel()), np.sort(out.ravel()))
            seen |= {
                (k, axes)
                for k in (1, 2, 3)
                for axes in ((2, 3), (0, 1))
                if np.array_equal(out, np.rot90(w, k, axes))
            }
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("function", "values"),
    [(weights.flip_signs, {-1.0, 1.0}), (weights.drop_weights, {0.0, 1.0})],
)
def test_weights_are_negated_or_dropped_with_one_half(edsr, function, values):
    after, names = distorted(function, edsr)
    assert all(name.endswith("conv0") for name in names)
    ratios = np.concatenate([(after[n]["w"] / edsr[n]["w"]).ravel() for n in names])
    assert {float(r) for r in ratios} == values
    assert 0.2 < np.mean(ratios == 1) < 0.6


def test_negated_filters_are_whole(edsr):
    after, names = distorted(weights.negate_filters, edsr)
    for name in names:
        ratio = oihw(after[name]["w"] / edsr[name]["w"]).reshape(FEATURES, -1)
        assert (ratio == ratio[:, :1]).all() and set(np.abs(ratio[:, 0])) == {1.0}


def test_only_the_largest_tap_is_kept(edsr):
    after, names = distorted(weights.keep_largest_tap, edsr)
    for name in names:
        w, out = oihw(edsr[name]["w"]).reshape(-1, 9), oihw(after[name]["w"]).reshape(-1, 9)
        assert ((out != 0).sum(1) == 1).all()
        np.testing.assert_array_equal(out.max(1) + out.min(1), w.max(1))


def test_three_distortions_are_drawn_and_theta_is_left_alone(edsr):
    before = jax.tree.map(np.copy, edsr)
    first, again, other = (weights.distort_edsr(np.random.default_rng(s), edsr) for s in (0, 0, 1))
    assert not changed(before, edsr)
    assert not changed(first, again) and changed(first, other)


def test_edsr_gets_three_distortions_and_the_cae_one(edsr, cae_theta, monkeypatch):
    calls = []
    for name in ("EDSR_DISTORTIONS", "CAE_DISTORTIONS"):
        count = len(getattr(weights, name))
        monkeypatch.setattr(weights, name, [lambda *args: calls.append(args)] * count)
    weights.distort_edsr(np.random.default_rng(0), edsr)
    assert len(calls) == 3
    weights.distort_cae(np.random.default_rng(0), cae_theta)
    assert len(calls) == 4


# ------------------------------------------------------------------------ the CAE's weights


def cae_filters(theta, name):
    """A kernel in PyTorch's order: [out,in,...], transposed ones [in,out,...]."""
    w = theta[name]["w"]
    return w.transpose(2, 3, 0, 1) if name.endswith("/up") else w.transpose(3, 2, 0, 1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("function", weights.CAE_DISTORTIONS)
def test_cae_distortions(cae_theta, function, seed):
    after, names = distorted(function, cae_theta, seed)
    indices = [weights._LAYERS.index(name) for name in names]
    assert 1 <= len(names) <= (2 if function is weights.cae_amplify else 1)
    low, high = {"cae_reverse": (11, 15), "cae_gelu": (10, 13)}.get(function.__name__, (8, 13))
    assert all(low <= i <= high for i in indices)
    w, out = cae_filters(cae_theta, names[0]), cae_filters(after, names[0])
    rows = np.abs(out - w).reshape(len(w), -1).max(1) > 0
    match function.__name__:
        case "cae_reverse":
            np.testing.assert_array_equal(out, w[::-1])
        case "cae_negate":
            np.testing.assert_array_equal(out, np.where(rows[:, None, None, None], -w, w))
            assert rows.sum() <= 12 and rows.sum() % 2 == 0
        case "cae_zero":
            np.testing.assert_array_equal(out, np.where(rows[:, None, None, None], 0, w))
            assert 15 <= rows.sum() <= 25
        case "cae_gelu":
            assert rows.sum() <= 25 and np.abs(out).max() <= np.abs(w).max()
            once = -w * scipy.stats.norm.cdf(w)
            assert np.mean(np.abs(out[rows] - once[rows]) < 1e-6) > 0.5
        case "cae_amplify":
            assert (out / w).min() >= 1 - 1e-6 and (out / w).max() <= 81
        case "cae_mask":
            assert np.mean(out == w) == pytest.approx(0.5, abs=0.05)
            assert (out[out != w] == 0).all() or (out[out != w] == -w[out != w]).all()
        case "cae_rotate":
            assert any(np.array_equal(out, np.rot90(w, k, (2, 3))) for k in (1, 2, 3))
        case "cae_negate_filters":
            np.testing.assert_array_equal(out, np.where(rows[:, None, None, None], -w, w))
            assert 1 <= rows.sum() <= len(w) // 5


def test_the_cae_s_kernels_are_amplified_by_factors_of_up_to_nine(cae_theta):
    largest = []
    for seed in range(20):
        after, names = distorted(weights.cae_amplify, cae_theta, seed)
        largest += [(after[n]["w"] / cae_theta[n]["w"]).max() for n in names if len(names) == 2]
    assert 7 < max(largest) <= 9 + 1e-5


# ------------------------------------------------------------------------ features and latents

LATENT = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (8, 8, 32)), jnp.float32)


def latents(function, count=60):
    draws = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(jax.vmap(function, (0, None)))(draws, LATENT))


def test_latents_are_dropped_and_negated_by_place():
    ratio = latents(features.latent_drop) / np.asarray(LATENT)
    assert (ratio == ratio[..., :1]).all() and np.mean(ratio == 0) == pytest.approx(0.2, abs=0.03)
    ratio = latents(features.latent_negate) / np.asarray(LATENT)
    assert (ratio == ratio[..., :1]).all() and np.mean(ratio == -1) == pytest.approx(0.1, abs=0.03)


def test_ten_channels_are_permuted():
    out, e = latents(features.latent_permute), np.asarray(LATENT)
    assert (out[..., 10:] == e[..., 10:]).all() and (out[..., :10] != e[..., :10]).any()
    for image in out:
        for c in range(10):
            assert any(np.array_equal(image[..., c], e[..., d]) for d in range(10))


def test_channels_are_flipped_three_ways():
    e = np.asarray(LATENT)
    ways = [e[::-1, ::-1], e[::-1], e[:, ::-1]]
    kinds = [
        [np.array_equal(image, way) for way in ways] for image in latents(features.latent_flip)
    ]
    assert np.all(np.sum(kinds, 1) == 1) and np.all(np.mean(kinds, 0) > 0.15)
    for image in latents(features.latent_flip_some):
        moved = [c for c in range(32) if not np.array_equal(image[..., c], e[..., c])]
        assert 1 <= len(moved) <= 5
        assert any(all(np.array_equal(image[..., c], w[..., c]) for c in moved) for w in ways)


def shifted(channel, row, column):
    return np.pad(channel, 1)[row : row + 8, column : column + 8]


def test_latent_convolutions():
    e = np.asarray(LATENT)
    noise = latents(features.latent_convolve) - e
    # Taps are uniform in [-0.1, 0.1], with variance 0.01 / 3.
    near = [shifted((e**2).sum(-1), r, c) for r in range(3) for c in range(3)]
    np.testing.assert_allclose(noise.var((0, 3)), 0.01 / 3 * sum(near), rtol=0.2)
    added = latents(features.latent_mix, 6) - e
    on = np.abs(added).max((1, 2)) > 1e-6
    assert 0.35 < on.mean() < 0.65
    for image, channel in np.argwhere(on)[:10]:
        assert any(
            np.allclose(added[image, ..., channel], shifted(e[..., d], r, c), atol=1e-5)
            for d in range(32) for r in range(3) for c in range(3)
        )  # fmt: skip
    out = latents(features.latent_shift, 6)
    offsets = [(r, c) for r in range(3) for c in range(3)]

    def offset(image, d):
        near = [np.allclose(image[..., d], shifted(e[..., d], *o), atol=1e-6) for o in offsets]
        return near.index(True)

    taps = [[offset(image, d) for d in range(32)] for image in out]
    assert 0.7 < np.mean(np.diff(taps, axis=1) == 0) < 0.95


def test_a_channel_is_never_mixed_with_itself_in_place():
    # One in 576 draws itself, unshifted; adding to its tap of 1, not setting it, would double it.
    distance = np.abs(latents(features.latent_mix, 150) - 2 * np.asarray(LATENT)).max((1, 2))
    assert distance.min() > 0.1


def test_head_features_are_exchanged_dropped_negated_or_left():
    h = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 64)), jnp.float32)
    draws = jax.random.split(jax.random.key(0), 80)
    f = jax.jit(jax.vmap(lambda key: features._distort_head(key, h[0], False)[None]))
    kinds = {"same": 0, "drop": 0, "negate": 0, "exchange": 0}
    for image in np.asarray(f(draws)):
        ratio = image / np.asarray(h)
        if (ratio == 1).all():
            kinds["same"] += 1
        elif set(np.unique(ratio)) <= {0.0, 1.0}:
            kinds["drop"] += 1
        elif set(np.unique(ratio)) <= {-1.0, 1.0}:
            kinds["negate"] += 1
        else:
            kinds["exchange"] += 1
            np.testing.assert_array_equal(np.sort(image[0, 0, 0]), np.sort(h[0, 0, 0]))
    assert min(kinds.values()) >= 8


def bodies(theta, h, quirks):
    """Everything the body may come to, by name of the distortion."""
    block = functools.partial(edsr_net.edsr_block, theta)
    close = functools.partial(edsr_net.edsr_body_end, theta)
    first = block(1, block(0, h))

    def rest(x):
        return close(block(3, block(2, x)))

    def skip(skipped):
        out = last = h
        for i in range(BLOCKS + 1):
            if i not in skipped:
                last = (close if i == BLOCKS else functools.partial(block, i))(h if quirks else out)
            out = last
        return last

    found = {
        "negate": [rest(-first)],
        "activate": [rest(jax.nn.relu(first)), rest(jax.nn.gelu(first, approximate=False))],
        "flip": [rest(first[:, ::-1, :, ::-1]), rest(first[:, :, ::-1, ::-1])],
        "none": [rest(first)],
    }
    subsets = itertools.product(range(2, BLOCKS + 1), repeat=3)
    return found | {"skip": [skip(set(s)) for s in {tuple(sorted(set(s))) for s in subsets}]}


@pytest.mark.parametrize("quirks", [False, True])
def test_the_body_is_distorted_in_five_ways(edsr, quirks):
    h = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 5, FEATURES)), jnp.float32)
    draws = jax.random.split(jax.random.key(0), 80)
    f = jax.jit(
        lambda keys: features._distorted_body(keys, edsr, jnp.tile(h, (80, 1, 1, 1)), quirks)
    )
    known, seen = bodies(edsr, h, quirks), dict.fromkeys(("negate", "activate", "flip", "skip"), 0)
    for out in f(draws)[:, None]:
        names = {
            n for n, some in known.items() if any(np.allclose(out, s, atol=1e-4) for s in some)
        }
        assert names
        for name in names & set(seen):
            seen[name] += 1
    assert all(7 <= count <= 30 for count in seen.values())


@pytest.mark.parametrize("quirks", [False, True])
def test_renderings_are_finite_follow_their_key_and_differ(edsr, quirks):
    x = jnp.tile(jax.random.uniform(jax.random.key(0), (16, 12, 3)), (12, 1, 1, 1))
    draws = jax.random.split(jax.random.key(1), 12)
    f = jax.jit(lambda keys: features.render_edsr(edsr, x, keys, quirks=quirks))
    images = np.asarray(f(draws))
    assert images.shape == (12, 16, 12, 3) and np.isfinite(images).all()
    np.testing.assert_array_equal(images[::-1], f(draws[::-1]))
    assert len(np.unique(images[:, 3, 3, 0])) > 4


def test_the_cae_s_renderings_are_finite_follow_their_key_and_differ(cae_theta):
    x = jnp.tile(jax.random.uniform(jax.random.key(0), (16, 20, 3)), (18, 1, 1, 1))
    draws = jax.random.split(jax.random.key(1), 18)
    f = jax.jit(lambda keys: features.render_cae(cae_theta, x, keys))
    images = np.asarray(f(draws))
    assert images.shape == (18, 16, 20, 3) and np.isfinite(images).all()
    np.testing.assert_allclose(images[::-1], f(draws[::-1]), atol=1e-5)
    assert len(np.unique(images[:, 8, 8, 0])) == 18
