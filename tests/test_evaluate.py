"""The evaluation: counts that do not depend on devices, resuming, refusals, and the mCE."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict
from PIL import Image

import ada_jax
from ada_jax import evaluate, sharding, training
from ada_jax import results as results_files
from ada_jax.corruptions import c_folder, functions, parameter_tables
from ada_jax.data import batching, core, photographs, sources, tfds_sets
from ada_jax.errors import UserError
from ada_jax.evaluation import evaluators, scoring, worst_case
from ada_jax.nets import weight_files
from ada_jax.run import checkpoint
from ada_jax.sharding import replicate
from experiments import quickstart
from tests.conftest import assert_mistake, run_here

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "ada_jax" / "README.md").read_text()


def images(count: int = 24, *, side: int = 16, seed: int = 0) -> core.Dataset:
    """Smooth random images of four classes."""
    rng = np.random.RandomState(seed)
    coarse = rng.randint(0, 256, (count, side // 4, side // 4, 3))
    pixels = coarse.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
    return core.from_arrays(pixels, rng.randint(0, 4, count), class_names="abcd", name="blocks")


def classifier() -> hk.TransformedWithState:
    """A convolution, batch norm and a linear layer: quick to compile."""

    def net(x, is_training, test_local_stats=False):
        x = hk.Conv2D(8, 3, 2)(x)
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(x, is_training, test_local_stats))
        return hk.Linear(4)(hk.Flatten()(x))

    return hk.transform_with_state(net)


def logits_of(params, state, x):
    return classifier().apply(params, state, None, x, is_training=False)[0]


def variables(seed: int = 0, side: int = 16) -> tuple:
    x = jnp.zeros((2, side, side, 3))
    return classifier().init(jax.random.key(seed), x, is_training=True)


def config_with(**changes) -> ConfigDict:
    config = quickstart.get_config().unlock()
    config.update(changes)
    return config.lock()


def sets_of(clean: core.Dataset, *names: str, **changes) -> evaluators.Sets:
    return evaluators.open_sets(config_with(**changes), clean, names)


def results_of(clean: core.Dataset, sets: evaluators.Sets, digest: str = "d", **changes) -> dict:
    settings = {"name": "test", "step": 3, "weights_digest": digest}
    return evaluate.new_results(config_with(**changes), clean=clean, source=sets.source, **settings)


def counts(sets: evaluators.Sets, batch_size: int = 10) -> dict:
    """(examples, wrong) of every cell."""
    step = scoring.map_eval_step(classifier())
    measured = scoring.count_errors(step, replicate(variables()), sets.datasets, batch_size)
    return {" ".join(map(str, cell)): (c["examples"], c["wrong"]) for cell, c in measured}


# ------------------------------------------------------------------------ counting


def test_counts_agree_with_a_loop_over_the_corrupted_images():
    clean, (params, state) = images(), variables()

    def wrong(pixels):
        x = batching.to_float(pixels)
        logits = logits_of(params, state, x)
        return 24, int(np.sum(np.argmax(logits, -1) != clean.source.labels))

    found = counts(sets_of(clean, "clean", "c", "extra"))
    assert list(found) == ["clean 0"] + [
        f"{name} {severity}"
        for name in parameter_tables.NAMES + parameter_tables.EXTRA
        for severity in (1, 2, 3, 4, 5)
    ]
    assert found["clean 0"] == wrong(clean.source.images)
    for name, severity in (("fog", 5), ("snow", 2), ("saturate", 4)):
        corrupted = functions.corrupt(name, severity, clean.source.images, 0)
        assert found[f"{name} {severity}"] == wrong(corrupted)
    assert len(set(found.values())) > 5


_DEVICES = """
import json, sys, jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
sys.path.insert(0, "tests")
import test_evaluate as t
sets = t.sets_of(t.images(131), "clean", "extra")
print(json.dumps([t.counts(sets, batch_size) for batch_size in (100, 128)]))
"""


@pytest.mark.slow
def test_one_device_and_four_and_any_batch_size_count_the_same():
    found = []
    for count in (1, 4):
        command = [sys.executable, "-c", _DEVICES, str(count)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found += json.loads(done.stdout)
    assert [examples for examples, _ in found[0].values()] == [131] * 21
    assert found == found[:1] * 4


def test_any_function_is_measured_under_the_corruptions():
    clean, of = images(), variables()
    found = scoring.corruption_errors(
        lambda x: logits_of(*of, x), clean.source.images, clean.source.labels, batch_size=10
    )
    grid = counts(sets_of(clean, "clean", "c"))
    assert found["clean"]["wrong"] == grid.pop("clean 0")[1]
    cells = [(n, row) for n, rows in found["corruptions"].items() for row in rows]
    assert {f"{n} {row['severity']}": (24, row["wrong"]) for n, row in cells} == grid
    mean = np.mean([100 * wrong / 24 for _, wrong in grid.values()])
    np.testing.assert_allclose(found["mce_unnormalised"], mean)


def test_the_readme_s_measurement_runs(monkeypatch, capsys):
    (block,) = re.findall(
        r"```python\n(import ada_jax\nfrom ada_jax.eval.*?)```", README, re.DOTALL
    )
    clean, runs = images(), []
    monkeypatch.setattr(ada_jax, "load_classifier", runs.append)
    monkeypatch.setattr(scoring, "metadata", lambda run: {"class_names": [run]})
    given = {"logits_fn": lambda x: x.mean((1, 2)) @ jnp.eye(3, 4)}
    exec(block, given | {"images": clean.source.images, "labels": clean.source.labels})
    assert runs == ["runs/quickstart"]
    assert all(0 < float(value) <= 100 for value in capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": np.full(24, 4)}, "label 4 and only 4 classes"),
        ({"images": np.zeros((24, 16, 16, 4), np.uint8)}, "24, 16, 16, 4"),
        ({"names": ["mist"]}, "'mist' is unknown"),
        ({"names": []}, "names is empty"),
        ({"table": "cifar100"}, "'cifar100' is unknown"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"logits_fn": lambda x: (x, {})}, "one array of logits"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, said):
    clean = images()
    given = {"images": clean.source.images, "labels": clean.source.labels}
    given |= {"logits_fn": lambda x: jnp.zeros((len(x), 4))}
    with pytest.raises(UserError, match=said):
        scoring.corruption_errors(**given | changes)


def test_padding_that_is_not_finite_does_not_count():
    step = jax.pmap(scoring.make_eval_step(logits_of), sharding.AXIS)
    batch = {
        "image": np.float32([[np.zeros((16, 16, 3)), np.full((16, 16, 3), np.nan)]]),
        "label": np.int32([[0, 0]]),
        "mask": np.float32([[1, 0]]),
    }
    sums = step(*jax.tree.map(lambda a: a[:1], replicate(variables())), batch)
    assert sums["examples"][0] == 1 and np.isfinite(sums["loss"][0])
    assert jnp.issubdtype(sums["wrong"].dtype, jnp.integer)


def test_a_subset_takes_the_first_examples_corrupted_as_in_the_whole_set():
    clean, config = images(), config_with(corruption_seed=3)
    part = evaluators.open_sets(config, clean, ("extra",), 5).datasets["spatter", 2]
    whole = functions.corrupt("spatter", 2, clean.source.images, 3)
    batch = next(batching.eval_batches(part, batch_size=8))
    assert len(part) == 5
    np.testing.assert_array_equal(batch["image"][:5], whole[:5])
    np.testing.assert_array_equal(batch["label"][:5], clean.source.labels[:5])


# ------------------------------------------------------------------------ folders of .npy files


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> pathlib.Path:
    """The four extra corruptions of `images()`, by the package's own writer."""
    folder = tmp_path_factory.mktemp("blocks-C")
    c_folder.write_set(images(), folder, names=parameter_tables.EXTRA, seed=7)
    return folder


