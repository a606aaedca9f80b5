"""Fine-tunes a trained classifier with AdA for a few epochs to make it robust.

    python -m ada_jax.train --config=experiments/finetune.py \\
        --config.init_weights=runs/cifar10_nominal_small

`init_weights` is a run's folder, its classifier.safetensors, or a file of ada_jax.import_weights.
The classifier and its normalisation must be those of the weights. Data of another number of classes
get a new last layer. By default the classifier and the data are those of
experiments/cifar10.py:small; the word gpu selects those of :gpu, and flags such as
--config.classifier others. The words after the colon are those of experiments/cifar10.py:
'ada+augmix' is AdA with AugMix, and 'nominal' the same schedule without AdA, for comparison.
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
