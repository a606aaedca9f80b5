"""What AdA adds to DeepAugment with AugMix at the small preset, by the share of attacked examples.

    python -m ada_jax.deepaugment --config=experiments/deepaugment.py:small \\
        --out=runs/deepaugment40000 --config.train_split='train[:40000]'
    python -m ada_jax.sweep --sweep=experiments/sweeps/deepaugment.py

It trains on 40,000 of CIFAR-10's training images and measures on the next 5,000, neither the test
images nor those that the small table is measured on: what is chosen here is not chosen on them.
"""

from typing import Any

CONFIG = "experiments/cifar10.py:ada+deepaugment+augmix,small"


def get_hyper(hyper: Any) -> list[dict[str, Any]]:
    """The same schedule without AdA first."""
    control = hyper.fixed("config", "experiments/cifar10.py:deepaugment+augmix,small")
    attacked = hyper.sweep("config.ada.every", [2, 4])
    return hyper.product(
        [
            hyper.fixed("config.train_split", "train[:40000]"),
            hyper.fixed("config.eval_split", "train[40000:45000]"),
            hyper.fixed("config.deepaugment.dir", "runs/deepaugment40000"),
            hyper.chainit([control, attacked]),
        ]
    )
