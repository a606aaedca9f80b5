"""What all tests share."""

import contextlib
import fcntl
import functools
import io
import logging
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image, ImageEnhance, ImageOps

from ada_jax.nets import classifiers, corruption_nets, edsr, residual_nets, weight_files
from ada_jax.run import cli

ROOT = pathlib.Path(__file__).parents[1]

# What tests and the programs that they start compile is compiled once. A folder that is set here
# from outside lasts longer.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _PROGRAMS = tempfile.TemporaryDirectory(prefix="ada_jax-tests-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS.name
    jax.config.update("jax_compilation_cache_dir", _PROGRAMS.name)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
# A shell script's background commands ignore Ctrl-C, and so would what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
_MAPS = pathlib.Path("/proc/self/maps")
_MOST_MAPS = 20_000


def pytest_configure(config: pytest.Config) -> None:
    """Compiles without optimisation, which takes two thirds of the time: most tests compute little.

    `-m accelerator` tests the numerics as they run.
    """
    if config.option.markexpr != "accelerator":
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.fixture(autouse=True)
def compiled_programs_are_dropped() -> Iterator[None]:
    """Frees them before they use up a process's memory mappings: Linux allows 65,530."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def float32_is_float32(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keeps an accelerator from multiplying in TF32 or bfloat16 where a test is about numerics."""
    with contextlib.ExitStack() as stack:
        if request.node.get_closest_marker("accelerator"):
            stack.enter_context(jax.default_matmul_precision("highest"))
        yield


