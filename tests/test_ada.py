"""The inner maximisation: what it promises, against a literal statement, and what it costs."""

import functools
import pathlib
import re
from typing import NamedTuple
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ada_jax import ada, losses, perturbation, ssim
from ada_jax.ada import CorruptionNet
from ada_jax.errors import UserError
from ada_jax.nets import corruption_nets, edsr, per_example

BATCH, SIZE, CLASSES, NU = 4, 16, 5, 0.05
PIXELS = SIZE * SIZE * 3
quick = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def make_net(blocks: int, features: int) -> CorruptionNet:
    """A small EDSR that is nearly the identity: its skip path is, and its body adds a little."""
    architecture = edsr.edsr(blocks=blocks, features=features, scale=1)
    rng = np.random.default_rng(0)
    random = lambda a: jnp.float32(0.02 * rng.normal(size=a.shape))  # noqa: E731
    theta = jax.tree.map(random, jax.eval_shape(architecture.init, jax.random.key(0)))
    for name in ("head", "tail"):
        eye = jnp.eye(*theta[name]["w"].shape[2:])
        theta[name] = {**theta[name], "w": theta[name]["w"].at[1, 1].add(eye)}
    return CorruptionNet(architecture.apply, theta)


NET, NET_WITHOUT_BLOCKS = make_net(blocks=1, features=4), make_net(blocks=0, features=16)
AFFINE = CorruptionNet(lambda theta, x, key: theta["gain"] * x, {"gain": jnp.ones(3)})


def make_params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    w, v = rng.normal(size=(PIXELS, 32)), rng.normal(size=(32, CLASSES))
    return {"w": jnp.float32(0.1 * w), "v": jnp.float32(0.5 * v)}


def classify(params, x: jax.Array) -> jax.Array:
    """A small classifier that does not mix examples."""
    return jnp.tanh((x.reshape(len(x), -1) - 0.5) @ params["w"]) @ params["v"]


LOGITS_FN = functools.partial(classify, make_params())


