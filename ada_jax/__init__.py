"""AdversarialAugment (AdA) in JAX: image classifiers that are robust to corruptions."""

import importlib
import os
import sys
from typing import Any

if sys.argv[0] == "-m":  # A command, `python -m ada_jax.train`: set before JAX reads it.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's and TensorFlow's messages
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # TensorFlow only writes events here.

_HOMES = {
    "CorruptionNet": "ada_jax.ada",
    "UserError": "ada_jax.errors",
    "adversarial_augment": "ada_jax.ada",
    "augment_and_mix": "ada_jax.augment.augmix",
    "autoattack": "ada_jax.attacks",
    "conv2d": "ada_jax.nets.per_example",
    "conv_transpose2d": "ada_jax.nets.per_example",
    "corrupt": "ada_jax.corruptions",
    "corruption_errors": "ada_jax.evaluation.scoring",
    "load_classifier": "ada_jax.evaluation.scoring",
    "make_corruption_net": "ada_jax.nets.corruption_nets",
}
_SUBPACKAGES = ("attacks", "augment", "corruptions")
__all__ = [*_HOMES, *_SUBPACKAGES]


def __getattr__(name: str) -> Any:
    """Imports public names on first use, so that `ada_jax.report` runs without JAX."""
    if name in _SUBPACKAGES:
        return importlib.import_module(f"ada_jax.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'ada_jax' has no attribute {name!r}")
    own = {"make_corruption_net": "make"}.get(name, name)
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), own)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
