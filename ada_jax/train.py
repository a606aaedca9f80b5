"""Trains a classifier with AdA.

python -m ada_jax.train --config=experiments/cifar10.py [--workdir=DIR] [--config.FIELD=VALUE]
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from ada_jax import ada, checks, evaluate, paths, training
from ada_jax import results as results_files
from ada_jax.data import batching, core
from ada_jax.errors import require_extra
from ada_jax.evaluation import scoring
from ada_jax.nets import corruption_nets, weight_files
from ada_jax.report import figures
from ada_jax.run import checkpoint, cli, config_checks, distributed, logbook, setup
from ada_jax.sharding import AXIS, replicate, shard, unreplicate


def main(config: ml_collections.ConfigDict, workdir: str) -> int | None:
    """Trains, or goes on training, in `workdir`; returns an exit status."""
    config_checks.validate(config)
    pictures = ["matplotlib"] if config.method == "ada" and config.figure_examples else []
    require_extra("Training", "grain", "orbax.checkpoint", *pictures)
    paths.check_bucket(f"--workdir={workdir}", workdir)
    paths.check_bucket(f"config.init_weights={config.init_weights!r}", config.init_weights)
    cli.set_up_devices(config.cpu_devices, config.compilation_cache)
    config_checks.validate_devices(config, jax.device_count())
    distributed.check_shared(workdir)
    parts = setup.build(config)
    core.check_held_out(parts.train_set, parts.eval_set, config.train_split, config.eval_split)
    setup.check_memory(parts)
    with distributed.alone_in(f"--workdir={workdir}", workdir):
        return run(parts, workdir)


def run(parts: setup.Parts, workdir: str) -> int | None:
    """Trains, evaluates and writes in a folder that is locked; returns an exit status."""
    config = parts.config
    key = jax.random.key(config.seed)
    images = batching.to_float(next(batching.eval_batches(parts.train_set, batch_size=8))["image"])
    state = training.initial_state(parts.classifier, parts.optimizer, key, images)
    if config.init_weights:
        state = setup.with_weights(state, parts, config.init_weights)

    thetas = tuple(net.theta for net in parts.nets)
    checkpoints = checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints)
    expect = setup.identity(parts, thetas, state)
    former = {"training data": core.sampled_fingerprint(parts.train_set)}
    restored = checkpoints.restore(state, expect, former)
    about = setup.describe(parts, expect)
    extra = {"pending": [], "seconds": 0.0}
    if restored:
        state, extra, step = restored
        logging.info("Going on from step %d of %s.", step, workdir)
    else:
        show_parameters(state.params)
    if jax.process_index() == 0:
        paths.write_json(os.path.join(workdir, "config.json"), config.to_dict())
    log = logbook.Logbook(workdir, int(state.step), write=jax.process_index() == 0)
    extra |= {"expect": expect, "about": about}

    with contextlib.closing(log), checkpoints.closing():
        state, seconds, stopped = train(parts, state, thetas, key, checkpoints, extra, log)
    if stopped:
        logging.warning("Stopped: saved step %d; the same command goes on.", state.step)
        return stopped
    finish(parts, workdir, state, seconds, about)
    return None


def train(
    parts: setup.Parts,
    state: training.TrainState,
    thetas: Any,
    key: jax.Array,
    checkpoints: checkpoint.Checkpoints,
    extra: dict[str, Any],
    log: logbook.Logbook,
) -> tuple[training.TrainState, float, int]:
    """Trains from `state` to the last step, or until SIGTERM or Ctrl-C.

    Args:
      parts: the run.
      state: on the host, one copy.
      thetas: the corruption networks' parameters.
      key: the run's key.
      checkpoints: where to save.
      extra: what is saved beside the state; 'pending' are metrics of steps not yet logged,
        'seconds' what the run has taken so far.
      log: where metrics go.

    Returns:
      The last state, saved, on the host; the run's seconds; the exit status where it was stopped,
      else 0.

    Raises:
      UserError: the loss is no longer finite; the checkpoints saved before are kept.
    """
    config, total_steps, step = parts.config, parts.total_steps, int(state.step)
    started = time.monotonic() - extra.get("seconds", 0.0)
    finite = functools.partial(logbook.finite, advice="lower config.learning_rate or config.ada.nu")
    update_step = compile_update_step(parts)
    if step < total_steps:
        logging.info("The first step compiles: seconds for small networks, minutes for large ones.")
    state, thetas = replicate(state), replicate(thetas)
    batches = train_batches(parts, step)
    evaluate_at = every_epochs(config.eval_epochs, parts)
    corrupt_at = every_epochs(config.corruption_eval_epochs, parts)
    save_at = every_epochs(config.checkpoint_epochs, parts)
    pending = extra["pending"]
    timer = logbook.Timer(step, total_steps, config.batch_size, show=jax.process_index() == 0)
    with distributed.StopSignal() as stop:
        while step < total_steps and not stop.at(step):
            with timer.waiting():
                batch = shard(next(batches))
            state, metrics = update_step(state, thetas, batch, key)
            pending.append(metrics)
            step += 1
            if step % config.log_steps == 0 or step == total_steps:
                summary = logbook.summarise(finite(pending, step))
                pending = []
                progress = {"epoch": step / parts.steps_per_epoch, **timer.lap(step)}
                rate = {"learning_rate": parts.schedule(step - 1)}
                log.write(step, "train", summary | rate | progress)
            if evaluate_at(step) or step == total_steps:
                log.write(step, "eval", clean_error(parts, state))
            if corrupt_at(step):
                log.write(step, "corruptions", corruption_errors(parts, state))
            if save_at(step) and step < total_steps:
                pending = finite(pending, step)
                log.flush()
                extra |= {"pending": pending, "seconds": time.monotonic() - started}
                checkpoints.save(step, unreplicate(state), extra)
        timer.close()
        state = unreplicate(state)
        # Still inside, for a second SIGTERM must not end the process before this is written.
        log.flush()
        extra |= {"pending": finite(pending, step), "seconds": time.monotonic() - started}
        checkpoints.save(step, state, extra, wait=True)
    return state, extra["seconds"], stop.status


def train_batches(parts: setup.Parts, start_step: int) -> Iterator[dict[str, np.ndarray]]:
    """This process's batches from a step on; see `batching.train_batches`."""
    config = parts.config
    return batching.train_batches(
        parts.train_set,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        renderings=list(parts.renderings.copies.values()) if parts.renderings else (),
        clean_too=config.deepaugment.clean_too,
        crop_scale=config.crop_scale,
        crop_ratio=config.crop_ratio,
    )


