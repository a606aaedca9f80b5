"""What is installed where: light, without TensorFlow, as a wheel; and nothing deprecated."""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from unittest import mock

import numpy as np
import pytest

from ada_jax import errors, paths
from ada_jax.data import batching
from ada_jax.evaluation import scoring
from ada_jax.nets import weight_files
from ada_jax.run import logbook

ROOT = pathlib.Path(__file__).parents[1]
TENSORFLOW = ("tensorflow", "tensorflow_datasets", "tensorboard")
TINY = (
    *("--config.epochs=0", "--config.train_steps=3", "--config.batch_size=8"),
    *("--config.cpu_devices=0", "--config.eval_batch_size=8", "--config.compilation_cache="),
    *("--config.eval_sets=('clean',)", "--config.figure_examples=0", "--config.log_steps=3"),
)


def blocking(folder: pathlib.Path, modules: tuple[str, ...]) -> dict[str, str]:
    """The environment of a Python that lacks modules, and takes our deprecated calls for errors."""
    (folder / "sitecustomize.py").write_text(
        "import sys, warnings\n"
        f"sys.modules.update(dict.fromkeys({modules!r}))\n"
        "for module in ('ada_jax', '__main__', 'jax'):\n"
        "    warnings.filterwarnings('error', category=DeprecationWarning, module=module)\n"
    )
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def run(*command: str, cwd: pathlib.Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    """A Python in a folder."""
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True
    )


def binary(name: str, *flags: str, cwd: pathlib.Path, env: dict[str, str]) -> str:
    """What a binary of the package prints."""
    done = run("-m", f"ada_jax.{name}", *flags, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def distribution(requirement: str) -> str:
    """The name in 'grain>=0.2' or 'etils[epath]==1.0; python_version > "3"'."""
    return re.match(r"[\w-]+", requirement)[0].lower()


@pytest.fixture(scope="module")
def setup() -> dict:
    """The arguments of setup.py."""
    with mock.patch("setuptools.setup") as called:
        runpy.run_path(str(ROOT / "setup.py"))
    return called.call_args.kwargs


def test_requirements_have_what_training_needs(setup):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {distribution(line) for line in lines if not line.startswith("#")}
    needed = [*setup["install_requires"], *setup["extras_require"]["train"]]
    assert pinned == {distribution(requirement) for requirement in needed}


def test_only_the_extra_brings_the_modules_that_a_light_installation_lacks(setup):
    installed = importlib.metadata.packages_distributions()
    extra = {distribution(requirement) for requirement in setup["extras_require"]["train"]}
    light = {distribution(requirement) for requirement in setup["install_requires"]}
    for module in errors.EXTRA:
        brings = {name.lower().replace("_", "-") for name in installed[module]}
        assert brings & extra and not brings & light, module


LIGHT = """
import sys
import haiku as hk, jax, jax.numpy as jnp, numpy as np
import ada_jax
from ada_jax import attacks

model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([10])(hk.Flatten()(x))))
key, labels = jax.random.key(0), jnp.arange(2)
images = jax.random.uniform(key, (2, 16, 16, 3))
params = model.init(key, images)
classify = lambda x: model.apply(params, x)
net = ada_jax.make_corruption_net("edsr_small")
ada_jax.adversarial_augment(key, images, labels, logits_fn=classify, net=net, nu=0.02, steps=0)
ada_jax.augment_and_mix(key, images)
attacks.pgd(key, classify, images, labels, 8 / 255, steps=1)
pixels = np.asarray(255 * images, np.uint8)
names = ["fog", "elastic_transform", "jpeg_compression"]
results = ada_jax.corruption_errors(classify, pixels, np.asarray(labels), names=names)
assert sorted(results["corruptions"]) == sorted(names)
logits = ada_jax.load_classifier(sys.argv[1])(images)
assert logits.shape == (2, 10), logits.shape
"""


def finished_run(workdir: pathlib.Path) -> None:
    """What a finished run of a random classifier leaves for `load_classifier`."""
    import jax

    config = runpy.run_path(str(ROOT / "experiments/quickstart.py"))["get_config"]("nominal")
    classifier = scoring.make_classifier(config, 10)
    images = np.zeros((1, 32, 32, 3), np.float32)
    params, state = jax.eval_shape(
        lambda key: classifier.init(key, images, is_training=True), jax.random.key(0)
    )
    tree = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), {"params": params, "state": state})
    metadata = {"classes": 10, "mean": list(config.mean), "std": list(config.std)}
    paths.write_json(workdir / "config.json", config.to_dict())
    weight_files.save_weights(workdir / "classifier.safetensors", tree, metadata)


