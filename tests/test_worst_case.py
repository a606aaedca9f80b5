"""Worst-case errors in results files: what is kept, what is measured again, and what is counted."""

import functools
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_evaluate import classifier, images, variables

from ada_jax import ada, attacks, losses, ssim
from ada_jax import results as results_files
from ada_jax.attacks import Account, Report
from ada_jax.errors import UserError
from ada_jax.evaluation import scoring, worst_case
from ada_jax.report import grouping, paper_tables
from tests.conftest import assert_mistake, run_here

RANDOM = ("evaluate", "--config=experiments/quickstart.py", "--random")

DATASET = images(12, side=32)


def logits_fn():
    return functools.partial(scoring.apply_classifier, classifier(), *variables(side=32))


def report_of(calls, key, logits_fn, x, y, epsilon, *, norm, attacks, state_dir, **options):
    """What an attack that breaks every other example would say."""
    calls.append((norm, epsilon, len(x), state_dir))
    assert options["programs"] == {} and options["batch_size"] == 8
    robust = np.arange(len(x)) % 2 == 0
    accounts = [Account(name, 6, 0, 0.75, 10, 10, 1.0) for name in attacks]
    return Report(
        "AutoAttack+multitargeted", norm, epsilon, x, robust, np.array([]), 0.9, 0.5, accounts, []
    )


def test_every_radius_of_table_2_is_measured_once(monkeypatch, tmp_path):
    calls, written = [], []
    monkeypatch.setattr(attacks, "autoattack", functools.partial(report_of, calls))
    measure = functools.partial(
        worst_case.pixel_balls,
        None,
        save=written.append,
        options=worst_case.Options(batch_size=8, state_dir=tmp_path),
    )
    results = measure(*worst_case.first_examples(DATASET, 10), measured={})
    assert [(norm, round(255 * e, 1)) for norm, e, _, _ in calls] == [
        ("l2", 127.5), ("l2", 255.0), *(("linf", n) for n in (1, 2, 4, 8))
    ]  # fmt: skip
    assert len({folder for *_, folder in calls}) == 6 and len(written) == 6
    assert all(str(folder).endswith("_batch8") for *_, folder in calls)  # Another size starts anew.
    cell = results["lp"]["linf"]["8/255"]
    assert (cell["examples"], cell["robust"], cell["accuracy"], cell["autoattack"]) == (
        10,
        5,
        50,
        75,
    )
    assert results["lp_accuracy"]["l2"] == {"0.5": 50, "1": 50}
    again = measure(*worst_case.first_examples(DATASET, 10), measured=written[2])
    assert again == results and len(calls) == 9
    more = measure(*worst_case.first_examples(DATASET, 0), measured=results)
    worst_case.check_replaced(results, 12, seed=0)
    for measured, seed in ((more, 0), (results, 1)):
        with pytest.raises(UserError, match="would replace: give another --out"):
            worst_case.check_replaced(measured, 10, seed)
    assert len(calls) == 15 and calls[-1][2] == 12


def test_table_2_has_the_accuracies_beside_the_paper_s():
    row = grouping.Row("ours", "nominal", {"clean": 5.0, "linf 1/255": 30.0, "l2 0.5": 1.0}, {}, 1)
    paper = grouping.rows(results_files.read(str(results_files.PUBLISHED)))
    for comparable in (False, True):
        table = paper_tables.table_2([row._replace(comparable=comparable)], paper)
        assert "linf 8/255" not in table.head and "linf 1/255" in table.head
        ((ours, *minus),) = [g for g in table.groups if g[0][0].value == "ours"]
        column = table.head.index("linf 1/255")
        assert ours[column].value == 30
        differences = [line[column].value for line in minus]
        assert differences == ([pytest.approx(30 - 24.23)] if comparable else [])
    assert not paper_tables.table_2([], []).groups


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_errors_under_ada_are_the_worst_of_the_restarts_and_kept():
    written, fn = [], logits_fn()
    examples = worst_case.first_examples(DATASET, 10)

    def measure(measured, **changes):
        options = worst_case.Options(**{"steps": 1, "batch_size": 8} | changes)
        save = written.append
        return worst_case.under_ada(fn, *examples, options=options, measured=measured, save=save)

    once = measure({}, radii=[0.0, 0.05], restarts=1)
    plain = np.mean(
        np.argmax(fn(jnp.float32(DATASET.source.images[:10]) / 255), -1)
        != DATASET.source.labels[:10]
    )
    none, some = once["under_ada"]
    # With a radius of 0 the network renders the image almost as it is.
    assert none["error"] == pytest.approx(100 * plain, abs=10) and none["ssim"] > 0.98
    assert some["wrong"] >= none["wrong"] and some["ssim"] < none["ssim"]
    assert len(written) == 4 and measure(once, radii=[0.05], restarts=1) == once
    again = measure(once, radii=[0.05], restarts=3)["under_ada"]
    assert len(again) == 3 and again[-1]["wrong"] >= some["wrong"]
    assert again[-1]["loss"] >= some["loss"] > none["loss"]
    other = measure({}, radii=[0.05], restarts=1, batch_size=4)
    assert other["under_ada"][0]["wrong"] == some["wrong"]
    # The gradient of the shared perturbation is summed over all batches.
    shared = once["under_shared_ada"][1]
    assert other["under_shared_ada"][0]["loss"] == pytest.approx(shared["loss"], rel=1e-3)
    # A results file from before there were shared ones keeps what it has.
    assert measure({"under_ada": once["under_ada"]}, radii=[0.0, 0.05], restarts=1) == once


