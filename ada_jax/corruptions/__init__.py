"""The corruptions of ImageNet-C and CIFAR-10-C, in NumPy and SciPy."""

from ada_jax.corruptions.functions import corrupt
from ada_jax.corruptions.parameter_tables import EXTRA, NAMES, SEVERITIES, TABLES

__all__ = ["EXTRA", "NAMES", "SEVERITIES", "TABLES", "corrupt"]
