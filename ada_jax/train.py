"""Trains a classifier, with AdA or without.

python -m ada_jax.train --config=experiments/cifar10.py [--workdir=DIR] [--config.FIELD=VALUE]
"""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from ada_jax import ada, checks, evaluate, training
from ada_jax import results as results_files
from ada_jax.data import batching
from ada_jax.evaluation import scoring
from ada_jax.nets import corruption_nets, weight_files
from ada_jax.report import figures
from ada_jax.run import cli, config_checks, distributed, logbook, loop, setup
from ada_jax.sharding import AXIS, replicate, shard, unreplicate


def main(config: ml_collections.ConfigDict, workdir: str) -> int | None:
    """Trains, or resumes training, in `workdir`; returns an exit status."""
    config_checks.validate(config)
    cli.set_up_devices(config.cpu_devices, config.compilation_cache)
    parts = setup.build(config)
    with distributed.lock_workdir(workdir):
        return run(parts, workdir)


def run(parts: setup.Parts, workdir: str) -> int | None:
    """Trains, evaluates and writes in a folder that is locked; returns an exit status."""
    config = parts.config
    key = jax.random.key(config.seed)
    images = batching.to_float(next(batching.eval_batches(parts.train_set, batch_size=8))["image"])
    state = training.initial_state(parts.classifier, parts.optimizer, key, images)
    if config.init_weights:
        state = setup.with_weights(state, parts, config.init_weights)
    if config.ema_decay:
        state = training.with_average(state)
    thetas = tuple(net.theta for net in parts.nets)
    expect = setup.identity(parts, thetas, state)
    about = setup.describe(parts, expect)
    logging.info(
        "%s: %d training and %d evaluation images of %d classes, %dx%d; %s; %d %s device(s); %s",
        parts.train_set.name,
        len(parts.train_set),
        len(parts.eval_set),
        parts.train_set.num_classes,
        *parts.train_set.image_shape[:2],
        config.classifier,
        jax.device_count(),
        jax.default_backend(),
        workdir,
    )
    trained = loop.run(
        make_task(parts, thetas, key),
        workdir,
        state,
        config=config.to_dict(),
        expect=expect,
        extra={"about": about},
    )
    if trained.status:
        return trained.status
    finish(parts, workdir, trained.state, trained.seconds, about)
    return None


def make_task(parts: setup.Parts, thetas: tuple[Any, ...], key: jax.Array) -> loop.Task:
    """What the training loop needs of a run.

    Args:
      parts: the run.
      thetas: the parameters of `parts.nets`.
      key: the run's key.
    """
    config, epoch = parts.config, parts.steps_per_epoch
    update_step, thetas = compile_update_step(parts), replicate(thetas)

    def evaluation(kind: str, epochs: float, evaluate: Any, at_end: bool) -> loop.Evaluation:
        return loop.Evaluation(kind, epochs * epoch, functools.partial(evaluate, parts), at_end)

    return loop.Task(
        update_step=lambda state, batch: update_step(state, thetas, shard(batch), key),
        batches=functools.partial(train_batches, parts),
        evaluations=(
            evaluation("eval", config.eval_epochs, clean_error, True),
            evaluation("corruptions", config.corruption_eval_epochs, corruption_errors, False),
        ),
        scalars=lambda step: {"epoch": step / epoch, "learning_rate": parts.schedule(step - 1)},
        to_devices=replicate,
        to_host=unreplicate,
        total_steps=parts.total_steps,
        batch_size=config.batch_size,
        log_interval=config.log_steps,
        save_interval=config.checkpoint_epochs * epoch,
        keep_checkpoints=config.keep_checkpoints,
        advice="lower config.learning_rate" + " or config.ada.nu" * (config.method == "ada"),
    )


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
    """The replicated state's 'examples', 'wrong', 'error' in percent and 'loss'.

    With config.ema_decay also 'ema_error', that of the averaged weights.
    """
    size = parts.config.eval_batch_size
    datasets = {("clean", 0): parts.eval_set}
    count = functools.partial(scoring.count_errors, datasets=datasets, batch_size=size)
    ((_, counts),) = count(parts.eval_step, (state.params, state.net_state))
    if state.ema:
        ((_, averaged),) = count(parts.eval_step, state.ema)
        counts |= {"ema_error": averaged["error"]}
    return counts


def corruption_errors(parts: setup.Parts, state: training.TrainState) -> dict[str, float]:
    """The replicated state's 'error/NAME/SEVERITY' on some corrupted images, and 'mce'."""
    variables = state.params, state.net_state
    datasets, size = parts.corruption_sets.datasets, parts.config.eval_batch_size
    counts = scoring.count_errors(parts.eval_step, variables, datasets, size)
    return results_files.flat_errors(counts)


def finish(
    parts: setup.Parts,
    workdir: str,
    state: training.TrainState,
    seconds: float,
    about: dict[str, Any],
) -> None:
    """Writes the run's weights, results and pictures, and prints its table.

    Averaged weights (config.ema_decay) are evaluated first, into files and results of their own.
    """
    outcomes = {"": state}
    if state.ema:
        params, net_state = state.ema
        averaged = state._replace(params=params, net_state=net_state)
        outcomes = {"_ema": averaged} | outcomes
    for suffix, outcome in outcomes.items():
        write_weights(parts, workdir, outcome, about, suffix)
    for suffix, outcome in outcomes.items():
        write_results(parts, workdir, outcome, seconds, about, suffix)


