"""How far, how often and how AdA's attack steps: radius, steps and step rule, at the small preset.

    python -m ada_jax.sweep --sweep=experiments/sweeps/radius.py

It trains on 40,000 of CIFAR-10's training images and measures on the next 5,000, neither the test
images nor those that the small table is measured on: what is chosen here is not chosen on them.
"""

from typing import Any

CONFIG = "experiments/cifar10.py:small"


def get_hyper(hyper: Any) -> list[dict[str, Any]]:
    """Twelve points; the preset itself is the one with nu 0.02 and one step by the sign."""
    return hyper.product(
        [
            hyper.fixed("config.train_split", "train[:40000]"),
            hyper.fixed("config.eval_split", "train[40000:45000]"),
            hyper.sweep("config.ada.nu", [0.01, 0.02, 0.04]),
            hyper.sweep("config.ada.steps", [1, 2]),
            hyper.zipit(
                [
                    hyper.sweep("config.ada.step_rule", ["sign", "l2"]),
                    # The paper's sign steps leave the ball anyway; one of l2 just reaches its rim.
                    hyper.sweep("config.ada.step_scale", [0.25, 1.0]),
                ]
            ),
        ]
    )