def batch(seed: int = 0, n: int = BATCH) -> tuple[jax.Array, jax.Array]:
    """Random images with some structure, so that small changes leave them similar, and labels."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0.1, 0.9, (n, SIZE // 4, SIZE // 4, 3)).repeat(4, 1).repeat(4, 2)
    x = np.clip(coarse + 0.05 * rng.normal(size=(n, SIZE, SIZE, 3)), 0, 1)
    return jnp.float32(x), jnp.asarray(rng.integers(0, CLASSES, n))


def example_keys(seed: int, n: int = BATCH) -> jax.Array:
    return jax.random.split(jax.random.key(seed), n)


def loss_of(y: jax.Array):
    return lambda images: losses.cross_entropy(LOGITS_FN(images), y)


@jax.jit
def jitted_augment(key, x, y, nu, ssim_threshold):
    options = {"nu": nu, "ssim_threshold": ssim_threshold, "steps": 3}
    return ada.adversarial_augment(key, x, y, logits_fn=LOGITS_FN, net=NET, **options)


def augment(seed: int, x, y, nu: float = NU, ssim_threshold: float = 0.3):
    """Three steps; one compilation serves every nu and threshold."""
    return jitted_augment(jax.random.key(seed), x, y, nu, ssim_threshold)


@functools.partial(jax.jit, static_argnames=("steps", "step_rule", "group", "leaves", "choice"))
def jitted_attack(example_keys, x, y, nu, leaves="", **options):
    net = ada.restricted(NET, leaves)
    return ada.maximise(example_keys, x, loss_of(y), net, nu=nu, **options)


def attack(seed: int, x, y, nu: float = NU, steps: int = 3, **options):
    return jitted_attack(example_keys(seed), x, y, nu, steps=steps, **options)


render = jax.jit(functools.partial(ada.render, NET))


@jax.jit
def random_delta(example_keys):
    return perturbation.init(example_keys, NET.theta, perturbation.radii(NET.theta, NU))


def loss_at_random(seed: int, x, y) -> jax.Array:
    keys = example_keys(seed)
    return loss_of(y)(render(random_delta(keys), x, keys))


def row(tree, i: int | slice):
    """Example i (or the examples of a slice) of every leaf."""
    return jax.tree.map(lambda a: a[i], tree)


# ------------------------------------------------------------------------------- what it promises


@quick
@given(seeds)
def test_the_loss_rises_above_its_start_and_above_random_corruptions(seed):
    x, y = batch(seed)
    _, metrics = augment(seed, x, y)
    reached = metrics["loss_end"].sum()
    assert reached >= metrics["loss_start"].sum()
    for other in range(3):
        assert reached >= loss_at_random(seed + 1 + other, x, y).sum()


@quick
@given(seeds, st.sampled_from([("sign", 1), ("l2", 2)]))
def test_every_leaf_of_the_result_is_inside_its_ball(seed, variant):
    step_rule, group = variant
    delta, metrics = attack(seed, *batch(seed), step_rule=step_rule, group=group)
    chex.assert_tree_all_finite(delta)
    at_surface = []
    for d, a in zip(*map(jax.tree.leaves, (delta, NET.theta)), strict=True):
        norm = np.linalg.norm(np.asarray(d).reshape(BATCH // group, -1), axis=1)
        radius = NU * np.linalg.norm(np.ravel(a))
        assert np.all(norm <= radius * (1 + 1e-5))
        at_surface.append(norm >= radius * (1 - 1e-3))
    expected = np.mean(at_surface, 0).repeat(group)
    np.testing.assert_allclose(metrics["on_surface"], expected, atol=1e-6)


def test_the_start_is_a_random_point_of_the_ball():
    x, y = batch()
    _, metrics = attack(0, x, y)
    np.testing.assert_allclose(metrics["loss_start"], loss_at_random(0, x, y), rtol=1e-4)


def test_no_steps_leave_the_random_start():
    x, y = batch(5)
    options = {"logits_fn": LOGITS_FN, "net": NET, "nu": NU, "ssim_threshold": -1.0}
    images, metrics = ada.adversarial_augment(example_keys(5), x, y, steps=0, **options)
    start = render(random_delta(example_keys(5)), x, example_keys(5))
    np.testing.assert_allclose(images, start, atol=1e-6)
    np.testing.assert_array_equal(metrics["loss_start"], metrics["loss_end"])


@pytest.mark.parametrize("i", range(BATCH))
def test_an_examples_result_is_independent_of_its_neighbours(i):
    (x, y), (other_x, other_y) = batch(), batch(1)
    ours = augment(0, x, y)
    theirs = augment(0, other_x.at[i].set(x[i]), other_y.at[i].set(y[i]))
    chex.assert_trees_all_close(row(ours, i), row(theirs, i), rtol=1e-5, atol=1e-6)


def test_images_are_in_range_and_metrics_are_per_example():
    x, y = batch()
    images, metrics = augment(0, x, y, nu=1.0, ssim_threshold=0.6)
    assert (images.shape, images.dtype) == (x.shape, x.dtype)
    assert np.all((images >= 0) & (images <= 1))
    names = "loss_start loss_end ssim_before ssim_after changed on_surface"
    assert set(metrics) == set(names.split())
    chex.assert_shape(list(metrics.values()), (BATCH,))
    chex.assert_tree_all_finite(metrics)


def test_the_line_search_guards_the_result():
    x, y = batch()
    images, metrics = augment(0, x, y, nu=1.0, ssim_threshold=0.6)
    np.testing.assert_allclose(metrics["ssim_after"], jax.jit(ssim.ssim)(x, images), atol=1e-5)
    np.testing.assert_array_equal(metrics["changed"], metrics["ssim_before"] < 0.6)
    assert np.any(metrics["changed"])
    assert np.all(metrics["ssim_after"] > metrics["ssim_before"] * metrics["changed"])


def test_a_threshold_of_minus_one_switches_the_line_search_off():
    x, y = batch()
    images, metrics = augment(0, x, y, nu=1.0, ssim_threshold=-1.0)
    delta, _ = attack(0, x, y, nu=1.0)
    np.testing.assert_allclose(images, render(delta, x, example_keys(0)), atol=1e-5)
    np.testing.assert_array_equal(metrics["changed"], 0)
    np.testing.assert_allclose(metrics["ssim_after"], metrics["ssim_before"], atol=1e-6)
    np.testing.assert_allclose(metrics["loss_end"], loss_of(y)(images), rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"group": 2}, {"choice": "mixing"}, {"step_scale": 0.1}, {"step_rule": "l2"}],
    ids=str,
)
def test_each_option_reaches_the_maximisation(options):
    x, y = batch()
    augmented = functools.partial(
        ada.adversarial_augment,
        **{"logits_fn": LOGITS_FN, "net": NET, "nu": NU, "steps": 3, "ssim_threshold": -1.0},
        **options,
    )
    images, _ = jax.jit(augmented)(example_keys(0), x, y)
    delta, _ = attack(0, x, y, **options)
    np.testing.assert_allclose(images, render(delta, x, example_keys(0)), atol=1e-5)
    default, _ = attack(0, x, y)
    assert np.abs(images - render(default, x, example_keys(0))).max() > 1e-4


def test_the_root_rule_reaches_the_line_search():
    x, y = batch()
    images, _ = augment(0, x, y, nu=1.0, ssim_threshold=-1.0)
    augmented = functools.partial(
        ada.adversarial_augment,
        **{"logits_fn": LOGITS_FN, "net": NET, "nu": 1.0, "steps": 3},
        **{"ssim_threshold": 0.6, "root_rule": "interpolated"},
    )
    found, metrics = jax.jit(augmented)(jax.random.key(0), x, y)
    expected, _ = ssim.line_search(x, images, 0.6, "interpolated")
    other, _ = ssim.line_search(x, images, 0.6, "in_range")
    assert metrics["changed"].any() and np.abs(expected - other).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_nu_zero_gives_the_corruption_network_itself():
    x, y = batch()
    apply = jax.jit(NET.apply)
    images, metrics = augment(0, x, y, nu=0.0)
    np.testing.assert_allclose(images, jnp.clip(apply(NET.theta, x), 0, 1), atol=1e-5)
    np.testing.assert_allclose(metrics["loss_end"], metrics["loss_start"], rtol=1e-5)


def test_different_keys_give_different_images_and_equal_keys_equal_ones():
    first, again, other = (augment(seed, *batch())[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.all(np.any(first != other, axis=(1, 2, 3)))


@pytest.mark.parametrize("group", [1, 2])
def test_a_stochastic_networks_noise_is_the_same_at_every_step_and_in_the_result(group):
    noise = lambda key: jax.random.key_data(key)[1] % 100 / 500  # noqa: E731
    net = CorruptionNet(lambda t, x, key: AFFINE.apply(t, x, key) + noise(key), AFFINE.theta)
    (x, y), keys = batch(), example_keys(0)
    options = {"net": net, "nu": 0.1, "steps": 3, "group": group}
    maximise = functools.partial(ada.maximise, loss_fn=loss_of(y), **options)
    delta, metrics = jax.jit(maximise)(keys, x)
    images = jax.jit(functools.partial(ada.render, net))(delta, x, keys)
    for i in range(BATCH):
        first = i - i % group
        expected = (1 + delta["gain"][i // group]) * x[i] + noise(
            jax.random.fold_in(keys[first], 2)
        )
        np.testing.assert_allclose(images[i], np.clip(expected, 0, 1), atol=1e-6)
    gained = loss_of(y)(images) - metrics["loss_start"]
    assert np.all(gained.reshape(-1, group).sum(1) >= 0)


# ------------------------------------------------------------------------------- literally


@jax.jit
@jax.grad
def literal_gradient(delta, x, y):
    theta = jax.tree.map(lambda a, d: a + d, NET.theta, delta)
    image = jnp.clip(NET.apply(theta, x[None], None), 0, 1)
    return -jax.nn.log_softmax(LOGITS_FN(image)[0])[y]


def literal_attack(delta, x, y, steps: int, perturbed: str = ""):
    """Appendix A for images that share delta: sign of the gradient, a quarter median radius.

    Leaves of the layers whose name lacks `perturbed` have the radius 0.
    """
    leaves, tree = jax.tree.flatten(delta)
    leaves = [np.asarray(d, np.float64) for d in leaves]
    radii = [
        NU * np.linalg.norm(np.ravel(a)) * (perturbed in layer)
        for layer, parameters in sorted(NET.theta.items())
        for a in jax.tree.leaves(parameters)
    ]
    eta = np.median([radius for radius in radii if radius]) / 4
    for _ in range(steps):
        delta = jax.tree.unflatten(tree, [jnp.float32(d) for d in leaves])
        each = [jax.tree.leaves(literal_gradient(delta, *one)) for one in zip(x, y, strict=True)]
        for i, gradient in enumerate(map(sum, zip(*each, strict=True))):
            moved = leaves[i] + eta * np.sign(gradient)
            norm = np.linalg.norm(np.ravel(moved))
            leaves[i] = moved * radii[i] / norm if norm > radii[i] else moved
    return jax.tree.unflatten(tree, [np.float32(d) for d in leaves])


@pytest.mark.parametrize(("steps", "group"), [(1, 1), (3, 1), (3, 2), (3, BATCH)])
def test_maximise_equals_a_literal_statement_for_each_group(steps, group):
    x, y = batch()
    start = random_delta(example_keys(0)[::group])
    delta, _ = attack(0, x, y, steps=steps, group=group)
    images = render(delta, x, example_keys(0))
    for i in range(BATCH // group):
        own = slice(i * group, (i + 1) * group)
        expected = literal_attack(row(start, i), x[own], y[own], steps)
        chex.assert_trees_all_close(row(delta, i), expected, rtol=1e-4, atol=1e-6)
        theta = jax.tree.map(jnp.add, NET.theta, expected)
        shared = [NET.apply(theta, image[None], None)[0] for image in x[own]]
        np.testing.assert_allclose(images[own], np.clip(shared, 0, 1), atol=1e-5)


def test_only_the_leaves_that_match_are_perturbed():
    x, y = batch()
    delta, metrics = attack(0, x, y, leaves="^block")
    theirs, others = perturbation.split(NET.theta, "^block")
    start = perturbation.init(example_keys(0), theirs, perturbation.radii(theirs, NU))
    zeros = jax.tree.map(lambda a: jnp.zeros((BATCH, *a.shape)), others)
    start, full = (perturbation.merge(tree, zeros) for tree in (start, delta))
    for i in range(BATCH):
        expected = literal_attack(row(start, i), x[i : i + 1], y[i : i + 1], 3, "block")
        chex.assert_trees_all_close(row(full, i), expected, rtol=1e-4, atol=1e-6)
    images = ada.render(ada.restricted(NET, "^block"), delta, x, example_keys(0))
    np.testing.assert_allclose(images, render(full, x, example_keys(0)), atol=1e-5)
    assert np.all(metrics["on_surface"] > 0)


def test_a_pattern_that_matches_all_leaves_changes_nothing():
    programs = [
        jax.jit(functools.partial(augment_affinely, LOGITS_FN, net=NET, **options))
        .lower(jax.random.key(0), *batch())
        .as_text()
        for options in ({}, {"leaves": ""}, {"leaves": ".*"}, {"choice": "delta"})
    ]
    assert len(set(programs)) == 1


def literal_mixing(delta, weights, x, y, steps: int):
    """One weight in [0,1] per leaf: sign of the derivative, steps of a quarter."""
    leaves, tree = jax.tree.flatten(delta)
    weights = np.array(jax.tree.leaves(weights), np.float64)
    mixed = lambda: [jnp.float32(w * d) for w, d in zip(weights, leaves, strict=True)]  # noqa: E731
    for _ in range(steps):
        gradient = literal_gradient(jax.tree.unflatten(tree, mixed()), x, y)
        slopes = [np.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), leaves, strict=True)]
        weights = np.clip(weights + np.sign(slopes) / 4, 0, 1)
    return jax.tree.unflatten(tree, mixed())


@pytest.mark.parametrize("step_rule", sorted(perturbation.STEP_RULES))
def test_mixing_equals_a_literal_statement(step_rule):
    x, y = batch()
    delta, _ = attack(0, x, y, choice="mixing", step_rule=step_rule)
    delta_keys, weight_keys = jax.vmap(jax.random.split)(example_keys(0)).T
    drawn, weights = random_delta(delta_keys), perturbation.init_weights(weight_keys, NET.theta)
    for i in range(BATCH):
        expected = literal_mixing(row(drawn, i), row(weights, i), x[i], y[i], 3)
        chex.assert_trees_all_close(row(delta, i), expected, rtol=1e-4, atol=1e-6)


@quick
@given(seeds)
def test_mixing_interpolates_every_leaf_and_exceeds_a_random_mixing(seed):
    x, y = batch(seed)
    delta, metrics = attack(seed, x, y, choice="mixing", group=2)
    delta_keys = jax.vmap(jax.random.split)(example_keys(seed)[::2])[:, 0]
    for d, other in zip(*map(jax.tree.leaves, (delta, random_delta(delta_keys))), strict=True):
        d, other = (np.asarray(a).reshape(BATCH // 2, -1) for a in (d, other))
        weights = (d * other).sum(1) / (other * other).sum(1)
        assert np.all((weights >= 0) & (weights <= 1 + 1e-6))
        np.testing.assert_allclose(d, weights[:, None] * other, rtol=1e-4, atol=1e-8)
    reached = loss_of(y)(render(delta, x, example_keys(seed)))
    assert reached.sum() > metrics["loss_start"].sum()


def test_mixed_leaves_are_those_that_match_whatever_the_microbatch():
    arguments, options = (example_keys(0), *batch()), {"choice": "mixing", "leaves": "b$"}
    augment = functools.partial(augment_affinely, LOGITS_FN, net=NET_WITHOUT_BLOCKS, **options)
    whole, split = (
        jax.jit(lambda *a, nu, n=n: augment(*a, nu=nu, microbatch=n)) for n in (None, 2)
    )
    unperturbed, _ = whole(*arguments, nu=0.0)
    whole, split = whole(*arguments, nu=NU), split(*arguments, nu=NU)
    chex.assert_trees_all_close(split, whole, rtol=1e-4, atol=1e-5)
    assert np.all(np.any(whole[0] != unperturbed, axis=(1, 2, 3)))


# ------------------------------------------------------------------------------- in other programs


def test_no_gradient_flows_through_the_result():
    """The gradient of a whole training step is that of its last part, images held constant."""
    x, y = batch()
    key, params, net = jax.random.key(0), make_params(), NET_WITHOUT_BLOCKS

    def loss(params, images):
        return losses.cross_entropy(classify(params, images), y).mean()

    def whole_step(params, x, theta):
        options = {"net": net._replace(theta=theta), "nu": NU, "steps": 2, "microbatch": 2}
        logits_fn = functools.partial(classify, params)
        images, metrics = ada.adversarial_augment(key, x, y, logits_fn=logits_fn, **options)
        return loss(params, images) + sum(m.sum() for m in metrics.values()), images

    gradients, images = jax.jit(jax.grad(whole_step, (0, 1, 2), has_aux=True))(params, x, net.theta)
    of_params, *of_the_rest = gradients
    chex.assert_trees_all_close(of_params, jax.grad(loss)(params, images), rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_equal(of_the_rest, jax.tree.map(jnp.zeros_like, of_the_rest))


def augment_affinely(logits_fn, key, x, y, **options):
    options = {"net": AFFINE, "nu": NU, "steps": 2} | options
    return ada.adversarial_augment(key, x, y, logits_fn=logits_fn, **options)


class Module(NamedTuple):
    """A classifier as Equinox has it: a pytree of parameters that is called."""

    w: jax.Array
    v: jax.Array

    def __call__(self, x):
        return classify(self._asdict(), x)


def test_it_takes_a_flax_like_closure_under_jit_and_an_equinox_like_module_under_pmap():
    arguments = jax.random.key(0), *batch()
    variables = {"params": make_params()}

    @jax.jit
    def with_closure(variables, *args):
        return augment_affinely(lambda x: classify(variables["params"], x), *args)

    with_module = jax.pmap(augment_affinely, axis_name="devices")
    on_one_device = jax.tree.map(lambda a: a[None], (Module(**variables["params"]), *arguments))
    chex.assert_trees_all_close(
        row(with_module(*on_one_device), 0), with_closure(variables, *arguments), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nu": -0.1}, "nu=-0.1"),
        ({"nu": float("nan")}, "nu=nan"),
        ({"steps": -1}, "steps=-1"),
        ({"step_rule": "adam"}, "step_rule='adam'.*sign, l2"),
        ({"root_rule": "nearest"}, "root_rule='nearest'.*in_range, interpolated, paper"),
        ({"nu": float("inf")}, "nu=inf"),
        ({"step_scale": -0.25}, "step_scale=-0.25 must be positive"),
        ({"ssim_threshold": float("nan")}, "ssim_threshold=nan must be in"),
        ({"microbatch": 3}, "microbatch=3 .*4"),
        ({"microbatch": 8}, "microbatch=8 .*4"),
        ({"microbatch": -2}, "microbatch=-2 must be an integer"),
        ({"group": 3}, "group=3 does not divide the 4 examples"),
        ({"group": 4, "microbatch": 2}, "group=4 does not divide the 2 examples"),
        ({"group": 0}, "group=0 must be an integer of at least 1"),
        ({"leaves": "tail"}, "leaves='tail' matches no parameter .* 1 paths, from 'gain' to"),
        ({"leaves": "["}, r"leaves='\[' is not a regular expression"),
        ({"choice": "images"}, "choice='images' is unknown: choose one of delta, mixing"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(UserError, match=message):
        augment_affinely(LOGITS_FN, jax.random.key(0), *batch(), **options)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (jnp.zeros((0, 8, 8, 3)), "B at least 1"),
        (jnp.zeros((8, 8, 3)), r"shape \[8, 8, 3\]"),
        (jnp.zeros((4, 8, 8, 3), jnp.uint8), "uint8 must be floating point"),
        (jnp.full((4, 8, 8, 3), 255.0), "Pixels from 255.0 to 255.0"),
        (jnp.full((4, 8, 8, 3), jnp.nan), "Pixels from nan"),
    ],
    ids=["empty", "rank", "uint8", "range", "nan"],
)
def test_invalid_images_are_rejected(images, message):
    with pytest.raises(UserError, match=message):
        augment_affinely(LOGITS_FN, jax.random.key(0), images, batch()[1])


@pytest.mark.parametrize("bad", [lambda y: y + 10, lambda y: y - 10, lambda y: y[:-1], jnp.float32])
def test_invalid_labels_are_rejected(bad):
    x, y = batch()
    with pytest.raises(UserError, match="Labels"):
        augment_affinely(LOGITS_FN, jax.random.key(0), x, bad(y))


def test_images_and_options_closed_over_inside_a_jit_are_looked_at_too():
    x, y = batch()
    augment = lambda x, **options: augment_affinely(LOGITS_FN, jax.random.key(0), x, y, **options)  # noqa: E731
    good = jax.jit(lambda: augment(x, nu=jnp.float32(0.01))[0])()
    assert good.shape == x.shape
    bright = 2 + x
    with pytest.raises(UserError, match="Pixels from"):
        jax.jit(lambda: augment(bright)[0])()


def test_a_name_is_no_corruption_network():
    x, y = batch()
    with pytest.raises(UserError, match=r"net='edsr_small' is not an ada_jax\.CorruptionNet"):
        ada.adversarial_augment(jax.random.key(0), x, y, logits_fn=LOGITS_FN, net="edsr_small")


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (lambda theta, x, key: x @ jnp.ones((5, 3)), "fails for images"),
        (lambda theta, x, key: x.mean(-1, keepdims=True), "must preserve the image shape"),
        (lambda theta, x, key: x[0], "must preserve the image shape"),
        (lambda theta, x, key: (x, theta), "must preserve the image shape"),
        (lambda theta, x: x, "fails for images"),
    ],
)
def test_a_network_that_makes_no_such_images_is_refused(apply, message):
    x, y = batch()
    net = CorruptionNet(apply, {"w": jnp.ones(3)})
    with pytest.raises(UserError, match=rf"net\.apply {message}.* \[1, \d+, \d+, 3\]"):
        ada.adversarial_augment(jax.random.key(0), x, y, logits_fn=LOGITS_FN, net=net)


@pytest.mark.parametrize(
    ("name", "enlarge"), [("edsr_small", 1), ("edsr_small", 2), ("edsr_baseline_x4", 1)]
)
def test_a_network_for_other_channels_is_refused(name, enlarge):
    x, y = batch()
    net, logits_fn = corruption_nets.make(name, enlarge=enlarge), lambda x: x.reshape(len(x), -1)
    for images in (x[..., :1], x.transpose(0, 3, 1, 2)):
        with pytest.raises(UserError, match="use a network for images of this shape"):
            ada.adversarial_augment(jax.random.key(0), images, y, logits_fn=logits_fn, net=net)


def test_parameters_of_other_types_become_float32():
    x, y = batch()
    attack = functools.partial(ada.adversarial_augment, jax.random.key(0), x, y, steps=1)
    half = jax.tree.map(jnp.bfloat16, NET.theta)
    rounded = jax.tree.map(jnp.float32, half)
    (images, _), (expected, _) = (
        attack(logits_fn=LOGITS_FN, net=NET._replace(theta=theta)) for theta in (half, rounded)
    )
    np.testing.assert_array_equal(images, expected)


@pytest.mark.parametrize(
    "leaf",
    [jax.nn.relu, np.ones(3, complex), np.array([1.0, None]), np.array(["a"]), jax.random.key(0)],
    ids=["function", "complex", "object", "text", "key"],
)
def test_a_parameter_that_is_no_real_array_is_named(leaf):
    x, y = batch()
    net = NET._replace(theta={"w": jnp.ones(3), "other": leaf})
    with pytest.raises(UserError, match=r"net\.theta\['other'\] is of type .*: give arrays"):
        ada.adversarial_augment(jax.random.key(0), x, y, logits_fn=LOGITS_FN, net=net)


def test_the_error_of_a_network_that_fails_is_named():
    def apply(theta, x, key):
        raise ValueError

    x, y = batch()
    net = NET._replace(apply=apply)
    with pytest.raises(UserError, match=r"parameters: ValueError: correct it"):
        ada.adversarial_augment(jax.random.key(0), x, y, logits_fn=LOGITS_FN, net=net)


@pytest.mark.parametrize(
    "logits_fn", [lambda x: (LOGITS_FN(x), {}), lambda x: LOGITS_FN(x)[:, None], lambda x: x.sum()]
)
def test_a_function_that_returns_no_logits_is_refused(logits_fn):
    x, y = batch()
    augment = functools.partial(
        ada.adversarial_augment, jax.random.key(0), x, logits_fn=logits_fn, net=NET
    )
    for call in (augment, jax.jit(augment)):
        with pytest.raises(UserError, match="must return one array of logits"):
            call(y)


def test_inside_jit_wrong_images_and_labels_become_nan():
    x, y = batch()
    x, y = x.at[1].multiply(255), y.at[2].set(CLASSES)
    augment = functools.partial(ada.adversarial_augment, jax.random.key(0), net=NET, nu=NU)
    images, _ = jax.jit(lambda x, y: augment(x, y, logits_fn=LOGITS_FN, steps=1))(x, y)
    assert np.isnan(images).any((1, 2, 3)).tolist() == [False, True, True, False]


def test_a_network_without_parameters_cannot_be_perturbed():
    x, y = batch()
    net = CorruptionNet(lambda theta, x, key: x, {})
    with pytest.raises(UserError, match="no parameters"):
        ada.adversarial_augment(jax.random.key(0), x, y, logits_fn=LOGITS_FN, net=net)


# ------------------------------------------------------------------------------- microbatches


@functools.cache
def compiled(examples: int, microbatch: int | None, group: int = 1):
    """Two steps on examples that have a key each."""
    options = {"net": NET_WITHOUT_BLOCKS, "nu": NU, "steps": 2}
    options |= {"microbatch": microbatch, "group": group}
    program = functools.partial(ada.adversarial_augment, logits_fn=LOGITS_FN, **options)
    return jax.jit(program).lower(example_keys(0, examples), *batch(n=examples)).compile()


def test_the_memory_of_a_large_batch_is_that_of_its_microbatch():
    large, small = (
        program.memory_analysis().temp_size_in_bytes
        for program in (compiled(32, microbatch=4), compiled(4, microbatch=None))
    )
    assert large <= 1.3 * small


def test_a_microbatch_gets_what_it_would_get_as_a_batch():
    examples = example_keys(0, 32), *batch(n=32)
    images, metrics = compiled(32, microbatch=4)(*examples)
    for part in (slice(i, i + 4) for i in range(0, 32, 4)):
        alone_images, alone_metrics = compiled(4, microbatch=None)(*row(examples, part))
        np.testing.assert_allclose(images[part], alone_images, atol=1e-6)
        chex.assert_trees_all_close(row(metrics, part), alone_metrics, rtol=1e-4, atol=1e-5)


def test_groups_do_not_depend_on_the_microbatch_or_on_other_groups():
    examples = example_keys(0, 32), *batch(n=32)
    whole, split = (compiled(32, microbatch, group=4)(*examples) for microbatch in (None, 8))
    chex.assert_trees_all_close(split, whole, rtol=1e-4, atol=1e-5)
    others, part = (example_keys(1, 32), *batch(1, n=32)), slice(20, 24)
    mixed = jax.tree.map(lambda a, b: b.at[part].set(a[part]), examples, others)
    found = compiled(32, None, group=4)(*mixed)
    chex.assert_trees_all_close(row(found, part), row(whole, part), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- a golden step


@pytest.mark.accelerator
def test_a_golden_step():
    """Renew the numbers when the method or the order of its random draws changes on purpose, never
    to make a difference go away that nobody can explain."""
    images, metrics = augment(7, *batch(7))
    golden = {
        "loss_start": [4.6897, 0.5610, 2.4900, 3.7967],
        "loss_end": [5.5038, 0.8077, 3.1076, 4.3957],
        "ssim_after": [0.9600, 0.9703, 0.9740, 0.9670],
        "on_surface": [1.0, 1.0, 1.0, 1.0],
        "changed": [0.0, 0.0, 0.0, 0.0],
    }
    for name, values in golden.items():
        np.testing.assert_allclose(metrics[name], values, rtol=1e-3, err_msg=name)
    means = [0.49417, 0.49714, 0.53425, 0.51220]
    np.testing.assert_allclose(images.mean((1, 2, 3)), means, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["mosaic", "triton"])
def test_a_golden_step_through_pallas_kernels(kernels, monkeypatch):
    lowering = [mock.Mock(wraps=f) for f in per_example.LOWERINGS[kernels]]
    monkeypatch.setitem(per_example.LOWERINGS, kernels, lowering)
    monkeypatch.setitem(per_example.CHOSEN, "cpu", (kernels, kernels))
    per_example._many_op.cache_clear()
    try:
        through_kernels = jax.jit(lambda *a: jitted_augment.__wrapped__(*a))
        found = through_kernels(jax.random.key(7), *batch(7), NU, 0.3)
    finally:
        per_example._many_op.cache_clear()
    assert all(f.called for f in lowering)
    chex.assert_trees_all_close(found, augment(7, *batch(7)), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- the README


def test_the_readme_s_training_loop_runs():
    text = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    (loop,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "train_step" in b)
    x, y = jax.random.uniform(jax.random.key(0), (4, 32, 32, 3)), jnp.arange(4)
    ran = {"batches": iter([(x, y)] * 3)}
    exec(loop, ran)
    assert ran["step"] == 1 and jnp.isfinite(ran["loss"])
