"""Sweeps: their points and names, skipping, kills, signals and failures, and the sentences."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

from ada_jax import locks, sweep
from ada_jax import results as results_files
from ada_jax.errors import UserError
from ada_jax.nets.weight_files import save_weights
from ada_jax.run import distributed
from experiments import cifar10
from tests.conftest import assert_mistake, run_here

ROOT = pathlib.Path(__file__).parents[1]
TABLE_1 = "experiments/sweeps/table1.py"
RADIUS = "experiments/sweeps/radius.py"
TINY = (
    "--config.train_split=train[:32]",
    "--config.eval_split=test[:40]",
    "--config.batch_size=16",
    "--config.eval_batch_size=40",
    "--config.epochs=0",
    "--config.train_steps=2",
    "--config.eval_sets=('clean',)",
    "--config.figure_examples=0",
    "--config.cpu_devices=0",
)
SEEDS = """
CONFIG = "experiments/quickstart.py:nominal"
def get_hyper(hyper):
    return hyper.sweep("config.seed", range({}))
"""


@pytest.fixture(autouse=True)
def root(monkeypatch):
    """Configs are named from the repository's folder."""
    monkeypatch.chdir(ROOT)


def write(tmp_path, text: str) -> str:
    path = tmp_path / "sweep.py"
    path.write_text(text)
    return str(path)


def test_a_point_s_config_has_the_folders_that_training_sees():
    flags = ["--config=experiments/quickstart.py", "--config.data_dir=~/data"]
    assert sweep.load_config(flags)["data_dir"] == os.path.expanduser("~/data")


def binary(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ada_jax.sweep", *arguments]


# ------------------------------------------------------------------------ points


def test_hyper_combines_points():
    hyper = sweep.Hyper
    a, b = hyper.sweep("a", [1, 2]), hyper.sweep("b", [3, 4])
    assert hyper.product([a, b]) == [
        {"a": 1, "b": 3},
        {"a": 1, "b": 4},
        {"a": 2, "b": 3},
        {"a": 2, "b": 4},
    ]
    zipped = hyper.zipit([a, b, hyper.fixed("c", 5)])
    assert zipped == [{"a": 1, "b": 3, "c": 5}, {"a": 2, "b": 4, "c": 5}]
    assert hyper.zipit([a, hyper.fixed("c", 5, length=2)]) == hyper.product(
        [a, hyper.fixed("c", 5)]
    )
    assert hyper.chainit([a, b]) == a + b
    assert hyper.product([]) == [{}]
    with pytest.raises(UserError, match="2, 3 points"):
        hyper.zipit([a, hyper.sweep("b", [1, 2, 3])])


def test_table_1_has_the_papers_ten_rows():
    published = json.loads((ROOT / "experiments/results/published.json").read_text())["rows"]
    rows = {row["name"] for row in published if "1" in row["tables"]}
    base, points = sweep._load(TABLE_1)
    assert base == "experiments/cifar10.py"
    assert len(rows) == len(points) == 10
    assert {point["config"] for point in points} == {f"{base}:{row}" for row in rows}
    assert {point["config.seed"] for point in points} == {0}


def test_table_1_at_the_small_preset_repeats_four_rows():
    base, points = sweep._load(f"{TABLE_1}:small")
    names = sweep.names(points, base)
    assert len(set(names)) == len(names) == 6 + 4 * 3
    assert names[0] == "nominal,small-seed0"
    assert names[9] == "ada+deepaugment10x+augmix,small-seed0"
    for row in ("nominal", "augmix", "ada", "ada+augmix"):
        assert {f"{row},small-seed{seed}" for seed in (0, 1, 2)} < set(names)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("small,ada,seeds=1", ["ada,small-seed0"]),
        ("nominal,ada+augmix", ["nominal-seed0", "ada+augmix-seed0"]),
        ("seeds=2,nominal", ["nominal-seed0", "nominal-seed1"]),
        ("small,random", ["random,small-seed0"]),
        ("small,ada+advmix", ["ada+advmix,small-seed0"]),
    ],
)
def test_a_row_of_table_1_has_the_same_name_alone(words, expected):
    points = sweep.read(f"{TABLE_1}:{words}")
    assert [point.name for point in points] == expected


