"""Errors under attacks that are bounded by LPIPS: LPA and PPGD."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from ada_jax import checks, keys, sharding
from ada_jax.attacks import loops, perceptual
from ada_jax.errors import UserError, renamed
from ada_jax.evaluation import scoring, worst_case
from ada_jax.nets import weight_files

_ATTACKS = {"lpa": perceptual.lpa, "ppgd": perceptual.ppgd}


def check(options: worst_case.Options, image_shape: Sequence[int]) -> None:
    """Checks the options of `measure`; raises UserError that names the flag of `evaluate`."""
    del image_shape
    try:
        perceptual.check(options.lpips_bound)
    except UserError as error:
        raise renamed(error, {"bound": "--lpips_bound"}) from error
    if options.lpips_weights:
        scoring.load_features(options.lpips_weights)


def measure(
    logits_fn: Callable[..., Any],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    options: worst_case.Options,
    measured: worst_case.Fields,
    save: Callable[[worst_case.Fields], None],
) -> worst_case.Fields:
    """Errors under LPA and PPGD; an image that is misclassified without them counts as wrong.

    Args:
      logits_fn: the classifier in evaluation mode, closed over its parameters; called with
        `with_features=True`, it returns logits and features.
      images: [N,H,W,3] float32 in [0,1].
      labels: [N].
      options: 'seed', 'batch_size' and those of LPIPS are used.
      measured: fields of an earlier call; what is in it is not measured again.
      save: called with the fields after every attack.

    Returns:
      'perceptual', one entry per attack: 'examples', 'wrong', 'error' in percent, and the mean
      'distance' of the attacked images. 'features' is the network of LPIPS or 'self'.

    Raises:
      UserError: logits that are not finite, or a classifier without feature layers.
    """
    entries, count = measured.get("perceptual", []), len(images)
    apply, theta, name = None, {}, "self"
    if options.lpips_weights:
        apply, theta, name = scoring.load_features(options.lpips_weights)

    def model(theta, x):
        if apply is None:
            return logits_fn(x, with_features=True)
        return logits_fn(x), apply(theta, x)

    def attacked(attack, key, x, y, theta):
        bound, steps = options.lpips_bound, options.lpips_steps
        images, info = attack(key, functools.partial(model, theta), x, y, bound, steps=steps)
        return {
            "wrong": info["broken"] | loops.misclassified(logits_fn(x), y),
            "distance": info["distance"],
            "not_finite": checks.not_finite(logits_fn(images)),
        }

    examples = keys.of_positions(jax.random.key(options.seed), 0, count), images, labels
    for attack, function in _ATTACKS.items():
        entry = {"attack": attack, "features": name, "bound": options.lpips_bound}
        entry |= {"steps": options.lpips_steps, "examples": count, "seed": options.seed}
        entry |= {"features_digest": weight_files.digest(theta)} if theta else {}
        if any(entry.items() <= earlier.items() for earlier in entries):
            continue
        run = functools.partial(attacked, function)
        mapped = jax.pmap(run, sharding.AXIS, in_axes=(0, 0, 0, None))
        found = sharding.in_batches(mapped, examples, options.batch_size, theta)
        checks.check_finite(int(found["not_finite"].sum()), count, f"images of {attack}")
        wrong = found["wrong"]
        entry |= {"wrong": int(wrong.sum()), "error": 100 * float(wrong.mean())}
        entry |= {"distance": float(found["distance"].mean())}
        entries = [*entries, entry]
        save({"perceptual": entries})
        logging.info("%s, LPIPS of %s: %.2f%% wrong", attack, name, entry["error"])
    return {"perceptual": entries}
