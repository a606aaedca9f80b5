"""Tests of the classifiers: sizes, structure, batch-norm modes and initialisation."""

import functools
from collections.abc import Callable

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ada_jax.errors import UserError
from ada_jax.nets import batch_norm, classifiers

PARAMETERS = {
    "preact_resnet20": 272_282,
    "alexnet_small": 275_418,
    "resnet9": 486_938,
    "preact_resnet18": 11_172_170,
    "preact_resnet18_no_bn": 11_171_146,
    "preact_resnet18_v2": 11_172_170,
    "alexnet": 23_272_266,
    "preact_resnet50": 23_513_162,
    "resnet20": 269_722,
    "resnet56": 853_018,
    "wide_resnet40_2": 2_243_546,
    "wide_resnet28_4": 5_849_050,
    "wide_resnet28_10": 36_479_194,
    "torchvision_resnet18": 11_181_642,
    "torchvision_resnet50": 23_528_522,
    "resnet50": 23_528_522,
}


def images(batch: int, height: int = 32, width: int = 32, seed: int = 0) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), (batch, height, width, 3))


@functools.cache
def shapes(
    name: str, height: int = 32, width: int = 32, *, num_classes: int = 10
) -> tuple[hk.Params, hk.State]:
    init = functools.partial(classifiers.make(name, num_classes).init, is_training=True)
    return jax.eval_shape(init, jax.random.key(0), images(2, height, width))


@functools.cache
def fitted(name: str) -> tuple[hk.TransformedWithState, hk.Params, hk.State]:
    """Returns a network as if trained: none of its parameters and statistics is at its start."""
    rng = np.random.default_rng(0)
    ranges = {"scale": (0.7, 1.3), "offset": (-0.3, 0.3), "average": (0.1, 0.5)}

    def fill(_: str, leaf: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf == "counter":
            return jnp.int32(20)
        bound = np.prod(shape.shape[:-1]) ** -0.5
        values = rng.uniform(*ranges.get(leaf, (-bound, bound)), shape.shape)
        return jnp.asarray(values, jnp.float32)

    params, state = (hk.data_structures.map(fill, tree) for tree in shapes(name))
    return classifiers.make(name, 10), params, state


@functools.cache
def jitted(name: str, **modes: bool) -> Callable:
    return jax.jit(functools.partial(classifiers.make(name, 10).apply, **modes))


def apply(name: str, x: jax.Array, **modes: bool) -> tuple[jax.Array, hk.State]:
    _, params, state = fitted(name)
    return jitted(name, **modes)(params, state, None, x)


def test_names() -> None:
    assert classifiers.names() == tuple(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    params, _ = shapes(name)
    assert hk.data_structures.tree_size(params) == PARAMETERS[name]


def test_resnet50_has_the_published_sizes_stage_by_stage() -> None:
    # Of the network that PyTorch's model zoo calls resnet50, from the stem to the logits.
    published = (9_408 + 128, 215_808, 1_219_584, 7_098_368, 14_964_736, 2_049_000)
    params, _ = shapes("resnet50", num_classes=1000)
    stages = ("initial_", *(f"block_group_{i}/" for i in range(4)), "logits")
    counts = [
        hk.data_structures.tree_size({k: p for k, p in params.items() if f"/~/{stage}" in k})
        for stage in stages
    ]
    assert tuple(counts) == published
    assert hk.data_structures.tree_size(params) == sum(published) == 25_557_032


@pytest.mark.parametrize(
    ("name", "count"), [("preact_resnet18", 20), ("preact_resnet50", 53), ("resnet50", 53)]
)
def test_convolutions_have_no_bias(name: str, count: int) -> None:
    params, _ = shapes(name)
    convolutions = [p for p in params.values() if "w" in p and p["w"].ndim == 4]
    assert len(convolutions) == count
    assert all(set(p) == {"w"} for p in convolutions)


def test_preact_resnet50_projects_in_the_first_block_of_each_stage() -> None:
    params, _ = shapes("preact_resnet50")
    projections = {k: p["w"].shape for k, p in params.items() if k.endswith("shortcut")}
    assert projections == {
        "stage1_block1/shortcut": (1, 1, 64, 256),
        "stage2_block1/shortcut": (1, 1, 256, 512),
        "stage3_block1/shortcut": (1, 1, 512, 1024),
        "stage4_block1/shortcut": (1, 1, 1024, 2048),
    }


@pytest.mark.parametrize("name", PARAMETERS)
def test_logits_for_any_image_size(name: str) -> None:
    net = classifiers.make(name, 10)
    params, state = shapes(name, 48, 40)
    apply_fn = functools.partial(net.apply, is_training=True)
    logits, new_state = jax.eval_shape(apply_fn, params, state, None, images(2, 48, 40))
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    chex.assert_trees_all_equal_shapes(params, shapes(name)[0])


def test_logits_are_float32_with_bfloat16_inputs_and_parameters() -> None:
    net = classifiers.make("resnet9", 10)
    params, state = shapes("resnet9")
    params, x = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), (params, images(2))
    )
    apply_fn = functools.partial(net.apply, is_training=True)
    logits, new_state = jax.eval_shape(apply_fn, params, state, None, x)
    assert logits.dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


