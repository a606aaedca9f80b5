"""The inner maximisation: what it promises, against a literal statement, and what it costs."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ada_jax import ada, corruption_nets, losses, perturbation, ssim
from ada_jax.corruption_nets import CorruptionNet
from ada_jax.errors import UserError

BATCH, SIZE, CLASSES, NU = 4, 16, 5, 0.05
PIXELS = SIZE * SIZE * 3
quick = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def make_net(features: int = 4) -> CorruptionNet:
    """A small EDSR that is nearly the identity: its skip path is, and its block adds a little."""
    architecture = corruption_nets.edsr(blocks=1, features=features, scale=1)
    theta = jax.jit(architecture.init)(jax.random.key(0))
    theta = jax.tree.map(lambda a: 0.2 * a, theta)
    for name in ("head", "tail"):
        eye = jnp.eye(*theta[name]["w"].shape[2:])
        theta[name] = {**theta[name], "w": theta[name]["w"].at[1, 1].add(eye)}
    return CorruptionNet(architecture.apply, theta)


NET = make_net()


def make_params(seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = {"w": (PIXELS, 32), "v": (32, CLASSES)}
    return {
        k: jnp.asarray(3 * rng.normal(size=s) / s[0] ** 0.5, jnp.float32) for k, s in shapes.items()
    }


def classify(params, x: jax.Array) -> jax.Array:
    """A small classifier that does not mix examples."""
    return jnp.tanh((x.reshape(len(x), -1) - 0.5) @ params["w"]) @ params["v"]


LOGITS_FN = functools.partial(classify, make_params())


def batch(seed: int = 0, n: int = BATCH) -> tuple[jax.Array, jax.Array]:
    """Random images with some structure, so that small changes leave them similar, and labels."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0.1, 0.9, (n, SIZE // 4, SIZE // 4, 3)).repeat(4, 1).repeat(4, 2)
    x = np.clip(coarse + 0.05 * rng.normal(size=(n, SIZE, SIZE, 3)), 0, 1)
    return jnp.asarray(x, jnp.float32), jnp.asarray(rng.integers(0, CLASSES, n))


def example_keys(seed: int, n: int = BATCH) -> jax.Array:
    return jax.random.split(jax.random.key(seed), n)


def loss_of(y: jax.Array):
    return lambda images: losses.cross_entropy(LOGITS_FN(images), y)


@functools.partial(jax.jit, static_argnames=("steps", "step_rule", "microbatch", "ssim_threshold"))
def augment(key, x, y, **knobs):
    knobs = {"logits_fn": LOGITS_FN, "net": NET, "nu": NU, "steps": 3} | knobs
    return ada.adversarial_augment(key, x, y, **knobs)


@functools.partial(jax.jit, static_argnames=("steps", "step_rule"))
def attack(keys, x, y, steps=3, step_rule="sign"):
    return ada.maximise(keys, x, loss_of(y), NET, nu=NU, steps=steps, step_rule=step_rule)


@jax.jit
def loss_in_the_ball(keys, x, y):
    """Losses at random points of the ball."""
    delta = perturbation.init(keys, NET.theta, perturbation.radii(NET.theta, NU))
    return loss_of(y)(ada.render(NET, delta, x, keys))


# ------------------------------------------------------------------------------- what it promises


@quick
@given(seeds)
def test_the_loss_rises_above_its_start_and_above_random_corruptions(seed):
    x, y = batch(seed)
    _, metrics = augment(jax.random.key(seed), x, y)
    reached = metrics["loss_end"].sum()
    assert reached >= metrics["loss_start"].sum()
    for other in range(3):
        assert reached >= loss_in_the_ball(example_keys(seed + 1 + other), x, y).sum()


@quick
@given(seeds, st.sampled_from(sorted(perturbation.STEP_RULES)))
def test_every_leaf_of_the_result_is_inside_its_ball(seed, step_rule):
    delta, metrics = attack(example_keys(seed), *batch(seed), step_rule=step_rule)
    chex.assert_tree_all_finite(delta)
    share = np.zeros(BATCH)
    for d, a in zip(*map(jax.tree.leaves, (delta, NET.theta)), strict=True):
        norm = np.linalg.norm(np.asarray(d).reshape(BATCH, -1), axis=1)
        radius = NU * np.linalg.norm(np.ravel(a))
        assert np.all(norm <= radius * (1 + 1e-5))
        share += (norm >= radius * (1 - 1e-3)) / len(jax.tree.leaves(NET.theta))
    np.testing.assert_allclose(metrics["on_surface"], share, atol=1e-6)


def test_the_start_is_a_random_point_of_the_ball():
    x, y = batch()
    _, metrics = attack(example_keys(0), x, y)
    np.testing.assert_allclose(
        metrics["loss_start"], loss_in_the_ball(example_keys(0), x, y), rtol=1e-5
    )