def compile_update_step(parts: setup.Parts) -> Callable[..., Any]:
    """The update step, mapped over all devices."""
    update_step = training.make_update_step(
        parts.config, parts.classifier, [net.apply for net in parts.nets], parts.optimizer
    )
    return jax.pmap(update_step, AXIS, in_axes=(0, 0, 0, None), donate_argnums=0)


def clean_error(parts: setup.Parts, state: training.TrainState) -> dict[str, float]:
    """The replicated state's 'examples', 'wrong', 'error' in percent and 'loss'."""
    variables = state.params, state.net_state
    size = parts.config.eval_batch_size
    return scoring.measure_one(parts.eval_step, variables, parts.eval_set, size)


def corruption_errors(parts: setup.Parts, state: training.TrainState) -> dict[str, float]:
    """The replicated state's 'error/NAME/SEVERITY' on some corrupted images, and 'mce'."""
    variables = state.params, state.net_state
    datasets, size = parts.corruption_sets.datasets, parts.config.eval_batch_size
    return results_files.flat_errors(scoring.measure(parts.eval_step, variables, datasets, size))


def every_epochs(epochs: float, parts: setup.Parts) -> Callable[[int], bool]:
    """Whether a step is the last of a period of so many epochs; never for 0."""

    def at(step: int) -> bool:
        period = epochs * parts.steps_per_epoch
        return period > 0 and int(step / period) > int((step - 1) / period)

    return at


