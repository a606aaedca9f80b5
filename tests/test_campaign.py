"""The reliability campaign with small counts; tests/README.md has the command of the whole."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_small_campaign_finds_nothing(tmp_path):
    counts = ["--malformed=13", "--settings=4"]
    command = [sys.executable, "tests/campaign.py", *counts, f"--folder={tmp_path / 'campaign'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
