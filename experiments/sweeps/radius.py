"""AdA's radius, number of steps and step rule, with the small preset.

    python -m ada_jax.sweep --sweep=experiments/sweeps/radius.py

It trains on 40,000 of CIFAR-10's training images and evaluates on the next 5,000, so settings are
chosen neither on the test images nor on those of the results in experiments/RESULTS.md.
"""

from typing import Any

CONFIG = "experiments/cifar10.py:small"


def get_hyper(hyper: Any) -> list[dict[str, Any]]:
    """Twelve points; the preset is the one with nu 0.02 and one sign step."""
    return hyper.product(
        [
            hyper.fixed("config.train_split", "train[:40000]"),
            hyper.fixed("config.eval_split", "train[40000:45000]"),
            hyper.sweep("config.ada.nu", [0.01, 0.02, 0.04]),
            hyper.sweep("config.ada.steps", [1, 2]),
            hyper.zipit(
                [
                    hyper.sweep("config.ada.step_rule", ["sign", "l2"]),
                    # A sign step of 0.25 leaves the ball; an l2 step of 1 reaches its surface.
                    hyper.sweep("config.ada.step_scale", [0.25, 1.0]),
                ]
            ),
        ]
    )
