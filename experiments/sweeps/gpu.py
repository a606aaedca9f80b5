"""Rows of the paper's table 1 with the preset for one GPU, the most informative ones first.

    python -m ada_jax.sweep --sweep=experiments/sweeps/gpu.py:nominal,ada,augmix,ada+augmix

Words after the colon, separated by commas:
  a row     such as ada+augmix; without any row, the ten of table 1 are trained. Others are those
            for comparison, such as advmix.
  seeds=N   the seeds 0 to N-1; by default only 0.

The rows with DeepAugment need its images, made once:
    python -m ada_jax.deepaugment --config=experiments/deepaugment.py:gpu --copies=10
"""

import pathlib
import re
import runpy
from typing import Any

CONFIG = "experiments/cifar10.py"
ROWS = (
    "nominal",
    "ada",
    "augmix",
    "ada+augmix",
    "deepaugment+augmix",
    "ada+deepaugment+augmix",
    "deepaugment",
    "deepaugment10x+augmix",
    "ada+deepaugment10x+augmix",
    "deepaugment10x",
)
_CIFAR10 = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "cifar10.py"))
KNOWN = (*ROWS, *_CIFAR10["COMPARISONS"])


def get_hyper(hyper: Any, words: str = "") -> list[dict[str, Any]]:
    """All rows of a seed before the next seed."""
    chosen = [word for word in words.split(",") if word]
    for word in chosen:
        if word not in KNOWN and not re.fullmatch(r"seeds=[1-9]\d*", word):
            raise ValueError(
                f"The word {word!r} is unknown: choose from seeds=N, {', '.join(KNOWN)}."
            )
    rows = [row for row in KNOWN if row in chosen] or ROWS
    seeds = [int(word.removeprefix("seeds=")) for word in chosen if word.startswith("seeds=")]
    return hyper.product(
        [
            hyper.sweep("config.seed", range(max(seeds, default=1))),
            hyper.sweep("config", [f"{CONFIG}:{row},gpu" for row in rows]),
        ]
    )