def test_the_gpu_s_rows_are_table_1_s_and_the_most_telling_come_first():
    base, points = sweep._load("experiments/sweeps/gpu.py")
    names = sweep.names(points, base)
    assert names[:4] == [f"{r},gpu-seed0" for r in ("nominal", "ada", "augmix", "ada+augmix")]
    assert {p["config"] for p in points} == {f"{base}:{row},gpu" for row in cifar10.ROWS}
    points = sweep.read("experiments/sweeps/gpu.py:ada,nominal,seeds=2")
    assert [point.name[-5:] for point in points] == ["seed0", "seed0", "seed1", "seed1"]
    with pytest.raises(UserError, match="The word 'small' is unknown"):
        sweep.read("experiments/sweeps/gpu.py:small")


def test_table_3_has_the_methods_for_comparison():
    names = [point.name for point in sweep.read("experiments/sweeps/table3.py:small")]
    assert names[0] == "nominal,small-seed0" and "pat_alexnet,small-seed0" in names
    assert {point.config["method"] for point in sweep.read("experiments/sweeps/table3.py:gpu")} == {
        *("nominal", "ada", "pgd", "pat", "rlat")
    }
    points = sweep.read("experiments/sweeps/table3.py:rlat,seeds=2")
    assert [point.name for point in points] == ["rlat-seed0", "rlat-seed1"]
    with pytest.raises(UserError, match="The word 'big' is unknown"):
        sweep.read("experiments/sweeps/table3.py:big")


def test_radius_keeps_off_the_images_that_the_table_is_measured_on():
    points = sweep.read(RADIUS)
    assert len({point.name for point in points}) == 12
    assert points[0].name == "small-nu0.01-steps1-sign-step_scale0.25"
    preset = next(p for p in points if p.name == "small-nu0.02-steps1-sign-step_scale0.25")
    assert preset.config["ada"]["steps"] == 1
    assert preset.config["eval_split"] == "train[40000:45000]"


def test_group_repeats_one_size_with_other_seeds():
    points = sweep.read("experiments/sweeps/group.py:16")
    names = ["small-group4-seed0", "small-group16-seed0", "small-group64-seed0"]
    names += ["small-group16-seed1", "small-group16-seed2"]
    assert [point.name for point in points] == names
    assert points == [*sweep.read("experiments/sweeps/group.py"), *points[3:]]
    with pytest.raises(UserError, match="The word '5' is unknown"):
        sweep.read("experiments/sweeps/group.py:5")


def listed(value):
    return list(value) if isinstance(value, tuple) else value


def test_the_study_of_the_recipe():
    points = sweep.read("experiments/sweeps/best.py")
    assert len({point.name for point in points}) == len(points) == 13
    assert {point.config["train_split"] for point in points} == {"train[:40000]"}
    # The recipe is one of the points, but for the batch size and what is evaluated.
    best = results_files.comparable(cifar10.get_config("best,small").to_dict())
    apart = {"name", "batch_size", "eval_sets", "ema_decay", "train_split", "eval_split"}
    configs = [results_files.comparable(point.config) for point in points]
    differences = [
        {k for k in best | own if listed(own.get(k)) != listed(best.get(k))} for own in configs
    ]
    assert any(fields <= apart for fields in differences)
    confirmed = sweep.read("experiments/sweeps/best.py:confirm,seeds=2")
    assert len(confirmed) == 10
    assert {point.config["eval_split"] for point in confirmed} == {"train[45000:]"}
    assert all("cbar" in point.config["eval_sets"] for point in confirmed)
    with pytest.raises(UserError, match="confirm and seeds=N"):
        sweep.read("experiments/sweeps/best.py:big")


@pytest.mark.parametrize(
    ("images", "attacks"),
    [("40000", [(0.02, 2), (0.01, 1), (0.005, 1)]), ("5000", [(0.02, 1)])],
)
def test_the_variety_sweep_has_a_matching_nominal_control(images, attacks):
    points = sweep.read(f"experiments/sweeps/variety.py:{images}")
    control, *attacked = (point.config for point in points)
    assert control["method"] == "nominal" and control["train_split"] == f"train[:{images}]"
    assert control["eval_split"] == "train[40000:45000]"
    assert [(p["ada"]["nu"], p["ada"]["every"]) for p in attacked] == attacks
    others = {"name", "method", "ada"}
    for point in attacked:
        assert point["method"] == "ada"
        assert {k: v for k, v in control.items() if k not in others} == {
            k: v for k, v in point.items() if k not in others
        }


