"""Under JAX_ENABLE_X64=1, with float64 images and numbers, all functions give the same float32."""

import contextlib
import functools
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ada_jax import ada, attacks, keys, losses, pretrain, ssim
from ada_jax.augment import (
    augmix,
    cropping,
    feature_distortions,
    norm_noise,
    trivial_augment,
)
from ada_jax.data import batching
from ada_jax.evaluation import scoring
from ada_jax.nets import cae, classifiers, edsr, per_example
from ada_jax.run import logbook
from experiments import pretrain_edsr
from tests.conftest import run_here

ROOT = pathlib.Path(__file__).parents[1]
BATCH, SIDE, CLASSES = 4, 12, 5
RNG = np.random.default_rng(0)
X = np.float32(RNG.uniform(0.2, 0.8, (BATCH, SIDE, SIDE, 3)))
WEIGHTS = np.float32(RNG.normal(size=(SIDE * SIDE * 3, CLASSES)) / 20)
NET = edsr.edsr(blocks=1, features=4, scale=1)
SCALED = edsr.edsr(blocks=1, features=4, scale=2)


def classify(x: jax.Array) -> jax.Array:
    return jnp.tanh(3 * (x.reshape(len(x), -1) - 0.5) @ WEIGHTS)


Y = np.argmax(classify(X), -1)


@contextlib.contextmanager
def x64() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def augment(x: Any, y: Any, number: Callable, **options: Any) -> Any:
    theta = jax.tree.map(lambda a: np.asarray(a, x.dtype), NET.init(jax.random.key(1)))
    net = ada.CorruptionNet(NET.apply, theta)
    numbers = {"nu": number(0.5), "step_scale": number(0.3), "ssim_threshold": number(0.6)}
    return ada.adversarial_augment(
        jax.random.key(0), x, y, logits_fn=classify, net=net, steps=2, **numbers | options
    )


def mix(x: Any, y: Any, number: Callable) -> jax.Array:
    ops = augmix.OPS + augmix.EXTRA_OPS
    return augmix.augment_and_mix(
        jax.random.key(0), x, severity=number(3), width=2, depth=1, alpha=number(1.1), ops=ops
    )


def augmentations(x: Any, y: Any, number: Callable) -> Any:
    key, radii = jax.random.key(0), {k: number(v) for k, v in norm_noise.RADII.items()}
    noisy = norm_noise.add_noise(key, x, norms=tuple(radii), radii=radii, share=number(0.9))
    return noisy, trivial_augment.trivial_augment(key, x)


def attack(x: Any, y: Any, number: Callable, *, f: Callable, norm: str, **options: Any) -> Any:
    epsilon = number(0.02 if norm == "linf" else 0.15)
    return f(jax.random.key(0), classify, x, y, epsilon, norm=norm, microbatch=3, **options)


def autoattack(x: Any, y: Any, number: Callable) -> Any:
    few = {"attacks": ("apgd-ce",), "constants": {"apgd-ce": {"steps": 3}}}
    report = attacks.autoattack(jax.random.key(0), classify, x, y, number(0.01), **few)
    accounts = [(a.attack, a.attacked, a.broken, a.forward, a.backward) for a in report.accounts]
    return report.images, report.robust, report.broken_by.tolist(), accounts


def errors(x: Any, y: Any, number: Callable) -> Any:
    images = np.uint8(255 * np.repeat(x, 8, 0).repeat(3, 1)[:, :32].repeat(3, 2)[:, :, :32])
    logits_fn = lambda x: x[:, ::7, ::7].reshape(len(x), -1) @ np.ones((75, 3), x.dtype)  # noqa: E731
    labels = np.arange(len(images)) % 3
    found = scoring.corruption_errors(logits_fn, images, labels, names=["brightness"])
    return [found["clean"], found["corruptions"]]


def classifier(x: Any, y: Any, number: Callable) -> Any:
    net = classifiers.make("preact_resnet20", CLASSES)
    state = jax.jit(net.init, static_argnames="is_training")(jax.random.key(0), x, is_training=True)
    return jax.jit(net.apply, static_argnames="is_training")(*state, None, x, is_training=True)


def small_things(x: Any, y: Any, number: Callable) -> Any:
    logits = classify(jnp.float32(x))
    key = jax.random.key(0)
    return {
        "ssim": ssim.ssim(x, x[::-1]),
        "search": [ssim.line_search(x, x[::-1], number(0.5), rule) for rule in ssim.ROOT_RULES],
        "losses": [f(logits, y) for f in (losses.cross_entropy, losses.margin)],
        "jsd": losses.jsd(logits, logits[::-1], logits),
        "keys": jax.random.key_data(keys.of_positions(key, 3, 4)),
        "crops": cropping.random_crop_flip(key, batching.to_float(np.uint8(255 * x))),
        "patches": pretrain.random_patches(key, jnp.float32(x), size=5),
        "noise": pretrain.add_noise(key, jnp.float32(x), 0.1),
    }


def distorted_edsr(x: Any, y: Any, number: Callable) -> Any:
    theta = SCALED.init(jax.random.key(1))
    return jax.jit(feature_distortions.render_edsr)(theta, x, jax.random.key(0))


