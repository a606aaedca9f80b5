"""AdA with perturbations that 4, 16 or 64 examples share (`config.ada.group`), small preset.

    python -m ada_jax.sweep --sweep=experiments/sweeps/group.py
    python -m ada_jax.sweep --sweep=experiments/sweeps/group.py:16

A device of the preset attacks 64 examples, so 64 is one environment per device. The word after the
colon is one of these numbers, usually the best of the first command; its seeds 1 and 2 are then
trained too. The results of experiments/sweeps/table1.py:small,ada are those of one example.
"""

from typing import Any

CONFIG = "experiments/cifar10.py:small"
GROUPS = (4, 16, 64)


def get_hyper(hyper: Any, words: str = "") -> list[dict[str, Any]]:
    """Seed 0 of all groups, then the other seeds of one."""
    if words not in ("", *map(str, GROUPS)):
        raise ValueError(
            f"The word {words!r} is unknown: choose from {', '.join(map(str, GROUPS))}."
        )
    repeated = [int(words)] if words else []
    return hyper.chainit(
        [
            hyper.product(
                [hyper.sweep("config.ada.group", groups), hyper.sweep("config.seed", seeds)]
            )
            for groups, seeds in ((GROUPS, [0]), (repeated, [1, 2]))
        ]
    )
