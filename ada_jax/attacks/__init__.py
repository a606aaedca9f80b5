"""Adversarial attacks in l-infinity and l2 balls, and AutoAttack.

Every call traces `logits_fn` anew: it may be any callable, and is attacked as it is at the call. A
function that is itself jitted may keep what it closed over when it was traced. Outside `jax.jit`
each call compiles, too. `autoattack` takes `programs` to compile once for several calls; for the
others jit a function of the classifier's parameters:

    @jax.jit
    def attack(key, params, x, y):
        return attacks.pgd(key, functools.partial(apply, params), x, y, 8 / 255)

All but `autoattack`, which takes whole arrays and splits them itself, take batches that are split
over several devices, as `ada_jax.adversarial_augment` does.
"""

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
