"""AutoAttack: which examples are attacked and counted, resuming, warnings and errors."""

import dataclasses
import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ada_jax import attacks
from ada_jax.attacks import geometry
from ada_jax.attacks.autoattack import _Runner, _within
from ada_jax.errors import UserError
from tests.conftest import exact_distances

COUNT, SIZE, CLASSES = 30, 5, 5
PIXELS = SIZE * SIZE * 3
WEIGHTS = np.random.default_rng(0).normal(size=(PIXELS, CLASSES))
QUICK = {
    "apgd-ce": {"steps": 10},
    "square": {"queries": 20},
    "multitargeted": {"steps": 40, "restarts": 3},
}


def linear(x: jax.Array) -> jax.Array:
    return (x.reshape(len(x), -1) - 0.5) @ jnp.float32(WEIGHTS)


def examples() -> tuple[np.ndarray, np.ndarray]:
    """Images far from the box's sides; the last three are misclassified."""
    x = np.float32(np.random.default_rng(1).uniform(0.3, 0.7, (COUNT, SIZE, SIZE, 3)))
    y = np.array(jnp.argmax(linear(x), -1))
    y[-3:] = (y[-3:] + 1) % CLASSES
    return x, y


@functools.cache
def distances_of(norm: str) -> np.ndarray:
    return exact_distances(*examples(), WEIGHTS, norm)


def epsilon_of(norm: str) -> float:
    """In the middle between two examples' distances, so that rounding decides nothing."""
    distances = np.sort(distances_of(norm))
    return float(distances[COUNT // 2 - 1 : COUNT // 2 + 1].mean())


@functools.cache
def attacked(norm: str) -> attacks.Report:
    return attacks.autoattack(
        jax.random.key(0), linear, *examples(), epsilon_of(norm), norm=norm, batch_size=12
    )


def quick(logits_fn=linear, names=("apgd-ce", "square"), seed=0, **options) -> attacks.Report:
    x, y = examples()
    options = {"x": x, "y": y, "epsilon": 0.015, "batch_size": 12} | options
    constants = {name: QUICK[name] for name in names if name in QUICK}
    return attacks.autoattack(
        jax.random.key(seed), logits_fn, attacks=names, constants=constants, **options
    )


def assert_equal_reports(first: attacks.Report, second: attacks.Report):
    for field in dataclasses.fields(first):
        a, b = getattr(first, field.name), getattr(second, field.name)
        np.testing.assert_array_equal(a, b) if isinstance(a, np.ndarray) else None
        assert isinstance(a, np.ndarray) or field.name == "accounts" or a == b
    for a, b in zip(first.accounts, second.accounts, strict=True):
        assert dataclasses.replace(a, seconds=0) == dataclasses.replace(b, seconds=0)


# ------------------------------------------------------------------------------- what it finds

each_norm = pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=pytest.mark.slow)])


@pytest.mark.accelerator
@each_norm
def test_it_finds_the_exact_robust_accuracy_of_a_linear_classifier(norm):
    report = attacked(norm)
    np.testing.assert_array_equal(report.robust, distances_of(norm) > epsilon_of(norm))
    assert report.robust_accuracy == report.robust.mean()
    assert report.clean_accuracy == (COUNT - 3) / COUNT
    assert report.name == "AutoAttack"


@each_norm
def test_every_image_is_inside_ball_and_box_and_misclassified_where_counted(norm):
    report, (x, y) = attacked(norm), examples()
    assert np.all((report.images >= 0) & (report.images <= 1))
    assert np.all(geometry.size(report.images - x, norm) <= epsilon_of(norm) + 1e-6)
    np.testing.assert_array_equal(np.argmax(linear(report.images), -1) != y, ~report.robust)
    unmoved = report.robust | (report.broken_by == "clean")
    np.testing.assert_array_equal(report.images[unmoved], x[unmoved])


@each_norm
def test_accounts(norm):
    report, left = attacked(norm), COUNT - 3
    assert [account.attack for account in report.accounts] == list(attacks.STANDARD)
    for account in report.accounts:
        assert account.attacked == left
        assert account.broken == np.sum(report.broken_by == account.attack)
        left -= account.broken
        assert account.robust_accuracy == left / COUNT
        assert account.seconds > 0
    ce, targeted, fab, square = report.accounts
    # A look at the clean image, the start and the steps, for as long as an example is unbroken.
    full, robust = 102 * ce.attacked, 102 * (ce.attacked - ce.broken)
    assert robust <= ce.forward < 0.75 * full and ce.backward == ce.forward - ce.attacked
    left = targeted.attacked - targeted.broken
    assert left * (1 + 4 * 101) <= targeted.forward <= targeted.attacked * (1 + 4 * 101)
    assert fab.forward >= left * (1 + 4 * 200) and fab.backward >= left * 400
    assert (square.attacked, square.backward) == (left, 0)
    assert square.forward == left * 5002