GAIN = ada.CorruptionNet(
    lambda theta, x, key: theta["gain"] * x + theta["shift"],
    {"gain": jnp.ones(3), "shift": jnp.full((32, 32, 1), 0.01)},
)


def under_gain(**changes):
    """AdA with a network of one layer."""
    options = worst_case.Options(**{"radii": [0.3], "batch_size": 4} | changes)
    examples = worst_case.first_examples(DATASET, 10)
    with mock.patch.object(worst_case.corruption_nets, "make", lambda name: GAIN):
        return worst_case.under_ada(
            logits_fn(), *examples, options=options, measured={}, save=lambda fields: None
        )


def test_the_worst_shared_perturbation_is_between_a_random_one_and_the_worst_of_each_example():
    random, worst = under_gain(steps=0), under_gain(steps=5, restarts=2)
    (shared,), (own,) = worst["under_shared_ada"], worst["under_ada"]
    assert random["under_shared_ada"][0]["loss"] < shared["loss"] <= own["loss"]
    assert shared["wrong"] <= own["wrong"] and shared["examples"] == 10
    assert shared["error"] == 10 * shared["wrong"] and 0 < shared["ssim"] < 1


def test_one_shared_perturbation_is_that_of_a_single_group():
    """What `ada.maximise` finds for all images as one group, from the same start."""
    (shared,) = under_gain(steps=3, batch_size=4)["under_shared_ada"]
    images, labels = worst_case.first_examples(DATASET, 10)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 10), 0)
    loss_fn = lambda x: losses.cross_entropy(logits_fn()(x), labels)  # noqa: E731
    delta, _ = ada.maximise(
        jnp.repeat(key[None], 10), images, loss_fn, GAIN, nu=0.3, steps=3, group=10
    )
    found = ada.render(GAIN, delta, images, jnp.repeat(key[None], 10))
    found, _ = ssim.line_search(images, found)
    assert shared["loss"] == pytest.approx(float(loss_fn(found).mean()), rel=1e-3)
    assert shared["ssim"] == pytest.approx(float(ssim.ssim(images, found).mean()), abs=1e-4)


def test_the_tables_of_the_binary():
    cell = {"accuracy": 50.0, "autoattack": 51.0, "examples": 8}
    under = {"net": "cae", "nu": 0.03, "steps": 5, "error": 25.0, "examples": 8}
    rows = results_files.summary(
        {"lp": {"l2": {"1": cell}}, "under_ada": [under], "under_shared_ada": [under]}
    )
    assert rows == [
        ("robust, l2 1 (AutoAttack alone)", "50.00% of 8 (51.00%)"),
        ("error under AdA, cae, nu 0.03, 5 steps", "25.00% of 8"),
        ("error under AdA, shared by all, cae, nu 0.03, 5 steps", "25.00% of 8"),
    ]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--ada_nets=edsr", "--ada_nets=edsr is unknown"),
        ("--ada_nets=edsr_baseline", "--ada_nets=edsr_baseline is unknown or has no shipped"),
        ("--ada_radii=far", "--ada_radii=far is not a radius"),
        ("--ada_radii=1e999", "--ada_radii=1e999 is not a radius"),
        ("--ada_restarts=0", "--ada_restarts=0"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(tmp_path, flag, said):
    assert_mistake(run_here(*RANDOM, f"--out={tmp_path}/r.json", "--sets=ada", flag), said)


def test_networks_that_do_not_take_the_images_are_said_before_anything_is_measured(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.full((9, 30, 30, 3), 9, np.uint8), labels=np.arange(9))
    flags = ["--config.dataset=npz", f"--data_dir={tmp_path / 'x.npz'}", "--split=all"]
    flags += [f"--out={tmp_path / 'r.json'}", "--sets=ada", "--ada_nets=cae"]
    assert_mistake(run_here(*RANDOM, *flags), "--ada_nets=('cae',) does not fit")
    assert not (tmp_path / "r.json").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("small_networks")
def test_the_binary_measures_under_ada(tmp_path):
    flags = [f"--out={tmp_path / 'r.json'}", "--sets=ada", "--ada_radii=0.02"]
    done = run_here(*RANDOM, *flags, "--split=test[:40]", "--worst_examples=16", "--ada_steps=1")
    assert done.returncode == 0, done.stderr
    for attack in ("AdA", "AdA, shared by all"):
        assert f"error under {attack}, edsr_small, nu 0.02, 1 steps" in done.stdout


@pytest.mark.slow
def test_the_binary_measures_balls_of_pixels_and_goes_on(tmp_path, monkeypatch):
    few = {"l2": {"1": 1.0}, "linf": {"8/255": 8 / 255}}
    monkeypatch.setattr(worst_case.results_files, "RADII", few)
    out = tmp_path / "r.json"
    flags = [f"--out={out}", "--sets=lp", "--worst_examples=12", "--config.seed=3"]
    done = run_here(*RANDOM, *flags)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results["lp_accuracy"].keys() == {"l2", "linf"}
    for cells in results["lp"].values():
        for cell in cells.values():
            assert cell["attacks"] == "AutoAttack+multitargeted" and cell["examples"] == 12
            assert cell["accuracy"] <= cell["autoattack"] <= cell["clean"]
            assert cell["accounts"][0]["attacked"] == round(0.12 * cell["clean"]) > 0
    del results["lp"]["linf"]["8/255"]
    out.write_text(json.dumps(results))
    done = run_here(*RANDOM, *flags)
    again = json.loads(out.read_text())
    assert done.returncode == 0 and again["lp_accuracy"] == results["lp_accuracy"]
    assert again["lp"]["l2"] == results["lp"]["l2"]