def test_an_examples_result_is_independent_of_its_neighbours():
    x, y = batch()
    other_x, other_y = batch(1)
    for i in range(BATCH):
        ours = augment(jax.random.key(0), x, y)
        neighbours = other_x.at[i].set(x[i]), other_y.at[i].set(y[i])
        theirs = augment(jax.random.key(0), *neighbours)
        row = lambda tree: jax.tree.map(lambda a: a[i], tree)  # noqa: B023, E731
        chex.assert_trees_all_close(row(ours), row(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("microbatch", [1, 2, 4])
def test_a_microbatch_does_not_change_the_result(microbatch):
    whole = augment(jax.random.key(0), *batch())
    parts = augment(jax.random.key(0), *batch(), microbatch=microbatch)
    np.testing.assert_allclose(parts[0], whole[0], atol=1e-6)
    chex.assert_trees_all_close(parts[1], whole[1], rtol=1e-4, atol=1e-5)


def test_images_are_in_range_and_metrics_are_per_example():
    x, y = batch()
    images, metrics = augment(jax.random.key(0), x, y, nu=1.0, ssim_threshold=0.6)
    assert (images.shape, images.dtype) == (x.shape, x.dtype)
    assert np.all((images >= 0) & (images <= 1))
    assert set(metrics) == {
        *("loss_start", "loss_end", "ssim_before", "ssim_after", "changed", "on_surface")
    }
    chex.assert_shape(list(metrics.values()), (BATCH,))
    chex.assert_tree_all_finite(metrics)
    np.testing.assert_allclose(metrics["ssim_after"], ssim.ssim(x, images), atol=1e-5)
    np.testing.assert_array_equal(metrics["changed"], metrics["ssim_before"] < 0.6)
    assert metrics["changed"].any()


def test_the_line_search_is_switched_off_by_minus_one():
    x, y = batch()
    images, metrics = augment(jax.random.key(0), x, y, nu=1.0, ssim_threshold=-1.0)
    delta, _ = ada.maximise(example_keys(0), x, loss_of(y), NET, nu=1.0, steps=3)
    np.testing.assert_allclose(images, ada.render(NET, delta, x, example_keys(0)), atol=1e-5)
    np.testing.assert_array_equal(metrics["changed"], 0)
    np.testing.assert_array_equal(metrics["ssim_after"], metrics["ssim_before"])
    np.testing.assert_allclose(metrics["loss_end"], loss_of(y)(images), rtol=1e-5)


def test_nu_zero_gives_the_corruption_network_itself():
    x, y = batch()
    images, metrics = augment(jax.random.key(0), x, y, nu=0.0)
    np.testing.assert_allclose(images, jnp.clip(NET.apply(NET.theta, x, None), 0, 1), atol=1e-6)
    np.testing.assert_allclose(metrics["loss_end"], metrics["loss_start"], rtol=1e-5)


def test_different_keys_give_different_images_and_equal_keys_equal_ones():
    x, y = batch()
    first, again, other = (augment(jax.random.key(k), x, y)[0] for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.all(np.any(first != other, axis=(1, 2, 3)))


def test_a_stochastic_networks_noise_is_the_same_at_every_step_and_in_the_result():
    noisy = lambda theta, x, key: theta["gain"] * x + 0.1 * jax.random.normal(key, x.shape)  # noqa: E731
    net = CorruptionNet(noisy, {"gain": jnp.ones(3)})
    x, y = batch()
    keys = example_keys(0)
    delta, metrics = ada.maximise(keys, x, loss_of(y), net, nu=0.1, steps=2)
    for i in range(BATCH):
        noise = 0.1 * jax.random.normal(keys[i], (1, *x.shape[1:]))
        expected = np.clip((1 + delta["gain"][i]) * x[i] + noise[0], 0, 1)
        np.testing.assert_allclose(ada.render(net, delta, x, keys)[i], expected, atol=1e-6)
    assert np.all(loss_of(y)(ada.render(net, delta, x, keys)) >= metrics["loss_start"])


# ------------------------------------------------------------------------------- a literal statement


def literal_attack(delta, x, y, steps: int):
    """Appendix A for one example: sign of the gradient times a quarter of the median radius."""
    radii = {
        name: {kind: NU * np.linalg.norm(np.ravel(a)) for kind, a in conv.items()}
        for name, conv in NET.theta.items()
    }
    eta = np.median([r for conv in radii.values() for r in conv.values()]) / 4

    @jax.jit
    @jax.grad
    def gradient(delta):
        theta = jax.tree.map(lambda a, d: a + d, NET.theta, delta)
        image = jnp.clip(NET.apply(theta, x[None], None), 0, 1)
        return -jax.nn.log_softmax(LOGITS_FN(image)[0])[y]

    for _ in range(steps):
        g = gradient(delta)
        for name, conv in delta.items():
            for kind, d in conv.items():
                d = np.asarray(d) + eta * np.sign(g[name][kind])
                norm, radius = np.linalg.norm(np.ravel(d)), radii[name][kind]
                delta[name][kind] = jnp.asarray(d * radius / norm if norm > radius else d)
    return delta


@pytest.mark.parametrize("steps", [1, 3])
def test_maximise_equals_a_literal_statement_for_each_example(steps):
    x, y = batch()
    start = perturbation.init(example_keys(0), NET.theta, perturbation.radii(NET.theta, NU))
    delta, _ = attack(example_keys(0), x, y, steps=steps)
    for i in range(BATCH):
        row = lambda tree: jax.tree.map(lambda d: d[i], tree)  # noqa: B023, E731
        expected = literal_attack(row(start), x[i], y[i], steps)
        chex.assert_trees_all_close(row(delta), expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------- in other programs


def test_no_gradient_flows_through_the_result():
    x, y = batch()
    key = jax.random.key(0)

    def augmented(params):
        return augment_with(functools.partial(classify, params), key, x, y)

    def outer(params, images):
        return losses.cross_entropy(classify(params, images), y).mean()

    params = make_params()
    through = jax.jit(jax.grad(lambda p: outer(p, augmented(p)[0])))(params)
    constant = jax.grad(outer)(params, jax.jit(augmented)(params)[0])
    chex.assert_trees_all_close(through, constant, rtol=1e-4, atol=1e-6)
    total = lambda p: sum(leaf.sum() for leaf in jax.tree.leaves(augmented(p)))  # noqa: E731
    chex.assert_trees_all_equal(
        jax.jit(jax.grad(total))(params), jax.tree.map(jnp.zeros_like, params)
    )


def augment_with(logits_fn, key, x, y, **knobs):
    knobs = {"nu": NU, "steps": 1} | knobs
    return ada.adversarial_augment(key, x, y, logits_fn=logits_fn, net=NET, **knobs)


class Module(NamedTuple):
    """A classifier as Equinox has it: a pytree of parameters that is called."""

    w: jax.Array
    v: jax.Array

    def __call__(self, x):
        return classify(self._asdict(), x)


def test_it_takes_a_flax_like_closure_an_equinox_like_module_and_pmap():
    x, y = batch()
    key, params = jax.random.key(0), make_params()
    model = Module(**params)
    flax_like = jax.jit(
        lambda p, *args: augment_with(lambda images: classify(p["params"], images), *args)
    )
    equinox_like = jax.jit(lambda model, *args: augment_with(model, *args))
    pmapped = jax.pmap(lambda model, *args: augment_with(model, *args), axis_name="devices")
    one_device = jax.tree.map(lambda a: a[None], (model, key, x, y))
    expected = flax_like({"params": params}, key, x, y)
    chex.assert_trees_all_close(equinox_like(model, key, x, y), expected, atol=1e-5)
    chex.assert_trees_all_close(
        jax.tree.map(lambda a: a[0], pmapped(*one_device)), expected, atol=1e-5
    )


@pytest.mark.parametrize(
    ("knobs", "field"),
    [
        ({"nu": -0.1}, "nu=-0.1"),
        ({"nu": float("nan")}, "nu=nan"),
        ({"steps": 0}, "steps=0"),
        ({"step_rule": "adam"}, "step_rule='adam'.*sign, l2"),
        ({"root_rule": "nearest"}, "root_rule='nearest'.*in_range, paper"),
        ({"microbatch": 3}, "microbatch=3 .*4"),
        ({"microbatch": -2}, "microbatch=-2"),
        ({"microbatch": 8}, "microbatch=8"),
    ],
    ids=str,
)
def test_a_knob_out_of_range_is_named(knobs, field):
    with pytest.raises(UserError, match=field):
        augment_with(LOGITS_FN, jax.random.key(0), *batch(), **knobs)


# ------------------------------------------------------------------------------- what it costs


def temporary_bytes(examples: int, microbatch: int | None) -> int:
    x, y = batch(n=examples)
    net = make_net(features=16)
    f = lambda key, x, y: ada.adversarial_augment(  # noqa: E731
        key, x, y, logits_fn=LOGITS_FN, net=net, steps=2, microbatch=microbatch
    )
    compiled = jax.jit(f).lower(jax.random.key(0), x, y).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_memory_of_a_large_batch_is_that_of_its_microbatch():
    assert temporary_bytes(32, microbatch=4) <= 1.3 * temporary_bytes(4, microbatch=None)


# ------------------------------------------------------------------------------- a golden step


def test_a_golden_step():
    """Renew the numbers when the method, its defaults or the order of random draws change on
    purpose, never to make an unexplained difference go away."""
    images, metrics = augment(jax.random.key(7), *batch(7), steps=2)
    print(images.mean((1, 2, 3)), metrics)
