"""The ten rows of the paper's table 1, with several seeds.

    python -m ada_jax.sweep --sweep=experiments/sweeps/table1.py
    python -m ada_jax.sweep --sweep=experiments/sweeps/table1.py:small,ada,nominal

Words after the colon, separated by commas:
  a row     such as ada+augmix; without any row, all ten are trained.
  random, linf_at, ...
            rows for comparison, listed in experiments/cifar10.py (COMPARISONS).
  small     the small preset; three seeds for nominal, augmix, ada and ada+augmix.
  seeds=N   the seeds 0 to N-1 for every row; by default only 0.
"""

import pathlib
import re
import runpy
from typing import Any

CONFIG = "experiments/cifar10.py"
_CIFAR10 = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "cifar10.py"))
ROWS = _CIFAR10["ROWS"]
KNOWN = (*ROWS, *_CIFAR10["COMPARISONS"])
REPEATED = ("nominal", "augmix", "ada", "ada+augmix")  # at the small preset


def get_hyper(hyper: Any, words: str = "") -> list[dict[str, Any]]:
    """All rows of a seed before the next seed."""
    chosen = [word for word in words.split(",") if word]
    for word in chosen:
        if word not in (*KNOWN, "small") and not re.fullmatch(r"seeds=[1-9]\d*", word):
            raise ValueError(
                f"The word {word!r} is unknown: choose from small, seeds=N, {', '.join(KNOWN)}."
            )
    rows = [row for row in KNOWN if row in chosen] or ROWS
    preset = ",small" if "small" in chosen else ""
    given = [int(word.removeprefix("seeds=")) for word in chosen if word.startswith("seeds=")]
    seeds = {row: 3 if preset and row in REPEATED else 1 for row in rows}
    seeds |= {row: number for row in rows for number in given}

    def rows_with(seed: int) -> list[str]:
        return [f"{CONFIG}:{row}{preset}" for row in rows if seeds[row] > seed]

    return hyper.chainit(
        [
            hyper.product(
                [hyper.fixed("config.seed", seed), hyper.sweep("config", rows_with(seed))]
            )
            for seed in range(max(seeds.values()))
        ]
    )
