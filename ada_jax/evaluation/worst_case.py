"""Worst-case errors for a results file: AutoAttack with MultiTargeted, and AdA's own attack.

Both are measured cell by cell; a cell that a file has of as many images is not measured again.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ada_jax import ada, attacks, checks, keys, ssim
from ada_jax import results as results_files
from ada_jax.attacks import loops
from ada_jax.attacks.loops import LogitsFn
from ada_jax.corruptions import c_folder
from ada_jax.data import batching, core
from ada_jax.nets import corruption_nets
from ada_jax.sharding import AXIS, shard

Results = dict[str, Any]
Write = Callable[[Results], None]
_SEQUENCE = (*attacks.STANDARD, "multitargeted")


def first_examples(dataset: core.Dataset, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images [N,H,W,3], float32 in [0,1], and labels [N]; all for a count of 0."""
    batch = batching.gather(dataset, np.arange(min(count or len(dataset), len(dataset))))
    return np.float32(c_folder.as_uint8(batch["image"])) / 255, batch["label"]


def pixel_balls(
    results: Results,
    write: Write,
    logits_fn: LogitsFn,
    dataset: core.Dataset,
    *,
    examples: int,
    seed: int,
    batch_size: int,
    state_dir: str | os.PathLike[str],
) -> Results:
    """Robust accuracy in balls of pixels: AutoAttack, then MultiTargeted on what it leaves.

    Args:
      results: so far; what they lack of RADII is measured.
      write: called with the results after every radius.
      logits_fn: the classifier in evaluation mode, closed over its parameters.
      dataset: clean images.
      examples: how many to take from the start; 0 is all.
      seed: of the attacks.
      batch_size: examples a call, over all devices.
      state_dir: folder for what an interrupted radius has finished.

    Returns:
      The results with 'lp', by norm and radius: 'examples', those 'robust', 'accuracy' against
      both (the worst case for each example), 'autoattack' and 'clean', all in percent, and the
      attacks' accounts and warnings; and 'lp_accuracy', the accuracies alone.

    Source: Calian et al. (2021), table 2.
    """
    x, y = first_examples(dataset, examples)
    programs = {}
    for norm, radii in results_files.RADII.items():
        for name, epsilon in radii.items():
            if results.get("lp", {}).get(norm, {}).get(name, {}).get("examples") == len(x):
                continue
            report = attacks.autoattack(
                jax.random.key(seed),
                logits_fn,
                x,
                y,
                epsilon,
                norm=norm,
                attacks=_SEQUENCE,
                batch_size=batch_size,
                state_dir=os.path.join(
                    state_dir, f"{norm}_{name.replace('/', '_')}_{len(x)}_seed{seed}"
                ),
                programs=programs,
            )
            results = _with_ball(results, norm, name, report)
            write(results)
            logging.info("%s %s: %.2f%% robust", norm, name, 100 * report.robust_accuracy)
    return results


def _with_ball(results: Results, norm: str, name: str, report: attacks.Report) -> Results:
    count = len(report.robust)

    def percent(share: float) -> float:
        return round(100 * share, 10)  # 100 * 0.07 is more than 7

    after = {account.attack: percent(account.robust_accuracy) for account in report.accounts}
    cell = {
        "attacks": report.name,
        "examples": count,
        "robust": int(report.robust.sum()),
        "accuracy": percent(report.robust_accuracy),
        "autoattack": after[attacks.STANDARD[-1]],
        "clean": percent(report.clean_accuracy),
        "accounts": [dataclasses.asdict(account) for account in report.accounts],
        "warnings": report.warnings,
    }
    balls = results.get("lp", {})
    balls = balls | {norm: balls.get(norm, {}) | {name: cell}}
    accuracies = {
        norm: {name: c["accuracy"] for name, c in cells.items()} for norm, cells in balls.items()
    }
    return results | {"lp": balls, "lp_accuracy": accuracies}


