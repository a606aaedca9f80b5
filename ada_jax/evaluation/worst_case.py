"""Worst-case errors: AutoAttack with MultiTargeted in pixel balls, and AdA's own attack.

Both skip what an interrupted call has measured on as many images.
"""

import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ada_jax import ada, attacks, checks, keys, losses, perturbation, sharding, ssim
from ada_jax import results as results_files
from ada_jax.attacks import loops
from ada_jax.attacks.loops import LogitsFn
from ada_jax.data import batching, core
from ada_jax.errors import UserError
from ada_jax.nets import corruption_nets

Fields = dict[str, Any]  # of a results file
_SEQUENCE = (*attacks.STANDARD, "multitargeted")


class Options(NamedTuple):
    """The options of the attacks.

    Attributes:
      seed: seed of the attacks.
      batch_size: examples at a time, over all devices.
      state_dir: folder for the progress of AutoAttack.
      nets: corruption networks of AdA, with shipped weights.
      radii: relative radii nu of AdA.
      steps: steps of AdA's gradient ascent.
      restarts: random starts of AdA; an image counts as wrong if any succeeds.
      lpips_weights: the network whose features bound LPA and PPGD; '' is the classifier itself.
      lpips_bound: their largest LPIPS.
      lpips_steps: steps of PPGD, and of each round of LPA.
    """

    seed: int = 0
    batch_size: int = 256
    state_dir: str | os.PathLike[str] = ""
    nets: Sequence[str] = ("edsr_small",)
    radii: Sequence[float] = (0.015, 0.03, 0.06)
    steps: int = 10
    restarts: int = 1
    lpips_weights: str = ""
    lpips_bound: float = 0.5
    lpips_steps: int = 40