def test_state_changes_in_training_only() -> None:
    x = images(4, 8, 8, seed=3)
    _, _, state = fitted("resnet9")
    _, running_state = apply("resnet9", x, is_training=False)
    _, local_state = apply("resnet9", x, is_training=False, test_local_stats=True)
    _, trained_state = apply("resnet9", x, is_training=True)
    chex.assert_trees_all_equal(running_state, state)
    chex.assert_trees_all_equal(local_state, state)
    same = jax.tree.map(np.array_equal, trained_state, state)
    assert not any(jax.tree.leaves(same))


def test_local_statistics_equal_training_and_running_ones_do_not() -> None:
    x = images(4, 8, 8, seed=3)
    trained, _ = apply("resnet9", x, is_training=True)
    local, _ = apply("resnet9", x, is_training=False, test_local_stats=True)
    running, _ = apply("resnet9", x, is_training=False)
    np.testing.assert_allclose(local, trained, atol=1e-6)
    assert np.abs(running - local).max() > 1e-2


def test_examples_are_independent_with_running_statistics_only() -> None:
    x = images(4, 8, 8, seed=3)
    other = x.at[1:].set(images(3, 8, 8, seed=4))
    running = [apply("resnet9", v, is_training=False)[0][0] for v in (x, other)]
    local = [
        apply("resnet9", v, is_training=False, test_local_stats=True)[0][0] for v in (x, other)
    ]
    np.testing.assert_allclose(*running, atol=1e-6)
    assert np.abs(local[0] - local[1]).max() > 1e-3


def test_running_statistics_decay() -> None:
    _, params, state = fitted("resnet9")
    net = classifiers.make("resnet9", 10, bn_decay=0.75)
    x = images(4, 8, 8)
    _, new_state = jax.jit(functools.partial(net.apply, is_training=True))(params, state, None, x)
    h = reference_conv(normalised(x), params["stem"]["w"])
    for which, batch in (("mean", h.mean((0, 1, 2))), ("var", h.var((0, 1, 2)))):
        old, new = (s[f"stem_bn/~/{which}_ema"] for s in (state, new_state))
        hidden = 0.75 * old["hidden"] + 0.25 * batch
        np.testing.assert_allclose(new["hidden"], hidden, atol=1e-5)
        # Haiku corrects for the zero it starts from.
        np.testing.assert_allclose(new["average"], hidden / (1 - 0.75**21), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["resnet9", pytest.param("preact_resnet20", marks=pytest.mark.slow)]
)
def test_gradients_are_finite_and_reach_every_parameter(name: str) -> None:
    net, params, state = fitted(name)

    def loss(params: hk.Params, x: jax.Array) -> jax.Array:
        logits, _ = net.apply(params, state, None, x, is_training=True)
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - logits[:, 0])

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    grads, flat_grads = (
        jax.tree.leaves(jax.device_get(gradient(params, x)))
        for x in (images(4, 8, 8, seed=3), jnp.full((4, 8, 8, 3), 0.5, jnp.float32))
    )
    assert all(np.all(np.isfinite(g)) and np.any(g) for g in grads)
    assert all(np.all(np.isfinite(g)) for g in flat_grads)


