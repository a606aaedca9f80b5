"""The training binary: its schedule and checks, devices, kills and resumes, and one golden step."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ada_jax import ada, paths, sharding, train, training
from ada_jax import results as results_files
from ada_jax.augment import rendered_set
from ada_jax.data import batching, sources
from ada_jax.errors import UserError
from ada_jax.evaluation import scoring
from ada_jax.nets import classifiers, weight_files
from ada_jax.run import config_checks, distributed, logbook, loop, setup
from experiments import cifar10, finetune, imagenet, quickstart
from experiments import deepaugment as deepaugment_config
from tests.conftest import assert_mistake, photograph, run_here, shared_folder

ROOT = pathlib.Path(__file__).parents[1]


def tiny(**changes) -> ConfigDict:
    """The quickstart on 64 images, 16 at a time."""
    config = quickstart.get_config().unlock()
    config.update(
        train_split="train[:64]",
        eval_split="test[:40]",
        batch_size=16,
        eval_batch_size=16,
        epochs=2.0,
        log_steps=3,
        eval_epochs=1.0,
        eval_sets=("clean",),
        checkpoint_epochs=0.5,
        figure_examples=4,
        cpu_devices=0,
    )
    config.augmix.update(width=1, depth=1)  # each position of a chain is compiled
    config.update_from_flattened_dict(changes)
    return config


def flags_of(config: ConfigDict) -> list[str]:
    """The command-line flags that turn the quickstart into `config`."""
    base = quickstart.get_config().to_dict()
    flags = []
    for name, value in config.items():
        if not isinstance(value, ConfigDict) and base[name] != value:
            flags.append(f"--config.{name}={value}")
    return flags


def command(workdir, *flags: str) -> list[str]:
    binary = [sys.executable, "-m", "ada_jax.train", "--config=experiments/quickstart.py"]
    return [*binary, f"--workdir={workdir}", *flags]


def run(workdir, *flags: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(workdir, *flags), cwd=ROOT, capture_output=True, text=True, timeout=600, **kwargs
    )


def here(workdir, *flags: str) -> subprocess.CompletedProcess:
    """The same in this process."""
    return run_here("train", "--config=experiments/quickstart.py", f"--workdir={workdir}", *flags)


# ------------------------------------------------------------------------ config and schedule


@pytest.mark.parametrize("small", ["", ",small", ",gpu"])
@pytest.mark.parametrize("row", ["", *cifar10.ROWS, *cifar10.COMPARISONS])
def test_every_preset_is_valid(row, small):
    for experiment in (cifar10, finetune):
        config_checks.validate(experiment.get_config(row + small))


@pytest.mark.parametrize("small", ["", ",small"])
@pytest.mark.parametrize("row", ["", "nominal", "augmix", "ada+augmix", "random", "l2_at"])
def test_every_preset_of_imagenet_is_valid(row, small):
    config = imagenet.get_config(row + small)
    config_checks.validate(config)
    config_checks.validate_devices(config, 32)
    assert config.dataset == "imagenet2012" and config.name.startswith("imagenet_")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"crop_scale": (0.0, 1.0)}, "config.crop_scale=(0.0, 1.0) must be two shares"),
        ({"crop_scale": (0.5,)}, "config.crop_scale=(0.5,) must be two shares"),
        ({"crop_ratio": (2.0, 1.0)}, "config.crop_ratio=(2.0, 1.0) must be two positive"),
        ({"dataset": "cifar10"}, "config.dataset='cifar10' has images of one size"),
        ({"deepaugment.copies": 1}, "config.deepaugment.copies=1"),
    ],
)
def test_crops_that_cannot_be_are_found_before_anything_is_compiled(changes, said):
    config = imagenet.get_config().unlock()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=re.escape(said)):
        config_checks.validate(config)


def test_crops_are_of_a_run_s_identity_only_where_they_are_used(tmp_path):
    for i in range(4):
        of_class = tmp_path / ("train", "test")[i // 2] / "ab"[i % 2]
        of_class.mkdir(parents=True)
        (of_class / f"{i}.jpg").write_bytes(photograph(i))
    folder = {"dataset": "folder", "data_dir": str(tmp_path), "batch_size": 2, "eval_sets": ()}
    folder |= {"train_split": "train", "eval_split": "test", "method": "nominal"}
    for scale in ((), (0.5, 1.0)):
        parts = setup.build(tiny(**folder, crop_scale=scale))
        fields = setup.identity(parts, (), state=None)
        # A run from before there were crops must still go on.
        assert {f for f in fields if "crop" in f} == (
            {"config.crop_scale", "config.crop_ratio"} if scale else set()
        )


@pytest.mark.slow
def test_imagenet_trains_and_is_evaluated_on_generated_photographs(request, tmp_path):
    flags = {
        "data_dir": request.getfixturevalue("imagenet"),
        "image_size": 32,
        "batch_size": 8,
        "eval_split": "validation[:2]",
        "eval_batch_size": 2,
        "train_steps": 2,
        "epochs": 0.0,
        "log_steps": 1,
    }
    given = [f"--config.{field}={value}" for field, value in flags.items()]
    small = "--config=experiments/imagenet.py:nominal,small"
    done = run_here("train", small, f"--workdir={tmp_path}", *given)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["clean"]["examples"] == 2 and len(results["corruptions"]) == 15
    assert results["corruption_source"]["pixels"] == 224
    # Of 1,000 classes two steps learn nothing: all errors are near 100%, AlexNet's mean is 79%.
    assert 90 < results["mce_unnormalised"] <= 100 and 110 < results["mce_alexnet"] < 135
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all("input_wait_percent" in line for line in logged if line["kind"] == "train")


@pytest.mark.parametrize("words", ["gpu", "ada,gpu", "pat_self", "ada+deepaugment", "best"])
def test_words_that_are_not_for_imagenet_are_refused(words):
    with pytest.raises(ValueError, match="is not for ImageNet: choose from ada, augmix, nominal"):
        imagenet.get_config(words)


@pytest.mark.parametrize(
    "words",
    ["adda", "nominal+ada", "random+ada", "pat_self+rlat", "advmix+random"]
    + ["deepaugment,deepaugment10x"],
)
def test_an_unknown_row_lists_the_known_ones(words):
    with pytest.raises(ValueError, match=r"ada\+deepaugment10x\+augmix"):
        cifar10.get_config(words)


def test_the_paper_s_values_are_the_defaults():
    config = cifar10.get_config()
    assert (config.epochs, config.batch_size, config.learning_rate) == (300, 256, 0.1)
    assert (config.warmup_epochs, config.weight_decay) == (5, 1e-4)
    assert (config.ada.nu, config.ada.steps, config.ada.step_scale) == (0.015, 10, 0.25)
    assert config.classifier == "preact_resnet50"
    assert config.ada.corruption_net == ("edsr_baseline_x4",)


@pytest.mark.parametrize("batch_size", [128, 512])
def test_learning_rate_schedule(batch_size):
    config = cifar10.get_config().unlock()
    config.batch_size = batch_size
    _, schedule = training.make_optimizer(config, steps_per_epoch=10, total_steps=3000)
    peak = max(0.1 * batch_size / 256, 0.1)
    expected = [
        peak * min(s / 50, 0.5 * (1 + np.cos(np.pi * max(s - 50, 0) / 2950)))
        for s in (0, 25, 50, 1525, 2999, 3000)
    ]
    np.testing.assert_allclose(
        [schedule(s) for s in (0, 25, 50, 1525, 2999, 3000)], expected, atol=1e-7
    )


def test_the_optimiser_is_sgd_with_nesterov_momentum_and_pat_clips_its_gradients():
    config = cifar10.get_config().unlock()
    config.warmup_epochs, momentum, trace = 0, config.momentum, 0.0
    optimizer, schedule = training.make_optimizer(config, steps_per_epoch=10, total_steps=100)
    state = optimizer.init(jnp.float32(0))
    for step, gradient in enumerate((1.0, -2.0, 0.5)):
        update, state = optimizer.update(jnp.float32(gradient), state)
        trace = gradient + momentum * trace
        expected = -float(schedule(step)) * (gradient + momentum * trace)
        np.testing.assert_allclose(update, expected, rtol=1e-5)
    config.method = "pat"
    optimizer, _ = training.make_optimizer(config, steps_per_epoch=10, total_steps=100)
    limit = config.pat.gradient_clip
    update = lambda g: optimizer.update(jnp.float32(g), optimizer.init(jnp.float32(0)))[0]  # noqa: E731
    assert update(-7 * limit) == update(-limit) != update(-0.5 * limit)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("eval_sets", ("clean", "d"), "clean, c, extra, cbar, cifar10_1"),
        ("eval_sets", ("c",), "lacks 'clean'"),
        ("corruption_seed", -1, "out of range"),
        ("corruption_table", "mnist", "cifar, imagenet"),
        ("corruption_eval_examples", 0, "1 or more"),
        ("method", "adda", "ada, nominal"),
        ("dataset", "mnist", "mnist5k"),
        ("classifier", "resnet", "preact_resnet50"),
        ("compute_dtype", "float16", "bfloat16"),
        ("pgd.norm", "l1", "linf"),
        ("pgd.epsilon", 0.0, "positive"),
        ("pgd.steps", 0, "at least 1"),
        ("pat.bound", 0.0, "config.pat.bound=0.0 must be positive"),
        ("pat.steps", 0, "config.pat.steps=0 must be an integer of at least 1"),
        ("pat.penalty", -1.0, "config.pat.penalty=-1.0 must be positive"),
        ("pat.gradient_clip", 0.0, "must be positive"),
        ("pat.network", "vgg", "choose one of self, "),
        ("pat.network", "alexnet", "config.pat.weights='' is missing"),
        ("pat.weights", "x.safetensors", "config.pat.weights='x.safetensors' is not used"),
        ("rlat.epsilon", 0.0, "config.rlat.epsilon=0.0 must be positive"),
        ("ada.corruption_net", ("edsr",), "edsr_small"),
        ("ada.corruption_net", ("edsr_small", "cae"), "2 networks"),
        ("ada.corruption_enlarge", (0,), "at least 1"),
        ("ada.step_rule", "fgsm", "sign"),
        ("ada.root_rule", "x", "paper"),
        ("ada.batch_norm", "x", "running"),
        ("ada.nu", -0.1, "negative"),
        ("ada.steps", -1, "at least 0"),
        ("ada.every", 0, "1 or more"),
        ("ada.group", 0, "1 or more"),
        ("ada.leaves", "up0", "matches no parameter"),
        ("ada.leaves", "*", "is not a regular expression"),
        ("ada.choice", (), "one or both of delta, mixing"),
        ("ada.choice", ("mixing", "mixing"), "one or both of delta, mixing"),
        ("deepaugment.copies", -1, "0 (off) or more"),
        ("ada.ssim_threshold", 1.0, "[-1, 1)"),
        ("augmix.severity", 0.0, "severity=0.0"),
        ("augmix.depth", 0, "depth=0"),
        ("augmix.jsd_weight", -1.0, "0 (off)"),
        ("augmix.jsd_weight", 12.0, "needs config.augmix.use"),
        ("augmix.clean_view", True, "needs config.augmix.use and a positive"),
        ("augmix.label_views", True, "needs config.augmix.use and a positive"),
        ("label_smoothing", 1.0, "[0, 1)"),
        ("ema_decay", 1.0, "[0, 1)"),
        ("mixup.layers", (), "must name layers, each once"),
        ("mixup.layers", ("input", "input"), "must name layers, each once"),
        ("mixup.sparsity", 1.0, "config.mixup.sparsity=1.0 must be at least 0 and below 1"),
        ("noise.share", 1.5, "config.noise.share=1.5 must be in 0..1"),
        ("noise.norms", ("l3",), "unknown norm 'l3'"),
        ("learning_rate", 0.0, "positive"),
        ("learning_rate", float("inf"), "finite"),
        ("ada.nu", float("inf"), "finite"),
        ("seed", -1, "0..2**32-1"),
        ("mean", (0.5,), "three numbers"),
        ("mean", (0.5, 0.5, 50.0), "three numbers in [0, 1]"),
        ("mean", ("a", "b", "c"), "must be numbers"),
        ("std", ("a", "b", "c"), "must be numbers"),
        ("crop_scale", ("a", "b"), "must be numbers"),
        ("crop_ratio", ("a", "b"), "must be numbers"),
        ("std", (0.0, 0.0, 0.0), "three positive numbers"),
        ("momentum", 1.0, "[0, 1)"),
        ("batch_size", 0, "1 or more"),
        ("train_steps", 5, "must not both"),
        ("epochs", 0.0, "train_steps=0 are both 0"),
        ("epochs", float("inf"), "finite"),
        ("ada.step_scale", float("inf"), "finite"),
        ("weight_decay", float("nan"), "finite"),
        ("ada.corruption_weights", (1,), "paths"),
        ("pad", 33, "from 0 to image_size"),
        ("image_size", 4097, "must be 1 to 4096"),
        ("cpu_devices", 1025, "must be 0 (off) to 1024"),
    ],
)
def test_mistakes_are_found_before_anything_is_compiled(field, value, said):
    config = tiny(**{field: value})
    with pytest.raises(UserError) as error:
        config_checks.validate(config)
    assert said in str(error.value)
    assert field.split(".")[-1] in str(error.value) or field == "train_steps"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 128}, "config.batch_size=128 is larger than the 64 examples"),
        ({"epochs": 0.1}, "config.epochs=0.1 must be at least one step (16 of 64 examples)"),
        ({"epochs": 1e308}, "less than 2**31 steps"),
    ],
)
def test_data_that_does_not_fit_is_found_before_anything_is_compiled(changes, said):
    with pytest.raises(UserError, match=re.escape(said)):
        setup.build(tiny(**changes))


@pytest.mark.parametrize(
    ("net", "side", "said", "mended"),
    [
        ("cae", 30, "corruption_net=.* fit images of 30x30", {"ada.corruption_enlarge": (2,)}),
        ("edsr_small", 10, "ssim_threshold=.* 11x11 pixels", {"ada.ssim_threshold": -1.0}),
    ],
)
def test_images_that_ada_does_not_take_are_found_before_compiling(
    tmp_path, net, side, said, mended
):
    images = np.random.default_rng(0).integers(0, 256, (64, side, side, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(64) % 4)
    fields = {"dataset": "npz", "data_dir": str(tmp_path / "x.npz"), "method": "ada"}
    fields |= {"train_split": "train", "eval_split": "test", "ada.corruption_net": (net,)}
    with pytest.raises(UserError, match=r"config\.ada\." + said):
        setup.build(tiny(**fields))
    setup.build(tiny(**fields | mended))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 17}, "config.batch_size=17 is not divisible by the 2 devices"),
        ({"ada.every": 3}, "config.ada.every=3 does not divide the 8 examples"),
        ({"ada.microbatch": 3}, "config.ada.microbatch=3 does not divide the 8 examples"),
        ({"ada.every": 4, "ada.microbatch": 4}, "microbatch=4 does not divide the 2 examples"),
        ({"ada.group": 3}, "config.ada.group=3 does not divide the 8 examples"),
        ({"ada.group": 8, "ada.microbatch": 4}, "config.ada.group=8 does not divide the 4"),
    ],
)
def test_batches_that_the_devices_do_not_divide(changes, said):
    with pytest.raises(UserError, match=re.escape(said)):
        config_checks.validate_devices(tiny(**changes), devices=2)


def test_memory_is_needed_for_the_attacked_examples_only():
    counted = [({}, 8), ({"ada.every": 4}, 2), ({"ada.every": 2, "ada.microbatch": 2}, 2)]
    for changes, expected in counted:
        assert config_checks.attacked_at_once(tiny(**changes), devices=2) == expected


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.classifer=resnet9"], "no field 'classifer'"),
        (["--config=experiments/none.py"], "experiments/none.py does not exist"),
        (["--config=experiments/cifar10.py:adda"], "choose from nominal, augmix"),
        (["--config.epochs=many"], "--config.epochs=many"),
        (["--config.ada.steps=-1"], "config.ada.steps=-1"),
        (["--config.ada.corruption_weights=README.md"], "README.md"),
        (["--config.dataset=folder", "--config.data_dir=/nowhere"], "/nowhere"),
        (
            ["--config.dataset=npz", "--config.data_dir=gs://a/b.npz"],
            "'gs://a/b.npz' is in a bucket",
        ),
        (["word"], "word"),
    ],
)
def test_the_binary_tells_a_mistake_in_one_sentence_and_status_2(tmp_path, flags, said):
    assert_mistake(here(tmp_path / "run", *flags), said)
    assert not (tmp_path / "run").exists()


def test_a_process_of_its_own_ends_so_too(tmp_path):
    assert_mistake(run(tmp_path / "run", "--config.ada.steps=-1"), "config.ada.steps=-1")
    assert not (tmp_path / "run").exists()


def test_help_lists_the_flags(tmp_path):
    done = run(tmp_path / "run", "--help")
    assert done.returncode == 0 and not done.stderr
    assert all(f"--{name}" in done.stdout for name in ("config", "workdir", "[no]distributed"))


def test_a_config_file_that_leaves_is_no_success(tmp_path):
    (tmp_path / "mine.py").write_text("raise SystemExit(3)")
    assert run_here("train", f"--config={tmp_path}/mine.py").returncode == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:", "SyntaxError"),
        ("import nothing", "'nothing'"),
        ("x = y", "'y'"),
        ("from ml_collections import ConfigDict as get_config", "'method'"),
        ("get_config = dict", "returns a dict: return an ml_collections.ConfigDict"),
    ],
)
def test_a_config_file_that_does_not_run_or_lacks_a_field_is_named(tmp_path, text, said):
    (tmp_path / "mine.py").write_text(text)
    done = run_here("train", f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run")
    assert_mistake(done, said)
    assert "--config" in done.stderr


# ------------------------------------------------------------------------ the step


def first_steps(config: ConfigDict, steps: int = 3) -> tuple[training.TrainState, dict]:
    """The state and the metrics after a few steps on the devices there are."""
    state, metrics = steps_of(setup.build(config), steps)
    return state, metrics[-1]


def steps_of(parts: setup.Parts, steps: int, after_each=None) -> tuple[training.TrainState, list]:
    """The state after a few steps, and the metrics of each."""
    config, found = parts.config, []
    images = batching.to_float(next(batching.eval_batches(parts.train_set, batch_size=8))["image"])
    key = jax.random.key(config.seed)
    state = training.initial_state(parts.classifier, parts.optimizer, key, images)
    update_step = train.compile_update_step(parts)
    thetas = tuple(net.theta for net in parts.nets)
    state, thetas = sharding.replicate(state), sharding.replicate(thetas)
    batches = train.train_batches(parts, 0)
    for _ in range(steps):
        state, metrics = update_step(state, thetas, sharding.shard(next(batches)), key)
        found.append({k: float(v[0]) for k, v in metrics.items()})
        if after_each:
            after_each()
    return sharding.unreplicate(state), found


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_the_update_step_compiles_once():
    compiled, counts = [], []

    def note(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        parts = setup.build(tiny(method="nominal"))
        steps_of(parts, 3, lambda: counts.append(len(compiled)))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert 0 < counts[0] == counts[1] == counts[2]


def test_golden_step():
    """Renew the numbers only where a change is meant to change the training itself.

    The learning rate of the first step is 0, so the third one is the first with other parameters.
    """
    state, (_, metrics, updated) = steps_of(setup.build(tiny()), steps=3)
    assert {name: metrics[name] for name in GOLDEN} == pytest.approx(GOLDEN, abs=2e-3)
    assert {name: updated[name] for name in UPDATED} == pytest.approx(UPDATED, rel=0.02)
    assert int(state.step) == 3
    assert metrics["ada_loss_end"] > metrics["ada_loss_start"]
    assert 0.3 <= metrics["ada_ssim_after_min"] <= metrics["ada_ssim_after"] <= 1
    assert 0 <= metrics["ada_changed"] <= 1
    assert 0 < metrics["ada_on_surface"] <= 1


GOLDEN = {"loss": 2.4, "ada_loss_start": 2.317, "ada_ssim_after": 0.907}
UPDATED = {"loss": 2.814, "gradient_norm": 5.417}


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_bfloat16_and_remat_train_as_float32_does():
    _, wanted = first_steps(tiny(), steps=2)
    _, remat = first_steps(tiny(**{"ada.remat": True}), steps=2)
    assert remat == pytest.approx(wanted, rel=1e-3)
    state, half = first_steps(tiny(compute_dtype="bfloat16"), steps=2)
    for name in ("loss", "ada_loss_start", "ada_ssim_after"):
        assert half[name] == pytest.approx(wanted[name], rel=0.05)
        assert half[name] != wanted[name]
    assert {a.dtype.name for a in jax.tree.leaves(state)} == {"float32", "int32"}


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_adversarial_training_raises_the_loss(norm):
    plain = tiny(method="nominal")
    attacked = tiny(method="pgd", **{"pgd.norm": norm, "pgd.epsilon": 0.5, "pgd.steps": 2})
    losses = [first_steps(config, steps=1)[1]["loss"] for config in (plain, attacked)]
    assert losses[1] > losses[0] + 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_every_batch_draws_one_of_the_networks():
    """One renders what it sees, the other black."""
    nets = {"corruption_net": ("edsr_small",) * 2, "corruption_weights": ("", "")}
    nets |= {"corruption_enlarge": (1, 1), "ssim_threshold": -1.0}
    config = tiny(**{f"ada.{name}": value for name, value in nets.items()})
    parts = setup.build(config)
    black = ada.CorruptionNet(lambda theta, x, key: 0 * x * theta["w"], {"w": jnp.ones(())})
    parts = parts._replace(nets=(parts.nets[0], black))
    _, metrics = steps_of(parts, steps=10)
    seen = [m["ada_ssim_before"] > 0.8 for m in metrics]
    assert any(seen) and not all(seen)


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_augmix_changes_the_step():
    _, plain = first_steps(tiny(method="nominal"), steps=1)
    state, mixed = first_steps(tiny(method="nominal", **{"augmix.use": True}), steps=1)
    assert int(state.step) == 1 and np.isfinite(mixed["loss"])
    assert mixed["gradient_norm"] != pytest.approx(plain["gradient_norm"], rel=1e-4)


@pytest.fixture(scope="module")
def rendered_digits(tmp_path_factory):
    """Ten copies of the digits that `tiny` trains on."""
    folder = tmp_path_factory.mktemp("deepaugment")
    config = deepaugment_config.get_config("small").unlock()
    config.update(dataset="mnist5k", train_split="train[:64]", copies=10)
    config.update(nets=("edsr_small",), weights=("",), enlarge=(1,))
    digits = sources.load("mnist5k", "train[:64]")
    assert rendered_set.write_set(digits, folder, config)
    return str(folder)


@pytest.mark.parametrize("row", cifar10.ROWS)
def test_a_row_is_what_its_words_say(row):
    config = cifar10.get_config(row)
    assert (config.method == "ada") == ("ada" in row.split("+"))
    assert config.augmix.use == ("augmix" in row)
    assert config.deepaugment.copies == (10 if "10x" in row else int("deepaugment" in row))


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
@pytest.mark.parametrize("row", ["deepaugment", "ada+deepaugment10x+augmix"])
def test_rows_with_deepaugment_run_two_steps(row, rendered_digits):
    chosen = cifar10.get_config(f"{row},small")
    config = tiny(method=chosen.method)
    config.update(deepaugment=chosen.deepaugment)
    config.augmix.use = chosen.augmix.use
    config.deepaugment.dir = rendered_digits
    state, metrics = first_steps(config, steps=2)
    assert int(state.step) == 2 and np.isfinite(metrics["loss"])
    assert ("ada" in row.split("+")) == ("ada_loss_end" in metrics)


def bounding(folder, name: str = "alexnet_small", classes: int = 10) -> str:
    """The file of an untrained network, as of a finished run."""
    net = classifiers.make(name, classes)
    init = jax.jit(net.init, static_argnames="is_training")
    params, state = init(jax.random.key(0), jnp.zeros((2, 28, 28, 3)), is_training=True)
    about = {"classifier": name, "classes": classes}
    about |= {"mean": classifiers.CIFAR10_MEAN, "std": classifiers.CIFAR10_STD}
    path = str(folder / "classifier.safetensors")
    weight_files.save_weights(path, {"params": params, "state": state}, about)
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
@pytest.mark.parametrize(
    "row",
    ["pat_self", "pat_alexnet", "rlat", "rlat+augmix", "rlat+deepaugment", "alexnet"],
)
def test_every_row_for_comparison_runs_two_steps(row, rendered_digits, tmp_path):
    chosen = cifar10.get_config(f"{row},small")
    config = tiny(method=chosen.method, classifier=chosen.classifier)
    config.update(deepaugment=chosen.deepaugment)
    config.augmix.use = chosen.augmix.use
    config.update(pat=chosen.pat, rlat=chosen.rlat)
    config.deepaugment.dir = rendered_digits
    if row == "pat_alexnet":
        config.pat.weights = bounding(tmp_path)
    state, metrics = first_steps(config, steps=2)
    assert int(state.step) == 2 and np.isfinite(metrics["loss"])
    assert metrics["loss"] > metrics.get("rlat_loss_start", 0)
    assert (config.method == "pat") == ("pat_distance" in metrics)


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_rlat_perturbs_the_views_of_augmix_s_consistency_loss():
    config = tiny(method="rlat", **{"augmix.use": True, "augmix.jsd_weight": 12.0})
    assert np.isfinite(first_steps(config, steps=1)[1]["loss"])


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_pat_changes_correctly_classified_images_only():
    config = tiny(method="pat", **{"pat.steps": 2})
    parts = setup.build(config)
    images = batching.to_float(next(batching.eval_batches(parts.train_set, batch_size=16))["image"])
    state = training.initial_state(parts.classifier, parts.optimizer, jax.random.key(0), images)
    logits_fn = jax.jit(
        lambda x: scoring.apply_classifier(parts.classifier, state.params, state.net_state, x)
    )
    y = jnp.argmax(logits_fn(images), -1).at[::2].add(1) % 10
    attack = jax.jit(training.make_attack(config, parts.classifier, ()))
    keys = jax.random.split(jax.random.key(1), len(images))
    attacked, metrics = attack(jax.random.key(0), state, (), keys, images, y)
    np.testing.assert_array_equal(attacked[::2], images[::2])
    assert np.all(np.any(attacked[1::2] != images[1::2], axis=(1, 2, 3)))
    assert metrics["distance"].shape == (len(images),)


def test_the_bounding_network_is_part_of_a_run(tmp_path):
    path = bounding(tmp_path)
    config = tiny(method="pat", **{"pat.network": "alexnet_small", "pat.weights": path})
    parts = setup.build(config)
    fields = setup.identity(parts, tuple(net.theta for net in parts.nets), state=None)
    assert fields["config.pat.network"] == "alexnet_small"
    assert len(fields["config.pat.weights_digest"]) == 64 and "config.pat.weights" not in fields
    assert not any("rlat" in field or "config.ada." in field for field in fields)
    assert setup.describe(parts, fields)["training"]["bounding_net"]
    with pytest.raises(UserError, match=r"are of alexnet_small, and config.pat.network='resnet9'"):
        setup.build(tiny(method="pat", **{"pat.network": "resnet9", "pat.weights": path}))
    with pytest.raises(UserError, match=r"config.pat.weights='.*none': .* has no weights"):
        missing = str(tmp_path / "none")
        setup.build(tiny(method="pat", **{"pat.network": "resnet9", "pat.weights": missing}))


@pytest.mark.parametrize("method", ["pat", "rlat"])
def test_networks_without_feature_layers_are_no_classifiers_of_pat_and_rlat(method, monkeypatch):
    pool = lambda x, norm_relu, tap: norm_relu(x, "bn")  # noqa: E731
    monkeypatch.setitem(classifiers._NETWORKS, "resnet9", pool)
    with pytest.raises(UserError, match="names no feature layers"):
        setup.build(tiny(method=method))


@pytest.mark.slow
def test_deepaugment_changes_the_images_and_the_run_s_identity(rendered_digits):
    plain = tiny(method="nominal")
    with_set = tiny(
        method="nominal", **{"deepaugment.copies": 2, "deepaugment.dir": rendered_digits}
    )
    identities, images = [], []
    for config in (plain, with_set):
        parts = setup.build(config)
        batch = next(train.train_batches(parts, 0))
        images.append(batch["image"])
        state = training.TrainState(0, {}, {}, ())
        identities.append(setup.identity(parts, (), state))
    changed = np.any(images[0] != images[1], axis=(1, 2, 3))
    assert 2 <= changed.sum() <= 14
    added = {"config.deepaugment.copies", "config.deepaugment.clean_too"}
    assert set(identities[1]) - set(identities[0]) == added | {"config.deepaugment.set"}


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_training_starts_from_trained_weights(tmp_path):
    first = tiny(method="nominal", epochs=0.5)
    assert train.main(first, str(tmp_path / "first")) is None
    parts = setup.build(first)
    images = batching.to_float(next(batching.eval_batches(parts.train_set, batch_size=8))["image"])
    state = training.initial_state(parts.classifier, parts.optimizer, jax.random.key(1), images)
    loaded = setup.with_weights(state, parts, str(tmp_path / "first"))
    trained, _ = weight_files.load_weights(tmp_path / "first" / "classifier.safetensors")
    chex.assert_trees_all_equal(loaded.params, trained["params"])
    chex.assert_trees_all_equal(loaded.net_state, trained["state"])
    logits, _ = parts.classifier.apply(
        trained["params"], trained["state"], None, images, is_training=False
    )
    for classes in (None, 10):
        logits_fn = scoring.load_classifier(tmp_path / "first", classes)
        chex.assert_trees_all_equal(logits_fn(images), logits)
    with pytest.raises(UserError, match=r"config\.init_weights="):
        setup.with_weights(state, parts, str(tmp_path / "none"))
    other = setup.build(tiny(method="nominal", classifier="preact_resnet20"))
    with pytest.raises(UserError, match=r"config\.init_weights="):
        setup.with_weights(state, other, str(tmp_path / "first"))
    weight_files.save_weights(tmp_path / "first" / "classifier.safetensors", trained, {"step": 1})
    with pytest.raises(UserError, match="give num_classes"):
        scoring.load_classifier(tmp_path / "first")
    # Of a run that has not ended there are only checkpoints: not what was asked for.
    (tmp_path / "first" / "classifier.safetensors").unlink()
    with pytest.raises(UserError, match=r"config\.init_weights="):
        setup.with_weights(state, parts, str(tmp_path / "first"))


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_weights_of_other_classes_are_no_start(tmp_path):
    parts = setup.build(tiny(method="nominal"))
    parts = parts._replace(
        train_set=dataclasses.replace(parts.train_set, class_names=tuple("abcdefghij"))
    )
    images = jnp.zeros((2, 32, 32, 3))
    state = training.initial_state(parts.classifier, parts.optimizer, jax.random.key(0), images)
    file = str(tmp_path / "w.safetensors")

    def save(names):
        tree = {"params": state.params, "state": state.net_state}
        weight_files.save_weights(file, tree, {"class_names": list(names)} if names else {})

    for same in ("abcdefghij", "0123456789", ""):  # By name, by number, of an older version.
        save(same)
        setup.with_weights(state, parts, file)
    save("abcdefghji")
    with pytest.raises(UserError, match=r"config\.init_weights=.* on the classes 'a', .*'j', 'i'"):
        setup.with_weights(state, parts, file)


def test_weights_of_another_number_of_classes_get_a_new_last_layer(tmp_path, caplog):
    caplog.set_level("INFO", "absl")
    parts = setup.build(tiny(method="nominal"))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

    def variables(classes, fill):
        net = scoring.make_classifier(parts.config, classes)
        init = functools.partial(net.init, is_training=True)
        shapes = jax.eval_shape(init, jax.random.key(0), images)
        return jax.tree.map(lambda a: np.full(a.shape, fill, a.dtype), shapes)

    state = training.TrainState(0, *variables(10, 1), ())
    params, net_state = variables(4, 2)
    file, names = str(tmp_path / "w.safetensors"), {"class_names": list("abcd")}
    for about in (names, {"classes": 4}, names | {"classes": 4}):
        weight_files.save_weights(file, {"params": params, "state": net_state}, about)
        caplog.clear()
        found = setup.with_weights(state, parts, file)
        expected = params | {"logits": state.params["logits"]}
        chex.assert_trees_all_equal(found.params, expected)
        chex.assert_trees_all_equal(found.net_state, net_state)
        assert "on 4 classes, and config.dataset has 10: the last layer (logits) is new" in (
            caplog.text
        )


def test_weights_of_another_classifier_of_the_same_shapes_are_no_start(tmp_path):
    config = tiny(method="nominal", classifier="preact_resnet18")
    net = scoring.make_classifier(config, 10)
    init = functools.partial(net.init, is_training=True)
    shapes = jax.eval_shape(init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    params, net_state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    tree = {"params": params, "state": net_state}
    file = tmp_path / "w.safetensors"
    weight_files.save_weights(file, tree, {"classifier": "preact_resnet18_v2"})
    with pytest.raises(UserError, match="classifier=preact_resnet18_v2, but this config has"):
        scoring.load_variables(config, net, (32, 32, 3), file)


def test_training_images_are_not_evaluated_on(tmp_path):
    with pytest.raises(UserError, match=r"32 of the 40 images of config\.eval_split="):
        train.main(tiny(eval_split="train[32:72]"), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_runs_that_differ_in_seed_alone_have_one_recipe(tmp_path):
    def described(**changes):
        parts = setup.build(tiny(method="nominal", **changes))
        state = training.TrainState(0, {"w": jnp.full(1, parts.config.seed)}, {}, ())
        return setup.describe(parts, setup.identity(parts, (), state))

    first, second = (described(seed=seed) for seed in (0, 1))
    assert first == second and first["class_names"] == [str(i) for i in range(10)]
    assert described(learning_rate=0.3)["recipe"] != first["recipe"]
    other = described(train_split="train[64:128]")
    assert other["training"]["data"] != first["training"]["data"]
    # Each starts from weights of its own seed.
    files = []
    for seed, recipe in enumerate([first["recipe"]] * 2 + [other["recipe"]]):
        files.append(str(tmp_path / f"{seed}.safetensors"))
        weight_files.save_weights(files[-1], {"w": np.ones(1)}, {"recipe": recipe})
    tuned = [described(seed=seed, init_weights=file) for seed, file in enumerate(files)]
    assert tuned[0] == tuned[1] and tuned[0]["training"]["init_weights"] == first["recipe"]
    assert tuned[2]["recipe"] != tuned[0]["recipe"]


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_the_weights_of_a_run_are_described_and_kept_without_its_checkpoints(tmp_path):
    config = tiny(method="nominal", epochs=0.25)
    assert train.main(config, str(tmp_path)) is None
    train_set = sources.load("mnist5k", config.train_split)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["training"] == {"data": train_set.fingerprint}
    about = scoring.metadata(tmp_path)
    assert about["training"] == results["training"] and about["train_split"] == "train[:64]"
    assert about["class_names"] == results["class_names"]
    (tmp_path / "classifier.safetensors").rename(tmp_path / "moved")
    assert scoring.metadata(tmp_path)["class_names"] == about["class_names"]
    (tmp_path / "moved").rename(tmp_path / "classifier.safetensors")
    shutil.rmtree(tmp_path / "checkpoints")
    before = (tmp_path / "config.json").read_bytes()
    config.seed = 7
    with pytest.raises(UserError, match=r"has classifier\.safetensors and no checkpoints"):
        train.main(config, str(tmp_path))
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_a_run_does_not_go_on_with_one_other_label(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (400, 32, 32, 3), np.uint8)
    config = tiny(method="nominal", epochs=0.05, dataset="npz", data_dir=str(tmp_path / "x.npz"))
    config.update(train_split="train", eval_split="test")
    labels = np.arange(400) % 10
    arrays = {"train_images": images, "test_images": images[:20] ^ 1, "test_labels": labels[:20]}
    np.savez(config.data_dir, train_labels=labels, **arrays)
    assert train.main(config, str(tmp_path / "run")) is None
    labels[2] = 3
    np.savez(config.data_dir, train_labels=labels, **arrays)
    with pytest.raises(UserError, match="training data"):
        train.main(config, str(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_results_of_one_run_with_other_bookkeeping(tmp_path):
    """A repeated command is of its own config, keeps what was measured, and adds up the time."""
    config, file = tiny(method="nominal", epochs=0.5), tmp_path / "results.json"
    assert train.main(config, str(tmp_path)) is None
    before = json.loads(file.read_text()) | {"lp_accuracy": {}, "seconds": 1e6}
    file.write_text(json.dumps(before))
    config.eval_batch_size = 4
    assert train.main(config, str(tmp_path)) is None
    after = json.loads(file.read_text())
    assert after["config"] == json.loads(json.dumps(config.to_dict())) != before["config"]
    assert {k: v for k, v in after.items() if k != "config"} == {
        k: v for k, v in before.items() if k != "config"
    }
    config.eval_split = "test[:16]"
    with pytest.raises(UserError, match="move it away"):
        train.main(config, str(tmp_path))
    assert json.loads(file.read_text()) == after


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts():
    config = tiny(method="nominal")
    parts = setup.build(config)
    done = training.TrainState(np.int32(parts.total_steps), {}, {}, ())
    saved = []
    checkpoints = types.SimpleNamespace(save=lambda *args, **kwargs: saved.append(args))
    log = types.SimpleNamespace(flush=lambda: None)
    task = train.make_task(parts, (), jax.random.key(0))
    extra = {"pending": [], "seconds": 100.0}
    trained = loop._train(task, done, extra, checkpoints, log)
    assert 100 < trained.seconds < 200 and not trained.status
    assert saved[0][2]["seconds"] == trained.seconds


def test_networks_named_twice_have_results_each():
    config = tiny(**{"ada.corruption_net": ("cae", "edsr_small", "cae")})
    assert config_checks.net_labels(config.ada) == ["cae_1", "edsr_small", "cae_3"]


def test_a_microbatch_is_part_of_a_run_where_it_has_its_own_statistics():
    for batch_norm, part in (("batch", True), ("running", False)):
        config = tiny(**{"ada.batch_norm": batch_norm})
        parts = setup.build(config)
        known = setup.identity(parts, (), training.TrainState(0, {}, {}, ()))
        assert ("config.ada.microbatch" in known) == part


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_each_second_example_is_attacked_and_the_others_stay_as_they_are():
    # 'sign' would enlarge rounding errors, which another batch size changes.
    config = tiny(**{"ada.batch_norm": "running", "ada.steps": 1, "ada.step_rule": "l2"})
    parts = setup.build(config)
    batch = next(train.train_batches(parts, 0))
    x, y = batching.to_float(batch["image"]), jnp.asarray(batch["label"])
    state = training.initial_state(parts.classifier, parts.optimizer, jax.random.key(1), x)
    thetas = [net.theta for net in parts.nets]
    example_keys = jax.random.split(jax.random.key(2), len(y))

    def attacked(every):
        config.ada.every = every
        attack = training.make_attack(config, parts.classifier, [net.apply for net in parts.nets])
        return jax.jit(attack)(jax.random.key(0), state, thetas, example_keys, x, y)

    (all_images, all_metrics), (images, metrics) = attacked(1), attacked(2)
    equal = np.abs(images[::2] - all_images[::2]).max(axis=(1, 2, 3)) < 1e-5
    # Where a ReLU's input is zero but for rounding, the gradient of that example differs.
    assert sum(equal) >= len(equal) - 1
    np.testing.assert_array_equal(images[1::2], x[1::2])
    assert np.abs(images[::2] - x[::2]).max(axis=(1, 2, 3)).min() > 1e-3
    chex.assert_trees_all_close(
        jax.tree.map(lambda a: a[equal], metrics),
        jax.tree.map(lambda a: a[::2][equal], all_metrics),
        atol=1e-4,
    )


@pytest.mark.parametrize("field", ["ada.every", "ada.group"])
def test_a_later_field_is_part_of_a_run_where_it_is_not_its_default(field):
    for value, part in ((1, False), (2, True)):
        parts = setup.build(tiny(**{field: value}))
        known = setup.identity(parts, (), training.TrainState(0, {}, {}, ()))
        assert (f"config.{field}" in known) == part  # A run from before it must still go on.


@pytest.mark.parametrize(
    ("field", "default", "other"),
    [("ada.leaves", "", "b$"), ("ada.choice", ("delta",), ("delta", "mixing"))],
)
def test_leaves_and_choice_are_part_of_a_run_where_they_are_not_the_default(field, default, other):
    for value, part in ((default, False), (other, True)):
        parts = setup.build(tiny(**{field: value}))
        known = setup.identity(parts, (), training.TrainState(0, {}, {}, ()))
        assert (f"config.{field}" in known) == part


def test_leaves_must_match_in_each_network():
    nets = {"ada.corruption_net": ("edsr_small", "cae"), "ada.corruption_weights": ("", "")}
    config = tiny(**nets, **{"ada.corruption_enlarge": (1, 1), "ada.leaves": "^tail/"})
    with pytest.raises(UserError, match=r"ada\.leaves='\^tail/' matches .* 42 paths"):
        config_checks.validate(config)


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_advmix_alone_and_with_ada_trains():
    alone = {"ada.choice": ("mixing",), "ada.leaves": "w$"}
    for changes in (alone, {"ada.choice": ("delta", "mixing")}):
        state, metrics = first_steps(tiny(**changes), steps=2)
        assert int(state.step) == 2
        # Far above rounding errors: 0.0014 with the mixing weights alone.
        assert metrics["ada_loss_end"] > metrics["ada_loss_start"] + 3e-4
        assert np.all(np.isfinite(list(metrics.values())))


def test_the_nominal_line_trains_without_a_corruption_network():
    state, metrics = first_steps(tiny(method="nominal"), steps=1)
    assert int(state.step) == 1
    assert np.isfinite(metrics["loss"])
    assert not any(name.startswith("ada_") for name in metrics)


_DEVICES = """
import sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
sys.path.insert(0, "tests")
import test_train
from ada_jax.nets import weight_files, winograd
# Four devices have too few images each for winograd, whose rounding one device would have alone.
winograd.pays = lambda *_: False
# Rounding grows with every step, and the second is the first that moves the parameters.
config = test_train.tiny(cross_replica_bn=True, learning_rate=0.001)
state, _ = test_train.first_steps(config, steps=2)
weight_files.save_weights(sys.argv[2], {"params": state.params, "net": state.net_state}, {})
"""


@pytest.mark.slow
def test_one_device_and_four_train_alike(tmp_path):
    files = []
    for count in (1, 4):
        files.append(tmp_path / f"{count}.safetensors")
        subprocess.run(
            [sys.executable, "-c", _DEVICES, str(count), str(files[-1])], cwd=ROOT, check=True
        )
    one, four = (
        np.concatenate(
            [leaf.ravel() for leaf in jax.tree.leaves(weight_files.load_weights(path)[0])]
        )
        for path in files
    )
    # AdA's sign steps turn the rounding of single weights into 1e-5 to 4e-4, depending on the
    # CPU, so all are taken together: 5e-5, and 3.4e-3 with the statistics of each device alone.
    assert np.linalg.norm(four - one) < 4e-4 * np.linalg.norm(one)


def test_evaluated_images_have_the_size_of_the_training_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    labels = np.arange(40) % 4
    sets = {"train_images": images, "train_labels": labels, "test_labels": labels}
    np.savez(tmp_path / "x.npz", **sets, test_images=images[:, ::-1, :12])
    fields = {"dataset": "npz", "data_dir": str(tmp_path / "x.npz")}
    said = (
        r"'test' has images of shape \[16, 12, 3\] and config\.train_split='train' of \[16, 16, 3\]"
    )
    with pytest.raises(UserError, match=said):
        setup.build(tiny(**fields, train_split="train", eval_split="test"))


def test_evaluation_counts_every_example_once():
    config = tiny(eval_split="test[:37]")
    parts = setup.build(config)
    images = batching.to_float(next(batching.eval_batches(parts.train_set, batch_size=8))["image"])
    state = training.initial_state(parts.classifier, parts.optimizer, jax.random.key(0), images)
    result = train.clean_error(parts, sharding.replicate(state))
    batch = next(batching.eval_batches(parts.eval_set, batch_size=37))
    logits, _ = parts.classifier.apply(
        state.params,
        state.net_state,
        None,
        batching.to_float(batch["image"]),
        is_training=False,
    )
    assert result["examples"] == 37
    assert result["wrong"] == np.sum(np.argmax(logits, -1) != batch["label"])
    assert result["error"] == pytest.approx(100 * result["wrong"] / 37)


# ------------------------------------------------------------------------ runs


def comparable(workdir) -> list[dict]:
    """The run's records without what depends on the clock."""
    clock = ("examples_per_second", "input_wait_percent")
    return [{k: v for k, v in r.items() if k not in clock} for r in logbook.read(str(workdir))]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A folder with a whole run in a process of its own and what it printed, and its flags."""
    corrupted = {"corruption_eval_epochs": 2.0, "corruption_eval_examples": 3}
    flags = flags_of(tiny(eval_sets=("clean", "c"), eval_split="test[:16]", **corrupted))
    with shared_folder(tmp_path_factory, "runs") as folder:
        if not (printed := folder / "printed.txt").exists():
            done = run(folder / "whole", *flags)
            assert done.returncode == 0, done.stderr
            printed.write_text(done.stdout)
    return folder, flags


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(uninterrupted):
    folder, _ = uninterrupted
    printed = (folder / "printed.txt").read_text()
    files = {p.name for p in (folder / "whole").iterdir()}
    promised = (
        "config.json metrics.jsonl results.json adversarial_edsr_small.png classifier.safetensors"
    )
    assert files >= set(promised.split()) | {"checkpoints", "tensorboard"}
    results = json.loads((folder / "whole" / "results.json").read_text())
    assert results["step"] == 8
    evaluated = [results["clean"], *itertools.chain(*results["corruptions"].values())]
    assert [e["examples"] for e in evaluated] == [16] * 76
    assert f"{results['mce_unnormalised']:.2f}%" in printed and "clean error" in printed
    records = comparable(folder / "whole")
    kinds = [(3, "train"), (4, "eval"), (6, "train"), (8, "train"), (8, "eval"), (8, "corruptions")]
    assert [(r["step"], r["kind"]) for r in records] == kinds
    *_, clean, corrupted = records
    assert (clean["wrong"], clean["error"]) == tuple(
        results["clean"][k] for k in ("wrong", "error")
    )
    errors = [v for k, v in corrupted.items() if k.startswith("error/")]
    assert len(errors) == 75 and corrupted["mce"] == pytest.approx(np.mean(errors))
    assert set(np.round(errors, 3)) <= {0, 33.333, 66.667, 100}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random_moments_a_run_ends_bitwise_equal(uninterrupted):
    folder, flags = uninterrupted
    kill_and_restart(folder / "killed", flags, kills=3, moments=(3, 14), signals=[signal.SIGKILL])
    assert_alike(folder / "whole", folder / "killed")


@pytest.mark.skipif(
    "ADA_JAX_KILLS" not in os.environ, reason="ADA_JAX_KILLS=50 takes a quarter of an hour"
)
@pytest.mark.timeout(7200)
def test_the_quickstart_killed_many_times_ends_as_if_it_had_not_been(tmp_path):
    flags = [f"--config.compilation_cache={tmp_path}/cache"]
    done = run(tmp_path / "whole", *flags)
    assert done.returncode == 0, done.stderr
    kill_and_restart(
        tmp_path / "killed",
        flags,
        kills=int(os.environ["ADA_JAX_KILLS"]),
        moments=(1, 14),
        signals=[signal.SIGKILL, signal.SIGTERM],
    )
    assert_alike(tmp_path / "whole", tmp_path / "killed")
    whole, killed = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")
    )
    assert whole["clean"] == killed["clean"] and whole["corruptions"] == killed["corruptions"]


def kill_and_restart(workdir, flags, *, kills: int, moments, signals) -> None:
    """Runs the same command until it has been killed so often, and then to its end."""
    draw, killed = random.Random(0), 0
    for _ in range(4 * kills):
        process = subprocess.Popen(
            command(workdir, *flags),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            limit = draw.uniform(*moments) if killed < kills else 600
            assert process.wait(timeout=limit) == 0
            if killed == kills:
                return
        except subprocess.TimeoutExpired:
            killed += 1
            sent = draw.choice(signals)
            process.send_signal(sent)
            # SIGTERM before a run listens to it ends it as it ends any program.
            assert process.wait(timeout=300) in (-sent, distributed.INTERRUPTED)
    raise AssertionError(f"only {killed} of {kills} kills before the end")


def assert_alike(*workdirs) -> None:
    """The same weights, bit for bit, and the same records."""
    chex.assert_trees_all_equal(
        *(weight_files.load_weights(w / "classifier.safetensors") for w in workdirs)
    )
    one, other = (comparable(w) for w in workdirs)
    assert one == other


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    workdir, longer = tmp_path / "run", flags_of(tiny(method="nominal", epochs=200.0))
    process = subprocess.Popen(command(workdir, *longer), cwd=ROOT, stderr=subprocess.PIPE)
    while not list(workdir.glob("checkpoints/[0-9]*")):
        time.sleep(0.2)
        assert process.poll() is None
    # Twice, as schedulers and process groups do.
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == distributed.INTERRUPTED
    step = int(re.search(rb"saved step (\d+); run the same command again", errors)[1])
    steps = sorted(int(p.name) for p in workdir.glob("checkpoints/[0-9]*"))
    assert steps[-1] == step < 800
    process = subprocess.Popen(command(workdir, *longer), cwd=ROOT, stderr=subprocess.PIPE)
    seen = b""
    while b"Going on from step" not in seen:
        seen += process.stderr.readline()
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert f"Going on from step {step} ".encode() in seen


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_a_signal_during_the_last_step_is_not_forgotten(tmp_path, monkeypatch):
    config, make = tiny(method="nominal", epochs=0.0, train_steps=2), train.compile_update_step

    def terminated_in_the_second(parts):
        update_step, steps = make(parts), itertools.count(1)

        def update(*args):
            if next(steps) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return update_step(*args)

        return update

    with monkeypatch.context() as patch:
        patch.setattr(train, "compile_update_step", terminated_in_the_second)
        assert train.main(config, str(tmp_path)) == distributed.INTERRUPTED
    assert not (tmp_path / "results.json").exists()
    assert train.main(config, str(tmp_path)) is None
    assert json.loads((tmp_path / "results.json").read_text())["step"] == 2


@pytest.mark.slow
def test_a_full_disk_costs_one_sentence_and_the_same_command_goes_on(small_disk):
    workdir, flags = small_disk / "run", flags_of(tiny(method="nominal"))
    done = run(workdir, *flags)
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()
    assert said[-1].startswith("error: ") and "No space left" in said[-1]
    assert "Traceback" not in done.stderr
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    done = here(workdir, *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads((workdir / "results.json").read_text())["clean"]["examples"] == 40


@pytest.mark.slow
def test_a_run_in_a_bucket_is_stopped_and_ends_as_one_on_this_machine(uninterrupted, cloud):
    folder, flags = uninterrupted
    workdir = cloud.folder()
    whole, saved = str(folder / "whole"), f"{workdir}/checkpoints/2/commit_success.txt"
    process = subprocess.Popen(command(workdir, *flags), cwd=ROOT, stderr=subprocess.PIPE)
    while not cloud.has(saved):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == distributed.INTERRUPTED, errors.decode()
    done = run(workdir, *flags)
    assert done.returncode == 0, done.stderr
    assert "Going on from step" in done.stderr and f"of {workdir}" in done.stderr
    assert comparable(workdir) == comparable(whole)
    chex.assert_trees_all_equal(
        *(weight_files.load_weights(f"{w}/classifier.safetensors") for w in (whole, workdir))
    )
    assert cloud.content(f"{workdir}/adversarial_edsr_small.png").startswith(b"\x89PNG")

    theirs = json.loads(paths.read(f"{whole}/results.json"))
    ours = json.loads(cloud.content(f"{workdir}/results.json"))
    compared = ("clean", "corruptions", "weights_digest")
    assert {k: ours[k] for k in compared} == {k: theirs[k] for k in compared}
    cloud.remove(f"{workdir}/results.json")
    assert run_here("evaluate", f"--workdir={workdir}", "--sets=clean").returncode == 0
    (row,) = results_files.read(workdir)
    assert row.fields["clean"] == theirs["clean"]


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["nowhere", "secret", "shown"])
def test_a_bucket_that_cannot_be_used_is_named_before_the_first_step(cloud, bucket):
    done = here(f"gs://{bucket}/run")
    assert_mistake(done, f"gs://{bucket}/run")
    assert "step 1" not in done.stderr


@pytest.mark.slow
def test_other_data_in_the_same_workdir_are_refused(uninterrupted, tmp_path):
    folder, flags = uninterrupted
    shutil.copytree(folder / "whole", tmp_path / "whole")
    done = here(tmp_path / "whole", *flags, "--config.train_split=train[64:128]")
    assert_mistake(done, "config.train_split")
    rng = np.random.default_rng(0)
    for name in "ab":
        images = rng.integers(0, 256, (40, 32, 32, 3), np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(40) % 4)
    npz = ["--config.dataset=npz", "--config.train_split=train", "--config.eval_split=test"]
    npz += ["--config.train_steps=1", "--config.epochs=0", "--config.eval_sets=clean"]
    npz += ["--config.method=nominal"]
    first, second = (
        here(tmp_path / "npz", *flags, *npz, f"--config.data_dir={tmp_path}/{name}.npz")
        for name in "ab"
    )
    assert first.returncode == 0, first.stderr
    assert_mistake(second, "training data")


@pytest.mark.slow
def test_another_architecture_in_the_same_workdir_is_refused(uninterrupted, tmp_path):
    folder, flags = uninterrupted
    workdir = shutil.copytree(folder / "whole", tmp_path / "whole")
    before = (workdir / "config.json").read_text()
    done = here(workdir, *flags, "--config.classifier=preact_resnet20")
    assert_mistake(done, "config.classifier")
    assert (workdir / "config.json").read_text() == before


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    folder, flags = tmp_path, flags_of(tiny(method="nominal"))
    diverging = ["--config.learning_rate=1e30", "--config.warmup_epochs=0"]
    done = here(folder / "nan", *flags, *diverging, "--config.checkpoint_epochs=0.25")
    assert_mistake(done, "--workdir")
    step = int(re.search(r"stopped at step (\d+)", done.stderr)[1])
    kept = [int(p.name) for p in (folder / "nan" / "checkpoints").iterdir() if p.name.isdigit()]
    assert kept and max(kept) < step
