"""What the commands share: flags, signals and one-line errors."""

import gc
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from ada_jax.errors import UserError
from ada_jax.run import cli, config_checks, distributed
from tests.conftest import assert_mistake

ROOT = pathlib.Path(__file__).parents[1]


def test_a_pipe_that_closes_early_costs_no_traceback():
    command = f"{sys.executable} -m ada_jax.report experiments/results/small/*.json | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "**Table 1: robustness to common corruptions**\n"
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "deepaugment",
        "evaluate",
        "export_weights",
        "import_weights",
        "plan",
        "pretrain",
        "report",
        "study",
    ],
)
def test_every_binary_tells_a_mistake_in_a_process_of_its_own(name):
    """Other mistakes are told in the test's process."""
    command = [sys.executable, "-m", f"ada_jax.{name}", "--nonsense"]
    assert_mistake(subprocess.run(command, cwd=ROOT, capture_output=True, text=True), "'nonsense'")


@pytest.mark.parametrize(("seed", "folder"), [(0, "runs/a"), (3, "runs/a-seed3")])
def test_each_seed_has_a_folder_of_its_own(seed, folder):
    assert cli.default_folder("a", seed) == folder


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/x", "x/", "a\0b"])
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(UserError, match=r"^config\.name=.* cannot name a file or a folder: .*[.]$"):
        cli.default_folder(name, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_only_a_second_ctrl_c_raises(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with distributed.StopSignal() as stop:
        assert not stop.at(0)
        signal.raise_signal(number)
        assert stop.at(1) and stop.status == 128 + number
        signal.raise_signal(signal.SIGTERM)
        if number == signal.SIGTERM:
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.status == 128 + number
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("inf"), "config.a.b=inf must be finite"),
        ((1.0, float("nan")), "must be finite"),
        (10**30, "too large: use less than 2**31"),
        ((1, "a"), "mixes numbers and words"),
    ],
)
def test_values_that_no_field_takes_are_named(value, said):
    config_checks.check_values({"seed": 2**32 - 1, "a.b": 1.5, "a.c": ("x", ""), "a.d": True})
    with pytest.raises(UserError, match=re.escape(said)):
        config_checks.check_values({"a.b": value})


def test_ctrl_c_in_a_garbage_collection_is_not_lost(monkeypatch):
    """Python prints what a callback of the collector raises, and goes on."""
    monkeypatch.setattr(sys, "unraisablehook", cli._print_ignored)

    def callback(phase, _):
        if phase == "start":
            raise KeyboardInterrupt

    gc.callbacks.append(callback)
    try:
        with pytest.raises(KeyboardInterrupt):
            gc.collect()
            gc.callbacks.remove(callback)
            time.sleep(60)
    finally:
        if callback in gc.callbacks:
            gc.callbacks.remove(callback)


def test_ctrl_c_stays_ignored_where_it_was():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # As of a script's background command.
    try:
        with distributed.StopSignal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.at(0)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


STARTS = r"""
import errno, os, signal, sys
from ada_jax.run import cli

def run(main, *arguments):
    sys.argv[1:] = arguments
    try:
        cli.start(main, arguments=main is words)
    except SystemExit as leaving:
        print("status", leaving.code, file=sys.stderr, flush=True)

def full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a\u00fcb")

def words(argv):
    print(argv[1:])

run(full)
run(full, "b")
run(lambda _: open("/nowhere/a", "w"))
run(lambda _: signal.raise_signal(signal.SIGINT))
run(lambda _: print("12.49 \u00b1 0.12 \u2026 caf\udce9"))
run(words, "~/a", "b")
run(words, os.fsdecode(b"caf\xe9"))
"""


def test_what_the_system_refuses_costs_one_sentence_on_any_terminal():
    done = subprocess.run(
        [sys.executable, "-c", STARTS],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "HOME": "/home/me"},
        capture_output=True,
        text=True,
    )
    advice = "check that it exists, that you have access, and that its disk has space."
    assert done.stderr.splitlines() == [
        rf"error: a\xfcb cannot be read or written (No space left on device): {advice}",
        "status 2",
        "error: The argument 'b' is not a flag: write --flag=value.",
        "status 2",
        f"error: /nowhere/a cannot be read or written (No such file or directory): {advice}",
        "status 2",
        "Ctrl-C: run the same command again to continue.",
        "status 130",
        "status None",
        "status None",
        r"error: The argument b'caf\xe9' is not UTF-8, as names of folders must be: rename the "
        "folder, or set LC_ALL=C.UTF-8.",
        "status 2",
    ]
    assert done.stdout.splitlines() == [
        r"12.49 \xb1 0.12 \u2026 caf\udce9",
        "['/home/me/a', 'b']",
    ]


def test_the_home_folder_is_meant_by_every_flag(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for flag in ("--workdir", "--config.ada.x", "-out"):
        assert cli.expand_home(f"{flag}=~/a=~") == f"{flag}=/home/me/a=~"
    assert cli.expand_home("--config=~/c.py:a,b") == "--config=/home/me/c.py:a,b"
    assert cli.expand_home("--name=a~") == "--name=a~" and cli.expand_home("--flag") == "--flag"


def test_the_package_lists_its_commands():
    done = subprocess.run(
        [sys.executable, "-m", "ada_jax"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    listed = re.findall(r"^python -m ada_jax\.(\w+) +\w", done.stdout, re.MULTILINE)
    files = [*(ROOT / "ada_jax").glob("[!_]*.py"), *(ROOT / "ada_jax").glob("*/__main__.py")]
    sources = {p.stem.replace("__main__", p.parent.name): p.read_text() for p in files}
    assert sorted(listed) == sorted(
        n for n, text in sources.items() if "__main__" in text and n != "cli"
    )
