"""Adversarial attacks in l-infinity and l2 balls, AutoAttack, and attacks bounded by LPIPS.

Imports no other sub-package. `training` uses `pgd`, `fast_lpa` and `rlat`; `evaluation` uses
`autoattack`, `lpa` and `ppgd`.

Every call traces `logits_fn` again, so that it attacks the classifier in its current state.
(Arrays that an already jitted `logits_fn` closes over may be those of its first trace.) Outside
`jax.jit` each call compiles, too. To compile once, pass `programs` to `autoattack`, and wrap the
other attacks in `jax.jit` as functions of the classifier's parameters:

    @jax.jit
    def attack(key, params, x, y):
        return attacks.pgd(key, functools.partial(apply, params), x, y, 8 / 255)

`autoattack` splits its arrays over all local devices. The other attacks accept batches that are
split over several devices, like `ada_jax.adversarial_augment`. There a `microbatch` or several
restarts make every device compute the whole batch, except inside `jax.shard_map`.
"""

from ada_jax.attacks.apgd import apgd
from ada_jax.attacks.autoattack import ATTACKS, STANDARD, Account, Report, autoattack
from ada_jax.attacks.fab import fab
from ada_jax.attacks.perceptual import fast_lpa, lpa, ppgd
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
    "fast_lpa",
    "lpa",
    "multitargeted",
    "pgd",
    "ppgd",
    "square",
]
