"""Any callable is a classifier, and every call attacks it as it then is."""

import dataclasses
import functools
import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ada_jax
from ada_jax import attacks
from ada_jax.errors import UserError
from ada_jax.evaluation import scoring

BATCH, SIZE, CLASSES = 4, 12, 4  # SSIM needs 11 pixels.
PIXELS = SIZE * SIZE * 3
FIRST, SECOND = (
    jnp.float32(np.random.default_rng(seed).normal(size=(PIXELS, CLASSES))) for seed in (0, 1)
)


def linear(weights: jax.Array, x: jax.Array) -> jax.Array:
    return (x.reshape(len(x), -1) - 0.5) @ jnp.asarray(weights)


class Trainer:
    """Hashed by its identity, as most objects, while what it computes changes."""

    def __init__(self, weights: Any):
        self.weights = weights

    def logits(self, x: jax.Array) -> jax.Array:
        return linear(self.weights, x)


@dataclasses.dataclass(eq=True)
class Unhashable:
    """As an Equinox module: equal to another of equal arrays, and without a hash."""

    weights: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return linear(self.weights, x)


def batch() -> tuple[jax.Array, jax.Array]:
    x = jnp.float32(np.random.default_rng(2).uniform(0.3, 0.7, (BATCH, SIZE, SIZE, 3)))
    return x, jnp.argmax(linear(FIRST, x), -1)


ATTACKS = {
    "pgd": functools.partial(attacks.pgd, steps=2),
    "multitargeted": functools.partial(attacks.multitargeted, steps=2, restarts=1),
    "apgd": functools.partial(attacks.apgd, steps=3),
    "fab": functools.partial(attacks.fab, steps=2),
    "square": functools.partial(attacks.square, queries=3),
}


def run(name: str, logits_fn: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    return ATTACKS[name](jax.random.key(0), logits_fn, *batch(), 0.05)


def assert_equal(first: Any, second: Any) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), first, second)


@pytest.mark.parametrize(
    "name", ["pgd", *(pytest.param(n, marks=pytest.mark.slow) for n in ATTACKS if n != "pgd")]
)
def test_an_attack_sees_what_has_changed_in_place(name):
    trainer, expected = Trainer(FIRST), jax.jit(lambda w: run(name, functools.partial(linear, w)))
    jax.jit(lambda: run(name, trainer.logits)).lower()
    trainer.weights = SECOND
    after = jax.jit(lambda: run(name, trainer.logits))()
    assert np.any(expected(FIRST)[0] != after[0])
    assert_equal(after, expected(SECOND))


@pytest.mark.parametrize(
    "logits_fn",
    [Unhashable(FIRST), functools.partial(Unhashable(FIRST)), Trainer(np.asarray(FIRST)).logits],
    ids=["unhashable", "partial", "numpy"],
)
def test_any_callable_will_do(logits_fn):
    expected = jax.jit(lambda w: run("pgd", functools.partial(linear, w)))(FIRST)
    assert_equal(jax.jit(lambda: run("pgd", logits_fn))(), expected)


# ------------------------------------------------------------------------------- AutoAttack

CONSTANTS = {"apgd-ce": {"steps": 3}, "square": {"queries": 3}}


def audit(logits_fn: Any, epsilon: float = 1e-3, **options: Any) -> attacks.Report:
    x, y = map(np.asarray, batch())
    options = {"attacks": tuple(CONSTANTS), "constants": CONSTANTS} | options
    return attacks.autoattack(jax.random.key(0), logits_fn, x, y, epsilon, **options)


def test_autoattack_sees_what_has_changed_in_place():
    trainer = Trainer(FIRST)
    assert audit(trainer.logits).clean_accuracy == 1
    trainer.weights = -FIRST
    assert audit(trainer.logits).clean_accuracy == 0
    trainer.weights = jax.device_put(SECOND, jax.devices()[-1])
    expected = audit(Unhashable(SECOND))
    np.testing.assert_array_equal(audit(trainer.logits).images, expected.images)
    heads, trainer.head = [FIRST, -FIRST], 0
    trainer.logits = lambda x: [linear(head, x) for head in heads][trainer.head]
    assert audit(trainer.logits).clean_accuracy == 1
    trainer.head = 1
    assert audit(trainer.logits).clean_accuracy == 0


