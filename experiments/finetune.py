"""Makes a trained classifier robust in a few epochs: AdA from its weights on.

    python -m ada_jax.train --config=experiments/finetune.py \\
        --config.init_weights=runs/cifar10_nominal_small

`init_weights` is a run's folder or its classifier.safetensors; the classifier, its normalisation
and the data must be those of the run. Words after the colon are those of experiments/cifar10.py:
'ada+augmix' for both, 'nominal' for the same schedule without AdA, to compare with. The network and
the data are those of cifar10.py:small, or of :gpu with that word; for others give
--config.classifier and so on.
"""

import pathlib
import runpy

import ml_collections


def get_config(words: str = "") -> ml_collections.ConfigDict:
    """The small CIFAR-10 config with a short schedule."""
    preset = "" if "gpu" in words.split(",") else "small"
    config = _cifar10(",".join(word for word in (words, preset) if word)).unlock()
    config.name = config.name.replace("cifar10", "finetune")
    config.init_weights = f"runs/cifar10_nominal_{preset or 'gpu'}"
    config.epochs = 5.0
    config.warmup_epochs = 0.5
    config.learning_rate = 0.1
    return config.lock()


def _cifar10(words: str) -> ml_collections.ConfigDict:
    path = pathlib.Path(__file__).with_name("cifar10.py")
    return runpy.run_path(str(path))["get_config"](words)