def under_ada(
    results: Results,
    write: Write,
    logits_fn: LogitsFn,
    dataset: core.Dataset,
    *,
    nets: Sequence[str],
    radii: Sequence[float],
    steps: int,
    restarts: int,
    examples: int,
    seed: int,
    batch_size: int,
) -> Results:
    """Errors under AdA's maximisation, as the worst of some restarts.

    Args:
      results: so far.
      write: called with the results after every cell.
      logits_fn: the classifier in evaluation mode, closed over its parameters.
      dataset: clean images.
      nets: names of corruption networks with shipped weights.
      radii: relative radii nu.
      steps: of gradient ascent.
      restarts: attacks from other random starts; one that succeeds is enough.
      examples: images to take from the start; 0 is all.
      seed: of the attacks.
      batch_size: examples at a time, over all devices.

    Returns:
      The results with 'under_ada', one entry a network and radius: 'examples', 'wrong', 'error' in
      percent, and the mean 'ssim' of the last restart's images. For images smaller than SSIM's
      window there is none, and AdA's line search is off.

    Raises:
      UserError: logits that are not finite.
    """
    x, y = first_examples(dataset, examples)
    devices = jax.local_device_count()
    size = -(-min(batch_size, len(x)) // devices) * devices
    for name in nets:
        net = corruption_nets.make(name)
        attack = jax.pmap(_attacker(logits_fn, net, steps, restarts), AXIS, in_axes=(0, None))
        for nu in radii:
            cell = {"net": name, "nu": nu, "steps": steps, "restarts": restarts}
            cell |= {"examples": len(x), "seed": seed}
            before = results.get("under_ada", [])
            if any(cell.items() <= entry.items() for entry in before):
                continue
            found = _in_batches(attack, x, y, nu, seed, size)
            bad = int(found["not_finite"].sum())
            checks.check_finite(bad, len(x), f"images of AdA's attack by {name} at nu {nu:g}")
            wrong = found["wrong"]
            cell |= {"wrong": int(wrong.sum()), "error": 100 * float(wrong.mean())}
            cell |= {"ssim": float(found["ssim"].mean())} if "ssim" in found else {}
            results = results | {"under_ada": [*before, cell]}
            write(results)
            logging.info("AdA, %s, nu %g: %.2f%% wrong", name, nu, cell["error"])
    return results


def _attacker(
    logits_fn: Callable[[jax.Array], jax.Array],
    net: ada.CorruptionNet,
    steps: int,
    restarts: int,
) -> Callable[..., dict[str, jax.Array]]:
    augment = functools.partial(ada.adversarial_augment, logits_fn=logits_fn, net=net, steps=steps)

    def attack(batch, nu):
        x, y = batch["x"], batch["y"]
        settings = {"nu": nu} if ssim.fits(x) else {"nu": nu, "ssim_threshold": -1}

        def verdict(images):
            logits = logits_fn(images)
            return {
                "wrong": loops.misclassified(logits, y),
                "not_finite": checks.not_finite(logits),
            }

        def once(i, found):
            example_keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(batch["key"])
            images, metrics = augment(example_keys, x, y, **settings)
            new = {name: found[name] | value for name, value in verdict(images).items()}
            return new | ({"ssim": metrics["ssim_after"]} if ssim.fits(x) else {})

        similarity = {"ssim": jnp.ones(len(x), jnp.float32)} if ssim.fits(x) else {}
        return jax.lax.fori_loop(0, restarts, once, verdict(x) | similarity)

    return attack


def _in_batches(
    attack: Callable[..., Any], x: np.ndarray, y: np.ndarray, nu: float, seed: int, size: int
) -> dict[str, np.ndarray]:
    """What the attack finds for each example; the last batch is filled up."""
    example_keys = keys.of_positions(jax.random.key(seed), 0, len(x))
    parts = []
    for start in range(0, len(x), size):
        place = np.minimum(start + np.arange(size), len(x) - 1)
        batch = shard({"x": x[place], "y": y[place], "key": example_keys[place]})
        parts.append({name: np.asarray(a).ravel() for name, a in attack(batch, nu).items()})
    return {name: np.concatenate([p[name] for p in parts])[: len(x)] for name in parts[0]}


def rows(results: Results) -> list[tuple[str, str]]:
    """The worst cases as a table's (name, value)."""
    shown = []
    for norm, cells in results.get("lp", {}).items():
        for name, cell in cells.items():
            value = f"{cell['accuracy']:.2f}% of {cell['examples']} ({cell['autoattack']:.2f}%)"
            shown.append((f"robust, {norm} {name} (AutoAttack alone)", value))
    for cell in results.get("under_ada", []):
        title = f"error under AdA, {cell['net']}, nu {cell['nu']:g}, {cell['steps']} steps"
        shown.append((title, f"{cell['error']:.2f}% of {cell['examples']}"))
    return shown
