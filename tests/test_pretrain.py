"""Pre-training: it learns, resumes exactly, and writes weights that the rest can load."""

import importlib.util
import io
import json
import os
import pathlib
import re
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ada_jax import pretrain
from ada_jax.data import batching, core, tfds_sets, tiles
from ada_jax.errors import UserError
from ada_jax.nets import corruption_nets, layers, weight_files
from ada_jax.run import distributed, logbook
from experiments import pretrain_cae

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
TINY = {
    "tiny": {"blocks": 1, "features": 4, "scale": 1},
    "tiny_x2": {"blocks": 1, "features": 4, "scale": 2},
}


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch):
    monkeypatch.setattr(corruption_nets, "PRESETS", corruption_nets.PRESETS | TINY)


def get_config(preset="tiny", **fields):
    name = "pretrain_cae" if preset == "cae" else "pretrain_edsr"
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(preset)
    small = {
        "batch_size": 4,
        "patch": 12,
        "sr_batch_size": 2,
        "sr_patch": 16,
        "train_steps": 6,
        "warmup_steps": 0,
        "log_steps": 2,
        "eval_steps": 0,
        "eval_batch_size": 1000,
        "checkpoint_steps": 0,
        "compilation_cache": "",
    }
    config.update(small | fields)
    return config


def weights_of(workdir, preset="tiny"):
    return weight_files.load_weights(workdir / f"{preset}.safetensors")


def arrays_equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("preset", ["edsr_small", "edsr_baseline", "edsr_baseline_x4", "cae"])
def test_the_experiment_is_valid_for_every_preset(preset):
    config = get_config(preset)
    assert config.is_locked and preset in config.name
    pretrain.validate(config)


@pytest.mark.slow
def test_updates_lower_the_loss():
    config = get_config("tiny_x2", learning_rate=0.01)
    parts = pretrain.build(config)
    update_step = jax.jit(pretrain.make_update_step(config, parts.net, parts.optimizer))
    first = state = pretrain.initial_state(parts.net, parts.optimizer, jax.random.key(0))
    count = parts.examples
    batch = next(batching.train_batches(parts.train_set, batch_size=count, seed=0))
    batch = {"image": batch["image"]}

    seen = []
    for _ in range(3):
        state, metrics = update_step(state._replace(step=first.step), batch, jax.random.key(1))
        seen.append({name: float(value) for name, value in metrics.items()})
    assert seen[2]["loss"] < seen[1]["loss"] < seen[0]["loss"]
    parts_of_loss = seen[0]["reconstruction_loss"] + config.sr_weight * seen[0]["sr_loss"]
    assert seen[0]["loss"] == pytest.approx(parts_of_loss, rel=1e-5)


@pytest.mark.slow
def test_a_run_stopped_and_resumed_equals_one_uninterrupted(tmp_path, monkeypatch):
    config = get_config("tiny_x2", checkpoint_steps=2)
    pretrain.main(config, str(tmp_path / "whole"))

    write = logbook.Logbook.write

    def write_and_terminate(self, step, kind, metrics):
        write(self, step, kind, metrics)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(logbook.Logbook, "write", write_and_terminate)
    assert pretrain.main(config, str(tmp_path / "halves")) == distributed.INTERRUPTED
    assert not (tmp_path / "halves" / "tiny_x2.safetensors").exists()
    monkeypatch.undo()
    tiny = corruption_nets.PRESETS | TINY
    monkeypatch.setattr(corruption_nets, "PRESETS", tiny)
    assert pretrain.main(config, str(tmp_path / "halves")) is None

    (whole, about), (halves, _) = (weights_of(tmp_path / w, "tiny_x2") for w in ("whole", "halves"))
    assert arrays_equal(whole, halves)
    assert about["steps"] == 6 and about["scale"] == 2 and about["sr_psnr"] > 0
    records = [
        [(r["step"], r["kind"], r.get("loss"), r.get("psnr")) for r in logbook.read(workdir)]
        for workdir in (tmp_path / "whole", tmp_path / "halves")
    ]
    assert records[0] == records[1]
    assert [r[:2] for r in records[0]] == [(2, "train"), (4, "train"), (6, "train"), (6, "eval")]

    with pytest.raises(UserError, match=r"config\.noise"):
        pretrain.main(get_config("tiny_x2", noise=0.5), str(tmp_path / "whole"))


@pytest.mark.slow
def test_float16_weights_load_as_float32(tmp_path, capsys):
    config = get_config(train_steps=2, store_dtype="float16")
    pretrain.main(config, str(tmp_path))
    assert "SSIM" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["train_steps"] == 2

    path = tmp_path / "tiny.safetensors"
    stored, about = weight_files.load_weights(path)
    net = corruption_nets.make("tiny", weights=str(path))
    assert {a.dtype.name for a in jax.tree.leaves(stored)} == {"float16"}
    assert {a.dtype.name for a in jax.tree.leaves(net.theta)} == {"float32"}
    assert arrays_equal(jax.tree.map(np.float32, stored), net.theta)
    assert net.apply(net.theta, jnp.ones((1, 12, 12, 3)), None).shape == (1, 12, 12, 3)
    assert 0 < about["psnr"] < 100 and about["features"] == 4

    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="sha256"):
        corruption_nets.make("tiny", weights=str(path))