def write_weights(
    parts: setup.Parts,
    workdir: str,
    state: training.TrainState,
    about: dict[str, Any],
    suffix: str,
) -> None:
    """Writes the weights `state.params`; see `finish`."""
    if jax.process_index() == 0:
        metadata = {
            "classifier": parts.config.classifier,
            "classes": parts.train_set.num_classes,
            "mean": list(parts.config.mean),
            "std": list(parts.config.std),
            "step": int(state.step),
            **about,
        }
        weights = {"params": state.params, "state": state.net_state}
        path = os.path.join(workdir, f"classifier{suffix}.safetensors")
        weight_files.save_weights(path, weights, metadata)


def write_results(
    parts: setup.Parts,
    workdir: str,
    state: training.TrainState,
    seconds: float,
    about: dict[str, Any],
    suffix: str,
) -> None:
    """Writes the results of the weights `state.params`, and pictures; see `finish`."""
    config, path = parts.config, os.path.join(workdir, f"results{suffix}.json")
    weights = {"params": state.params, "state": state.net_state}
    weights_file = os.path.join(workdir, f"classifier{suffix}.safetensors")
    results = evaluate.new_results(
        config,
        name=config.name + suffix,
        step=int(state.step),
        weights_digest=weight_files.digest(weights),
        clean=parts.eval_set,
        source=parts.sets.source,
    )
    results |= {"seconds": seconds, "training": about["training"]}
    earlier = results_files.with_earlier(results, path, replace=True)
    results = earlier | {"config": results["config"]}
    variables = replicate((state.params, state.net_state))
    results = scoring.complete(
        results, path, parts.eval_step, variables, parts.sets.datasets, config.eval_batch_size
    )
    rows = results_files.summary(results)
    shown = zip(parts.nets, config_checks.net_labels(config.ada), strict=False)
    for net, name in shown if config.method == "ada" and config.figure_examples else ():
        picture = os.path.join(workdir, f"adversarial_{name}{suffix}.png")
        # In every process: one that left early would not meet the others at the end.
        attacked = show_attack(parts, net, state, picture)
        results["ada"] = results.get("ada", {}) | {name: attacked}
        rows += attack_rows(name, attacked, picture)
    if jax.process_index() == 0:
        scoring.write_results(path, results)
        rows += [("weights", weights_file), ("results", path)]
        rows += [("time of training and evaluation", results_files.clock(results["seconds"]))]
        print("\n" + logbook.table(rows), flush=True)


def attack_rows(name: str, attacked: dict[str, float], picture: str) -> list[tuple[str, str]]:
    """Lines of the final table about a network's attack, see `show_attack`."""
    error = f"{attacked['error']:.2f}% of {attacked['examples']} images"
    rows = [(f"error under AdA, {name}", error)]
    if "ssim" in attacked:
        rows.append(("mean SSIM of its images", f"{attacked['ssim']:.3f}"))
    return [*rows, ("picture", picture)]


def show_attack(
    parts: setup.Parts, net: ada.CorruptionNet, state: training.TrainState, path: str
) -> dict[str, float]:
    """Attacks the trained classifier on the first evaluation images, and draws some of them.

    Every image has its own perturbation (`config.ada.group` is not used), of the first kind in
    `config.ada.choice`. As many images are attacked at a time as in training.

    Args:
      parts: the run.
      net: one of its corruption networks.
      state: its last state.
      path: the PNG to write: clean, augmented, difference, SSIM, predictions (paper, figure 1a).

    Returns:
      'examples', 'error' in percent and mean 'ssim' of the attacked images; images smaller than
      SSIM's window have no 'ssim'.
    """
    config = parts.config
    batch = next(batching.eval_batches(parts.eval_set, batch_size=config.figure_examples))
    real = batch["mask"] > 0
    x, y = batching.to_float(batch["image"][real]), jnp.asarray(batch["label"][real])
    apply = corruption_nets.cast(net.apply, dtype=config.compute_dtype, remat=config.ada.remat)
    most = min(config_checks.attacked_at_once(config, jax.device_count()), len(x))

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
            net=net._replace(apply=apply),
            microbatch=max(n for n in range(1, most + 1) if len(x) % n == 0),
            leaves=config.ada.leaves,
            choice=config.ada.choice[0],
            **training.attack_settings(config.ada),
        )
        return images, metrics.get("ssim_after"), logits_fn(x), logits_fn(images)

    images, similarity, clean_logits, logits = attack(jax.random.key(config.seed), x, y)
    for found, what in ((clean_logits, "clean images"), (logits, "images of AdA's attack")):
        checks.check_finite(int(checks.not_finite(found).sum()), len(x), what)
    if jax.process_index() == 0:
        figures.adversarial_rows(
            path,
            clean=np.asarray(x),
            augmented=np.asarray(images),
            similarity=None if similarity is None else np.asarray(similarity),
            label=np.asarray(y),
            clean_prediction=np.argmax(clean_logits, -1),
            augmented_prediction=np.argmax(logits, -1),
            class_names=parts.eval_set.class_names,
        )
    error = float(100 * jnp.mean(jnp.argmax(logits, -1) != y))
    measured = {} if similarity is None else {"ssim": float(similarity.mean())}
    return {"examples": len(x), "error": error, **measured}


if __name__ == "__main__":
    cli.run(main, several=True)
