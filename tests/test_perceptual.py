"""LPIPS and the attacks that it bounds: what each promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ada_jax import attacks, losses, perceptual
from ada_jax import results as results_files
from ada_jax.attacks import rlat
from ada_jax.errors import UserError
from ada_jax.evaluation import perceptual_attacks, worst_case
from ada_jax.nets import classifiers
from tests.conftest import assert_mistake, run_here
from tests.test_train import bounding

BATCH, SIZE, CLASSES, BOUND = 8, 8, 5, 0.25


def weights() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(3, 3, 3, 12), (3, 3, 12, 16), (64, CLASSES)]
    return [np.float32(2 * rng.normal(size=s) / np.sqrt(np.prod(s[:-1]))) for s in shapes]


def model(x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Two convolutions of stride two, and a linear layer."""
    *kernels, w = weights()
    h, features = x - 0.5, {}
    for i, kernel in enumerate(kernels):
        layout = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(h, kernel, (2, 2), "SAME", dimension_numbers=layout)
        h = features[f"conv{i}"] = jax.nn.elu(h)
    return h.reshape(len(x), -1) @ w, features


def logits_fn(x: jax.Array) -> jax.Array:
    return model(x)[0]


def batch(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Images, and the network's own labels but for one."""
    x = jnp.float32(np.random.default_rng(seed).uniform(0, 1, (BATCH, SIZE, SIZE, 3)))
    y = jnp.argmax(logits_fn(x), -1)
    return x, y.at[0].set((y[0] + 1) % CLASSES)


ATTACKS = {
    "fast_lpa": attacks.fast_lpa,
    "lpa": functools.partial(attacks.lpa, steps=10),
    "ppgd": functools.partial(attacks.ppgd, steps=10),
}
each_attack = pytest.mark.parametrize("name", list(ATTACKS))


@functools.cache
def compiled(name: str):
    return jax.jit(lambda keys, x, y: ATTACKS[name](keys, model, x, y, BOUND))


def run(name: str, order=slice(None)):
    (x, y), keys = batch(), jax.random.split(jax.random.key(0), BATCH)
    return compiled(name)(keys[order], x[order], y[order])


# ------------------------------------------------------------------------ LPIPS


def test_lpips_is_a_distance_with_finite_gradients():
    (x, _), (other, _) = batch(), batch(1)
    lpips = jax.jit(functools.partial(perceptual.lpips, lambda x: model(x)[1]))
    np.testing.assert_allclose(lpips(x, other), lpips(other, x), rtol=1e-6)
    np.testing.assert_allclose(lpips(x, x), np.zeros(BATCH), atol=1e-5)
    gradient = jax.jit(jax.grad(lambda a: perceptual.distance(a, x).sum()))(x)
    np.testing.assert_array_equal(gradient, np.zeros_like(x))


def test_features_are_of_unit_norm_in_every_pixel():
    features = {"a": 7 * jnp.ones((2, 3, 5, 4)), "b": jnp.zeros((2, 1, 1, 6))}
    unit = jax.jit(perceptual.unit_features)(features)
    np.testing.assert_allclose(jnp.sum(unit["a"] ** 2, (1, 2, 3)), np.ones(2), rtol=1e-6)
    np.testing.assert_array_equal(unit["b"], features["b"])  # Without NaN.
    total = lambda f: perceptual.unit_features(f)["b"].sum()  # noqa: E731
    gradients = jax.jit(jax.grad(total))(features)
    assert np.isfinite(gradients["b"]).all()


def test_a_classifier_is_bounded_by_its_stages():
    net = classifiers.make("resnet9", 10)
    x = jnp.zeros((2, 16, 16, 3))
    params, state = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, is_training=True), x)
    of = lambda p, s, x: perceptual.model_of(net, p, s)(x)  # noqa: E731
    logits, features = jax.eval_shape(of, params, state, x)
    assert logits.shape == (2, 10) and sorted(features) == ["stage1", "stage2", "stage3"]


# ------------------------------------------------------------------------ the attacks


@each_attack
def test_images_are_in_the_box_and_raise_the_loss(name):
    x, y = batch()
    images, info = run(name)
    assert (images.shape, images.dtype) == (x.shape, jnp.float32)
    assert np.all((images >= 0) & (images <= 1))
    lpips = perceptual.lpips(lambda x: model(x)[1], images, x)
    np.testing.assert_allclose(info["distance"], lpips, atol=1e-5)
    np.testing.assert_array_equal(info["broken"], jnp.argmax(logits_fn(images), -1) != y)
    before, after = (losses.margin(logits_fn(a), y)[1:] for a in (x, images))
    assert np.all(after > before)
    assert info["broken"][1:].sum() > 2


@pytest.mark.parametrize("name", ["lpa", "ppgd"])
def test_the_attacks_of_evaluation_stay_within_the_bound(name):
    _, info = run(name)
    assert np.all(info["distance"] <= BOUND + 1e-5) and info["distance"].max() > 0.8 * BOUND


def test_fast_lpa_leaves_misclassified_images():
    images, info = run("fast_lpa")
    np.testing.assert_array_equal(images[0], batch()[0][0])
    assert info["broken"][0] and info["distance"][0] < 1e-6


@each_attack
def test_an_image_s_attack_does_not_depend_on_its_position(name):
    order = np.array([5, 2, 7, 0, 1, 3, 6, 4])
    images, info = run(name)
    moved, moved_info = run(name, order)
    # Rounding, which depends on the position, grows over the steps: to 1.1e-4 on a CPU without
    # AVX-512. Other random numbers change pixels of each image by 0.03 or more.
    np.testing.assert_allclose(moved, images[order], atol=1e-3)
    np.testing.assert_array_equal(moved_info["broken"], info["broken"][order])