def test_evaluation_counts_every_image_once():
    config = get_config()
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    dataset = core.from_arrays(images, np.zeros(5, int), class_names=("photo",))
    net = layers.Architecture(None, lambda theta, x, key=None: x + theta, 1)
    eval_step = jax.jit(pretrain.make_eval_step(config, net))
    quality = pretrain.evaluate(eval_step, jnp.float32(0), dataset, batch_size=3)
    assert quality == pytest.approx({"examples": 5, "psnr": 100, "ssim": 1})
    in_one = pretrain.evaluate(eval_step, jnp.float32(0.01), dataset, batch_size=5)
    assert in_one == pytest.approx(
        pretrain.evaluate(eval_step, jnp.float32(0.01), dataset, batch_size=2), rel=1e-5
    )
    assert in_one["psnr"] == pytest.approx(40, abs=0.1)


def test_patches_are_cut_and_turned_in_eight_ways():
    image = jnp.arange(5 * 6 * 3, dtype=jnp.float32).reshape(1, 5, 6, 3)
    x = jnp.repeat(image, 400, 0)
    patches = pretrain.random_patches(jax.random.key(0), x, size=4)
    assert len(np.unique(np.asarray(patches).reshape(400, -1), axis=0)) == 8 * 2 * 3
    whole = pretrain.random_patches(jax.random.key(1), x[:, :, :5], size=5)
    assert len(np.unique(np.asarray(whole).reshape(400, -1), axis=0)) == 8
    assert (jnp.sort(whole.ravel()[: 5 * 5 * 3]) == jnp.sort(image[0, :, :5].ravel())).all()


def test_noise_is_as_strong_as_it_says():
    x = jnp.full((500, 8, 8, 3), 0.5)
    deviation = jnp.std(pretrain.add_noise(jax.random.key(0), x, 0.1) - x, (1, 2, 3))
    assert 0 < deviation.min() < 0.01 and 0.09 < deviation.max() < 0.12
    assert jnp.mean(deviation) == pytest.approx(0.05, abs=0.005)
    assert (pretrain.add_noise(jax.random.key(0), x, 0.0) == x).all()


def test_tiles_cover_the_photographs_and_hold_one_out():
    photo = tiles.photo("chelsea")
    squares = tiles.cut(photo, side=64, step=32, most=1000)
    assert (squares[0] == photo[:64, :64]).all() and (squares[-1] == photo[-64:, -64:]).all()
    assert squares.dtype == np.uint8 and len(squares) == 9 * 14
    few = tiles.cut(photo, side=64, step=32, most=7)
    assert len(few) == 7 and (few[0] == squares[0]).all() and (few[-1] == squares[-1]).all()
    assert not set(tiles.PHOTOS["train"]) & set(tiles.PHOTOS["test"])


