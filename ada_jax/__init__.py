"""AdversarialAugment (AdA) in JAX: classifiers that survive image corruptions."""

from ada_jax.ada import adversarial_augment
from ada_jax.corruption_nets import CorruptionNet
from ada_jax.corruption_nets import make as make_corruption_net
from ada_jax.errors import UserError

__all__ = ["CorruptionNet", "UserError", "adversarial_augment", "make_corruption_net"]