def test_images_far_outside_of_a_small_bound_are_projected_by_bisection():
    """Newton's steps overshoot the bound by 0.1, ten times this one."""
    x, y = batch()
    images, info = attacks.lpa(jax.random.key(0), model, x, y, 0.01, steps=1, rounds=1)
    assert np.all(info["distance"] <= 0.01 + 1e-6) and np.all((images >= 0) & (images <= 1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bound": 0.0}, "bound=0.0 must be positive"),
        ({"bound": np.nan}, "bound=nan must be positive"),
        ({"steps": 0}, "steps=0 must be an integer of at least 1"),
        ({"step_size": -1.0}, "step_size=-1.0 must be positive"),
        ({"penalty": 0.0}, "penalty=0.0 must be positive"),
        ({"noise": 0.0}, "noise=0.0 must be positive"),
        ({"model": lambda x: (logits_fn(x), {})}, "at least one layer"),
        ({"model": lambda x: (logits_fn(x), logits_fn(x))}, "each must be"),
        ({"x": jnp.full((BATCH, SIZE, SIZE, 3), 2.0)}, "Pixels from 2.0"),
    ],
)
def test_arguments_out_of_range_are_rejected(changes, said):
    x, y = batch()
    arguments = {"key": jax.random.key(0), "model": model, "x": x, "y": y} | changes
    with pytest.raises(UserError, match=said):
        attacks.fast_lpa(**arguments)


# ------------------------------------------------------------------------ RLAT


def test_radii_of_rlat_are_those_of_its_code():
    net = classifiers.make("preact_resnet18", 10)
    layers = classifiers.feature_shapes(net, (32, 32, 3))
    image, others = rlat.radii((32, 32, 3), layers, 0.08)
    found = [image, *others.values()]
    np.testing.assert_allclose(found, [0.08, 0.8533, 0.5689, 0.2133, 0.0853, 0.0356], atol=5e-5)


def test_rlat_raises_the_loss_and_keeps_its_radii():
    x, y = batch()
    w = weights()[-1]

    def loss_fn(x, deltas):
        h = x.reshape(BATCH, 4, 4, -1)[..., :4] + deltas["stem"]
        return losses.cross_entropy(h.reshape(BATCH, -1) @ w, y)

    perturb = jax.jit(lambda x: rlat.perturb(loss_fn, x, {"stem": (4, 4, 4)}, 0.1))
    images, deltas, before = perturb(x)
    radius = 0.1 * 64 / x[0].size / 2
    np.testing.assert_allclose(
        jnp.linalg.norm(deltas["stem"].reshape(BATCH, -1), axis=1), radius, rtol=1e-5
    )
    assert np.all(jnp.linalg.norm((images - x).reshape(BATCH, -1), axis=1) <= 0.1 + 1e-6)
    assert np.all(loss_fn(images, deltas) > before)


# ------------------------------------------------------------------------ evaluation


def test_errors_are_measured_once_and_independently_of_the_batch_size():
    x, y = map(np.asarray, batch())
    written = []

    def classify(x, with_features=False):
        return model(x) if with_features else logits_fn(x)

    def measure(measured, **changes):
        options = {"lpips_steps": 4, "lpips_bound": BOUND, "batch_size": 8} | changes
        options = worst_case.Options(**options)
        return perceptual_attacks.measure(
            classify, x, y, options=options, measured=measured, save=written.append
        )

    found = measure({})
    assert [e["attack"] for e in found["perceptual"]] == ["lpa", "ppgd"] and len(written) == 2
    for entry in found["perceptual"]:
        assert (entry["examples"], entry["features"], entry["bound"]) == (BATCH, "self", BOUND)
        assert 1 <= entry["wrong"] <= BATCH and 0 < entry["distance"] <= BOUND
        assert entry["error"] == 100 * entry["wrong"] / BATCH
    assert measure(found) == found and len(written) == 2
    others = measure({}, batch_size=3)["perceptual"]
    assert [e["wrong"] for e in others] == [e["wrong"] for e in found["perceptual"]]
    title, value = results_files.summary(found)[0]
    assert title == "error under lpa, LPIPS of self, 0.25, 4 steps" and value.endswith("% of 8")


RANDOM = ("evaluate", "--config=experiments/quickstart.py", "--random", "--sets=perceptual")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--lpips_bound=0", "--lpips_bound=0.0 must be positive"),
        ("--lpips_steps=0", "--lpips_steps=0"),
        ("--lpips_weights=nowhere", "nowhere has no weights that name their classifier"),
    ],
)
def test_mistakes_are_said_before_anything_is_measured(tmp_path, flag, said):
    assert_mistake(run_here(*RANDOM, f"--out={tmp_path}/r.json", flag), said)
    assert not (tmp_path / "r.json").exists()


@pytest.mark.slow
def test_the_binary_measures_under_perceptual_attacks(tmp_path):
    flags = [f"--out={tmp_path / 'r.json'}", "--split=test[:40]", "--worst_examples=8"]
    flags += [f"--lpips_weights={bounding(tmp_path)}", "--lpips_steps=2"]
    done = run_here(*RANDOM, *flags)
    assert done.returncode == 0, done.stderr
    for attack in ("lpa", "ppgd"):
        assert f"error under {attack}, LPIPS of alexnet_small, 0.5" in done.stdout
