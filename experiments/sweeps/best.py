"""The study behind experiments/cifar10.py:best: ingredients added to ada+augmix, small preset.

    python -m ada_jax.sweep --sweep=experiments/sweeps/best.py
    python -m ada_jax.sweep --sweep=experiments/sweeps/best.py:confirm,seeds=3 --out=runs/confirm

Words after the colon, separated by commas:
  confirm   ada+augmix, also with batches of 64 as in the recipe, and the recipe, also without AdA
            and without noise
  seeds=N   the seeds 0 to N-1; by default only 0.

With ',small', AdA gives no measurable gain on top of noise and views; with ',gpu' it lowers mCE
(one seed): see experiments/RESULTS.md.

The study trains on 40,000 of CIFAR-10's training images and evaluates on the next 5,000, with the
15 corruptions of CIFAR-10-C. `confirm` trains on 45,000 and evaluates on the last 5,000, also with
the ten of CIFAR-10-C-bar, which take no part in the choice.
"""

import re
from typing import Any

ADA_AUGMIX = "experiments/cifar10.py:ada+augmix,small"
BEST = "experiments/cifar10.py:best,small"
JSD = {"config.augmix.jsd_weight": 12.0}
VIEWS = {
    "config.augmix.jsd_weight": 4.0,
    "config.augmix.clean_view": True,
    "config.augmix.label_views": True,
}
NOISE = {"config.noise.share": 0.5}
TRIVIAL = {"config.trivial_augment.use": True}
WITHOUT_ADA = {"config.method": "nominal"}
# One ingredient at a time, then together, then with less of AdA.
STUDY = (
    {},
    JSD,
    VIEWS,
    NOISE,
    TRIVIAL,
    {"config.label_smoothing": 0.1},
    {"config.mixup.alpha": 1.0},
    VIEWS | NOISE,
    VIEWS | NOISE | TRIVIAL,
    VIEWS | NOISE | {"config.ada.every": 2},
    VIEWS | NOISE | {"config.ada.nu": 0.007},
    VIEWS | NOISE | WITHOUT_ADA,
    VIEWS | NOISE | WITHOUT_ADA | TRIVIAL | {"config.trivial_augment.extra_ops": False},
)
CONFIRM = (
    {"config": ADA_AUGMIX},
    {"config": ADA_AUGMIX, "config.batch_size": 64},  # as in the recipe
    {"config": BEST},
    {"config": BEST} | WITHOUT_ADA,
    {"config": BEST, "config.noise.share": 0.0},
)


def get_hyper(hyper: Any, words: str = "") -> list[dict[str, Any]]:
    """All points of a seed before the next seed."""
    chosen = [word for word in words.split(",") if word]
    for word in chosen:
        if word != "confirm" and not re.fullmatch(r"seeds=[1-9]\d*", word):
            raise ValueError(f"The word {word!r} is unknown: choose from confirm and seeds=N.")
    seeds = [int(word.removeprefix("seeds=")) for word in chosen if word != "confirm"]
    if "confirm" in chosen:
        points = CONFIRM
        shared = {"config.train_split": "train[:45000]", "config.eval_split": "train[45000:]"}
        shared["config.eval_sets"] = ("clean", "c", "cbar")
    else:
        points = STUDY
        shared = {"config.train_split": "train[:40000]", "config.eval_split": "train[40000:45000]"}
        # The averaged weights are evaluated beside the last ones and do not change these.
        shared |= {"config": ADA_AUGMIX, "config.ema_decay": 0.999}
    return hyper.product(
        [
            hyper.sweep("config.seed", range(max(seeds, default=1))),
            [shared | point for point in points],
        ]
    )