@pytest.mark.parametrize("name", ["preact_resnet18", "preact_resnet20", "preact_resnet50"])
def test_preact_resnets_equal_an_independent_statement(name: str) -> None:
    _, params, state = fitted(name)
    x = images(2, 12, 16, seed=5)
    logits, _ = apply(name, x, is_training=False)
    expected = jax.jit(reference_preact_resnet)(params, state, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_resnet9_equals_an_independent_statement() -> None:
    _, params, state = fitted("resnet9")
    x = images(2, 12, 15, seed=5)
    logits, _ = apply("resnet9", x, is_training=False)
    conv, norm_relu = reference_layers(params, state)
    h = norm_relu(conv(normalised(x), "stem"), "stem_bn")
    for stage in ("stage1", "stage2", "stage3"):
        h = norm_relu(conv(h, f"{stage}/down", 2), f"{stage}/down_bn")
        r = norm_relu(conv(h, f"{stage}/conv1"), f"{stage}/bn1")
        h = h + norm_relu(conv(r, f"{stage}/conv2"), f"{stage}/bn2")
    expected = h.mean((1, 2)) @ params["logits"]["w"] + params["logits"]["b"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_resnet50_equals_an_independent_statement() -> None:
    _, params, state = fitted("resnet50")
    x = images(2, 64, 64, seed=5)
    logits, _ = apply("resnet50", x, is_training=False)
    expected = jax.jit(reference_resnet50)(params, state, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_resnet50_convolves_in_the_dtype_asked_for() -> None:
    params, state = shapes("resnet50")
    net = classifiers.make("resnet50", 10, compute_dtype="bfloat16")
    apply_fn = functools.partial(net.apply, is_training=True)
    jaxpr = str(jax.make_jaxpr(apply_fn)(params, state, None, images(2)))
    made = [line.split(" = ")[0] for line in jaxpr.splitlines() if "conv_general_dilated" in line]
    assert len(made) == 53 and all(":bf16[" in line for line in made)
    logits, new_state = jax.eval_shape(apply_fn, params, state, None, images(2))
    assert logits.dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


def test_normalisation_is_the_one_asked_for() -> None:
    x = images(2, 8, 8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.4, 0.3)
    _, params, state = fitted("resnet9")
    plain = classifiers.make("resnet9", 10, mean=(0.0,) * 3, std=(1.0,) * 3)
    asked = classifiers.make("resnet9", 10, mean=mean, std=std)
    by_hand = (x - np.array(mean)) / np.array(std)
    plain, asked = (jax.jit(functools.partial(n.apply, is_training=False)) for n in (plain, asked))
    expected, _ = plain(params, state, None, by_hand)
    logits, _ = asked(params, state, None, x)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def initialised(**options: bool) -> hk.Params:
    net = classifiers.make("resnet9", 10, **options)
    key = jax.random.key(0, impl="unsafe_rbg")  # Compiles faster than the default.
    # Without the state the compiler drops the forward pass.
    return jax.jit(lambda: net.init(key, images(2, 8, 8), is_training=True)[0])()


def test_initialisation_is_pytorchs() -> None:
    params = jax.tree.map(np.asarray, initialised())
    for path, leaves in params.items():
        if "scale" in leaves:
            assert np.all(leaves["scale"] == 1)
            assert np.all(leaves["offset"] == 0)
            continue
        bound = np.prod(leaves["w"].shape[:-1]) ** -0.5
        assert all(np.abs(leaf).max() <= bound for leaf in leaves.values()), path
        if leaves["w"].size > 2000:
            assert np.abs(leaves["w"]).max() > 0.99 * bound
            np.testing.assert_allclose(leaves["w"].std(), bound / 3**0.5, rtol=0.05)
    assert np.unique(params["logits"]["b"]).size == 10


def test_zero_init_logits() -> None:
    params = initialised(zero_init_logits=True)
    assert not any(np.any(leaf) for leaf in params["logits"].values())
    assert np.any(params["stem"]["w"])


def test_statistics_are_averaged_over_the_named_axis() -> None:
    net = classifiers.make("resnet9", 10, bn_axis_name="devices")
    _, params, state = fitted("resnet9")
    x = images(4, 8, 8, seed=6)
    # `init` runs without the axis.
    jax.eval_shape(functools.partial(net.init, is_training=True), jax.random.key(0), x)
    train = functools.partial(net.apply, is_training=True)
    train = jax.jit(jax.vmap(train, (None, None, None, 0), axis_name="devices"))
    logits, new_state = train(params, state, None, x.reshape(2, 2, 8, 8, 3))
    expected, expected_state = apply("resnet9", x, is_training=True)
    np.testing.assert_allclose(logits.reshape(4, 10), expected, atol=1e-4)
    chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: leaf[0], new_state), expected_state, atol=1e-4
    )


@pytest.mark.parametrize(("is_training", "local"), [(True, False), (False, True), (False, False)])
def test_batch_normalisation_equals_haikus(is_training: bool, local: bool) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, (4, 5, 6, 3)), jnp.float32)

    def results(module):
        net = hk.transform_with_state(
            lambda x, *flags: module(True, True, 0.9, name="bn")(x, *flags)
        )
        params, state = net.init(jax.random.key(0), x, True, False)
        state = jax.tree.map(lambda a: a + 1, state)

        def loss(params, x):
            y, new = net.apply(params, state, None, x, is_training, local)
            return (y**3).mean(), (y, new)

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    found, expected = results(batch_norm.BatchNorm), results(hk.BatchNorm)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)


