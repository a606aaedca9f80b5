"""Every row of the benchmark but `augment` and `scaling` is printed, with tiny sizes."""

import re

import pytest

from tests.conftest import run_here


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
