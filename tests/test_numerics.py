"""Types of images and logits, few classes, small images, and logits that are not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ada_jax import CorruptionNet, adversarial_augment, attacks, paths, sharding
from ada_jax.attacks import geometry, loops
from ada_jax.augment import augmix
from ada_jax.errors import NotFiniteError, UserError
from ada_jax.evaluation import scoring, worst_case
from ada_jax.report import figures
from ada_jax.run import loop
from tests.conftest import exact_distances

KEY = jax.random.key(0)
X = np.float32(np.random.default_rng(0).uniform(0.3, 0.7, (12, 5, 5, 3)))
X = np.float32(np.float16(X))  # so that all floating types hold the same images
WEIGHTS = np.random.default_rng(1).normal(size=(75, 4))
NET = CorruptionNet(lambda theta, x, key: x * theta["gain"], {"gain": jnp.ones((1, 1, 3))})


def linear(x: jax.Array, classes: int = 3) -> jax.Array:
    return (x.reshape(len(x), -1) - 0.5) @ jnp.float32(WEIGHTS[:, :classes])


def labels(classes: int) -> np.ndarray:
    return np.asarray(jnp.argmax(linear(X, classes), -1))


Y = labels(3)


def augmented(x=X, logits_fn=linear, **options):
    options = {"steps": 1, "ssim_threshold": -1} | options
    return adversarial_augment(KEY, x, Y, logits_fn=logits_fn, net=NET, **options)


GRADIENT_ATTACKS = {
    "pgd": functools.partial(attacks.pgd, steps=2),
    "multitargeted": functools.partial(attacks.multitargeted, steps=2, restarts=1),
    "apgd": functools.partial(attacks.apgd, steps=2),
    "fab": functools.partial(attacks.fab, steps=2),
}
SQUARE = functools.partial(attacks.square, queries=5)

# ------------------------------------------------------------------------ types


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16])
def test_images_of_any_floating_type_become_float32(dtype):
    x = X if dtype != jnp.bfloat16 else np.float32(X.astype(jnp.bfloat16))
    for f in (
        lambda x: augmented(x)[0],
        functools.partial(augmix.augment_and_mix, KEY, width=1, depth=1, ops=("rotate",)),
        lambda x: GRADIENT_ATTACKS["pgd"](KEY, linear, x, Y, 0.1)[0],
    ):
        found = f(x.astype(dtype))
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, f(x))


@pytest.mark.parametrize("f", [augmented, functools.partial(augmix.augment_and_mix, KEY)])
def test_integer_images_are_not_divided_by_a_guess(f):
    with pytest.raises(UserError, match="divide by 255"):
        f(np.uint8(255 * X))


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float16, marks=pytest.mark.slow), jnp.bfloat16])
@pytest.mark.parametrize("name", [*GRADIENT_ATTACKS, "square", "ada"])
def test_logits_of_few_bits_are_attacked(name, dtype):
    short = lambda x: linear(x).astype(dtype)  # noqa: E731
    if name == "ada":
        images, metrics = augmented(logits_fn=short)
        assert metrics["loss_end"].dtype == images.dtype == jnp.float32
        return
    attack = (GRADIENT_ATTACKS | {"square": SQUARE})[name]
    images, info = attack(KEY, short, X, Y, 0.3)
    assert images.dtype == jnp.float32 and np.all(info["broken"])


def votes(x: jax.Array) -> jax.Array:
    return jnp.round(10 * linear(x)).astype(jnp.int32)


@pytest.mark.parametrize("name", [*GRADIENT_ATTACKS, "autoattack", "ada"])
def test_integer_logits_have_no_gradient(name):
    attack = GRADIENT_ATTACKS.get(name, attacks.autoattack)
    with pytest.raises(UserError, match="logits of int32, which have no gradient"):
        augmented(logits_fn=votes) if name == "ada" else attack(KEY, votes, X, Y, 0.1)


def test_integer_logits_are_enough_without_gradients():
    assert np.all(SQUARE(KEY, votes, X, Y, 0.3)[1]["broken"])
    assert "loss_end" in augmented(logits_fn=votes, steps=0)[1]
    report = attacks.autoattack(KEY, votes, X, Y, 0.3, attacks=["square"])
    assert report.robust_accuracy == 0
    images = np.uint8(np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)))
    whole = lambda x: jnp.int32(255 * x.mean((1, 2)))  # noqa: E731
    y = np.argmax(np.int32((images / np.float32(255)).mean((1, 2)) * 255), -1)
    found = scoring.corruption_errors(whole, images, y, names=["fog"])
    assert found["clean"]["wrong"] == 0


# ------------------------------------------------------------------------ two and three classes


@pytest.mark.parametrize(("classes", "norm"), [(2, "l2"), (3, "linf")])
def test_targeted_attacks_with_few_classes_find_the_exact_robust_accuracy(classes, norm):
    few = functools.partial(linear, classes=classes)
    distances = exact_distances(X, labels(classes), WEIGHTS[:, :classes], norm)
    epsilon = np.sort(distances)[5:7].mean()
    for attack in ("apgd-t", "fab-t", "multitargeted"):
        report = attacks.autoattack(
            KEY, few, X, labels(classes), epsilon, norm=norm, attacks=[attack],
            constants={"multitargeted": {"steps": 40, "restarts": 3}},
        )  # fmt: skip
        missed = report.robust & (distances < epsilon)
        # MultiTargeted's Adam does not follow the gradient's direction, which is the nearest in l2.
        assert missed.sum() <= (3 if (attack, norm) == ("multitargeted", "l2") else 0)
        assert report.robust[distances > epsilon].all()
        told = any(f"the classifier has {classes}" in sentence for sentence in report.warnings)
        assert told == (attack == "apgd-t")


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3])
def test_table_2_has_results_for_few_classes(classes, tmp_path, monkeypatch):
    monkeypatch.setattr(worst_case.results_files, "RADII", {"linf": {"8/255": 8 / 255}})
    few = functools.partial(linear, classes=classes)
    results = worst_case.pixel_balls(
        few,
        np.float32(np.uint8(255 * X)) / 255,
        labels(classes),
        options=worst_case.Options(batch_size=12, state_dir=tmp_path),
        measured={},
        save=lambda fields: None,
    )
    cell = results["lp"]["linf"]["8/255"]
    assert cell["attacks"].startswith("partial: ") and "apgd-t" in cell["attacks"]
    assert f"has {classes}" in cell["warnings"][0]


def test_one_class_is_no_classifier():
    with pytest.raises(UserError, match="one class"):
        attacks.pgd(KEY, lambda x: linear(x)[:, :1], X, 0 * Y, 0.1)


def test_the_untargeted_dlr_loss_needs_three_classes():
    with pytest.raises(UserError, match="needs at least 3 classes"):
        attacks.apgd(KEY, lambda x: linear(x)[:, :2], X, Y % 2, 0.1, loss="dlr")
    with pytest.raises(UserError, match="needs at least 3 classes"):
        attacks.pgd(KEY, lambda x: linear(x)[:, :2], X, Y % 2, 0.1, loss="dlr")


# ------------------------------------------------------------- images smaller than SSIM's window


def test_small_images_pass_where_the_line_search_is_off():
    images, metrics = augmented()
    assert images.shape == X.shape and not metrics["changed"].any()
    assert not {"ssim_before", "ssim_after"} & set(metrics)
    with pytest.raises(UserError, match=r"ssim_threshold=0.3 needs images .* 11x11 .* 5x5"):
        augmented(ssim_threshold=0.3)


def test_small_images_have_an_error_under_ada(monkeypatch):
    monkeypatch.setattr(worst_case.corruption_nets, "make", lambda name: NET)
    (cell,) = under_ada(linear)["under_ada"]
    assert cell["error"] < 100 and "ssim" not in cell


def test_small_images_are_drawn_without_an_ssim(tmp_path):
    one = {"label": Y[:2], "clean_prediction": Y[:2], "augmented_prediction": Y[:2]}
    figures.adversarial_rows(
        tmp_path / "a.png", clean=X[:2], augmented=X[:2], similarity=None,
        class_names=["a", "b", "c"], **one,
    )  # fmt: skip
    assert (tmp_path / "a.png").stat().st_size


def under_ada(logits_fn):
    options = worst_case.Options(radii=[0.1], steps=1, restarts=2, batch_size=8)
    images = np.float32(np.uint8(255 * X)) / 255
    return worst_case.under_ada(
        logits_fn, images, Y, options=options, measured={}, save=lambda fields: None
    )


# ------------------------------------------------------------------------ not finite


def broken_where_dark(x: jax.Array) -> jax.Array:
    dark = x.mean((1, 2, 3))[:, None] < 0.5
    return jnp.where(dark, jnp.nan, linear(x))


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_logits_that_are_not_finite_are_no_class(value):
    images = np.full((6, 32, 32, 3), 200, np.uint8)
    images[:2] = 20
    bad = lambda x: jnp.where(x.mean((1, 2, 3))[:, None] < 0.5, value, x.mean((1, 2)) * 0)  # noqa: E731
    with pytest.raises(UserError, match="NaN or infinity for 2 of 6 clean images"):
        scoring.corruption_errors(bad, images, np.zeros(6, int), names=["fog"])


def test_non_finite_logits_count_as_errors():
    step = jax.pmap(scoring.make_eval_step(lambda x: x[:, 0, 0]), sharding.AXIS)
    pixels = jnp.float32([[jnp.nan, 0, 0], [1, 0, 0], [0, 1, 0], [jnp.nan] * 3])
    batch = {
        "image": pixels[:, None, None],
        "label": np.zeros(4, int),
        "mask": np.float32([1, 1, 1, 0]),
    }
    sums = step(jax.tree.map(lambda a: a[None], batch))
    assert {k: v.item() for k, v in sums.items() if k != "loss"} == {
        "examples": 3, "wrong": 2, "not_finite": 1,
    }  # fmt: skip
    assert np.isfinite(sums["loss"])


def test_attacks_treat_non_finite_logits_as_misclassified():
    logits = jnp.float32([[jnp.nan, 0], [1, 0], [0, jnp.inf]])
    wrong = loops.misclassified(logits, jnp.int32([0, 0, 1]))
    assert wrong.tolist() == [True, False, True]
    bright = X / 2 + 0.5
    y = np.asarray(jnp.argmax(linear(bright), -1))
    for name, attack in (GRADIENT_ATTACKS | {"square": SQUARE}).items():
        images, info = attack(KEY, broken_where_dark, bright, y, 1.0)
        assert np.all(info["broken"]), name
        assert np.all((images >= 0) & (images <= 1)), name


def test_inside_jit_invalid_examples_become_nan_and_count_as_broken():
    y = np.asarray(jnp.argmax(linear(X), -1))
    x, y = jnp.asarray(X).at[0, 0, 0, 0].set(128.0), jnp.asarray(y).at[1].set(99)
    for name, attack in (GRADIENT_ATTACKS | {"square": SQUARE}).items():
        images, info = jax.jit(lambda x, y, attack=attack: attack(KEY, linear, x, y, 1e-6))(x, y)
        assert np.isnan(images[:2]).any((1, 2, 3)).all(), name
        assert info["broken"][:2].all() and not info["broken"][2:].any(), name
        assert np.isfinite(images[2:]).all(), name


def test_a_gradient_of_nan_moves_nothing_out_of_the_box():
    # The square root's gradient at zero is infinite, and times zero NaN.
    trap = lambda x: linear(x) + jnp.sqrt(0 * x.sum((1, 2, 3)))[:, None]  # noqa: E731
    for name, attack in GRADIENT_ATTACKS.items():
        images, info = attack(KEY, trap, X, Y, 1e-6)
        assert np.all(np.isfinite(images)) and not np.any(info["broken"]), name
    assert not np.any(geometry.steepest(jnp.full((1, 2, 2, 3), jnp.nan), "l2"))


def test_autoattack_reports_non_finite_logits():
    with pytest.raises(UserError, match=r"NaN or infinity for .* of 12 clean images"):
        attacks.autoattack(KEY, broken_where_dark, X, Y, 0.1)
    bright = X / 2 + 0.5
    y = np.asarray(jnp.argmax(linear(bright), -1))

    def near(x):
        far = jnp.abs(x - bright[:1]).max((1, 2, 3))[:, None] > 0.01
        return jnp.where(far, jnp.nan, linear(x))

    same, y = np.repeat(bright[:1], 12, 0), np.repeat(y[:1], 12)
    constants = {"square": {"queries": 3}}
    report = attacks.autoattack(KEY, near, same, y, 0.2, attacks=["square"], constants=constants)
    assert report.robust_accuracy == 0 and np.isfinite(report.images).all()
    assert any("square broke 12 examples with images for which" in s for s in report.warnings)


def test_an_error_under_ada_is_no_number_of_nan(monkeypatch):
    monkeypatch.setattr(worst_case.corruption_nets, "make", lambda name: NET)
    with pytest.raises(UserError, match=r"NaN or infinity for .* images of AdA's attack"):
        under_ada(broken_where_dark)


def test_no_json_holds_nan(tmp_path):
    with pytest.raises(ValueError):
        paths.write_json(tmp_path / "a.json", {"error": float("nan")})
    assert not (tmp_path / "a.json").exists()
    with pytest.raises(NotFiniteError, match=r"at step 3, where the metrics are ada_loss_end inf"):
        loop.finite([{"loss": 1.0, "ada_loss_end": np.inf}], 3, advice="rest")