@pytest.fixture
def folder(written, tmp_path) -> pathlib.Path:
    """A copy to be spoilt."""
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_written_folder_counts_as_the_images_corrupted_on_the_fly(written):
    on_the_fly = sets_of(images(), "extra", corruption_seed=7)
    from_folder = sets_of(images(), "extra", eval_c_dir=str(written))
    assert counts(from_folder) == counts(on_the_fly)
    assert counts(sets_of(images(), "extra", corruption_seed=8)) != counts(on_the_fly)
    assert from_folder.source["kind"] == "npy" and from_folder.source["seed"] == 7
    assert on_the_fly.source["kind"] == "on_the_fly"
    # Numbers of CIFAR's corruptions stand beside those of before the change to ImageNet's.
    assert on_the_fly.source["recipe"] == from_folder.source["recipe"] == 1
    stronger = sets_of(images(), "extra", corruption_table="imagenet")
    assert stronger.source["recipe"] == 2


def test_a_published_folder_in_its_own_order_and_either_spelling(folder):
    (folder / "manifest.json").unlink()
    (folder / "spatter.npy").rename(folder / "elastic.npy")
    order = np.random.RandomState(0).permutation(24)
    clean = images()
    shuffled = core.ArraySource(clean.source.images[order], clean.source.labels[order])
    clean = dataclasses.replace(clean, source=shuffled)
    config = config_with(eval_c_dir=str(folder))
    names = ["elastic_transform", "saturate"]
    datasets, source = c_folder.open_set(config.eval_c_dir, clean, names, 24)
    assert set(source.pop("files")) == {"labels", *names}
    assert source == {"kind": "npy", "folder": str(folder)}
    image, label = datasets["elastic_transform", 4].source[5]
    np.testing.assert_array_equal(image, np.load(folder / "elastic.npy")[3 * 24 + 5])
    assert label == np.load(folder / "labels.npy")[5] == images().source.labels[5]