def test_names_have_what_differs_and_are_safe_for_file_systems():
    points = [
        {"config": "a/cifar10.py:small", "config.ada.corruption_net": ("cae",), "config.pad": 4},
        {"config": "a/quickstart.py", "config.data_dir": "/a b/../c", "config.pad": 4},
    ]
    names = sweep.names(points, "")
    assert names == ["cifar10-small-corruption_net_cae", "quickstart-a_b_.._c"]


@pytest.mark.slow
def test_reading_touches_no_device():
    """On a TPU the parent would take it from its runs."""
    code = f"from ada_jax import sweep; sweep.read({RADIUS!r}); import jax._src.xla_bridge as x"
    code += "; assert not x.backends_are_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_printed_commands_are_the_points():
    split = "--config.train_split=train[:45000]"
    done = run_here("sweep", f"--sweep={TABLE_1}:nominal,small", "--out=my runs", "--print", split)
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert commands[1] == [
        *("python", "-m", "ada_jax.train", "--config=experiments/cifar10.py:nominal,small"),
        *("--config.seed=1", split, "--workdir=my runs/nominal,small-seed1"),
    ]
    assert len(commands) == 3
    assert not os.path.exists("my runs")


# ------------------------------------------------------------------------ bad input

LIST = "CONFIG = 'experiments/quickstart.py'\ndef get_hyper(hyper): return {}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "no get_hyper"),
        ("import nothing_of_that_name", "nothing_of_that_name"),
        ("def get_hyper(", "correct the file"),
        (LIST.format("[]"), "no points"),
        (LIST.format("[1]"), "not a dict"),
        (LIST.format("[{'seed': 1}]"), "'config.seed': 1"),
        ("def get_hyper(hyper): return [{'config.seed': 1}]", "without a config"),
        (LIST.format("[{'config': 3}]"), "without a config"),
        (LIST.format("[{'config': 'nothing.py:a'}]"), "nothing.py does not exist"),
        (LIST.format("[{'config': 'experiments/cifar10.py:x'}]"), "unknown word 'x'"),
        (LIST.format("[{'config.sed': 1}]"), "point quickstart: The config has no field 'sed'"),
        (LIST.format("[{'config.seed': 'x'}]"), "config.seed=x"),
        (LIST.format("[{'config.ada.nu': -1.0}]"), "negative"),
        (LIST.format("[{'config.seed': 1}, {'config.seed': 1}]"), "2 points with the name"),
        (LIST.format("hyper.sweep('config.name', ['a b', 'a/b'])"), "more than punctuation"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_is_started(tmp_path, text, said):
    with pytest.raises(UserError) as error:
        sweep.read(write(tmp_path, text))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("nothing.py", (), "nothing.py is not a Python file"),
        ("README.md", (), "not a Python file"),
        (f"{TABLE_1}:small,adda", (), "'adda' is unknown: choose from small, seeds=N, nominal"),
        (f"{TABLE_1}:seeds=0", (), "'seeds=0' is unknown"),
        (f"{RADIUS}:small", (), "takes no words"),
        (RADIUS, ("--config.ada.nu=1",), "sets config.ada.nu itself"),
        (RADIUS, ("--config.nu=1",), "has no field 'nu'"),
    ],
)
def test_words_and_overrides_that_do_not_fit_are_refused(name, overrides, said):
    with pytest.raises(UserError) as error:
        sweep.read(name, overrides)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--sweep"),
        ([f"--sweep={RADIUS}", "--config.learning_rat=1"], 'Did you mean "learning_rate"'),
        ([f"--sweep={RADIUS}", "--out=README.md"], "--out=README.md cannot be created"),
    ],
)
def test_the_binary_tells_a_mistake_in_one_sentence_and_status_2(arguments, said):
    done = run_here("sweep", *arguments)
    assert_mistake(done, said)
    assert done.stdout == "" and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------ runs of a stand-in