@pytest.mark.slow
def test_a_light_installation_has_all_but_training(tmp_path):
    finished_run(tmp_path)
    env = blocking(tmp_path, (*errors.EXTRA, "cv2", "imagecorruptions", "tensorboard"))
    done = run("-c", LIGHT, str(tmp_path), cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    shown = binary("report", "--paper", "--table=1", "--format=csv", cwd=tmp_path, env=env)
    assert "Nominal (paper),4.23,25.17" in shown
    for command, sentence in (
        (("train", "--config=experiments/quickstart.py"), "Training needs the package grain"),
        (("report", "--paper", "--figures=f"), "--figures=f needs the package matplotlib"),
        (("evaluate", "--workdir=gs://b/f"), "--workdir=gs://b/f needs the package etils"),
        (
            ("evaluate", "--config=experiments/cifar10.py", "--random", "--out=f"),
            "The data set cifar10 needs the package tensorflow_datasets",
        ),
    ):
        done = run("-m", f"ada_jax.{command[0]}", *command[1:], cwd=tmp_path, env=env)
        assert done.returncode == 2
        assert done.stderr.endswith(f"error: {sentence}: pip install 'ada-jax[train]'.\n")


def test_a_module_of_the_extra_that_is_missed_late_costs_one_sentence(tmp_path):
    env = blocking(tmp_path, ("tensorflow",))
    program = "from ada_jax.run import cli; cli.start(lambda argv: __import__('tensorflow'))"
    done = run("-c", program, cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert done.stderr == (
        "error: This command needs the package tensorflow: pip install 'ada-jax[train]'.\n"
    )


@pytest.mark.slow
def test_training_needs_no_tensorflow(tmp_path):
    env = blocking(tmp_path, ("flax", *TENSORFLOW))
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 16, 16, 3), np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "set.npz", images=images, labels=labels)
    flags = ["--config=experiments/quickstart.py:nominal", "--workdir=run", *TINY]
    flags += ["--config.dataset=npz", "--config.data_dir=set.npz"]
    assert "pip install clu tensorboard tensorflow" in binary(
        "train", *flags, cwd=tmp_path, env=env
    )
    kinds = [record["kind"] for record in logbook.read(str(tmp_path / "run"))]
    assert kinds == ["train", "eval"] and not (tmp_path / "run/tensorboard").exists()
    assert "Going on from step 3" in binary("train", *flags, cwd=tmp_path, env=env)
    binary("evaluate", "--workdir=run", "--out=again.json", cwd=tmp_path, env=env)
    first, again = (
        json.loads((tmp_path / n).read_text()) for n in ("run/results.json", "again.json")
    )
    assert again["clean"] == first["clean"]
    assert "quickstart_nominal" in binary("report", "run", cwd=tmp_path, env=env)


def test_no_module_asks_for_what_is_deprecated(tmp_path):
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "ada_jax").rglob("*.py"))
        if path.stem != "__init__"
        and (importlib.util.find_spec("torch") or "\nimport torch\n" not in path.read_text())
    ]
    imports = "\n".join(f"import {module}" for module in modules)
    done = run("-c", imports, cwd=tmp_path, env=blocking(tmp_path, ()))
    assert done.returncode == 0, done.stderr


def test_evaluation_makes_its_batches_ahead_and_in_order():
    asked = []
    batches = batching._in_threads(
        lambda i: asked.append(i) or i, range(20), num_threads=3, ahead=4
    )
    assert not asked
    assert next(batches) == 0 and len(asked) <= 4
    assert list(batches) == list(range(1, 20)) and sorted(asked) == list(range(20))