def spoil(folder: pathlib.Path, name: str, change) -> None:
    np.save(folder / name, change(np.load(folder / name)))


def other_seed(folder: pathlib.Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"data_sha256": "0" * 64}))


def three_severities(folder: pathlib.Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"severities": [1, 2, 6]}))


def pickled(folder: pathlib.Path) -> None:
    np.save(folder / "spatter.npy", np.array([{}]), allow_pickle=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "spatter.npy").unlink(), "spatter.npy in .* is missing"),
        (lambda f: (f / "labels.npy").unlink(), "labels.npy in .* is missing"),
        (lambda f: spoil(f, "spatter.npy", lambda a: a[:-1]), r"\[119, 16, 16, 3\] uint8 and shou"),
        (lambda f: spoil(f, "spatter.npy", np.float32), "float32 and should be .* uint8"),
        (lambda f: spoil(f, "labels.npy", lambda a: a[:-24]), r"is \[96\] uint8 and should be"),
        (lambda f: spoil(f, "labels.npy", lambda a: a / 2), "integers"),
        (lambda f: cut_header(f / "labels.npy"), "is not a complete array"),
        (lambda f: spoil(f, "labels.npy", np.sort), "does not have the labels"),
        (lambda f: spoil(f, "labels.npy", lambda a: 3 - a), "does not have the labels"),
        (lambda f: (f / "spatter.npy").write_bytes(b"\x93NUMPY"), "not a complete array"),
        (pickled, "not a complete array"),
        (lambda f: (f / "snow.npy.partial").touch(), r"incomplete \(snow.npy.partial\)"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (other_seed, "made from other images"),
        (three_severities, r"severities \[1, 2, 6\]"),
    ],
)
def test_a_folder_that_is_not_whole_or_not_of_these_images_is_refused(folder, change, said):
    change(folder)
    with pytest.raises(UserError, match=said) as error:
        sets_of(images(), "extra", eval_c_dir=str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_of_other_images_or_none_is_refused(written):
    with pytest.raises(UserError, match="was made from other images"):
        sets_of(images(20), "extra", eval_c_dir=str(written))
    with pytest.raises(UserError, match="is not a folder"):
        sets_of(images(), "extra", eval_c_dir=str(written / "none"))


def test_images_that_cannot_be_corrupted_are_refused_before_anything_is_computed():
    with pytest.raises(UserError, match="at least 8 pixels"):
        sets_of(images(side=4), "clean", "c")


# ------------------------------------------------------------------------ TFDS


@pytest.fixture
def tfds_asked(monkeypatch) -> list:
    """What is asked of TFDS, which here has 20 black images in every set."""
    asked = []

    def records(name, split, data_dir, image_key):
        asked.append((name, split, data_dir))
        return [{"image": b"", "label": i % 10} for i in range(20)][core.positions(split, 20)]

    monkeypatch.setattr(tfds_sets, "_tfds_records", records)
    black = np.zeros((32, 32, 3), np.uint8)
    monkeypatch.setattr(tfds_sets, "_decode_tfds", lambda record: (black, record["label"]))
    return asked


def ten_classes(count: int) -> core.Dataset:
    pixels = np.full((count, 32, 32, 3), 9, np.uint8)
    return core.from_arrays(pixels, np.arange(count) % 10, name="dark")


def test_tfds_is_asked_by_its_own_names(tfds_asked):
    sets = sets_of(ten_classes(20), "c", "extra", eval_c_dir="tfds", data_dir="there")
    (_, whole, _), *asked = tfds_asked
    names = {name for name, _, _ in asked}
    assert whole == "test" and len(sets.datasets) == len(asked) == len(names) == 95
    assert {"cifar10_corrupted/frosted_glass_blur_3", "cifar10_corrupted/elastic_5"} <= names
    assert set(asked) == {(name, "test[0:20]", "there") for name in names}
    batch = next(batching.eval_batches(sets.datasets["glass_blur", 3], batch_size=25))
    assert batch["mask"].sum() == 20 and batch["label"][13] == 3
    assert tfds_sets.cifar10_corrupted("elastic", 1).name == "cifar10_corrupted/elastic_1"


def cut_header(path: pathlib.Path) -> None:
    """Opens a bracket in the header, which NumPy reads as Python."""
    path.write_bytes(path.read_bytes().replace(b"}", b"{", 1))


def test_cifar10_1_is_measured(tfds_asked, tmp_path):
    clean = ten_classes(12)
    sets = sets_of(clean, "clean", "cifar10_1")
    assert tfds_asked == [("cifar10_1/v6", "test", None)]
    step = jax.pmap(lambda p, s, b: jax.lax.psum(always_zero(b), "d"), "d")
    results = results_of(clean, sets)
    results = scoring.complete(results, tmp_path / "r", step, ({}, {}), sets.datasets, 8)
    assert results["cifar10_1"] == {"examples": 20, "wrong": 18, "error": 90.0}
    assert results["clean"] == {"examples": 12, "wrong": 10, "error": 1000 / 12, "loss": 0.0}
    assert ("CIFAR-10.1 v6 error", "90.00% of 20 images") in results_files.summary(results)


@pytest.mark.parametrize("names", [{"c"}, {"cifar10_1"}])
def test_sets_of_other_classes_are_refused_in_training_too(tfds_asked, names):
    classes = [f"flower {i}" for i in range(10)]
    clean = dataclasses.replace(ten_classes(20), class_names=tuple(classes))
    with pytest.raises(UserError, match=r"the class\(es\) 'airplane', 'automobile'"):
        sets_of(clean, *names, eval_c_dir="tfds")


def always_zero(batch: dict) -> dict:
    real = (batch["mask"] > 0).astype(jnp.int32)
    wrong = (real * (batch["label"] != 0)).sum()
    return {"examples": real.sum(), "wrong": wrong, "not_finite": 0 * wrong, "loss": 0.0}


@pytest.mark.parametrize("names", [{"c"}, {"cifar10_1"}])
def test_tfds_s_sets_are_refused_for_other_data(tfds_asked, names):
    with pytest.raises(UserError, match="4 of 16x16"):
        sets_of(images(), *names, eval_c_dir="tfds")
    with pytest.raises(UserError, match="20 images, and there are 10"):
        sets_of(ten_classes(10), "c", eval_c_dir="tfds")


def test_tfds_s_sets_are_refused_for_training_images(tfds_asked):
    clean = dataclasses.replace(ten_classes(20), origin="cifar10/3.0.2/train")
    with pytest.raises(UserError, match="of the test split, and the clean ones are of cifar10/"):
        sets_of(clean, "c", eval_c_dir="tfds", dataset="cifar10")


# ------------------------------------------------------------------------ ImageNet-C


@pytest.fixture
def held_out(imagenet) -> core.Dataset:
    return sources.load("imagenet2012", "validation", data_dir=imagenet, image_size=32)


def imagenet_sets(clean: core.Dataset, root: pathlib.Path, c_dir: str) -> evaluators.Sets:
    fields = {"dataset": "imagenet2012", "image_size": 32, "corruption_table": "imagenet"}
    return sets_of(clean, "c", data_dir=str(root), eval_c_dir=c_dir, **fields)


def test_imagenet_is_corrupted_on_the_fly_at_the_size_of_imagenet_c(held_out, imagenet):
    sets = imagenet_sets(held_out, imagenet, c_dir="")
    assert sets.source["pixels"] == 224 and sets.source["table"] == "imagenet"
    image, label = sets.datasets["pixelate", 4].source[3]
    original, same_label = tfds_sets.resized(held_out, 224).source[3]
    corrupted = functions.corrupt("pixelate", 4, original[None], table="imagenet")
    np.testing.assert_array_equal(image, photographs.shrunk(corrupted, 32)[0])
    assert label == same_label and image.shape == (32, 32, 3)


def test_imagenet_c_comes_from_tfds(held_out, imagenet, monkeypatch):
    fog = evaluators.Evaluator(("corruptions",), corruptions={"imagenet": ("fog",)})
    monkeypatch.setitem(evaluators.EVALUATORS, "c", fog)
    sets = imagenet_sets(held_out, imagenet, c_dir="tfds")
    assert list(sets.datasets) == [("fog", severity) for severity in range(1, 6)]
    assert len(set(sets.source.pop("files").values())) == 5
    assert sets.source == {"kind": "tfds"}
    batch = next(batching.eval_batches(sets.datasets["fog", 2], batch_size=8))
    assert sorted(batch["label"]) == list(range(8)) and batch["image"].shape == (8, 32, 32, 3)
    part = sources.load("imagenet2012", "validation[2:5]", data_dir=imagenet, image_size=32)
    sets = imagenet_sets(part, imagenet, c_dir="tfds")
    batch = next(batching.eval_batches(sets.datasets["fog", 2], batch_size=3))
    np.testing.assert_array_equal(batch["label"], [part.source[i][1] for i in range(3)])


def test_alexnet_s_own_errors_are_an_mce_of_100(held_out):
    def grid(factor: float) -> dict:
        errors = {name: 100 * factor * e for name, e in parameter_tables.ALEXNET_ERRORS.items()}
        return {
            name: [{"severity": s, "error": error} for s in parameter_tables.SEVERITIES]
            for name, error in errors.items()
        }

    assert results_files.alexnet_mce(grid(1.0)) == pytest.approx(100)
    results = {"data": {"name": "imagenet2012"}, "corruptions": grid(0.5)}
    results |= results_files.means_of(results)
    assert results["mce_alexnet"] == pytest.approx(50)
    shown = dict(results_files.summary(results))
    assert shown["mCE, AlexNet's errors as 100%"] == "50.00%"
    assert shown["mCE, un-normalised"] == "39.45%"  # half of the 15 errors' mean
    assert results_files.alexnet_mce(grid(1.0) | {"fog": []}) is None
    others = results | {"data": {"name": "cifar10"}}
    assert "mce_alexnet" not in results_files.means_of(others)


# ------------------------------------------------------------------------ results


def test_an_interrupted_evaluation_goes_on_with_what_is_missing(tmp_path):
    clean, path = images(), tmp_path / "results.json"
    sets, step, calls = sets_of(clean, "clean", "extra"), scoring.map_eval_step(classifier()), []

    def failing(*args):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return step(*args)

    def run(a_step, path):
        results = results_files.with_earlier(results_of(clean, sets), path)
        return scoring.complete(
            results, path, a_step, replicate(variables()), sets.datasets, batch_size=12
        )

    with pytest.raises(KeyboardInterrupt):
        run(failing, path)
    half = json.loads(path.read_text())
    rows = {name: len(rows) for name, rows in half["corruptions"].items()}
    assert rows == {"speckle_noise": 5, "gaussian_blur": 3}
    assert "clean" in half and "mean_extra" not in half
    resumed = run(failing, path)
    assert len(calls) == 20 + 21 * 2 - 18  # Two batches a cell; nine cells were whole.
    whole = run(step, tmp_path / "whole.json")
    unlike = {"seconds": 0}
    assert resumed | unlike == whole | unlike
    assert json.loads(path.read_text()) == resumed
    assert run(failing, path)["mean_extra"] == whole["mean_extra"] and len(calls) == 44
    assert [r["severity"] for r in whole["corruptions"]["spatter"]] == [1, 2, 3, 4, 5]
    assert "mce_unnormalised" not in whole


def test_what_is_measured_later_leaves_the_run_s_own_commit_and_config(tmp_path):
    clean, path = images(), tmp_path / "results.json"
    first = results_of(clean, sets_of(clean, "clean"))
    results_files.write(path, first | {"commit": "before"})
    first["config"]["eval_sets"] = ["other"]
    later = results_files.with_earlier(first, path)
    assert later["commit"] == "before" and later["config"] != first["config"]


def earlier(**changes) -> dict:
    """A good results file with some changes."""
    results = results_of(images(), sets_of(images(), "extra"))
    rows = [{"severity": 1, "examples": 24, "wrong": 6, "error": 25.0}]
    return results | {"corruptions": {"spatter": rows}} | changes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps(earlier(schema=2)), "schema = 2"),
        (json.dumps(earlier(weights_digest="e")), 'weights_digest = "e", .* has "d"'),
        (json.dumps(earlier(data={"name": "x"})), 'data.name = "x", .* has "blocks"'),
        (json.dumps(earlier(config={"classifier": "x"})), 'classifier = "x"'),
        (json.dumps(earlier(corruption_source={"seed": 1})), "corruption_source.kind = null"),
        (json.dumps(earlier(corruptions={"spatter": [{"severity": 6}]})), r"severities \[6\]"),
        (json.dumps(earlier(corruptions=[])), "cannot be read"),
        (json.dumps(earlier())[:-9], "cannot be read"),
        ("[1]", "cannot be read"),
        (json.dumps(earlier(config=["small"])), "cannot be read"),
        (json.dumps(earlier(corruption_source={"files": "fog"})), "cannot be read"),
    ],
)
def test_a_results_file_that_does_not_fit_is_refused(tmp_path, text, said):
    path = tmp_path / "results.json"
    path.write_text(text)
    results = results_of(images(), sets_of(images(), "extra"))
    with pytest.raises(UserError, match=said) as error:
        results_files.with_earlier(results, path)
    assert str(path) in str(error.value) and "--out" in str(error.value)
    path.write_text(json.dumps(earlier(ada={"cae": {"error": 5.0}})))
    kept = results_files.with_earlier(results, path)
    assert kept["corruptions"]["spatter"][0]["wrong"] == 6
    assert kept["ada"] == {"cae": {"error": 5.0}}
    path.write_text(json.dumps(earlier(weights_digest="other")))
    with pytest.raises(UserError, match="weights_digest"):
        results_files.with_earlier(results, path)
    assert results_files.with_earlier(results, path, replace=True) == results