def test_schedules():
    cosine = pretrain.learning_rate_schedule(
        get_config(train_steps=10, warmup_steps=2, learning_rate=0.5)
    )
    rates = [float(cosine(step)) for step in range(11)]
    assert rates[:3] == [0, 0.25, 0.5] and rates[10] == 0
    assert rates[2:] == sorted(rates[2:], reverse=True)
    halving = pretrain.learning_rate_schedule(
        get_config(schedule="halving", halve_steps=2, learning_rate=1.0)
    )
    assert [float(halving(step)) for step in range(5)] == [1, 1, 0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"corruption_net": "vdsr"}, r"corruption_net='vdsr' is unknown: choose one of "),
        ({"dataset": "vimeo"}, r"config\.dataset='vimeo' is unknown: choose one of photos, div2k"),
        ({"dataset": "div2k", "data_dir": "/none"}, r"'div2k' is not in '/none/div2k"),
        ({"loss": "l3"}, r"config\.loss='l3' is unknown: choose one of l1, mse"),
        ({"weight_decay": -1.0}, r"config\.weight_decay=-1\.0 must be 0"),
        ({"train_split": "train[:10]"}, r"config\.train_split='train\[:10\]' is unknown"),
        ({"patch": 8}, r"config\.patch=8 is too small to measure SSIM: use 11 pixels or more"),
        ({"sr_patch": 15}, r"config\.sr_patch=15 must be a positive multiple of .* scale, 2"),
        ({"noise": -0.1}, r"config\.noise=-0\.1 must be in \[0, 1\]"),
        ({"learning_rate": 0.0}, r"config\.learning_rate=0\.0 must be positive"),
        ({"warmup_steps": 6}, r"config\.warmup_steps=6 must be .* below config\.train_steps=6"),
        ({"schedule": "linear"}, r"config\.schedule='linear' is unknown"),
        ({"store_dtype": "int8"}, r"config\.store_dtype='int8' is unknown"),
        ({"batch_size": 0}, r"config\.batch_size=0 must be 1 or more"),
        ({"seed": -1}, r"config\.seed=-1 must be in 0\.\.2\*\*32-1"),
        ({"image_size": 0}, r"config\.image_size=0 must be 1 to 4096 pixels"),
        ({"patch": 201}, r"squares of 402 pixels, more than a photograph of 400x600 has"),
    ],
)
def test_bad_configs_are_refused_in_a_sentence(fields, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        pretrain.main(get_config("tiny_x2", **fields), str(tmp_path))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_patches_that_the_cae_does_not_take_are_refused():
    for patch in (30, 45):
        with pytest.raises(UserError, match=rf"config\.patch={patch} does not fit the CAE: use "):
            pretrain.validate(get_config("cae", patch=patch))
    pretrain.validate(get_config("cae", patch=12))


def test_training_images_are_not_held_out(tmp_path):
    fields = {"dataset": "mnist5k", "train_split": "train[:40]", "eval_split": "train[30:50]"}
    with pytest.raises(UserError, match=r"10 of the 20 images of config\.eval_split="):
        pretrain.main(get_config(**fields), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_photographs_in_both_slices_are_not_held_out(tmp_path, monkeypatch):
    """Tiles of both splits may be cut at different places, and none have equal pixels."""
    rng, files = np.random.default_rng(0), []
    for _ in range(3):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)).save(file, "PNG")
        files.append({"hr": file.getvalue()})

    class Records(list):
        dataset_info = types.SimpleNamespace(full_name="div2k/bicubic_x2/2.0.0")

    def read(name, split, data_dir, image_key):
        start, stop = map(int, re.findall(r"\d+", split))
        found = Records(files[start:stop])
        found.split = split
        return found

    monkeypatch.setattr(tfds_sets, "_tfds_records", read)
    fields = {"dataset": "div2k", "train_split": "train[0:2]", "eval_split": "train[1:3]"}
    with pytest.raises(UserError, match=r"of the \d+ images of config\.eval_split='train\[1:3\]'"):
        pretrain.main(get_config(**fields), str(tmp_path / "run"))
    config = get_config(**fields)
    config.eval_split = "train[2:3]"
    train_set, eval_set = (
        pretrain.load_images(config, split, size=16)
        for split in (config.train_split, config.eval_split)
    )
    assert core.overlap(train_set, eval_set) == (0, 0)
    assert set(train_set.members) == {0, 1} and set(eval_set.members) == {2}


def test_tiles_beyond_the_memory_are_named(monkeypatch):
    memory = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 500}
    monkeypatch.setattr(pretrain.os, "sysconf", memory.get)
    with pytest.raises(UserError, match=r"config\.tiles=64 makes over .* 'train', .* to 2\."):
        pretrain.load_images(get_config(dataset="photos", tiles=64), "train", size=32)


def test_patches_larger_than_the_images_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.full((20, 14, 14, 3), 9, np.uint8), labels=[0, 1] * 10)
    fields = {"dataset": "npz", "data_dir": str(tmp_path / "x.npz"), "patch": 15}
    with pytest.raises(UserError, match=r"config\.patch=15 .*larger than the images of x, which "):
        pretrain.build(get_config(**fields))


def test_batches_larger_than_the_training_set_are_refused(tmp_path):
    images = np.arange(20, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 14, 14, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=[0, 1] * 10)
    fields = {"dataset": "npz", "data_dir": str(tmp_path / "x.npz"), "batch_size": 19}
    with pytest.raises(UserError, match=r"config\.batch_size=19 .* than the 18 images of"):
        pretrain.build(get_config(**fields))


def test_the_config_of_the_cae_is_not_for_other_networks():
    with pytest.raises(ValueError, match=r"use --config=experiments/pretrain_edsr\.py:edsr_small"):
        pretrain_cae.get_config("edsr_small")


@pytest.mark.slow
def test_the_cae_learns_from_its_bits_and_is_measured():
    config = get_config("cae", learning_rate=1e-3, train_steps=2)
    parts = pretrain.build(config)
    state = pretrain.initial_state(parts.net, parts.optimizer, jax.random.key(0))
    update_step = jax.jit(pretrain.make_update_step(config, parts.net, parts.optimizer))
    batch = next(batching.train_batches(parts.train_set, batch_size=4, seed=0))
    seen = []
    for _ in range(4):
        state, metrics = update_step(state, {"image": batch["image"]}, jax.random.key(1))
        seen.append(float(metrics["loss"]))
    assert seen[-1] < seen[0] and "sr_loss" not in metrics
    images = {"image": batch["image"], "mask": np.ones(4, np.float32)}
    quality = jax.jit(pretrain.make_eval_step(config, parts.net))(state.theta, images)
    assert quality["examples"] == 4 and 0 < quality["psnr"] / 4 < 30