def test_a_batch_that_cannot_be_made_stops_an_evaluation():
    def batch(i):
        if i == 2:
            raise errors.UserError("A torn image.")
        return i

    made = batching._in_threads(batch, range(9), num_threads=2, ahead=3)
    with pytest.raises(errors.UserError, match="torn"):
        list(made)


# ------------------------------------------------------------------------ outside of a clone


def git(folder: pathlib.Path, *command: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", "-C", folder, *identity, *command], check=True, capture_output=True, text=True
    ).stdout.strip()


def repository(folder: pathlib.Path) -> str:
    """Commits what is in a folder to a new repository there; returns the commit."""
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=all")
    return git(folder, "rev-parse", "HEAD")


def package(folder: pathlib.Path) -> pathlib.Path:
    """A package that could be ours."""
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    return folder


def test_the_commit_is_the_clone_s_own(tmp_path):
    folder = package(tmp_path / "ada_jax")
    assert logbook.commit(folder) == ""
    assert repository(tmp_path) == logbook.commit(folder) != ""


def test_the_commit_is_not_of_a_repository_around_the_installed_package(tmp_path):
    (tmp_path / ".gitignore").write_text(".venv\n")
    ignored = package(tmp_path / ".venv/lib/site-packages/ada_jax")
    copied = package(tmp_path / "third_party/ada_jax")
    repository(tmp_path)
    beside = package(tmp_path / "ada_jax")  # pip install --target=.
    assert [logbook.commit(folder) for folder in (ignored, copied, beside)] == ["", "", ""]
    (ignored / "commit.txt").write_text("0123abcd\n")
    assert logbook.commit(ignored) == "0123abcd"


def test_a_config_outside_of_a_clone_is_the_package_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "experiments/cifar10.py:small"
    assert paths.experiment(name) == f"{ROOT}/{name}"
    for unknown in ("experiments/other.py", "cifar10.py", f"{tmp_path}/{name}"):
        assert paths.experiment(unknown) == unknown
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/cifar10.py").touch()
    assert paths.experiment(name) == name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """A wheel of the sources, unpacked, and the commit it was built of."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for folder in ("ada_jax", "experiments"):
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    commit = repository(source)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next((source / "dist").glob("*.whl"))) as file:
        file.extractall(site)
    return site, commit


def test_a_wheel_has_what_its_commands_name(wheel):
    site, commit = wheel
    assert (site / "ada_jax/commit.txt").read_text().strip() == commit
    for folder in ("ada_jax", "experiments"):
        inside = site / "ada_jax" / ("experiments" if folder == "experiments" else "")
        for path in (ROOT / folder).rglob("*.py"):
            assert (inside / path.relative_to(ROOT / folder)).read_bytes() == path.read_bytes()
    assert sum(path.stat().st_size for path in site.rglob("*")) < 10 * 2**20
    assert [path.name for path in site.iterdir() if "dist-info" not in path.name] == ["ada_jax"]


@pytest.mark.slow
def test_a_wheel_s_commands_run_in_an_empty_folder(wheel, tmp_path):
    site, commit = wheel
    env = os.environ | {"PYTHONPATH": str(site)}
    flags = ("--config=experiments/quickstart.py", *TINY, "--config.eval_split=test[:16]")
    binary("train", *flags, cwd=tmp_path, env=env)
    results = json.loads((tmp_path / "runs/quickstart/results.json").read_text())
    assert results["step"] == 3 and results["commit"] == commit
    shown = binary("report", "runs/quickstart", "--paper", "--table=1", cwd=tmp_path, env=env)
    assert "quickstart" in shown and "AdA (paper)" in shown
    planned = ("--sweep=experiments/sweeps/table1.py:small,ada", "--print")
    assert binary("sweep", *planned, cwd=tmp_path, env=env).count("ada_jax.train --config=") == 3
    measured = binary(
        *("benchmark", "--rows=augment", "--scale=tiny", "--cpu_devices=1"), cwd=tmp_path, env=env
    )
    assert "| AugMix, batch 128 |" in measured
