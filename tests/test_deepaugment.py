"""DeepAugment's sets: made in shards, resumed, shared by processes, checked before use."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from ada_jax import deepaugment
from ada_jax.augment import rendered_set, rendering
from ada_jax.data import core, sources
from ada_jax.errors import UserError
from ada_jax.nets import corruption_nets
from ada_jax.run import cli
from experiments import deepaugment as experiment
from tests.conftest import run_here

ROOT = pathlib.Path(__file__).parents[1]
IMAGES = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
DATASET = core.from_arrays(IMAGES, np.arange(9) % 3, name="noise")
THETA = jax.tree.map(np.asarray, corruption_nets.make("edsr_small").theta)


def config(**changes):
    small = {"nets": ("edsr_small",), "weights": ("",), "enlarge": (1,)}
    result = experiment.get_config("small").unlock()
    result.update(small | {"shard_images": 4, "group": 2, "copies": 1} | changes)
    return result


def rendered(images=IMAGES, **changes):
    arguments = {"seed": 0, "copy": 0, "group": 4} | changes
    return np.concatenate(list(rendering.generate("edsr_small", THETA, images, **arguments)))


def whole(opened, copy=0):
    return np.stack([opened.copies["edsr_small"][copy][i] for i in range(len(DATASET))])


@pytest.mark.slow
def test_the_set_does_not_depend_on_the_batch_around_an_image():
    every = rendered()
    assert every.dtype == np.uint8 and every.shape == IMAGES.shape
    np.testing.assert_array_equal(rendered(IMAGES[:6]), every[:6])
    np.testing.assert_array_equal(rendered(start=4), every[4:])
    np.testing.assert_array_equal(rendered(start=4, stop=7), every[4:7])
    for other in ({"copy": 1}, {"seed": 1}, {"seed": 2**32 - 1}):
        assert (rendered(**other) != every).any()


def test_a_set_is_written_in_shards_grows_and_is_opened(tmp_path):
    assert rendered_set.write_set(DATASET, tmp_path, config())
    assert len(list(tmp_path.glob("*.npy"))) == 3
    first = rendered_set.open_set(tmp_path, DATASET, 1)
    np.testing.assert_array_equal(whole(first), rendered(group=2))
    assert rendered_set.write_set(DATASET, tmp_path, config(copies=2))
    grown = rendered_set.open_set(tmp_path, DATASET, 2)
    np.testing.assert_array_equal(whole(grown), whole(first))
    assert (whole(grown, 1) != whole(grown)).any() and grown.digest == first.digest


def test_a_stopped_set_goes_on(tmp_path, monkeypatch):
    generate, calls = rendering.generate, []

    def stop(*args, **kwargs):
        calls.append(kwargs["start"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(rendering, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        rendered_set.write_set(DATASET, tmp_path, config())
    with pytest.raises(UserError, match="0 complete copies of edsr_small"):
        rendered_set.open_set(tmp_path, DATASET, 1)
    assert rendered_set.write_set(DATASET, tmp_path, config()) and calls == [0, 4, 4, 8]
    monkeypatch.undo()
    np.testing.assert_array_equal(
        whole(rendered_set.open_set(tmp_path, DATASET, 1)), rendered(group=2)
    )


def test_another_process_s_shard_is_left_to_it(tmp_path):
    rendered_set.write_set(DATASET, tmp_path, config())
    shard = tmp_path / "edsr_small_copy00_001.npy"
    shard.unlink()
    hold = (
        "import sys; from ada_jax import locks\n"
        "with locks.claim(locks.of_file(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(shard)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    assert not rendered_set.write_set(DATASET, tmp_path, config()) and not shard.exists()
    other.communicate("")
    assert rendered_set.write_set(DATASET, tmp_path, config()) and shard.exists()


def test_a_set_in_the_home_folder_is_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    rendered_set.write_set(DATASET, "~/set", config())
    assert (tmp_path / "set" / "manifest.json").exists()
    assert len(rendered_set.open_set("~/set", DATASET, 1).copies) == len(config().nets)


def test_sets_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="no set"):
        rendered_set.open_set(tmp_path / "none", DATASET, 1)
    rendered_set.write_set(DATASET, tmp_path, config())
    with pytest.raises(UserError, match=r"1 complete copies.*copies=10"):
        rendered_set.open_set(tmp_path, DATASET, 10)
    reversed_set = core.from_arrays(IMAGES[::-1], np.arange(9) % 3)
    with pytest.raises(UserError, match="made from 9 other images"):
        rendered_set.open_set(tmp_path, reversed_set, 1)
    with pytest.raises(UserError, match="has a set whose data_sha256"):
        rendered_set.write_set(reversed_set, tmp_path, config())
    for changes in ({"seed": 1}, {"quirks": True}, {"group": 4}, {"shard_images": 8}):
        with pytest.raises(UserError, match="has a set whose"):
            rendered_set.write_set(DATASET, tmp_path, config(**changes))
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"kind": "corruptions"}))
    with pytest.raises(UserError, match="kind 'corruptions'"):
        rendered_set.open_set(tmp_path, DATASET, 1)
    manifest.write_text("[")
    with pytest.raises(UserError, match="cannot be read"):
        rendered_set.open_set(tmp_path, DATASET, 1)


def test_sizes_are_checked_for_all_networks_before_any_is_rendered(tmp_path):
    dataset = core.from_arrays(np.zeros((4, 33, 47, 3), np.uint8), np.arange(4))
    both = config(nets=("edsr_small", "cae"), weights=("", ""), enlarge=(1, 2))
    with pytest.raises(UserError, match=r"config\.nets=.* 'cae'\) does not fit images of 33x47"):
        rendered_set.write_set(dataset, tmp_path / "set", both)
    assert not (tmp_path / "set").exists()


def unrendered(net, theta, images, *, start, stop, **fields):
    yield images[np.arange(start, stop)]


def test_a_set_of_the_cae_s_former_recipe_is_trained_on_but_not_added_to(tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "generate", unrendered)
    both = config(nets=("edsr_small", "cae"), weights=("", ""), enlarge=(1, 1))
    for name, fields in (("edsr", config()), ("both", both)):
        rendered_set.write_set(DATASET, tmp_path / name, fields)
        path = tmp_path / name / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"recipe": 1}))
        assert len(rendered_set.open_set(tmp_path / name, DATASET, 1).copies) == len(fields.nets)
    both.copies = 2
    assert rendered_set.write_set(DATASET, tmp_path / "edsr", config(copies=2))
    with pytest.raises(UserError, match="recipe is 1, not 2"):
        rendered_set.write_set(DATASET, tmp_path / "both", both)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recipe": 3}))
    with pytest.raises(UserError, match="recipe 3"):
        rendered_set.open_set(tmp_path / "both", DATASET, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nets", ("edsr",)),
        ("nets", ("edsr_small", "edsr_small")),
        ("weights", ("", "")),
        ("enlarge", (0,)),
        ("copies", 0),
        ("group", 3),
        ("seed", -1),
    ],
)
def test_mistakes_name_the_field(field, value):
    with pytest.raises(UserError, match=f"config.{field}"):
        rendered_set.validate(config(**{field: value}))


@pytest.mark.parametrize(
    ("fields", "out", "said"),
    [
        ({"image_size": 0}, "set", "config.image_size=0 must be 1 to 4096 pixels"),
        ({"cpu_devices": -1}, "set", r"config.cpu_devices=-1 must be 0 \(off\)"),
        ({"dataset": "cifar11"}, "set", "config.dataset='cifar11' is unknown"),
        ({"weights": ("no.safetensors",)}, "set", r"no\.safetensors"),
        ({}, "gs://bucket/set", "--out=gs://bucket/set is in a bucket"),
    ],
)
def test_mistakes_are_told_before_images_are_read(fields, out, said, monkeypatch):
    monkeypatch.setattr(sources, "load", None)
    monkeypatch.setattr(cli, "set_up_devices", lambda *_: None)
    with pytest.raises(UserError, match=said):
        deepaugment.main(config(**fields), out)


def test_a_folder_without_a_set_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"no set .manifest.json is missing.* --out='.*/a set', or"):
        rendered_set.read_manifest(tmp_path / "a set")


@pytest.mark.slow
def test_the_binary_draws_a_contact_sheet(tmp_path):
    flags = [
        f"--{flag}"
        for flag in (
            "config=experiments/deepaugment.py:small",
            "config.dataset=mnist5k",
            "config.train_split=train[:40]",
            "copies=2",
            f"out={tmp_path}",
        )
    ]
    done = run_here("deepaugment", *flags)
    assert done.returncode == 0, done.stderr
    assert "2 copies of edsr_small, cae" in done.stdout
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    assert len(list(tmp_path.glob("*.npy"))) == 4