def test_unknown_name() -> None:
    with pytest.raises(UserError, match="'resnet8' is unknown: choose one of preact_resnet20, "):
        classifiers.make("resnet8", 10)


def test_integer_images_are_refused() -> None:
    net, params, state = fitted("resnet9")
    with pytest.raises(UserError, match=r"uint8 must be.* divide integers by 255"):
        net.apply(params, state, None, jnp.zeros((2, 8, 8, 3), jnp.uint8), is_training=False)


# An independent statement of the networks, from their parameters alone.


def normalised(x: jax.Array) -> jax.Array:
    return (x - np.array([0.4914, 0.4822, 0.4465])) / np.array([0.2471, 0.2435, 0.2616])


def reference_conv(x: jax.Array, w: jax.Array, stride: int = 1) -> jax.Array:
    pad = w.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def reference_layers(params: hk.Params, state: hk.State) -> tuple[Callable, Callable]:
    def conv(x: jax.Array, name: str, stride: int = 1) -> jax.Array:
        return reference_conv(x, params[name]["w"], stride)

    def norm_relu(x: jax.Array, name: str) -> jax.Array:
        mean, var = (state[f"{name}/~/{which}_ema"]["average"] for which in ("mean", "var"))
        x = (x - mean) / jnp.sqrt(var + 1e-5)
        return jnp.maximum(x * params[name]["scale"] + params[name]["offset"], 0)

    return conv, norm_relu


def reference_preact_resnet(params: hk.Params, state: hk.State, x: jax.Array) -> jax.Array:
    conv, norm_relu = reference_layers(params, state)
    x = conv(normalised(x), "stem")
    for block in sorted({name.split("/")[0] for name in params if name.startswith("stage")}):
        stride = 2 if block.endswith("_block1") and block != "stage1_block1" else 1
        pre = norm_relu(x, f"{block}/bn1")
        if f"{block}/conv3" in params:
            h = norm_relu(conv(pre, f"{block}/conv1"), f"{block}/bn2")
            h = norm_relu(conv(h, f"{block}/conv2", stride), f"{block}/bn3")
            h, projected = conv(h, f"{block}/conv3"), pre
        else:
            h = norm_relu(conv(pre, f"{block}/conv1", stride), f"{block}/bn2")
            h, projected = conv(h, f"{block}/conv2"), x
        shortcut = f"{block}/shortcut"
        x = h + (conv(projected, shortcut, stride) if shortcut in params else x)
    features = norm_relu(x, "bn").mean((1, 2))
    return features @ params["logits"]["w"] + params["logits"]["b"]