def run_here(name: str, *words: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python -m ada_jax.NAME WORDS...` in this process, on the devices that it has."""
    out, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    log, defined = logging.StreamHandler(errors), set(flags.FLAGS)
    logging.getLogger("absl").addHandler(log)
    try:
        with (
            warnings.catch_warnings(category=RuntimeWarning, action="ignore"),  # of runpy
            contextlib.chdir(ROOT),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
            mock.patch.object(sys, "argv", [name, *map(str, words)]),
            mock.patch.object(sys, "unraisablehook", sys.unraisablehook),
            mock.patch.object(cli, "set_up_devices"),
            mock.patch.object(
                cli.app, "run", lambda main, flags_parser: main(flags_parser(sys.argv))
            ),
        ):
            runpy.run_module(f"ada_jax.{name}", run_name="__main__")
        status = 0
    except SystemExit as leaving:
        status = leaving.code or 0
    finally:
        logging.getLogger("absl").removeHandler(log)
        for flag in set(flags.FLAGS) - defined:  # But those of a library that it imported stay.
            module = flags.FLAGS.find_module_defining_flag(flag, "")
            ours = module.startswith((name, "ada_jax", "ml_collections"))
            if ours or flag.startswith("config."):
                delattr(flags.FLAGS, flag)
        flags.FLAGS.unparse_flags()
    printed = (stream.buffer.getvalue().decode() for stream in (out, errors))
    return subprocess.CompletedProcess([name, *words], status, *printed)


@contextlib.contextmanager
def shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[pathlib.Path]:
    """A folder of all of pytest's workers; one at a time is within the context."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def assert_mistake(done: subprocess.CompletedProcess[str], said: str) -> None:
    """Status 2, and one sentence that has certain words."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert said in errors[0] and "Traceback" not in done.stderr


def photograph(number: int, size: tuple[int, int] | None = None) -> bytes:
    """A generated JPEG of another size and content for each number."""
    rng = np.random.default_rng(number)
    width, height = size or rng.integers(40, 120, 2)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    with io.BytesIO() as file:
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        return file.getvalue()


def pillow(name: str, image: np.ndarray, amount: float = 0) -> np.ndarray:
    """An operation of AugMix or TrivialAugment in Pillow, whose units the amount has."""
    source, bilinear = Image.fromarray(image), Image.Resampling.BILINEAR

    def transform(*matrix):
        return source.transform(source.size, Image.Transform.AFFINE, matrix, resample=bilinear)

    out = {
        "identity": lambda: source,
        "autocontrast": lambda: ImageOps.autocontrast(source),
        "equalize": lambda: ImageOps.equalize(source),
        "posterize": lambda: ImageOps.posterize(source, amount),
        "rotate": lambda: source.rotate(amount, resample=bilinear),
        "solarize": lambda: ImageOps.solarize(source, amount),
        "shear_x": lambda: transform(1, amount, 0, 0, 1, 0),
        "shear_y": lambda: transform(1, 0, 0, amount, 1, 0),
        "translate_x": lambda: transform(1, 0, amount, 0, 1, 0),
        "translate_y": lambda: transform(1, 0, 0, 0, 1, amount),
        "color": lambda: ImageEnhance.Color(source).enhance(amount),
        "contrast": lambda: ImageEnhance.Contrast(source).enhance(amount),
        "brightness": lambda: ImageEnhance.Brightness(source).enhance(amount),
        "sharpness": lambda: ImageEnhance.Sharpness(source).enhance(amount),
    }[name]()
    return np.asarray(out)


def exact_distances(x: np.ndarray, y: np.ndarray, weights: np.ndarray, norm: str) -> np.ndarray:
    """To the nearest boundary of (x - 0.5) @ weights: logit gaps over gradients' dual norms."""
    classes = np.arange(weights.shape[1])
    logits = (np.float64(x).reshape(len(x), -1) - 0.5) @ weights
    order = 1 if norm == "linf" else 2
    dual = np.linalg.norm(weights[:, None] - weights[..., None], ord=order, axis=0)[y]
    gaps = np.take_along_axis(logits, y[:, None], 1) - logits
    with np.errstate(invalid="ignore"):
        distances = np.where(classes == y[:, None], np.inf, gaps / dual)
    return np.maximum(distances.min(1), 0)


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with weights of an EDSR of one block of four channels, nearly the identity."""
    folder = tmp_path_factory.mktemp("weights")
    theta = edsr.edsr_init(jax.random.key(0), blocks=1, features=4, scale=1)
    theta = jax.tree.map(lambda a: 0.1 * a, theta)
    for name in ("head", "tail"):
        w = theta[name]["w"]
        theta[name]["w"] = w.at[1, 1].add(np.eye(*w.shape[2:], dtype=np.float32))
    weight_files.save_weights(folder / "edsr_small.safetensors", theta, {})
    return folder


@pytest.fixture
def small_networks(monkeypatch: pytest.MonkeyPatch, small_weights: pathlib.Path) -> None:
    """`resnet9` and `edsr_small` of one block each, which compile in a third of the time."""
    block = {"block": residual_nets.preact_basic, "widths": (8,), "depths": (1,)}
    one_block = functools.partial(residual_nets.preact_resnet, **block)
    monkeypatch.setitem(classifiers._NETWORKS, "resnet9", one_block)
    fields = {"blocks": 1, "features": 4, "scale": 1}
    monkeypatch.setitem(corruption_nets.PRESETS, "edsr_small", fields)
    monkeypatch.setattr(corruption_nets, "WEIGHTS", small_weights)


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder on a disk of 256 KiB, where this user may mount one."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """TFDS's folder of a small ImageNet and of ImageNet-C's fog; image i is of class i."""
    root = tmp_path_factory.mktemp("tfds")
    squares = [photograph(i, (224, 224)) for i in range(8)]
    for severity in range(1, 6):
        _prepare(root, f"imagenet2012_corrupted/fog_{severity}", {"validation": squares})
    everything = [photograph(i) for i in range(24)]
    _prepare(root, "imagenet2012", {"train": everything, "validation": everything[:8]})
    return root


def _prepare(root: pathlib.Path, name: str, splits: dict[str, list[bytes]]) -> None:
    import tensorflow_datasets as tfds

    def examples(images: list[bytes]) -> Iterator[tuple[str, dict]]:
        for i, image in enumerate(images):
            yield str(i), {"image": io.BytesIO(image), "label": i, "file_name": f"{i}.JPEG"}

    builder = tfds.builder(name, data_dir=root, file_format="array_record")
    with mock.patch.object(
        type(builder),
        "_split_generators",
        lambda *_: {split: examples(images) for split, images in splits.items()},
    ):
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=str(root))
        )


@pytest.fixture(scope="session")
def buckets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Google Cloud Storage on this machine, a `gcs.Emulator` with gs://bucket."""
    import gcs

    emulator = gcs.Emulator(tmp_path_factory.mktemp("gcs"), "bucket", "secret", "shown")
    emulator.forbidden.add("secret")
    emulator.read_only.add("shown")
    yield emulator
    emulator.stop()


@pytest.fixture
def cloud(buckets: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same, where all clients of the test and of what it starts find it."""
    for name, value in buckets.environment.items():
        monkeypatch.setenv(name, value)
    return buckets