def test_calls_that_share_programs_compile_once(monkeypatch):
    mapped, programs, pmap = [], {}, jax.pmap
    count = lambda f, *a, **k: pmap(lambda *args: mapped.append(f) or f(*args), *a, **k)  # noqa: E731
    monkeypatch.setattr(jax, "pmap", count)
    first = audit(Unhashable(FIRST), 1e-3, programs=programs)
    compiled = len(mapped)
    audit(Unhashable(FIRST), 2e-3, programs=programs)
    again = audit(Unhashable(FIRST), 1e-3, programs=programs)
    assert len(mapped) == compiled == 3  # Two attacks and the classifier.
    np.testing.assert_array_equal(first.images, again.images)


def test_no_call_keeps_the_weights_alive():
    def live() -> int:
        gc.collect()
        return sum(a.shape == FIRST.shape for a in jax.live_arrays())

    logits_fn = lambda: functools.partial(linear, FIRST + 1)  # noqa: E731
    run("pgd", logits_fn())
    before = live()
    for _ in range(3):
        run("pgd", logits_fn())
    assert live() <= before


def test_autoattack_sees_callbacks_that_have_changed():
    """Their programs are equal to the last letter."""

    def of(weights):
        weights = np.asarray(weights)
        shape = jax.ShapeDtypeStruct((BATCH, CLASSES), jnp.float32)
        on_host = lambda x: (np.asarray(x).reshape(BATCH, -1) - 0.5) @ weights  # noqa: E731
        return lambda x: jax.pure_callback(on_host, shape, x)

    found = [audit(of(w), attacks=("square",)).clean_accuracy for w in (FIRST, -FIRST)]
    assert found == [1, 0]


# ------------------------------------------------------------------------------- its siblings


def test_corruption_errors_and_adversarial_augment_count_classes_anew():
    trainer, (x, y) = Trainer(FIRST[:, :2]), batch()
    net = ada_jax.CorruptionNet(lambda theta, x, key: x + theta["tint"], {"tint": jnp.ones(3)})
    pictures = np.uint8(np.round(255 * np.asarray(x)))

    def augment():
        ada_jax.adversarial_augment(
            jax.random.key(0), x, y, logits_fn=trainer.logits, net=net, steps=1
        )

    def measure():
        names = ("brightness",)
        found = scoring.corruption_errors(trainer.logits, pictures, np.asarray(y), names=names)
        return found["clean"]["error"]

    for call in (augment, measure):
        trainer.weights = FIRST[:, :2]
        with pytest.raises(UserError):
            call()
        trainer.weights = FIRST
        call()
    trainer.weights = -FIRST
    assert measure() == 100


# ------------------------------------------------------------------------------- frameworks


@pytest.mark.slow
def test_flax_modules():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(PIXELS, CLASSES, rngs=nnx.Rngs(0))
    logits_fn = lambda x: model(x.reshape(len(x), -1) - 0.5)  # noqa: E731
    for weights in (FIRST, SECOND):
        model.kernel[...] = weights
        model.bias[...] = jnp.zeros(CLASSES)
        assert_equal(run("pgd", logits_fn), run("pgd", functools.partial(linear, weights)))
        expected = audit(functools.partial(linear, weights))
        np.testing.assert_allclose(audit(logits_fn).images, expected.images, atol=1e-5)


@pytest.mark.slow
def test_a_flax_model_in_training_mode_is_merged_as_a_copy():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(PIXELS, rngs=rngs)
            self.linear = nnx.Linear(PIXELS, CLASSES, rngs=rngs)

        def __call__(self, x):
            return self.linear(self.norm(x.reshape(len(x), -1)))

    model = Model(nnx.Rngs(0))
    model.train()
    graphdef, state = nnx.split(model)
    logits_fn = lambda x: nnx.merge(graphdef, state, copy=True)(x)  # noqa: E731
    images, _ = nnx.jit(lambda: run("pgd", logits_fn))()
    assert np.all(np.isfinite(images))
    assert np.all(model.norm.mean[...] == 0)  # The statistics before any update.


def test_equinox_modules():
    equinox = pytest.importorskip("equinox")

    class Model(equinox.Module):
        weights: jax.Array

        def __call__(self, x):
            return linear(self.weights, x)

    for weights in (FIRST, SECOND):
        expected = run("pgd", functools.partial(linear, weights))
        assert_equal(run("pgd", Model(weights)), expected)
        assert_equal(audit(Model(weights)).images, audit(Unhashable(weights)).images)
