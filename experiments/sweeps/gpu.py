"""Rows of the paper's table 1 with the preset for one GPU, the most informative ones first.

    python -m ada_jax.sweep --sweep=experiments/sweeps/gpu.py:nominal,ada,augmix,ada+augmix

Words after the colon, separated by commas:
  a row     such as ada+augmix; without any row, all ten are trained.
  seeds=N   the seeds 0 to N-1; by default only 0.

The rows with DeepAugment need its images, made once:
    python -m ada_jax.deepaugment --config=experiments/deepaugment.py:gpu --copies=10
"""

import re
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


def get_hyper(hyper: Any, words: str = "") -> list[dict[str, Any]]:
    """All rows of a seed before the next seed."""
    chosen = [word for word in words.split(",") if word]
    for word in chosen:
        if word not in ROWS and not re.fullmatch(r"seeds=[1-9]\d*", word):
            raise ValueError(
                f"The word {word!r} is unknown: choose from seeds=N, {', '.join(ROWS)}."
            )
    rows = [row for row in ROWS if row in chosen] or ROWS
    seeds = [int(word.removeprefix("seeds=")) for word in chosen if word.startswith("seeds=")]
    return hyper.product(
        [
            hyper.sweep("config.seed", range(max(seeds, default=1))),
            hyper.sweep("config", [f"{CONFIG}:{row},gpu" for row in rows]),
        ]
    )