def test_results_of_other_images_of_the_same_name_and_number_are_refused(tmp_path):
    path, clean = tmp_path / "results.json", images()
    path.write_text(json.dumps(earlier()))
    arrays = core.ArraySource(255 - clean.source.images, clean.source.labels)
    other = dataclasses.replace(clean, source=arrays)
    with pytest.raises(UserError, match="fingerprint"):
        results_files.with_earlier(results_of(other, sets_of(other, "extra")), path)


def test_results_of_images_with_one_other_label_are_refused(tmp_path):
    path, clean = tmp_path / "results.json", images(400, side=8)
    path.write_text(json.dumps(results_of(clean, sets_of(clean, "clean"))))
    labels = clean.source.labels.copy()
    labels[2] = (labels[2] + 1) % 4
    other = dataclasses.replace(clean, source=core.ArraySource(clean.source.images, labels))
    with pytest.raises(UserError, match="fingerprint"):
        results_files.with_earlier(results_of(other, sets_of(other, "clean")), path)


def test_a_folder_of_corrupted_images_counts_by_its_content(folder, tmp_path_factory):
    path, clean = tmp_path_factory.mktemp("results") / "results.json", images()

    def results(where=folder, *names):
        names = names or parameter_tables.EXTRA
        config = config_with(eval_c_dir=str(where))
        _, source = c_folder.open_set(config.eval_c_dir, clean, names, len(clean))
        return results_of(clean, evaluators.Sets({}, source))

    first = results(folder, "spatter", "saturate")
    assert set(first["corruption_source"]["files"]) == {"labels", "spatter", "saturate"}
    path.write_text(json.dumps(first))
    moved = folder.rename(folder.with_name(folder.name + "-moved"))
    kept = results_files.with_earlier(results(moved), path)
    files = kept["corruption_source"]["files"]
    assert set(files) == {"labels", *parameter_tables.EXTRA}
    spoil(moved, "speckle_noise.npy", lambda a: 255 - a)  # Is not measured yet.
    results_files.with_earlier(results(moved), path)
    spoil(moved, "spatter.npy", lambda a: 255 - a)
    with pytest.raises(UserError, match=r"corruption_source\.files\.spatter"):
        results_files.with_earlier(results(moved), path)
    del first["corruption_source"]["files"]  # As older versions wrote it: the path counts.
    path.write_text(json.dumps(first))
    with pytest.raises(UserError, match=r"corruption_source\.folder"):
        results_files.with_earlier(results(moved), path)
    moved.rename(folder)
    kept = results_files.with_earlier(results(), path)
    assert set(kept["corruption_source"]["files"]) == {"labels", *parameter_tables.EXTRA}


