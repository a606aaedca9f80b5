"""What binaries share: the second start for huge pages (the rest is tested with the binaries)."""

import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
SETTING = "glibc.malloc.hugetlb=1"
asked_for = pytest.mark.skipif(
    not PAGES.exists() or "[madvise]" not in PAGES.read_text(),
    reason="the kernel gives huge pages to all or to nobody",
)


def wait_until(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    """Until something happened, as long as the process lives, at most for two minutes."""
    for _ in range(1200):
        assert process.poll() is None
        if happened():
            return
        time.sleep(0.1)
    raise AssertionError("nothing happened in two minutes")


@asked_for
@pytest.mark.parametrize("given", ["", "glibc.malloc.arena_max=8"])
def test_a_binary_starts_anew_with_huge_pages_and_the_same_flags(given, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "ada_jax.train", "--config=experiments/quickstart.py:nominal"]
        + [f"--workdir={tmp_path}/a run"],
        env=os.environ | {"GLIBC_TUNABLES": given},
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        # glibc writes zeros between the settings.
        environment = pathlib.Path(f"/proc/{process.pid}/environ")
        settings = {given.encode(), SETTING.encode()}
        wait_until(process, lambda: all(s in environment.read_bytes() for s in settings))
        wait_until(process, (tmp_path / "a run" / "config.json").exists)
    finally:
        process.kill()
        process.wait()


def test_a_user_s_own_program_is_not_started_twice():
    program = "from ada_jax import cli; cli._take_huge_pages(); print('once')"
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", f"print('start'); {program}"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["start", "once"]


def test_a_pipe_that_closes_early_costs_no_traceback():
    command = f"{sys.executable} -m ada_jax.report experiments/results/small/*.json | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "**Table 1: robustness to common corruptions**\n"
    assert done.stderr == ""
