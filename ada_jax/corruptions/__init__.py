"""The corruptions of ImageNet-C, CIFAR-10-C and C-bar, in NumPy and SciPy.

For evaluation only: `evaluation.image_sets` applies them on the fly, or reads what `c_folder`
wrote.
"""

from ada_jax.corruptions.functions import corrupt
from ada_jax.corruptions.parameter_tables import CBAR, EXTRA, NAMES, SEVERITIES, TABLES

__all__ = ["CBAR", "EXTRA", "NAMES", "SEVERITIES", "TABLES", "corrupt"]
