"""The methods that the paper's table 3 compares with AdA.

    python -m ada_jax.sweep --sweep=experiments/sweeps/table3.py
    python -m ada_jax.sweep --sweep=experiments/sweeps/table3.py:small,nominal,ada,rlat

Words after the colon, separated by commas:
  a row     such as rlat+augmix; without any row, all are trained.
  small     the small preset; 'gpu' is that for one GPU.
  seeds=N   the seeds 0 to N-1; by default only 0.

The row pat_alexnet needs an AlexNet, trained once (with the word small or gpu, if these are given):
    python -m ada_jax.train --config=experiments/cifar10.py:alexnet
The row rlat+deepaugment needs DeepAugment's images, as in experiments/sweeps/table1.py.
"""

import re
from typing import Any

CONFIG = "experiments/cifar10.py"
ROWS = (
    "nominal",
    "ada",
    "linf_at",
    "l2_at",
    "advmix",
    "ada+advmix",
    "pat_self",
    "pat_alexnet",
    "rlat",
    "rlat+augmix",
    "rlat+deepaugment",
)
PRESETS = ("small", "gpu")


def get_hyper(hyper: Any, words: str = "") -> list[dict[str, Any]]:
    """All rows of a seed before the next seed."""
    chosen = [word for word in words.split(",") if word]
    for word in chosen:
        if word not in (*ROWS, *PRESETS) and not re.fullmatch(r"seeds=[1-9]\d*", word):
            known = ", ".join(["small", "gpu", "seeds=N", *ROWS])
            raise ValueError(f"The word {word!r} is unknown: choose from {known}.")
    rows = [row for row in ROWS if row in chosen] or ROWS
    preset = "".join(f",{word}" for word in PRESETS if word in chosen)
    seeds = [int(word.removeprefix("seeds=")) for word in chosen if word.startswith("seeds=")]
    return hyper.product(
        [
            hyper.sweep("config.seed", range(max(seeds, default=1))),
            hyper.sweep("config", [f"{CONFIG}:{row}{preset}" for row in rows]),
        ]
    )
