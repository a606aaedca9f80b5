"""Why AdA does not improve DeepAugment with AugMix in the small preset: strength or capacity?

    for n in 40000 5000; do
      python -m ada_jax.deepaugment --config=experiments/deepaugment.py:small \\
          --out=runs/deepaugment$n --config.train_split="train[:$n]"
      python -m ada_jax.sweep --sweep=experiments/sweeps/variety.py:$n --out=runs/variety$n
    done

The word is the number of training images. With 40000, half of the examples are attacked, or all of
them with a smaller radius. With 5000, which the network can fit better, all are attacked with
nu = 0.02. Each is compared with the same schedule without AdA, on images that the results in
experiments/RESULTS.md are not measured on.
"""

from typing import Any

CONFIG = "experiments/cifar10.py:ada+deepaugment+augmix,small"


def get_hyper(hyper: Any, words: str = "") -> list[dict[str, Any]]:
    """The control is the first point."""
    if words not in ("40000", "5000"):
        raise ValueError(f"The word {words!r} is unknown: choose 40000 or 5000 training images.")
    fixed = {
        "config.train_split": f"train[:{words}]",
        "config.eval_split": "train[40000:45000]",
        "config.deepaugment.dir": f"runs/deepaugment{words}",
    }
    if words == "40000":
        attacked = hyper.sweep("config.ada.nu", [0.02, 0.01, 0.005])
        attacked[0]["config.ada.every"] = 2
    else:  # About as many examples in total.
        attacked = hyper.sweep("config.ada.nu", [0.02])
        fixed |= {"config.epochs": 80.0, "config.warmup_epochs": 7.0}
        fixed |= {"config.eval_epochs": 10.0, "config.checkpoint_epochs": 10.0}
    control = hyper.fixed("config", CONFIG.replace("ada+", ""))
    return hyper.product([[fixed], control + attacked])