def test_a_new_attack_is_one_entry_whose_fields_are_written(monkeypatch, tmp_path):
    def attack(logits_fn, images, labels, *, options, measured, save):
        return {"noise": {"shape": logits_fn(images).shape, "before": measured}}

    entry = evaluators.Evaluator(("noise",), attack=attack)
    monkeypatch.setitem(evaluators.EVALUATORS, "noise", entry)
    subject = evaluate._Subject("run", 0, classifier(), *variables(), tuple("abcd"), {})
    examples, out = worst_case.first_examples(images(), 3), tmp_path / "results.json"
    evaluate._attack({"noise": 1}, ["noise"], subject, examples, worst_case.Options(), out)
    written = json.loads(out.read_text())
    assert written == {"noise": {"shape": [3, 4], "before": {"noise": 1}}}


# Errors of "AdA + DeepAugment(10x) + AugMix" on CIFAR-10-C, as RobustBench publishes them.
PUBLISHED = """
gaussian_noise 6.40 7.24 9.36 9.99 11.01
shot_noise 5.79 6.17 7.83 8.63 10.41
impulse_noise 6.82 8.49 10.02 13.54 17.20
defocus_blur 5.10 5.30 5.61 6.15 7.47
glass_blur 9.01 9.03 8.82 13.45 13.15
motion_blur 5.57 6.44 7.68 7.66 9.19
zoom_blur 6.05 6.05 6.34 6.56 7.46
snow 6.10 7.20 8.70 10.83 9.64
frost 5.53 6.08 6.91 7.12 7.91
fog 5.02 5.87 6.98 8.87 16.56
brightness 5.07 5.07 5.11 5.15 5.60
contrast 5.03 5.43 5.68 6.15 8.57
elastic_transform 7.14 6.76 7.35 9.32 12.19
pixelate 5.57 5.82 6.14 7.42 13.18
jpeg_compression 6.35 7.19 7.78 8.34 9.48
"""