def reference_resnet50(params: hk.Params, state: hk.State, x: jax.Array) -> jax.Array:
    def conv_norm(x: jax.Array, conv: str, norm: str, stride: int = 1) -> jax.Array:
        x = jax.lax.conv_general_dilated(
            x,
            params[f"resnet50/~/{conv}"]["w"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        scale = params[f"resnet50/~/{norm}"]
        mean, var = (state[f"resnet50/~/{norm}/~/{s}_ema"]["average"] for s in ("mean", "var"))
        return (x - mean) / jnp.sqrt(var + 1e-5) * scale["scale"] + scale["offset"]

    x = conv_norm(normalised(x), "initial_conv", "initial_batchnorm", 2)
    x = jnp.pad(jnp.maximum(x, 0), ((0, 0), (0, 1), (0, 1), (0, 0)))
    half = x.shape[1] // 2
    window = [x[:, i : i + 2 * half : 2, j : j + 2 * half : 2] for i in range(3) for j in range(3)]
    x = functools.reduce(jnp.maximum, window)
    for stage, depth in enumerate((3, 4, 6, 3)):
        for i in range(depth):
            stride = 2 if stage and not i else 1
            block = f"block_group_{stage}/~/block_{i}/~"
            h = jnp.maximum(conv_norm(x, f"{block}/conv_0", f"{block}/batchnorm_0"), 0)
            h = jnp.maximum(conv_norm(h, f"{block}/conv_1", f"{block}/batchnorm_1", stride), 0)
            h = conv_norm(h, f"{block}/conv_2", f"{block}/batchnorm_2")
            shortcut = f"{block}/shortcut_conv", f"{block}/shortcut_batchnorm", stride
            x = jnp.maximum(h + (x if i else conv_norm(x, *shortcut)), 0)
    logits = params["resnet50/~/logits"]
    return x.mean((1, 2)) @ logits["w"] + logits["b"]


STAGES = ("stem", "stage1", "stage2", "stage3", "stage4")


@pytest.mark.parametrize("name", PARAMETERS)
def test_feature_layers(name: str) -> None:
    found = classifiers.feature_shapes(classifiers.make(name, 10), (32, 32, 3))
    three = ("resnet9", "preact_resnet20", "resnet20", "resnet56")
    if name not in ("alexnet", "alexnet_small"):
        assert tuple(found) == STAGES[: 4 if name in three or name.startswith("wide") else 5]
    expected = {
        "alexnet": [(16, 16, 64), (8, 8, 192), (4, 4, 384), (4, 4, 256), (4, 4, 256)],
        "resnet9": [(32, 32, 16), (16, 16, 32), (8, 8, 64), (4, 4, 128)],
        "preact_resnet18": [(32, 32, 64), (32, 32, 64), (16, 16, 128), (8, 8, 256), (4, 4, 512)],
        "resnet20": [(32, 32, 16), (32, 32, 16), (16, 16, 32), (8, 8, 64)],
        "wide_resnet28_4": [(32, 32, 16), (32, 32, 64), (16, 16, 128), (8, 8, 256)],
        "torchvision_resnet18": [(8, 8, 64), (8, 8, 64), (4, 4, 128), (2, 2, 256), (1, 1, 512)],
        "resnet50": [(8, 8, 64), (8, 8, 256), (4, 4, 512), (2, 2, 1024), (1, 1, 2048)],
    }
    assert list(found.values()) == expected.get(name, list(found.values()))


@pytest.mark.parametrize("name", ["resnet9", "preact_resnet20", "resnet50"])
def test_perturbations_are_added_to_the_outputs_of_layers(name: str) -> None:
    net, params, state = fitted(name)
    x = images(2)

    @jax.jit
    def run(perturbations: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        options = {"is_training": False, "with_features": True}
        return net.apply(params, state, None, x, perturbations=perturbations, **options)[0]

    layers = classifiers.feature_shapes(net, (32, 32, 3))
    deltas = {k: jax.random.normal(jax.random.key(1), (2, *shape)) for k, shape in layers.items()}
    last = list(layers)[-1]
    changed = {layer: deltas[layer] for layer in ("stage2", last)}
    logits, clean = run(jax.tree.map(jnp.zeros_like, changed))
    np.testing.assert_allclose(logits, apply(name, x, is_training=False)[0], atol=1e-6)
    moved, features = run(changed)
    np.testing.assert_allclose(features["stage1"], clean["stage1"], atol=1e-6)
    np.testing.assert_allclose(features["stage2"], clean["stage2"] + deltas["stage2"], atol=1e-5)
    assert np.abs(features["stage3"] - clean["stage3"]).max() > 0.01
    assert np.abs(moved - logits).max() > 0.01


@pytest.mark.parametrize("name", ["resnet9", "preact_resnet20"])
def test_perturbations_may_be_functions_of_the_outputs(name: str) -> None:
    net, params, state = fitted(name)
    x = images(2)
    options = {"is_training": False, "with_features": True}

    def run(x, **perturbations):
        return net.apply(params, state, None, x, perturbations=perturbations, **options)[0]

    run = jax.jit(run, static_argnames=("input", "stage2"))
    _, clean = run(x)
    _, features = run(x, stage2=jnp.flip)
    np.testing.assert_allclose(features["stage1"], clean["stage1"], atol=1e-6)
    np.testing.assert_allclose(features["stage2"], jnp.flip(clean["stage2"]), atol=1e-5)
    turned = functools.partial(jnp.flip, axis=(0, 1))
    np.testing.assert_allclose(run(x, input=turned)[0], run(turned(x))[0], atol=1e-4)


def test_perturbations_of_unknown_layers_are_rejected() -> None:
    net, params, state = fitted("resnet9")
    with pytest.raises(UserError, match="'stage5' is unknown: resnet9 has input, stem, stage1"):
        net.apply(params, state, None, images(2), is_training=False, perturbations={"stage5": 0})


def test_networks_without_feature_layers_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = lambda x, norm_relu, tap: norm_relu(x, "bn")  # noqa: E731
    monkeypatch.setitem(classifiers._NETWORKS, "resnet9", pool)
    with pytest.raises(UserError, match="names no feature layers"):
        classifiers.feature_shapes(classifiers.make("resnet9", 10), (32, 32, 3))
