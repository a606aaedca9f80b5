"""Ingredients of the training step: views, averaged weights, label smoothing."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ada_jax import losses, train, training
from ada_jax.augment import augmix, trivial_augment
from ada_jax.errors import UserError
from ada_jax.nets import weight_files
from ada_jax.run import setup
from tests.test_train import first_steps, tiny

VIEWS = {"augmix.use": True, "augmix.jsd_weight": 12.0}


def images_and_keys(count: int = 4) -> tuple[jax.Array, jax.Array]:
    x = jax.random.uniform(jax.random.key(0), (count, 32, 32, 3))
    return x, jax.random.split(jax.random.key(1), count)


def test_averaged_weights_equal_those_of_numpy():
    random = np.random.default_rng(0)
    values = random.normal(size=(30, 5)).astype(np.float32)
    tree = lambda i: ({"w": jnp.asarray(values[i])}, {"counter": jnp.int32(i)})  # noqa: E731
    state = training.TrainState(jnp.int32(0), *tree(0), (), ema=tree(0))
    expected = values[0].astype(np.float64)
    for step, i in enumerate(range(1, 30)):
        params, net_state = tree(i)
        state = state._replace(step=jnp.int32(step), params=params, net_state=net_state)
        state = state._replace(ema=training.moved_average(state, 0.6))
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * values[i]
    np.testing.assert_allclose(state.ema[0]["w"], expected, rtol=1e-5, atol=1e-6)
    assert state.ema[1]["counter"] == 29


@pytest.mark.parametrize("clean_view", [False, True])
def test_the_first_view_is_the_image_before_or_after_ada(clean_view):
    config = tiny(**VIEWS, **{"augmix.clean_view": clean_view, "noise.share": 1.0})
    clean, example_keys = images_and_keys()
    attacked = 0.5 * clean
    views = training.make_views(example_keys, clean, attacked, config)
    assert views.shape == (12, 32, 32, 3)
    np.testing.assert_array_equal(views[:4], clean if clean_view else attacked)
    # The two others have AugMix and noise, and draws of their own.
    distance = lambda a, b: np.abs(a - b).max((1, 2, 3)).min()  # noqa: E731
    assert distance(views[4:8], views[8:]) > 1e-3 < distance(views[4:8], attacked)


def test_without_ingredients_images_stay_as_they_are():
    clean, example_keys = images_and_keys()
    views = training.make_views(example_keys, clean, 0.5 * clean, tiny(method="nominal"))
    np.testing.assert_array_equal(views, 0.5 * clean)


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_the_loss_of_three_views_equals_that_of_the_parts():
    config = tiny(method="nominal", weight_decay=0.1, **VIEWS)
    parts = setup.build(config)
    views = jnp.concatenate([images_and_keys()[0] * scale for scale in (1.0, 0.7, 0.4)])
    y = jnp.arange(4)
    params, net_state = parts.classifier.init(jax.random.key(0), views, is_training=True)
    logits, _ = parts.classifier.apply(params, net_state, None, views, is_training=True)
    consistency = 12 * losses.jsd(*jnp.split(logits, 3)).mean()
    for all_views in (False, True):
        for smoothing in (0.0, 0.1):
            config.augmix.label_views, config.label_smoothing = all_views, smoothing
            config.weight_decay_bn = all_views
            decay = 0.1 * losses.weight_decay(params, include_bn=all_views)
            loss_fn = training.make_loss(config, parts.classifier)
            loss, (_, labelled, first) = loss_fn(params, net_state, views, y, {}, {})
            kept = len(views) if all_views else len(y)
            expected = losses.cross_entropy(logits[:kept], jnp.tile(y, 3)[:kept], smoothing).mean()
            np.testing.assert_allclose(labelled, expected, rtol=1e-5)
            np.testing.assert_allclose(loss, expected + consistency + decay, rtol=1e-5)
            np.testing.assert_allclose(first, logits[:4], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_a_resumed_run_with_every_ingredient_has_the_same_last_and_averaged_weights(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(augmix, "OPS", ("autocontrast", "rotate"))
    monkeypatch.setattr(trivial_augment, "OPS", ("identity", "solarize", "translate_y"))
    ingredients = {"trivial_augment.use": True, "noise.share": 0.5, "label_smoothing": 0.1}
    ingredients |= {"augmix.label_views": True}
    ingredients |= {"mixup.alpha": 1.0, "mixup.layers": ("input", "stage1"), "mixup.additive": 0.4}
    config = tiny(method="nominal", ema_decay=0.9, epochs=1.0, **VIEWS, **ingredients)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train.main(config, str(whole)) is None
    last, averaged = (json.loads((whole / f"results{s}.json").read_text()) for s in ("", "_ema"))
    assert averaged["name"] == f"{last['name']}_ema"
    assert averaged["weights_digest"] != last["weights_digest"]
    files = [whole / f"classifier{suffix}.safetensors" for suffix in ("", "_ema")]
    chex.assert_trees_all_equal_shapes_and_dtypes(*(weight_files.load_weights(f)[0] for f in files))
    assert '"ema_error"' in (whole / "metrics.jsonl").read_text()
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "4")
    for suffix in ("", "_ema"):
        (resumed / f"results{suffix}.json").unlink()
    assert train.main(config, str(resumed)) is None
    for one, suffix in ((last, ""), (averaged, "_ema")):
        other = json.loads((resumed / f"results{suffix}.json").read_text())
        assert one["weights_digest"] == other["weights_digest"]


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_every_ingredient_changes_the_first_step():
    norms = [
        first_steps(tiny(method="nominal", **ingredient), steps=1)[1]["gradient_norm"]
        for ingredient in (
            {},
            {"trivial_augment.use": True},
            {"noise.share": 1.0},
            {"mixup.alpha": 1.0},
            {"label_smoothing": 0.5},
        )
    ]
    assert len({round(norm, 3) for norm in norms}) == len(norms), norms


def test_mixup_needs_layers_that_the_classifier_has():
    config = tiny(method="nominal", **{"mixup.alpha": 1.0, "mixup.layers": ("input", "stage9")})
    with pytest.raises(UserError, match=r"mixup\.layers=.* names 'stage9', which resnet9 lacks"):
        setup.build(config)
    config.mixup.alpha = 0.0
    setup.build(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ema_decay", 0.9),
        ("label_smoothing", 0.1),
        ("noise.share", 0.5),
        ("trivial_augment.use", True),
        ("mixup.alpha", 1.0),
    ],
)
def test_an_ingredient_is_part_of_a_run_where_it_is_on(field, value):
    group = field.partition(".")[0]
    for changes, part in (({}, False), ({field: value}, True)):
        parts = setup.build(tiny(**changes))
        known = setup.identity(parts, (), training.TrainState(0, {}, {}, ()))
        assert any(name.startswith(f"config.{field}") for name in known) == part
        assert part or not any(f"config.{group}" in name for name in known)
