"""The benchmark's rows, with tiny sizes: they run on a paid accelerator only."""

import pytest

from tests.conftest import run_here


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["peak,conv", "inner,memory", "step"])
def test_every_row_prints_its_figures(rows):
    done = run_here("benchmark", "--scale=tiny", f"--rows={rows}", "--cpu_devices=0")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= len(rows.split(","))