def test_multitargeted_finds_the_same_with_its_restarts_side_by_side():
    epsilon = epsilon_of("linf")
    report = quick(names=("multitargeted",), epsilon=epsilon)
    np.testing.assert_array_equal(report.robust, distances_of("linf") > epsilon)
    (account,) = report.accounts
    # Runs of all targets and restarts, of 40 steps and a look at the end.
    full = (CLASSES - 1) * 3 * 41
    assert report.robust.sum() * full <= account.forward < account.attacked * full


def test_it_is_named_after_what_ran():
    assert quick().name == "partial: apgd-ce+square"


# ------------------------------------------------------------------------------- the same again


def test_an_example_draws_the_same_in_any_batch_and_another_key_draws_otherwise():
    first, other = quick(), quick(batch_size=30, microbatch=12)
    np.testing.assert_array_equal(first.broken_by, other.broken_by)
    np.testing.assert_allclose(first.images, other.images, atol=1e-6)
    assert np.any(quick(seed=1).images != first.images)


@pytest.mark.parametrize(
    ("count", "microbatch"), [(0, 4), (3, 4), (32, 32), (33, 20), (38, 20), (83, 28), (999, 32)]
)
def test_microbatches_are_well_filled(count, microbatch):
    runner = _Runner(linear, "linf", 256, 32, None)
    assert runner.well_filled(count) == microbatch


@pytest.mark.parametrize("key", [jax.random.key(0, impl="rbg"), np.array([0, 0], np.uint32)])
def test_it_takes_every_kind_of_key(key):
    x, y = examples()
    options = {"attacks": ["apgd-ce"], "constants": {"apgd-ce": QUICK["apgd-ce"]}}
    report = attacks.autoattack(key, linear, x, y, 0.015, **options)
    assert report.robust_accuracy < report.clean_accuracy


ON_DEVICES = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
import numpy as np
sys.path.insert(0, sys.argv[2])
import test_attacks_autoattack as test
assert jax.local_device_count() == int(sys.argv[1])
report = test.quick(microbatch=4)
np.savez(sys.argv[3], images=report.images, broken_by=report.broken_by)
"""


@pytest.mark.slow
def test_the_number_of_devices_changes_nothing(tmp_path):
    command = [sys.executable, "-c", ON_DEVICES, "2", str(pathlib.Path(__file__).parent)]
    subprocess.run([*command, str(tmp_path / "two.npz")], check=True)
    one = quick(microbatch=4)
    with np.load(tmp_path / "two.npz", allow_pickle=False) as two:
        np.testing.assert_array_equal(two["broken_by"], one.broken_by)
        np.testing.assert_allclose(two["images"], one.images, atol=1e-6)


def test_it_goes_on_where_it_was_killed_and_ends_with_the_same_numbers(tmp_path, monkeypatch):
    whole = quick(state_dir=tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files[0] == "apgd-ce_0000000.npz" and "square_0000000.npz" in files
    calls = []
    # The package's attribute of the module's name is the function.
    runner = sys.modules["ada_jax.attacks.autoattack"]._Runner
    attack = runner.attack
    record = lambda self, name, *args: calls.append(name) or attack(self, name, *args)  # noqa: E731
    monkeypatch.setattr(runner, "attack", record)
    assert_equal_reports(quick(state_dir=tmp_path), whole)
    assert not calls
    for name in ("apgd-ce_0000024.npz", "square_0000000.npz"):
        (tmp_path / name).unlink()
    assert_equal_reports(quick(state_dir=tmp_path), whole)
    assert calls == ["apgd-ce", "square"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be created"):
        quick(state_dir=tmp_path / "file")


def test_a_folder_of_another_call_is_refused(tmp_path):
    quick(state_dir=tmp_path)
    with pytest.raises(UserError, match="holds attacks on another classifier, or"):
        quick(state_dir=tmp_path, epsilon=0.02)
    with pytest.raises(UserError, match="holds attacks on another classifier, or"):
        quick(lambda x: 2 * linear(x), state_dir=tmp_path)


# ------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
def test_every_loss_breaks_what_is_clearly_breakable(loss):
    """A descended, swapped or shifted loss does not."""
    x, y = examples()
    epsilon = epsilon_of("linf")
    near, far = (distances_of("linf") < 0.9 * epsilon), distances_of("linf") > 1.001 * epsilon
    run = lambda *arrays: attacks.pgd(  # noqa: E731
        jax.random.key(0), linear, *arrays, epsilon, loss=loss, steps=20
    )[1]["broken"]
    broken = np.asarray(jax.jit(run)(x, y))
    assert broken[near].all() and not broken[far].any()


def test_apgd_with_the_dlr_loss_breaks_what_is_clearly_breakable():
    report = quick(names=("apgd-dlr",), epsilon=epsilon_of("linf"))
    near = distances_of("linf") < 0.9 * epsilon_of("linf")
    assert not (report.robust & near).any()


# ------------------------------------------------------------------------------- warnings


def test_masked_gradients_are_warned_about():
    """The classifier's gradients are zero, but Square needs none."""
    report = quick(lambda x: linear(jnp.round(x * 20) / 20), epsilon=0.08)
    assert any("had a gradient of zero at" in w for w in report.warnings)
    assert any("Square, which uses no gradients, still broke" in w for w in report.warnings)


