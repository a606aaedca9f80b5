"""The benchmark: its rows with tiny sizes, but `augment` and `scaling`, and wrong flags."""

import re
import subprocess
import sys

import pytest

from tests.conftest import assert_mistake, run_here


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "titles"),
    [
        ("peak,conv", ["copy of", "conv forward", "conv gradients"]),
        ("inner,memory", ["\\| inner maximisation", "memory of the inner maximisation"]),
        ("step", ["training step"]),
    ],
)
def test_every_row_has_figures(rows, titles):
    done = run_here("benchmark", "--scale=tiny", f"--rows={rows}", "--cpu_devices=0")
    assert done.returncode == 0, done.stderr
    for title in titles:
        (line, *_) = re.findall(
            rf"^(?:\| )?[^|\n]*{title}.*\d (?:ms|GB/s|MiB|\S*s/s)\b.*$", done.stdout, re.M
        )
        assert "nan" not in line


def test_rows_without_a_peer_and_unknown_rows_are_rejected():
    said = "--peer=torch has no rows of --rows=conv,peak"
    assert_mistake(run_here("benchmark", "--rows=conv,peak", "--peer=torch"), said)
    assert_mistake(run_here("benchmark", "--rows=x"), "--rows=x is unknown: choose from peak, conv")


@pytest.mark.slow
def test_devices_must_divide_the_batches():
    command = [sys.executable, "-m", "ada_jax.benchmark", "--cpu_devices=3", "--rows=peak,step"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert_mistake(done, "The 3 devices do not divide a batch of 128 of --rows=step")
    assert done.stdout == ""
