"""Several processes over loopback: the same training, one end for all, errors on every one."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import chex
import numpy as np
import pytest
import skimage.data

from ada_jax import locks
from ada_jax.nets import weight_files
from tests.conftest import assert_mistake, run_here, shared_folder

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Patches of photographs, to be told apart; digits' black ground makes training chaotic."""
    rng, images, labels = np.random.default_rng(0), [], []
    for label, name in enumerate(("astronaut", "chelsea", "coffee", "rocket")):
        photo = getattr(skimage.data, name)()
        for _ in range(100):
            i, j = (rng.integers(n - 32) for n in photo.shape[:2])
            images.append(photo[i : i + 32, j : j + 32])
            labels.append(label)
    order = rng.permutation(400)
    path = tmp_path_factory.mktemp("data") / "photographs.npz"
    np.savez(path, images=np.stack(images)[order], labels=np.array(labels)[order])
    return path


def flags_of(photographs, **changes):
    values = {
        "dataset": "npz",
        "data_dir": photographs,
        "method": "nominal",
        "batch_size": 64,
        "eval_batch_size": 20,
        "epochs": 0.0,
        "train_steps": 10,
        "log_steps": 1,
        # Rounding grows with every step, without AVX-512 past 1e-5 at 0.0005 and to 1e-8 here; with
        # the same examples on both processes the parameters differ by 3e-4.
        "learning_rate": 0.0002,
        "eval_sets": "('clean',)",
        "figure_examples": 0,
    } | changes
    config = ["--config=experiments/quickstart.py"]
    return config + [f"--config.{name}={value}" for name, value in values.items()]


# Training that waits seconds, not a minute, for processes to meet and to answer.
IMPATIENT = """
import runpy, sys
sys.modules["clu"] = None  # Its writer for TensorBoard imports TensorFlow, which takes seconds.
from ada_jax.run import distributed
distributed._MEETING_SECONDS, distributed._HEARTBEAT_SECONDS = 20, 10
runpy.run_module("ada_jax.train", run_name="__main__", alter_sys=True)
"""


def start(workdir, *flags, log=subprocess.DEVNULL):
    command = [sys.executable, "-c", IMPATIENT, *flags, f"--workdir={workdir}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True)


def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start_two(workdirs, flags, log=subprocess.PIPE):
    """Two processes of two devices each; without a log pytest shows what they say if one fails."""
    meeting = ["--distributed", f"--coordinator=localhost:{port()}", "--processes=2"]
    return [
        start(workdir, *flags, "--config.cpu_devices=2", *meeting, f"--process={i}", log=log)
        for i, workdir in enumerate(workdirs)
    ]


def run_one(workdir, flags):
    """One process of four devices."""
    assert start(workdir, *flags, "--config.cpu_devices=4").wait(timeout=600) == 0


@pytest.fixture(scope="module")
def one(photographs, tmp_path_factory):
    """The folder of a run by one process."""
    with shared_folder(tmp_path_factory, "distributed") as folder:
        if not (folder / "one" / "results.json").exists():
            run_one(folder / "one", flags_of(photographs))
    return folder / "one"


def assert_same_end(one, other):
    trees = [weight_files.load_weights(w / "classifier.safetensors")[0] for w in (one, other)]
    chex.assert_trees_all_close(*(tree["params"] for tree in trees), atol=1e-5)
    # Averages of activations, which amplify what the parameters differ by.
    chex.assert_trees_all_close(*(tree["state"] for tree in trees), atol=1e-3)


def counts(results):
    sets = json.loads(results.read_text())
    sets["clean"].pop("loss")  # a sum in another order
    return sets["clean"], sets["corruptions"]


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(tmp_path, photographs, one):
    corrupted = flags_of(photographs, eval_sets="('clean','c')")
    for process in start_two([tmp_path / "two"] * 2, corrupted, None):
        assert process.wait(timeout=600) == 0
    assert_same_end(one, tmp_path / "two")
    again = tmp_path / "again.json"
    assert not run_here("evaluate", f"--workdir={tmp_path / 'two'}", f"--out={again}").returncode
    assert counts(again) == counts(tmp_path / "two" / "results.json")
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len((one / "metrics.jsonl").read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT])  # which raises SIGTERM in turn
def test_a_signal_to_one_saves_one_step_for_all_and_another_number_of_processes_goes_on(
    tmp_path, photographs, one, number
):
    # Measured on corrupted images after every step, for steps that take their time.
    slowly = {"corruption_eval_epochs": 0.1, "corruption_eval_examples": 20}
    flags, two = flags_of(photographs), tmp_path / "two"
    processes = start_two([two] * 2, flags_of(photographs, **slowly), None)
    wait_for(two / "metrics.jsonl", '"step": 2,', processes)
    processes[1].send_signal(number)
    assert [process.wait(timeout=300) for process in processes] == [143, 143]
    (saved,) = (int(p.name) for p in (two / "checkpoints").iterdir() if p.name.isdigit())
    assert 2 <= saved < 10
    run_one(two, flags)
    assert_same_end(one, two)