def test_mce_of_the_published_grid():
    lines = [line.split() for line in PUBLISHED.strip().splitlines()]
    grid = {name: [{"error": float(e)} for e in errors] for name, *errors in lines}
    assert tuple(grid) == parameter_tables.NAMES
    assert results_files.mean_error(grid, parameter_tables.NAMES) == pytest.approx(7.829, abs=5e-4)
    grid["fog"].pop()
    assert results_files.mean_error(grid, parameter_tables.NAMES) is None
    assert results_files.mean_error({}, parameter_tables.NAMES) is None


# ------------------------------------------------------------------------ weights


def test_variables_come_from_the_weights_file_else_from_the_newest_checkpoint(tmp_path):
    (params, state), shape = variables(), (16, 16, 3)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    for step in (4, 8):
        scaled = jax.tree.map(lambda a, s=step: s * a, params)
        train_state = training.TrainState(jnp.int32(step), scaled, state, {"momentum": params})
        checkpoints.save(step, train_state, {"expect": {"config.name": "other"}}, wait=True)
    checkpoints.close()
    found = scoring.load_variables(config_with(), classifier(), shape, tmp_path)
    chex.assert_trees_all_equal(found, (scaled, state, 8))
    for path in (tmp_path / "checkpoints" / "8").rglob("*"):
        path.write_bytes(b"") if path.is_file() else None
    with pytest.raises(UserError, match="checkpoints/8 cannot be read"):
        scoring.load_variables(config_with(), classifier(), shape, tmp_path)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"4", "8"}
    file = tmp_path / "classifier.safetensors"
    weight_files.save_weights(file, {"params": params, "state": state}, {"step": 9})
    for path in (tmp_path, file):
        chex.assert_trees_all_equal(
            scoring.load_variables(config_with(), classifier(), shape, path),
            (params, state, 9),
        )
    with pytest.raises(UserError, match="does not fit this network"):
        scoring.load_variables(config_with(), classifier(), (8, 8, 3), file)