def finish(
    parts: setup.Parts,
    workdir: str,
    state: training.TrainState,
    seconds: float,
    about: dict[str, Any],
) -> None:
    """Writes the run's weights, results and pictures, and prints its table."""
    config, path = parts.config, os.path.join(workdir, "results.json")
    weights = {"params": state.params, "state": state.net_state}
    results = evaluate.new_results(
        config,
        name=config.name,
        step=int(state.step),
        weights_digest=weight_files.digest(weights),
        clean=parts.eval_set,
        source=parts.sets.source,
    )
    results |= {"seconds": seconds, "training": about["training"]}
    if jax.process_index() == 0:
        metadata = {
            "classifier": config.classifier,
            "classes": parts.train_set.num_classes,
            "mean": list(config.mean),
            "std": list(config.std),
            "step": int(state.step),
            **about,
        }
        weight_files.save_weights(
            os.path.join(workdir, "classifier.safetensors"), weights, metadata
        )
    now = results["config"]
    results = results_files.with_earlier(
        results, path, replace=True, recognises=functools.partial(core.recognises, parts.eval_set)
    )
    results |= {"config": now}
    variables = replicate((state.params, state.net_state))
    results = scoring.complete(
        results, path, parts.eval_step, variables, parts.sets.datasets, config.eval_batch_size
    )
    rows = results_files.rows(results)
    shown = zip(parts.nets, config_checks.net_labels(config.ada), strict=False)
    for net, name in shown if config.figure_examples else ():
        picture = os.path.join(workdir, f"adversarial_{name}.png")
        # On every process: one that had left would not meet the others at the end.
        attacked = show_attack(parts, net, state, picture)
        results["ada"] = results.get("ada", {}) | {name: attacked}
        rows += [
            (
                f"error under AdA, {name}",
                f"{attacked['error']:.2f}% of {attacked['examples']} images",
            ),
        ]
        if "ssim" in attacked:
            rows.append(("mean SSIM of its images", f"{attacked['ssim']:.3f}"))
        rows.append(("picture", picture))
    if jax.process_index() != 0:
        return
    scoring.write_results(path, results)
    rows += [
        ("weights", os.path.join(workdir, "classifier.safetensors")),
        ("results", path),
        ("time", results_files.clock(results["seconds"])),
    ]
    print("\n" + logbook.table(rows), flush=True)


def show_attack(
    parts: setup.Parts, net: ada.CorruptionNet, state: training.TrainState, path: str
) -> dict[str, float]:
    """Attacks the finished classifier on the first evaluation images, and draws some.

    Args:
      parts: the run.
      net: one of its corruption networks.
      state: its last state.
      path: the PNG to write: clean, augmented, difference, SSIM and verdicts (paper, figure 1a).

    Returns:
      'examples', 'error' in percent and mean 'ssim' of the attacked images; without the latter if
      they are smaller than its window.
    """
    config = parts.config
    batch = next(batching.eval_batches(parts.eval_set, batch_size=config.figure_examples))
    real = batch["mask"] > 0
    x, y = batching.to_float(batch["image"][real]), jnp.asarray(batch["label"][real])
    cast = functools.partial(corruption_nets.cast, dtype=config.compute_dtype)
    at_once = range(1, min(config.ada.microbatch or len(x), len(x)) + 1)

    logits_fn = functools.partial(
        scoring.apply_classifier, parts.classifier, state.params, state.net_state
    )

    @jax.jit
    def attack(key, x, y):
        images, metrics = ada.adversarial_augment(
            key,
            x,
            y,
            logits_fn=logits_fn,
            net=net._replace(apply=cast(net.apply)),
            microbatch=max(n for n in at_once if len(x) % n == 0),
            **training.attack_settings(config),
        )
        return images, metrics.get("ssim_after"), logits_fn(x), logits_fn(images)

    images, similarity, clean_logits, logits = attack(jax.random.key(config.seed), x, y)
    for verdicts, what in ((clean_logits, "clean images"), (logits, "images of AdA's attack")):
        checks.check_finite(int(checks.not_finite(verdicts).sum()), len(x), what)
    if jax.process_index() == 0:
        figures.adversarial_rows(
            path,
            clean=np.asarray(x),
            augmented=np.asarray(images),
            similarity=None if similarity is None else np.asarray(similarity),
            label=np.asarray(y),
            clean_verdict=np.argmax(clean_logits, -1),
            augmented_verdict=np.argmax(logits, -1),
            class_names=parts.eval_set.class_names,
        )
    error = float(100 * jnp.mean(jnp.argmax(logits, -1) != y))
    measured = {} if similarity is None else {"ssim": float(similarity.mean())}
    return {"examples": len(x), "error": error, **measured}


def show_parameters(params: hk.Params) -> None:
    """Logs a table of the classifier's parameters."""
    try:
        from clu import parameter_overview  # imports Flax: takes seconds
    except ImportError:
        logging.info("The classifier has %d parameters.", hk.data_structures.tree_size(params))
        return
    parameter_overview.log_parameter_overview(params, include_stats=False)


if __name__ == "__main__":
    cli.run(main, several=True)