def first_examples(dataset: core.Dataset, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images [N,H,W,3], float32 in [0,1], and labels [N]; all for a count of 0."""
    batch = batching.gather(dataset, np.arange(min(count or len(dataset), len(dataset))))
    return np.float32(batching.to_uint8(batch["image"])) / 255, batch["label"]


def pixel_balls(
    logits_fn: LogitsFn,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    options: Options,
    measured: Fields,
    save: Callable[[Fields], None],
) -> Fields:
    """Robust accuracy in pixel balls: AutoAttack, then MultiTargeted on the remaining images.

    Args:
      logits_fn: the classifier in evaluation mode, closed over its parameters.
      images: [N,H,W,3] float32 in [0,1].
      labels: [N].
      options: 'seed', 'batch_size' and 'state_dir' are used.
      measured: fields of an earlier call; radii in it are not measured again, except on more
        images.
      save: called with the fields after every radius.

    Returns:
      'lp', for each norm and radius: 'examples', 'seed', the number of 'robust' ones, 'accuracy'
      against all attacks, 'autoattack' and 'clean', in percent, and the attacks' accounts and
      warnings; and 'lp_accuracy', the accuracies alone.

    Source: Calian et al. (2021), table 2.
    """
    programs, balls = {}, measured.get("lp", {})
    for norm, radii in results_files.RADII.items():
        for name, epsilon in radii.items():
            if balls.get(norm, {}).get(name, {}).get("examples") == len(images):
                continue
            folder = f"{norm}_{name.replace('/', '_')}_{len(images)}_seed{options.seed}"
            folder += f"_batch{options.batch_size}"
            report = attacks.autoattack(
                jax.random.key(options.seed),
                logits_fn,
                images,
                labels,
                epsilon,
                norm=norm,
                attacks=_SEQUENCE,
                batch_size=options.batch_size,
                state_dir=os.path.join(options.state_dir, folder),
                programs=programs,
            )
            ball = _ball(report) | {"seed": options.seed}
            balls = balls | {norm: balls.get(norm, {}) | {name: ball}}
            save(_lp_fields(balls))
            logging.info("%s %s: %.2f%% robust", norm, name, 100 * report.robust_accuracy)
    return _lp_fields(balls)


def check_replaced(measured: Fields, examples: int, seed: int) -> None:
    """Checks that `pixel_balls` would not replace results on more images or of another seed.

    Args:
      measured: fields of an earlier call.
      examples: number of images to measure.
      seed: seed of the attacks.

    Raises:
      UserError: it would.
    """
    for ball in (ball for radii in measured.get("lp", {}).values() for ball in radii.values()):
        count, before = ball.get("examples", 0), ball.get("seed", seed)  # Older files have none.
        if count > examples or before != seed:
            raise UserError(
                f"The results file has 'lp' for {count} images and seed {before}, which those for "
                f"{examples} images and seed {seed} would replace: give another --out."
            )


def _ball(report: attacks.Report) -> dict[str, Any]:
    def percent(share: float) -> float:
        return round(100 * share, 10)  # 100 * 0.07 is more than 7

    after = {account.attack: percent(account.robust_accuracy) for account in report.accounts}
    return {
        "attacks": report.name,
        "examples": len(report.robust),
        "robust": int(report.robust.sum()),
        "accuracy": percent(report.robust_accuracy),
        "autoattack": after[attacks.STANDARD[-1]],
        "clean": percent(report.clean_accuracy),
        "accounts": [dataclasses.asdict(account) for account in report.accounts],
        "warnings": report.warnings,
    }


def _lp_fields(balls: Fields) -> Fields:
    accuracies = {
        norm: {name: ball["accuracy"] for name, ball in entries.items()}
        for norm, entries in balls.items()
    }
    return {"lp": balls, "lp_accuracy": accuracies}


def check_radii(flag: str, radii: Sequence[str]) -> None:
    """Checks that a flag's words are radii.

    Raises:
      UserError: naming the flag and the first one that is not a finite number of 0 or more.
    """
    for radius in radii:
        number = re.fullmatch(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", radius)
        if not number or not np.isfinite(float(radius)):
            raise UserError(
                f"--{flag}={radius} is not a radius: give numbers of 0 or more, such as 0.015."
            )


def check_under_ada(options: Options, image_shape: Sequence[int]) -> None:
    """Checks the options of `under_ada` for images [H,W,3].

    Raises:
      UserError: naming the flag of `ada_jax.evaluate`.
    """
    known = corruption_nets.shipped()
    if not options.nets or not options.radii:
        raise UserError("--ada_nets or --ada_radii is empty: name at least one of each.")
    if unknown := [name for name in options.nets if name not in known]:
        raise UserError(
            f"--ada_nets={unknown[0]} is unknown or has no shipped weights: choose from "
            f"{', '.join(known)}."
        )
    corruption_nets.check_sizes("--ada_nets", options.nets, [1] * len(options.nets), image_shape)


def under_ada(
    logits_fn: LogitsFn,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    options: Options,
    measured: Fields,
    save: Callable[[Fields], None],
) -> Fields:
    """Errors under AdA's maximisation, by one perturbation per example and by one for all.

    Args:
      logits_fn: the classifier in evaluation mode, closed over its parameters.
      images: [N,H,W,3] float32 in [0,1].
      labels: [N].
      options: all but 'state_dir' are used.
      measured: fields of an earlier call; what is in it is not measured again.
      save: called with the fields after every measurement.

    Returns:
      Two lists with an entry per network and radius: 'under_ada' (paper, equation 1) and
      'under_shared_ada', where one perturbation maximises the mean loss of all images, the worst
      environment of IRM (equations 4 and 5). Entries have 'examples', 'wrong', 'error' in percent,
      the mean 'loss' in nats and the mean 'ssim'. In 'under_ada' 'wrong' and 'loss' are the worst
      of the image itself and of all restarts, and 'ssim' is that of the last restart; in
      'under_shared_ada' they are those of the restart with the largest loss. For images smaller
      than SSIM's window there is no 'ssim', and AdA's line search is off.

    Raises:
      UserError: logits that are not finite.
    """
    fields = {name: measured.get(name, []) for name in ("under_ada", "under_shared_ada")}
    count = len(images)
    example_keys = keys.of_positions(jax.random.key(options.seed), 0, count)
    examples = example_keys, images, labels
    for name in options.nets:
        net = corruption_nets.make(name)
        attacks_of = {
            "under_ada": _per_example(logits_fn, net, examples, options),
            "under_shared_ada": _shared(logits_fn, net, examples, options),
        }
        for nu, (field, attack) in itertools.product(options.radii, attacks_of.items()):
            entry = {"net": name, "nu": nu, "steps": options.steps, "restarts": options.restarts}
            entry |= {"examples": count, "seed": options.seed}
            if any(entry.items() <= earlier.items() for earlier in fields[field]):
                continue
            found = attack(nu)
            bad = int(found["not_finite"].sum())
            checks.check_finite(bad, count, f"images of AdA's attack by {name} at nu {nu:g}")
            wrong = found["wrong"]
            entry |= {"wrong": int(wrong.sum()), "error": 100 * float(wrong.mean())}
            entry |= {key: float(found[key].mean()) for key in ("loss", "ssim") if key in found}
            fields |= {field: [*fields[field], entry]}
            save(fields)
            logging.info("%s, %s, nu %g: %.2f%% wrong", field, name, nu, entry["error"])
    return fields


def _outcome(logits_fn: LogitsFn, images: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    logits = logits_fn(images)
    return {
        "wrong": loops.misclassified(logits, y),
        "not_finite": checks.not_finite(logits),
        "loss": losses.cross_entropy(logits, y),
    }


def _per_example(
    logits_fn: LogitsFn, net: ada.CorruptionNet, examples: Sequence[Any], options: Options
) -> Callable[[float], dict[str, np.ndarray]]:
    """The attack on each example, a function of nu that returns arrays [N]."""
    augment = functools.partial(
        ada.adversarial_augment, logits_fn=logits_fn, net=net, steps=options.steps
    )

    def attack(key, x, y, nu):
        settings = {"nu": nu} if ssim.fits(x) else {"nu": nu, "ssim_threshold": -1}

        def once(i, found):
            example_keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(key)
            images, metrics = augment(example_keys, x, y, **settings)
            outcome = _outcome(logits_fn, images, y)
            new = {name: jnp.maximum(found[name], value) for name, value in outcome.items()}
            return new | ({"ssim": metrics["ssim_after"]} if ssim.fits(x) else {})

        similarity = {"ssim": jnp.ones(len(x), jnp.float32)} if ssim.fits(x) else {}
        return jax.lax.fori_loop(0, options.restarts, once, _outcome(logits_fn, x, y) | similarity)

    mapped = jax.pmap(attack, sharding.AXIS, in_axes=(0, 0, 0, None))
    return functools.partial(sharding.in_batches, mapped, examples, options.batch_size)


def _shared(
    logits_fn: LogitsFn, net: ada.CorruptionNet, examples: Sequence[Any], options: Options
) -> Callable[[float], dict[str, np.ndarray]]:
    """The attack by one delta for all examples, a function of nu that returns arrays [N].

    It is `ada.maximise` with the gradient of the loss summed over all batches and devices.
    """

    def render(delta, key, x):
        deltas = jax.tree.map(lambda d: jnp.broadcast_to(d, (len(x), *d.shape[1:])), delta)
        return ada.render(net, deltas, x, key)

    def gradient(key, x, y, real, delta):
        def total_loss(delta):
            return (real * losses.cross_entropy(logits_fn(render(delta, key, x)), y)).sum()

        return jax.lax.psum(jax.grad(total_loss)(delta), sharding.AXIS)

    def judge(key, x, y, delta):
        images = render(delta, key, x)
        if not ssim.fits(x):
            return _outcome(logits_fn, images, y)
        images, _ = ssim.line_search(x, images)
        return _outcome(logits_fn, images, y) | {"ssim": ssim.ssim(x, images)}

    @jax.jit
    def start(key, nu):
        radii = perturbation.radii(net.theta, nu)
        return perturbation.init(key[None], net.theta, radii), radii

    @jax.jit
    def ascend(delta, radii, total):
        step = perturbation.sign_step(total, radii, 0.25)
        return perturbation.project(perturbation.add(delta, step), radii)

    gradient = jax.pmap(gradient, sharding.AXIS, in_axes=(0, 0, 0, 0, None))
    judge = jax.pmap(judge, sharding.AXIS, in_axes=(0, 0, 0, None))

    def restart(key, nu):
        delta, radii = start(key, jnp.float32(nu))
        for _ in range(options.steps):
            total = jax.tree.map(np.zeros_like, delta)
            for batch, real in sharding.batches(examples, options.batch_size):
                part = sharding.unreplicate(gradient(*batch, real, delta))
                total = jax.tree.map(np.add, total, part)
            delta = ascend(delta, radii, total)
        return sharding.in_batches(judge, examples, options.batch_size, delta)

    def attack(nu):
        # No example has this position.
        key = jax.random.fold_in(jax.random.key(options.seed), len(examples[1]))
        found = (restart(jax.random.fold_in(key, i), nu) for i in range(options.restarts))
        return max(found, key=lambda one: one["loss"].mean())

    return attack