def test_a_classifier_that_another_program_saved_in_half_precision_is_evaluated(tmp_path):
    (params, state), file = variables(), tmp_path / "weights.safetensors"
    weight_files.save_weights(file, {"params": params, "state": state}, {})
    halves = {
        name: a.astype(np.float16) if a.dtype == np.float32 else a
        for name, a in safetensors.numpy.load_file(file).items()
    }
    file.write_bytes(safetensors.numpy.save(halves, {"format": "pt"}))
    found = scoring.load_variables(config_with(), classifier(), (16, 16, 3), file)
    chex.assert_trees_all_equal_dtypes(found[:2], (params, state))
    chex.assert_trees_all_close(found[:2], (params, state), rtol=1e-3, atol=1e-6)


def test_weights_of_images_normalised_otherwise_are_refused(tmp_path):
    (params, state), file = variables(), tmp_path / "weights.safetensors"
    metadata = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    weight_files.save_weights(file, {"params": params, "state": state}, metadata)
    same = config_with(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    scoring.load_variables(same, classifier(), (16, 16, 3), file)
    other = config_with(mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))
    with pytest.raises(UserError, match=r"config\.std=\(0\.25, 0\.25, 0\.25\), but .*\(1\.0"):
        scoring.load_variables(other, classifier(), (16, 16, 3), file)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="nor a checkpoint"):
        scoring.load_variables(config_with(), classifier(), (16, 16, 3), tmp_path)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------ the binary