def wait_for(path, text, processes):
    for _ in range(3000):
        if path.exists() and text in path.read_text():
            return
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    raise AssertionError(f"{path} never had {text}")


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_end_when_one_is_killed(tmp_path, photographs, killed):
    flags = flags_of(photographs, train_steps=100_000, eval_epochs=0.0, checkpoint_epochs=0.0)
    processes = start_two([tmp_path] * 2, flags)
    wait_for(tmp_path / "metrics.jsonl", '"step": 3,', processes)
    processes[killed].kill()
    since, other = time.monotonic(), processes[1 - killed]
    said, _ = other.communicate(timeout=150)
    assert other.returncode == -signal.SIGABRT and "another task died" in said
    assert time.monotonic() - since < 60


@pytest.mark.slow
def test_folders_that_are_not_shared_are_refused_by_all(tmp_path, photographs):
    processes = start_two([tmp_path / "a", tmp_path / "b"], flags_of(photographs))
    for process in processes:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 2
        assert "not the same folder" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_refused_by_all(tmp_path, photographs):
    (tmp_path / "file").touch()
    processes = start_two([tmp_path / "file" / "run"] * 2, flags_of(photographs))
    for process, said in zip(processes, ("cannot be", "message of process 0"), strict=True):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 2
        assert said in output and "Traceback" not in output


@pytest.mark.slow
def test_a_folder_that_is_in_use_is_refused_by_all(tmp_path, photographs):
    with locks.hold("--workdir", locks.of_folder(tmp_path)):
        processes = start_two([tmp_path] * 2, flags_of(photographs))
        for process, said in zip(processes, ("is in use by", "message of process 0"), strict=True):
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 2
            assert said in output and "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_processes_that_do_not_meet_say_so(tmp_path, photographs, process):
    flags = ["--distributed", f"--coordinator=localhost:{port()}", "--processes=2"]
    flags.append(f"--process={process}")
    process = start(tmp_path, *flags_of(photographs), *flags, log=subprocess.PIPE)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "could not connect the processes" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--process=1"], "--process has no meaning without --distributed"),
        (["--distributed", "--process=1"], "--coordinator is not set"),
        (["--distributed", "--coordinator=h", "--process=0", "--processes=1"], "has no port"),
        (
            ["--distributed", "--coordinator=h:1", "--process=2", "--processes=2"],
            "--process=2 and --processes=2 do not fit",
        ),
    ],
)
def test_flags_that_contradict_each_other_are_refused(tmp_path, photographs, flags, said):
    done = run_here("train", *flags_of(photographs), *flags, f"--workdir={tmp_path}/run")
    assert_mistake(done, said)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_a_coordinator_there_must_be_a_cluster(tmp_path, photographs):
    process = start(tmp_path, *flags_of(photographs), "--distributed", log=subprocess.PIPE)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "finds neither a TPU slice nor Slurm" in said
