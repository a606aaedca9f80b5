"""Two commands in one folder: the second is told who holds it, and no lock outlives its holder."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from ada_jax import locks
from ada_jax.errors import UserError
from tests.conftest import assert_mistake, run_here

# Another program of this kind, written without ours.
HOLDER = """
import fcntl, pathlib, sys
path = pathlib.Path(sys.argv[1])
path.parent.mkdir(parents=True, exist_ok=True)
file = path.open("a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 7 on elsewhere")
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds, and that process."""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(locks.of_folder(folder))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield folder, process
    process.kill()
    process.communicate()


def test_the_second_is_told_who_holds_the_folder(tmp_path):
    lock = locks.of_folder(tmp_path / "a" / "b")
    with locks.hold("--out=a/b", lock):
        with pytest.raises(UserError) as refused, locks.hold("--out=a/b", lock):
            pass
        said = f"--out=a/b is in use by process {os.getpid()} on {socket.gethostname()}, since 20"
        assert str(refused.value).startswith(said) and ": python " in str(refused.value)
    assert os.listdir(tmp_path / "a" / "b") == []
    with locks.hold("--out=a/b", lock):
        pass


def test_a_kill_releases_the_folder(held):
    folder, process = held
    with (
        pytest.raises(UserError, match="in use by process 7 on elsewhere: wait"),
        locks.hold("--out", locks.of_folder(folder)),
    ):
        pass
    process.kill()
    process.wait()
    with locks.hold("--out", locks.of_folder(folder)):
        pass
    assert os.listdir(folder) == []


def test_files_of_one_folder_have_locks_of_their_own(tmp_path):
    with (
        locks.hold("--out", locks.of_file(tmp_path / "a.json")),
        locks.hold("--out", locks.of_file(tmp_path / "b.json")),
        locks.claim(locks.of_file(tmp_path / "a.json")) as ours,
    ):
        assert not ours


def test_who_waits_does_not_get_a_lock_that_was_removed(tmp_path):
    lock, events = locks.of_folder(tmp_path), []

    def second():
        with locks.hold("--out", lock, wait=True):
            events.append("second")
            with locks.claim(lock) as free:
                assert not free

    with locks.hold("--out", lock):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.2)
        events.append("first")
    waiting.join()
    assert events == ["first", "second"] and os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locks.hold("--out", locks.of_folder(tmp_path)):
        pass


def test_a_file_in_the_folder_s_place_costs_one_sentence(tmp_path):
    (tmp_path / "a").touch()
    with (
        pytest.raises(UserError, match=r"^--out=a cannot be written to \(.*\): .*[.]$"),
        locks.hold("--out=a", locks.of_folder(tmp_path / "a")),
    ):
        pass


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--config=experiments/quickstart.py:nominal", "--workdir="),
        ("pretrain", "--config=experiments/pretrain_edsr.py:edsr_small", "--workdir="),
        ("evaluate", "--config=experiments/quickstart.py:nominal", "--random", "--out="),
        ("report", "--paper", "--figures="),
        ("study", "ssim", "--dataset=mnist5k", "--examples=4", "--nets=edsr_small", "--out="),
    ],
    ids=lambda words: words[0],
)
def test_every_command_leaves_a_folder_to_its_holder(held, command):
    folder, _ = held
    out = folder / "results.json" if command[0] == "evaluate" else folder
    flags = [*command[1:-1], f"{command[-1]}{out}"]
    if command[0] == "pretrain":
        flags += ["--config.dataset=mnist5k", "--config.train_split=train[:64]"]
        flags += ["--config.eval_split=test[:8]", "--config.patch=28", "--config.sr_patch=28"]
    done = run_here(command[0], *flags)
    assert_mistake(done, f"error: {command[-1]}{out} is in use by")
    assert os.listdir(folder) == [".lock"]


@pytest.mark.slow
def test_a_run_that_trains_can_be_evaluated_into_another_file(tmp_path):
    run, out = tmp_path / "run", tmp_path / "c.json"
    tiny = ["--config.train_split=train[:64]", "--config.eval_split=test[:8]"]
    tiny += ["--config.batch_size=16", "--config.eval_batch_size=8", "--config.epochs=1"]
    quickstart = "--config=experiments/quickstart.py:nominal"
    trained = run_here("train", quickstart, f"--workdir={run}", "--config.eval_sets=clean", *tiny)
    assert trained.returncode == 0, trained.stderr
    with locks.hold("--workdir", locks.of_folder(run)):
        evaluated = run_here("evaluate", f"--workdir={run}", f"--out={out}")
        assert evaluated.returncode == 0, evaluated.stderr
        assert_mistake(run_here("evaluate", f"--workdir={run}"), "is in use by")
    assert json.loads(out.read_text())["clean"]["examples"] == 8