def run(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ada_jax.evaluate", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_binary_evaluates_random_weights(tmp_path):
    out = tmp_path / "results.json"
    config = ["--config=experiments/quickstart.py", "--config.compilation_cache="]
    done = run(*config, "--random", f"--out={out}", "--split=test[:12]", "--sets=clean,extra")
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert "mean of the 4 extra" in done.stdout and str(out) in done.stdout
    assert results["name"] == "quickstart_random" and results["devices"] == 2
    assert len(results["data"].pop("fingerprint")) == 64
    assert results["data"] == {"name": "mnist5k", "split": "test[:12]", "examples": 12}
    assert results["clean"]["examples"] == 12
    assert results["corruption_source"]["kind"] == "on_the_fly"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give exactly one"),
        (["--workdir=/nowhere"], "--workdir=/nowhere has no config.json"),
        (["--config=experiments/quickstart.py", "--random"], "--out=FILE"),
        (
            ["--config=experiments/quickstart.py", "--random", "--out=no", "--sets=clean,d"],
            "--sets",
        ),
    ],
)
def test_the_binary_tells_a_mistake_in_one_sentence_and_status_2(flags, said):
    assert_mistake(run_here("evaluate", *flags), said)


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_the_flags_of_corruptions_are_recorded(tmp_path):
    flags = ("--config=experiments/quickstart.py", "--random", "--split=test[:3]", "--sets=extra")
    flags += ("--corruption_seed=7", "--corruption_table=imagenet", f"--out={tmp_path}/r.json")
    done = run_here("evaluate", *flags)
    assert done.returncode == 0, done.stderr
    source = json.loads((tmp_path / "r.json").read_text())["corruption_source"]
    assert (source["seed"], source["table"]) == (7, "imagenet")


def test_json_with_nan_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"name": "run", "mean": [NaN, 0.5, 0.5]}')
    with pytest.raises(UserError, match="it has NaN, which is not JSON"):
        scoring.config_of_run(str(tmp_path))


@pytest.mark.slow
def test_classes_are_those_of_training_and_training_images_are_said_to_be(tmp_path):
    def write(root, first, **counts):
        for name, count in counts.items():
            (tmp_path / root / name).mkdir(parents=True)
            for i in range(first, first + count):
                # Told apart by colour, and no two alike.
                colour = {"cat": (200, i, 0), "dog": (0, 200, i), "owl": (i, 0, 200)}[name[-3:]]
                image = Image.new("RGB", (32, 32), colour)
                image.save(tmp_path / root / name / f"{i}.png")

    write("data/train", 0, cat=20, dog=20, owl=20)
    write("data/test", 20, cat=5, owl=5)  # Lacks a class.
    write("other", 30, bird_owl=5, cat=5, dog=5)
    write("two", 40, dog=4, owl=4)
    workdir = tmp_path / "run"
    fields = {"dataset": "folder", "data_dir": tmp_path / "data", "method": "nominal"}
    fields |= {"epochs": 0, "train_steps": 60, "batch_size": 16, "eval_batch_size": 16}
    fields |= {"eval_sets": "clean", "figure_examples": 0, "compilation_cache": ""}
    flags = [f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items())]
    done = run_here("train", "--config=experiments/quickstart.py", *flags)
    assert done.returncode == 0, done.stderr
    trained = json.loads((workdir / "results.json").read_text())
    assert trained["class_names"] == ["cat", "dog", "owl"] and trained["clean"]["examples"] == 10

    def evaluated(name, *flags):
        out = tmp_path / f"{name}.json"
        return run_here("evaluate", f"--workdir={workdir}", f"--out={out}", *flags), out

    done, out = evaluated("other", f"--data_dir={tmp_path / 'other'}", "--split=all")
    assert done.returncode == 2 and not out.exists()
    assert "the class(es) 'bird_owl', and the classifier was trained on 'cat', " in done.stderr
    # By number, 'dog' and 'owl' would be 'cat' and 'dog', and all verdicts wrong.
    done, out = evaluated("two", f"--data_dir={tmp_path / 'two'}", "--split=all")
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results["clean"]["error"] < 50 and results["training"] == trained["training"]
    assert results["class_names"] == ["cat", "dog", "owl"] and "trained_on" not in results
    done, out = evaluated("train", "--split=train[:40]")
    assert json.loads(out.read_text())["trained_on"] == 40
    assert "40 of these 40 images were trained on" in done.stderr