STAND_IN = """
import pathlib, shutil, signal, sys, time
workdir = pathlib.Path(sys.argv[-1].partition("=")[2])
ready = pathlib.Path(__file__).with_name("ready") / workdir.name
def stop(*_):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("up", flush=True)
while (ready / "wait").exists():
    time.sleep(0.05)
if (ready / "fail").exists():
    print("error: out of luck\\n", flush=True)
    sys.exit(3)
shutil.copytree(ready, workdir, dirs_exist_ok=True)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Three points, and in place of training a script that copies each one's results from ready."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(sweep, "_TRAIN", (str(tmp_path / "stand_in.py"),))
    monkeypatch.setattr(sweep, "_POLL_SECONDS", 0.02)
    points = sweep.read(write(tmp_path, SEEDS.format(3)))
    for point in points:
        folder = tmp_path / "ready" / point.name
        save_weights(folder / "classifier.safetensors", {"w": np.ones(1)}, {"step": 7})
        counts = {"examples": 8, "wrong": 2, "error": 25.0}
        results = {"config": point.config, "step": 7, "clean": counts, "mce_unnormalised": 50.0}
        (folder / "results.json").write_text(json.dumps(results))
    return points, tmp_path / "ready", str(tmp_path / "out")


def log_of(point, out) -> str:
    return (pathlib.Path(out) / point.name / "log.txt").read_text()


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_is_finished_is_skipped(stand_in, jobs):
    points, _, out = stand_in
    assert sweep.run(points[:2], out, jobs) == ({}, False)
    assert sweep.run(points, out, jobs) == ({}, False)
    assert all(log_of(point, out).count("up") == 1 for point in points)
    assert log_of(points[1], out).startswith("$ python ")


@pytest.mark.parametrize(
    "change",
    [
        lambda results: results.pop("clean"),
        lambda results: results.pop("mce_unnormalised"),  # Not the whole grid.
        lambda results: results.update(step=6),  # Of a checkpoint.
        lambda results: results["config"].update(learning_rate=0.3),
    ],
)
def test_what_is_not_whole_or_of_another_config_runs_again(stand_in, change):
    points, ready, out = stand_in
    sweep.run(points, out, 1)
    path = pathlib.Path(out) / points[1].name / "results.json"
    results = json.loads(path.read_text())
    change(results)
    path.write_text(json.dumps(results))
    assert sweep.run(points, out, 1) == ({}, False)
    assert [log_of(point, out).count("up") for point in points] == [1, 2, 1]
    path.write_text("{")
    assert sweep.finished(points[1], out) is None
    shutil.rmtree(ready)  # And now nothing would mend it.
    failed, _ = sweep.run(points, out, 1)
    assert set(failed) == {points[1].name}


def test_the_attacks_errors_and_pictures_count_where_they_are_wanted(stand_in):
    points, ready, _ = stand_in
    config = points[0].config | {"method": "ada", "figure_examples": 4}
    point = points[0]._replace(config=config)
    path = ready / point.name / "results.json"
    results = json.loads(path.read_text()) | {"config": config}
    path.write_text(json.dumps(results))
    assert sweep.finished(point, str(ready)) is None
    path.write_text(json.dumps(results | {"ada": {"edsr_small": {}}}))
    assert sweep.finished(point, str(ready))


def test_a_point_that_fails_does_not_stop_the_others(stand_in):
    points, ready, out = stand_in
    (ready / points[0].name / "fail").touch()
    (ready / points[1].name / "results.json").unlink()
    failed, stopped = sweep.run(points, out, 1)
    assert failed == {
        points[0].name: "status 3, error: out of luck",
        points[1].name: "status 0, results or weights are missing or damaged",
    }
    assert not stopped
    assert sweep.finished(points[2], out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda results: results["config"].update(pad=1, method="ada"), "another ada, method, pad"),
        (lambda results: results.update(step=6), "another step"),
        (lambda results: results.pop("mce_unnormalised"), "lack mce_unnormalised"),
    ],
)
def test_a_run_that_ends_well_with_other_results_says_what_is_wrong(stand_in, change, said):
    points, ready, out = stand_in
    path = ready / points[0].name / "results.json"
    results = json.loads(path.read_text())
    change(results)
    path.write_text(json.dumps(results))
    failed, _ = sweep.run(points[:1], out, 1)
    assert said in failed[points[0].name]


def test_results_from_before_a_field_was_there_are_finished(stand_in):
    points, ready, _ = stand_in
    path = ready / points[0].name / "results.json"
    results = json.loads(path.read_text())
    for field in ("crop_scale", "crop_ratio"):
        del results["config"][field]
    for field, default in {"every": 1, "group": 1, "leaves": "", "choice": ["delta"]}.items():
        assert results["config"]["ada"].pop(field) == default
    path.write_text(json.dumps(results))
    assert sweep.finished(points[0], str(ready))
    assert not sweep.finished(
        points[0]._replace(config=points[0].config | {"crop_scale": [0.5, 1]}), str(ready)
    )


def test_an_unforeseen_error_leaves_no_process(stand_in, monkeypatch):
    points, ready, out = stand_in
    (ready / points[0].name / "wait").touch()
    started, start = [], sweep.start

    def start_and_keep(point, out):
        started.append(start(point, out))
        while "up" not in log_of(point, out):
            time.sleep(0.05)
        return started[-1]

    def unforeseen(*_):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(sweep, "start", start_and_keep)
    monkeypatch.setattr(sweep, "_settle", unforeseen)
    with pytest.raises(RuntimeError, match="unforeseen"):
        sweep.run(points, out, 2)
    assert [process.poll() for process in started] == [143, 0]


def test_a_point_that_another_sweep_has_finished_meanwhile_is_not_run_again(stand_in, monkeypatch):
    points, ready, out = stand_in
    start, other = sweep.start, points[1].name

    def start_while_another_finishes(point, out):
        shutil.copytree(ready / other, pathlib.Path(out) / other, dirs_exist_ok=True)
        return start(point, out)

    monkeypatch.setattr(sweep, "start", start_while_another_finishes)
    assert sweep.run(points, out, 1) == ({}, False)
    logs = [(pathlib.Path(out) / point.name / "log.txt").exists() for point in points]
    assert logs == [True, False, True]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_let_the_runs_save(stand_in, number):
    points, ready, out = stand_in
    for point in points:
        (ready / point.name / "wait").touch()
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def send_when_two_are_up():
        logs = [pathlib.Path(out) / point.name / "log.txt" for point in points[:2]]
        while not all(log.exists() and "up" in log.read_text() for log in logs):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=send_when_two_are_up).start()
    assert sweep.run(points, out, 2) == ({}, 128 + number)
    assert [log_of(point, out).splitlines()[-1] for point in points[:2]] == ["saved", "saved"]
    assert not (pathlib.Path(out) / points[2].name).exists()
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_sweeps_share_a_folder_and_name_what_another_is_running(stand_in):
    points, _, out = stand_in
    log = pathlib.Path(out) / points[0].name / "log.txt"
    log.parent.mkdir(parents=True)
    with locks.claim(locks.of_file(log)):
        failed, _ = sweep.run(points, out, 2)
    assert list(failed) == [points[0].name] and "another sweep" in failed[points[0].name]
    assert not log.exists() and all(sweep.finished(point, out) for point in points[1:])
    assert sweep.run(points, out, 2) == ({}, False)


def test_a_stopped_sweep_collects_what_is_finished(stand_in, monkeypatch, tmp_path):
    points, _, out = stand_in
    sweep.run(points[:1], out, 1)
    given = types.SimpleNamespace(sweep="", out=out, jobs=1, print=False, collect=str(tmp_path))
    monkeypatch.setattr(sweep.flags, "FLAGS", given)
    monkeypatch.setattr(sweep, "read", lambda *_: points)
    monkeypatch.setattr(sweep, "run", lambda *_: ({}, 143))
    before = set(tmp_path.iterdir())
    assert sweep.main([]) == 143
    assert set(tmp_path.iterdir()) - before == {tmp_path / f"{points[0].name}.json"}


def test_what_ended_in_another_sweep_without_results_is_not_running(stand_in, monkeypatch):
    points, _, out = stand_in
    claims = iter([contextlib.nullcontext(False)])  # Another sweep's at first, later free.
    claim = locks.claim
    monkeypatch.setattr(locks, "claim", lambda path: next(claims, None) or claim(path))
    failed, _ = sweep.run(points[:1], out, 1)
    assert failed[points[0].name].startswith("it ended in another sweep without results, see ")


# ------------------------------------------------------------------------ runs


def children(pid: int) -> list[int]:
    return [int(p) for p in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def comparable(path: pathlib.Path) -> dict:
    return {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}


def test_results_of_averaged_weights_are_collected_too(tmp_path):
    points = [sweep.Point(name, [], {"ema_decay": decay}) for name, decay in (("a", 0.9), ("b", 0))]
    for file in ("a/results.json", "a/results_ema.json", "b/results.json"):
        (tmp_path / "out" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / file).write_text(file)
    (tmp_path / "all").mkdir()
    sweep.collect(points, str(tmp_path / "out"), str(tmp_path / "all"))
    assert {p.name: p.read_text() for p in (tmp_path / "all").iterdir()} == {
        "a.json": "a/results.json",
        "a_ema.json": "a/results_ema.json",
        "b.json": "b/results.json",
    }


def test_points_that_train_the_same_are_listed(tmp_path, capsys, caplog):
    counts = {"examples": 8, "wrong": 2, "error": 25.0}
    for name in "ab":
        content = dict.fromkeys(("commit", "device", "weights_digest"), name)
        content |= {"schema": 1, "name": "x", "seed": 0, "step": 7, "seconds": 1.0, "clean": counts}
        content |= {"config": {"method": "nominal", "log_steps": ord(name)}, "data": {"name": "y"}}
        (tmp_path / name).write_text(json.dumps(content))
    sweep.show_report([str(tmp_path / name) for name in "ab"])
    assert capsys.readouterr().out.count("25.0") == 2 and "Tables 1 and 3 are left" in caplog.text


def test_only_results_of_the_same_config_are_replaced(stand_in, tmp_path):
    points, ready, out = stand_in
    content = json.loads((ready / points[0].name / "results.json").read_text())
    content |= dict.fromkeys(("name", "commit", "device", "weights_digest"), "x")
    content |= {"schema": 1, "seed": 0, "data": {}, "seconds": 1.0}
    file = tmp_path / f"{points[0].name}.json"
    file.write_text(json.dumps(content))
    sweep.check_collected(points, out, str(tmp_path))
    others = [
        (f"config.{field}", {"config": points[0].config | {field: value}})
        for field, value in (("epochs", 99.0), ("eval_split", "test[:7]"), ("data_dir", "x"))
    ]
    for field, change in (*others, ("lp", {"lp": {}, "lp_accuracy": {}})):
        file.write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=f"has other results of {field} in {file.name}"):
            sweep.check_collected(points, out, str(tmp_path))
    # A copy of this sweep's own, such as of before a folder moved.
    own = pathlib.Path(out) / points[0].name / "results.json"
    own.parent.mkdir(parents=True)
    own.write_text(file.read_text())
    sweep.check_collected(points, out, str(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_in_the_middle_it_ends_with_the_same_results_files(tmp_path):
    cache = f"--config.compilation_cache={tmp_path / 'cache'}"
    arguments = [f"--sweep={write(tmp_path, SEEDS.format(2))}", *TINY, cache]
    out = tmp_path / "out"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(binary(*arguments, f"--out={out}"), stderr=log)
    while not (out / "nominal-seed1" / "log.txt").exists():
        time.sleep(0.1)
        assert process.poll() is None, (tmp_path / "log").read_text()
    (child,) = children(process.pid)
    for pid in (process.pid, child):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    first = (out / "nominal-seed0" / "results.json").read_bytes()
    assert not (out / "nominal-seed1" / "results.json").exists()

    collected = tmp_path / "collected"
    done = run_here("sweep", *arguments, f"--out={out}", f"--collect={collected}")
    assert done.returncode == 0, done.stderr
    assert "nominal-seed0: finished before, clean error" in done.stderr
    assert re.search(r"nominal-seed1: finished in [\d.]+ min, clean error", done.stderr)
    files = [out / f"nominal-seed{seed}" / "results.json" for seed in (0, 1)]
    assert files[0].read_bytes() == first
    assert [p.read_bytes() for p in sorted(collected.iterdir())] == [p.read_bytes() for p in files]
    assert done.stdout == run_here("report", *files).stdout

    whole = sweep.read(arguments[0].partition("=")[2], [*TINY, cache])[1]
    command = sweep.command(whole, str(tmp_path / "whole"))
    assert run_here("train", *command[2:]).returncode == 0
    assert comparable(files[1]) == comparable(tmp_path / "whole" / "nominal-seed1/results.json")


def test_a_missing_set_of_renderings_is_told_before_the_first_point_starts(tmp_path):
    points = sweep.read(f"{TABLE_1}:small,nominal,deepaugment,seeds=1")
    with pytest.raises(UserError, match=r"point deepaugment,small-seed0: config\.deepaugment"):
        sweep.run(points, str(tmp_path / "out"), jobs=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_binary_leaves_with_143_after_sigterm_and_1_after_a_failure(tmp_path):
    arguments = [f"--sweep={write(tmp_path, SEEDS.format(2))}", f"--out={tmp_path / 'out'}", *TINY]
    process = subprocess.Popen(binary(*arguments), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / "nominal-seed0" / "log.txt").exists():
        time.sleep(0.1)
        assert process.poll() is None
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == distributed.INTERRUPTED
    assert "run the same command again" in errors

    missing = f"--config.data_dir={tmp_path / 'nothing'}"
    done = run_here("sweep", *arguments, "--jobs=2", "--config.dataset=cifar10", missing)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("failed: nominal-seed") == 2
    assert "failed: nominal-seed1: status 2, error: The data set 'cifar10'" in done.stderr