def test_a_random_classifier_is_warned_about():
    rng = np.random.default_rng(0)
    noisy = lambda x: linear(x) + rng.normal(size=CLASSES)  # noqa: E731
    assert any("is random" in w for w in quick(noisy, names=("square",)).warnings)
    fewer = lambda x: noisy(x).at[:, -1].set(-jnp.inf)  # noqa: E731
    x, y = examples()
    report = quick(fewer, names=("square",), x=x[y < CLASSES - 1], y=y[y < CLASSES - 1])
    assert any("is random" in w for w in report.warnings)


def test_classes_of_infinitely_low_logits_do_not_count_for_the_targeted_loss():
    """DLR divides by a difference that is infinite with fewer than four finite logits."""
    x, y = examples()
    few = {"x": x[y < 3], "y": y[y < 3], "names": ("apgd-t",)}
    three = quick(lambda x: linear(x)[:, :3], **few)
    masked = quick(lambda x: linear(x).at[:, 3:].set(-jnp.inf), **few)
    assert any("has 3" in w for w in masked.warnings)
    assert masked.robust_accuracy == three.robust_accuracy < 1


def test_nothing_is_warned_about_otherwise():
    assert attacked("linf").warnings == []


# ------------------------------------------------------------------------------- bad input

X, Y = examples()


def test_a_constant_that_an_attack_does_not_take_is_refused():
    constants = {"square": {"quries": 3}}
    with pytest.raises(
        UserError, match="has the unknown argument 'quries': choose from p_init, queries"
    ):
        attacks.autoattack(jax.random.key(0), linear, X, Y, 0.1, constants=constants)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"queries": 0}, r"constants\['square'\]: queries=0 must be an integer of at least 1"),
        ({"p_init": "a"}, r"constants\['square'\]: p_init='a' must be one number"),
        (None, r"constants\['square'\]=None must be a dict"),
    ],
)
def test_constants_of_the_last_attack_are_checked_before_the_first_one_runs(
    given, message, monkeypatch
):
    monkeypatch.setattr(_Runner, "attack", None)
    with pytest.raises(UserError, match=message):
        attacks.autoattack(jax.random.key(0), linear, X, Y, 0.1, constants={"square": given})


def test_shared_programs_are_of_the_same_constants():
    programs, passes = {}, []
    for queries in (5, 20):
        report = attacks.autoattack(
            *(jax.random.key(0), linear, X, Y, 1e-6),
            attacks=["square"],
            constants={"square": {"queries": queries}},
            programs=programs,
        )
        passes.append(report.accounts[0].forward)
    assert passes[1] - passes[0] == (20 - 5) * (COUNT - 3)


def test_the_ball_s_tolerance_grows_with_its_radius():
    """Projections of float32 images exceed a radius of 20 by more than 1e-6."""
    x = np.random.default_rng(0).uniform(0.3, 0.7, (16, 224, 224, 3)).astype(np.float32)
    far = x + np.random.default_rng(1).normal(0, 1, x.shape).astype(np.float32)
    images = np.asarray(geometry.project(far, x, 20.0, "l2"))
    assert _within(images, x, 20.0, "l2").all()
    assert not _within(images, x, 19.99, "l2").any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": X * 255}, "Pixels from .* must be in"),
        ({"x": X[0]}, r"shape \[5, 5, 3\]"),
        ({"y": Y + CLASSES}, "Labels from 5 to 9 do not fit the classifier's 5 logits"),
        ({"y": Y[:3]}, r"Labels of shape \[3\]"),
        ({"epsilon": 0.0}, "epsilon=0.0 must be positive"),
        ({"epsilon": -1.0}, "epsilon=-1.0 must be positive"),
        ({"norm": "l1"}, "norm='l1' is unknown"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"names": ("apgd",)}, "The attack 'apgd' is unknown: choose from apgd-ce, apgd-t"),
        ({"names": ()}, "at least one attack"),
        ({"logits_fn": lambda x: jax.nn.softmax(linear(x))}, "returns probabilities"),
        ({"logits_fn": lambda x: jax.nn.softmax(jnp.bfloat16(linear(x)))}, "returns probabilities"),
        (
            {"logits_fn": lambda x: linear(x).at[:, 1:].set(-jnp.inf), "y": 0 * Y},
            "one finite logit: two classes or more",
        ),
        ({"logits_fn": lambda x: linear(x) * jnp.nan}, "returns NaN or infinity"),
        (
            {"logits_fn": lambda x: linear(x)[:, :2], "y": Y % 2, "names": ("apgd-dlr",)},
            "at least 3 classes and the classifier has 2",
        ),
    ],
)
def test_bad_input_is_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        quick(**options)