def distorted_cae(x: Any, y: Any, number: Callable) -> Any:
    theta = cae.cae_init(jax.random.key(1))
    x = jnp.concatenate([jnp.float32(x)] * 4)  # so that most distortions occur
    return jax.jit(feature_distortions.render_cae)(theta, x, jax.random.key(0))


def pretraining(x: Any, y: Any, number: Callable) -> Any:
    config = pretrain_edsr.get_config("edsr_small")
    config.update(patch=8, sr_patch=8, batch_size=4, train_steps=10, warmup_steps=2)
    optimizer = optax.adam(1e-3)
    state = pretrain.initial_state(NET, optimizer, jax.random.key(0))
    step = jax.jit(pretrain.make_update_step(config, NET, optimizer))
    for _ in range(2):
        state, metrics = step(state, {"image": np.uint8(255 * x)}, jax.random.key(1))
    return state.theta, metrics


def perceptual(x: Any, y: Any, number: Callable) -> Any:
    def model(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(x.reshape(len(x), -1) @ WEIGHTS).astype(jnp.float32)
        return h, h[:, None, None]

    settings = {"steps": 3, "step_size": number(0.5), "noise": number(0.01)}
    found = [attacks.fast_lpa(jax.random.key(0), model, x, y, number(0.5), **settings)]
    for f in (attacks.lpa, attacks.ppgd):
        found.append(f(jax.random.key(0), model, x, y, number(0.5), steps=2))
    return found


CASES: dict[str, Callable] = {
    "ada": augment,
    "ada-l2": functools.partial(augment, step_rule="l2", microbatch=2),
    "augmix": mix,
    "augmentations": augmentations,
    "pgd": functools.partial(attack, f=attacks.pgd, norm="linf", steps=3, restarts=2),
    "pgd-l2": functools.partial(attack, f=attacks.pgd, norm="l2", steps=3),
    "multitargeted": functools.partial(
        attack, f=attacks.multitargeted, norm="linf", steps=4, restarts=2
    ),
    "apgd": functools.partial(attack, f=attacks.apgd, norm="l2", steps=8, rho=np.float64(0.75)),
    "apgd-t": functools.partial(
        attack, f=attacks.apgd, norm="linf", loss="dlr-targeted", steps=8, restarts=2
    ),
    "fab": functools.partial(attack, f=attacks.fab, norm="l2", steps=4, restarts=2),
    "square": functools.partial(attack, f=attacks.square, norm="linf", queries=20),
    "square-l2": functools.partial(attack, f=attacks.square, norm="l2", queries=20),
    "perceptual": perceptual,
    "autoattack": autoattack,
    "errors": errors,
    "small": small_things,
    "classifier": classifier,
    "edsr": distorted_edsr,
    "cae": distorted_cae,
    "pretrain": pretraining,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_x64_changes_nothing(name):
    expected = CASES[name](X, Y, float)
    with x64():
        found = CASES[name](np.float64(X), np.int64(Y), np.float64)
        found = jax.tree.map(np.asarray, found)
    # jax.image.resize's weights and optax.adam's bias correction are of the default type: the last
    # digit differs.
    tolerance = 1e-6 if name in ("edsr", "pretrain") else 0

    def compare(found, expected):
        if isinstance(found, np.ndarray) and found.dtype.kind == "f":
            assert found.dtype == expected.dtype
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
        elif not tolerance:
            np.testing.assert_array_equal(found, expected)

    jax.tree.map(compare, found, jax.tree.map(np.asarray, expected))


@pytest.mark.slow
def test_training_under_x64_is_the_same(tmp_path):
    flags = [
        "--config=experiments/quickstart.py:nominal",
        "--config.epochs=0",
        "--config.train_steps=3",
    ]
    flags += ["--config.log_steps=1", "--config.eval_sets=('clean',)", "--config.batch_size=16"]
    flags += ["--config.figure_examples=0", "--config.cpu_devices=0"]
    command = [sys.executable, "-m", "ada_jax.train", *flags, f"--workdir={tmp_path / '64'}"]
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=600)
    done = run_here("train", *flags, f"--workdir={tmp_path / '32'}")
    assert done.returncode == 0, done.stderr
    one, other = ([r["loss"] for r in logbook.read(tmp_path / name)] for name in ("32", "64"))
    assert len(one) >= 3 and one == other


@pytest.mark.parametrize("name", per_example.LOWERINGS)
def test_every_lowering_of_a_float64_convolution_is_as_exact(name):
    x, w, dy = (RNG.normal(size=size) for size in ((2, 9, 9, 5), (3, 3, 5, 7), (2, 9, 9, 7)))
    layout = ("NHWC", "HWIO", "NHWC")
    with x64():
        forward, gradients = per_example.LOWERINGS[name]
        y, vjp = jax.vjp(
            lambda x, w: jax.lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=layout
            ),
            *map(jnp.asarray, (x, w)),
        )
        found = forward(x, w, None, 1, 1), *gradients(x, w, dy, 1, 1)[:2]
        for value, expected in zip(found, (y, *vjp(dy)), strict=True):
            assert value.dtype == np.float64
            np.testing.assert_allclose(value, expected, atol=1e-12)
