"""Adversarial attacks in l-infinity and l2 balls, and AutoAttack."""

from ada_jax.attacks.apgd import apgd
from ada_jax.attacks.autoattack import ATTACKS, STANDARD, Account, Report, autoattack
from ada_jax.attacks.fab import fab
from ada_jax.attacks.pgd import multitargeted, pgd
from ada_jax.attacks.square import square

__all__ = [
    "ATTACKS",
    "STANDARD",
    "Account",
    "Report",
    "apgd",
    "autoattack",
    "fab",
    "multitargeted",
    "pgd",
    "square",
]
