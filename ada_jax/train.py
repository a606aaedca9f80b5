"""Trains a classifier with AdA.

python -m ada_jax.train --config=experiments/cifar10.py [--workdir=DIR] [--config.FIELD=VALUE]
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging

from ada_jax import (
    ada,
    attacks,
    augmix,
    checkpoint,
    classifiers,
    cli,
    corruption_nets,
    data,
    deepaugment,
    evaluate,
    figures,
    guards,
    hosts,
    keys,
    logbook,
    losses,
    paths,
    perturbation,
    ssim,
)
from ada_jax.devices import AXIS, device_memory, replicate, shard, unreplicate
from ada_jax.errors import UserError, require_extra

METHODS = ("ada", "nominal", "pgd")


class TrainState(NamedTuple):
    """All that changes during training.

    Attributes:
      step: updates made, int32 scalar.
      params: the classifier's parameters.
      net_state: its batch-norm averages.
      opt_state: the optimiser's state.
    """

    step: jax.Array
    params: hk.Params
    net_state: hk.State
    opt_state: optax.OptState


# ------------------------------------------------------------------------ the step


def make_update_step(
    config: ml_collections.ConfigDict,
    classifier: hk.TransformedWithState,
    net_applies: Sequence[Callable[..., jax.Array]],
    optimizer: optax.GradientTransformation,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Makes the step of one device: crop/flip -> AdA -> line search -> AugMix -> update -> metrics.

    Args:
      config: the run's config.
      classifier: Haiku classifier.
      net_applies: the corruption networks' functions, of which every batch draws one; none trains
        without AdA.
      optimizer: of the classifier.

    Returns:
      `update_step(state, thetas, batch, key) -> (state, metrics)`, to be mapped over AXIS; `thetas`
      has a tree for each network, `batch` 'image' [b,H,W,3] and 'label' [b] of this device, `key`
      is the run's.
    """

    cast = functools.partial(
        corruption_nets.cast, dtype=config.compute_dtype, remat=config.ada.remat
    )
    attack = make_attack(config, classifier, [cast(apply) for apply in net_applies])

    def loss_fn(params, net_state, views, y):
        logits, net_state = classifier.apply(params, net_state, None, views, is_training=True)
        decay = config.weight_decay * losses.weight_decay(params, include_bn=config.weight_decay_bn)
        logits, *mixed = jnp.split(logits, len(views) // len(y))
        loss = losses.cross_entropy(logits, y).mean()
        total = loss + decay
        if mixed:
            total += config.augmix.jsd_weight * losses.jsd(logits, *mixed).mean()
        return total, (net_state, loss, logits)

    def update_step(state, thetas, batch, key):
        x, y = data.to_float(batch["image"]), batch["label"]
        # Keys by position in the global batch: the number of devices does not change the draw.
        first = jax.lax.axis_index(AXIS) * len(y)
        key = jax.random.fold_in(key, state.step)
        example_keys = keys.of_positions(key, first, len(y))
        crop_keys, ada_keys = jnp.moveaxis(jax.vmap(jax.random.split)(example_keys), 1, 0)

        x = data.random_crop_flip(crop_keys, x, pad=config.pad, flip=config.flip)
        metrics = {}
        if attack:
            x, attacked = attack(key, state, thetas, ada_keys, x, y)
            metrics = attack_metrics(config.method, attacked)

        if config.augmix.use:
            x = mixed_views(config, example_keys, x)
        gradient_fn = jax.grad(loss_fn, has_aux=True)
        gradient, (net_state, loss, logits) = gradient_fn(state.params, state.net_state, x, y)
        gradient, net_state = average((gradient, net_state))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        metrics |= {
            "loss": loss,
            "error": 100 * jnp.mean(jnp.argmax(logits, -1) != y),
            "gradient_norm": optax.tree.norm(gradient),
        }
        return TrainState(state.step + 1, params, net_state, opt_state), reduce_metrics(metrics)

    return update_step


def make_attack(
    config: ml_collections.ConfigDict,
    classifier: hk.TransformedWithState,
    net_applies: Sequence[Callable[..., jax.Array]],
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]] | None:
    """Makes the attack on one device's batch; see `make_update_step` for the arguments.

    Returns:
      `attack(key, state, thetas, example_keys, x, y) -> (images, metrics)`, where `key` is the
      step's, the same on every device, and metrics are per attacked example; None without an
      attack.
    """

    def logits_fn(state, batch_norm, x):
        return classifier.apply(
            state.params,
            state.net_state,
            None,
            x,
            is_training=False,
            test_local_stats=batch_norm == "batch",
        )[0]

    def through(i, state, thetas, example_keys, x, y):
        return ada.adversarial_augment(
            example_keys,
            x,
            y,
            logits_fn=functools.partial(logits_fn, state, config.ada.batch_norm),
            net=corruption_nets.CorruptionNet(net_applies[i], thetas[i]),
            microbatch=config.ada.microbatch or None,
            **attack_settings(config),
        )

    def ada_attack(key, state, thetas, example_keys, x, y):
        # The same network on every device; the key is of no example's position.
        key = jax.random.fold_in(key, config.batch_size)
        drawn = jax.random.randint(key, (), 0, len(net_applies))
        branches = [functools.partial(through, i) for i in range(len(net_applies))]
        attacked = slice(None, None, config.ada.every)
        examples = example_keys[attacked], x[attacked], y[attacked]
        images, metrics = jax.lax.switch(drawn, branches, state, thetas, *examples)
        return (images if config.ada.every == 1 else x.at[attacked].set(images)), metrics

    def pgd_attack(key, state, thetas, example_keys, x, y):
        del key, thetas
        images, info = attacks.pgd(
            example_keys,
            functools.partial(logits_fn, state, config.pgd.batch_norm),
            x,
            y,
            config.pgd.epsilon,
            norm=config.pgd.norm,
            steps=config.pgd.steps,
            step_size=config.pgd.step_scale * config.pgd.epsilon,
        )
        return jax.lax.stop_gradient((images, {"broken": info["broken"]}))

    return {"ada": ada_attack, "pgd": pgd_attack, "nominal": None}[config.method]


def mixed_views(
    config: ml_collections.ConfigDict, example_keys: jax.Array, x: jax.Array
) -> jax.Array:
    """AugMix of images [b,H,W,3]; with its consistency loss [3b,H,W,3], the images first."""

    def view(i):
        # 0 and 1 would be the keys of the crop and of AdA.
        view_keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(example_keys)
        return augmix.augment_and_mix(view_keys, x, **augmix_settings(config))

    return jnp.concatenate([x, view(2), view(3)]) if config.augmix.jsd_weight else view(2)


def augmix_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """AugMix's part of the config, as arguments of `augmix.augment_and_mix`."""
    ops = augmix.OPS + (augmix.EXTRA_OPS if config.augmix.extra_ops else ())
    names = ("severity", "width", "depth", "alpha")
    return {name: config.augmix[name] for name in names} | {"ops": ops}


def average(tree: Any) -> Any:
    """Mean over all devices; integers (batch norm's step counts) are the same everywhere."""
    return jax.tree.map(
        lambda a: jax.lax.pmean(a, AXIS) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
    )


def attack_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The attack's part of the config, as arguments of `ada.adversarial_augment`."""
    names = ("nu", "steps", "step_rule", "step_scale", "ssim_threshold", "root_rule")
    return {name: config.ada[name] for name in names}


def attack_metrics(method: str, attacked: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Scalars for the log from an attack's per-example metrics, named after the method."""
    means = {f"{method}_{name}": jnp.mean(value) for name, value in attacked.items()}
    least = ("ssim_before", "ssim_after")
    return means | {f"{method}_{n}_min": jnp.min(attacked[n]) for n in least if n in attacked}


def reduce_metrics(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Over all devices: the least of those named '*_min', the mean of the others."""
    return {
        name: (jax.lax.pmin if name.endswith("_min") else jax.lax.pmean)(value, AXIS)
        for name, value in metrics.items()
    }


def learning_rate_schedule(
    config: ml_collections.ConfigDict, steps_per_epoch: float, total_steps: int
) -> optax.Schedule:
    """Linear warm-up from 0, then cosine to 0 at the last step (paper, appendix A).

    The peak follows the linear scaling rule, max(lr * batch size / 256, lr).
    """
    peak = max(config.learning_rate * config.batch_size / 256, config.learning_rate)
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total_steps - 1)
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, total_steps)


def make_optimizer(
    config: ml_collections.ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """SGD with Nesterov momentum; weight decay is part of the loss."""
    return optax.sgd(schedule, momentum=config.momentum, nesterov=True)


def initial_state(
    classifier: hk.TransformedWithState,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    images: jax.Array,
) -> TrainState:
    """The state before the first step; `images` are real ones, for the batch-norm averages."""
    params, net_state = jax.jit(classifier.init, static_argnames="is_training")(
        key, images, is_training=True
    )
    return TrainState(jnp.zeros((), jnp.int32), params, net_state, optimizer.init(params))


# ------------------------------------------------------------------------ the config


def validate(config: ml_collections.ConfigDict) -> None:
    """Finds what is wrong with a config before anything is compiled.

    Raises:
      UserError: a field out of its range; the sentence names the field, its value and the fix.
    """

    def require(good: bool, field: str, fix: str) -> None:
        value = functools.reduce(lambda c, name: c[name], field.split("."), config)
        if not good:
            raise UserError(f"config.{field}={value!r} {fix}.")

    def one_of(field: str, value: str, known: tuple[str, ...]) -> None:
        require(value in known, field, f"is unknown: choose one of {', '.join(known)}")

    one_of("method", config.method, METHODS)
    one_of("dataset", config.dataset, data.NAMES)
    one_of("classifier", config.classifier, classifiers.names())
    evaluate.validate(config)
    require("clean" in config.eval_sets, "eval_sets", "lacks 'clean': add it")
    validate_corruption_nets(config.ada)
    augmix.check(**augmix_settings(config))
    good = 0 <= config.augmix.jsd_weight < math.inf
    require(good, "augmix.jsd_weight", "must be 0 (off) or more, and finite")
    require(config.deepaugment.copies >= 0, "deepaugment.copies", "must be 0 (off) or more")
    validate_crops(config)
    one_of("compute_dtype", config.compute_dtype, ("float32", "bfloat16"))
    one_of("pgd.norm", config.pgd.norm, ("linf", "l2"))
    one_of("pgd.batch_norm", config.pgd.batch_norm, ("batch", "running"))
    for field in ("pgd.epsilon", "pgd.step_scale"):
        value = config.pgd[field.partition(".")[2]]
        require(0 < value < math.inf, field, "must be positive and finite")
    require(config.pgd.steps >= 1, "pgd.steps", "must be 1 or more")
    one_of("ada.step_rule", config.ada.step_rule, tuple(perturbation.STEP_RULES))
    one_of("ada.root_rule", config.ada.root_rule, ssim.ROOT_RULES)
    one_of("ada.batch_norm", config.ada.batch_norm, ("batch", "running"))
    good = 0 <= config.ada.nu < math.inf
    require(good, "ada.nu", "is negative or not finite: a radius is 0 or more (paper: 0.015)")
    require(config.ada.steps >= 0, "ada.steps", "must be 0 (random) or more (paper: 10)")
    good = 0 < config.ada.step_scale < math.inf
    require(good, "ada.step_scale", "must be positive and finite (paper: 0.25)")
    require(-1 <= config.ada.ssim_threshold < 1, "ada.ssim_threshold", "must be in [-1, 1)")
    require(config.ada.microbatch >= 0, "ada.microbatch", "must be 0 (off) or more")
    require(config.ada.every >= 1, "ada.every", "must be 1 (all examples) or more")
    require(0 < config.learning_rate < math.inf, "learning_rate", "must be positive and finite")
    require(0 <= config.seed < 2**32, "seed", "must be in 0..2**32-1")
    good = len(config.mean) == 3 and all(map(math.isfinite, config.mean))
    require(good, "mean", "must be three numbers, one a channel")
    good = len(config.std) == 3 and all(0 < value < math.inf for value in config.std)
    require(good, "std", "must be three positive numbers, one a channel")
    require(0 <= config.momentum < 1, "momentum", "must be in [0, 1)")
    require(0 <= config.bn_decay < 1, "bn_decay", "must be in [0, 1)")
    for field in ("weight_decay", "warmup_epochs", "epochs", "train_steps"):
        require(0 <= config[field] < math.inf, field, "must be finite and 0 or more")
    require(0 <= config.pad <= config.image_size, "pad", "must be pixels, from 0 to image_size")
    require(config.image_size <= 4096, "image_size", "must be at most 4096 pixels")
    require(config.cpu_devices <= 1024, "cpu_devices", "must be at most 1024")
    at_least_1 = "batch_size", "log_steps", "keep_checkpoints", "image_size"
    for field in (*at_least_1, "corruption_eval_examples"):
        require(config[field] >= 1, field, "must be 1 or more")
    at_least_0 = "eval_epochs", "corruption_eval_epochs", "checkpoint_epochs"
    for field in (*at_least_0, "figure_examples", "cpu_devices"):
        require(config[field] >= 0, field, "must be 0 (off) or more")
    steps, both = f"and config.train_steps={config.train_steps}", config.epochs * config.train_steps
    require(not both, "epochs", f"{steps} must not both be set: make one of them 0")
    some = config.epochs + config.train_steps
    require(some > 0, "epochs", f"{steps} are both 0: set one of them")


def validate_crops(config: ml_collections.ConfigDict) -> None:
    """Checks the random crops of photographs.

    Raises:
      UserError: a range that is none, or images that cannot be cropped so.
    """
    scale, ratio = tuple(config.crop_scale), tuple(config.crop_ratio)
    if scale and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
        raise UserError(
            f"config.crop_scale={scale} must be two shares of the area in (0, 1], as (0.08, 1.0), "
            "or () for no such crops."
        )
    if not (len(ratio) == 2 and 0 < ratio[0] <= ratio[1] < math.inf):
        raise UserError(
            f"config.crop_ratio={ratio} must be two positive ratios, the lesser first, as "
            "(0.75, 1.3333)."
        )
    if scale and config.dataset not in data.PHOTOGRAPHS:
        raise UserError(
            f"config.crop_scale={scale} needs photographs of any size, as one of "
            f"{', '.join(data.PHOTOGRAPHS)} has, and config.dataset={config.dataset!r} has images "
            "of one size: set config.crop_scale='()' and config.pad."
        )
    if scale and config.deepaugment.copies:
        raise UserError(
            f"config.crop_scale={scale} crops photographs, and config.deepaugment.copies="
            f"{config.deepaugment.copies} takes images that are rendered after the crop: make one "
            "of them () or 0."
        )


def validate_corruption_nets(config: ml_collections.ConfigDict) -> None:
    """Checks the tuples of corruption networks, their weights and enlargements.

    Raises:
      UserError: an unknown name, or tuples of different lengths.
    """
    nets, known = tuple(config.corruption_net), corruption_nets.names()
    if not nets or not all(name in known for name in nets):
        raise UserError(
            f"config.ada.corruption_net={nets} is unknown: choose from {', '.join(known)}; several "
            "are written ('edsr_small','cae')."
        )
    for field in ("corruption_weights", "corruption_enlarge"):
        if len(config[field]) != len(nets):
            raise UserError(
                f"config.ada.{field}={tuple(config[field])} has {len(config[field])} values for "
                f"the {len(nets)} networks of config.ada.corruption_net={nets}: give one for each."
            )
    if not all(isinstance(path, str) for path in config.corruption_weights):
        raise UserError(
            f"config.ada.corruption_weights={tuple(config.corruption_weights)} must be paths, or "
            "'' for the weights that ship."
        )
    if not all(isinstance(n, int) and n >= 1 for n in config.corruption_enlarge):
        raise UserError(
            f"config.ada.corruption_enlarge={tuple(config.corruption_enlarge)} must be whole "
            "factors of 1 (off) or more."
        )


def net_labels(config: ml_collections.ConfigDict) -> list[str]:
    """Names of the corruption networks in results and files; those named twice get a number.

    Args:
      config: the attack's part of a run's.
    """
    nets = list(config["corruption_net"])
    return [n if nets.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(nets, 1)]


def validate_devices(config: ml_collections.ConfigDict, devices: int) -> None:
    """Finds batch sizes that so many devices do not divide.

    Raises:
      UserError: naming the field, its value and the number of devices.
    """
    for field in ("batch_size", "eval_batch_size"):
        if config[field] % devices:
            raise UserError(
                f"config.{field}={config[field]} is not divisible by the {devices} devices: "
                f"take a multiple of {devices}."
            )
    local = config.batch_size // devices
    if config.method == "ada" and local % config.ada.every:
        raise UserError(
            f"config.ada.every={config.ada.every} does not divide the {local} examples of a "
            "device: take a divisor."
        )
    attacked = local // config.ada.every
    if config.method == "ada" and config.ada.microbatch and attacked % config.ada.microbatch:
        raise UserError(
            f"config.ada.microbatch={config.ada.microbatch} does not divide the {attacked} "
            "examples of a device that are attacked: take a divisor."
        )


# ------------------------------------------------------------------------ the run


class Parts(NamedTuple):
    """What a run is made of; nothing here changes during training."""

    config: ml_collections.ConfigDict
    train_set: data.Dataset
    renderings: deepaugment.RenderedSet | None  # of the training images, for DeepAugment
    eval_set: data.Dataset
    sets: evaluate.Sets  # what the finished classifier is measured on
    corruption_sets: evaluate.Sets  # and what it is measured on while it trains
    nets: tuple[corruption_nets.CorruptionNet, ...]  # none without AdA
    classifier: hk.TransformedWithState
    eval_step: Callable[..., dict[str, jax.Array]]  # mapped over devices
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    steps_per_epoch: float
    total_steps: int


def check_files(config: ml_collections.ConfigDict) -> None:
    """Finds files that are missing, before data is read and without touching a device.

    Raises:
      UserError: naming the field.
    """
    # Not init_weights, which an earlier point of the same sweep may be there to train.
    weights = config.ada.corruption_weights if config.method == "ada" else ()
    if missing := [path for path in weights if path and not paths.exists(path)]:
        raise UserError(
            f"config.ada.corruption_weights names {missing[0]!r}, which is not there: check it."
        )
    if config.deepaugment.copies:
        deepaugment.read_manifest(config.deepaugment.dir)


def build(config: ml_collections.ConfigDict) -> Parts:
    """Loads the data and the corruption network and makes the classifier and its optimiser."""
    check_files(config)
    nets = make_corruption_nets(config.ada) if config.method == "ada" else ()
    load = functools.partial(
        data.load, config.dataset, data_dir=config.data_dir or None, image_size=config.image_size
    )
    train_set = load(config.train_split, encoded=bool(config.crop_scale))
    if nets:
        names, enlarge = config.ada.corruption_net, config.ada.corruption_enlarge
        shape = train_set.image_shape
        corruption_nets.check_sizes("config.ada.corruption_net", names, enlarge, shape)
    eval_set = load(config.eval_split)
    during = ("c",) if config.corruption_eval_epochs else ()
    classifier = evaluate.make_classifier(config, train_set.num_classes)
    steps_per_epoch = len(train_set) / config.batch_size
    total_steps = config.train_steps or round(config.epochs * steps_per_epoch)
    if config.batch_size > len(train_set):
        raise UserError(
            f"config.batch_size={config.batch_size} is larger than the {len(train_set)} examples "
            f"of config.train_split={config.train_split!r}: make it smaller."
        )
    if not total_steps:
        raise UserError(
            f"config.epochs={config.epochs} are less than one step of {config.batch_size} "
            f"examples of {len(train_set)}: take more."
        )
    schedule = learning_rate_schedule(config, steps_per_epoch, total_steps)
    folder, copies = config.deepaugment.dir, config.deepaugment.copies
    return Parts(
        config,
        train_set,
        deepaugment.open_set(folder, train_set, copies) if copies else None,
        eval_set,
        evaluate.open_sets(config, eval_set, config.eval_sets),
        evaluate.open_sets(config, eval_set, during, config.corruption_eval_examples),
        nets,
        classifier,
        evaluate.map_eval_step(classifier),
        make_optimizer(config, schedule),
        schedule,
        steps_per_epoch,
        total_steps,
    )


def check_memory(parts: Parts) -> None:
    """Checks that the devices have memory for the perturbations, before anything is compiled.

    Raises:
      UserError: they have not.
    """
    per_device, there = parts.config.batch_size // jax.device_count(), device_memory()
    if not parts.nets or there is None:
        return
    numbers = max(sum(a.size for a in jax.tree.leaves(net.theta)) for net in parts.nets)
    one = 3 * 4 * numbers  # float32: delta, its gradient and the next delta
    attacked = parts.config.ada.microbatch or per_device
    if one * attacked > there:
        fits = [n for n in range(1, attacked + 1) if attacked % n == 0 and 2 * n * one <= there]
        fix = (
            f"{fits[-1]}, or a smaller divisor"
            if fits
            else "1, or take a smaller config.ada.corruption_net"
        )
        raise UserError(
            f"config.ada.microbatch={parts.config.ada.microbatch} attacks {attacked} examples at "
            f"once on each device: their perturbations take {one * attacked / 2**30:.1f} GiB at "
            f"least, and a device has {there / 2**30:.1f}. Set it to {fix}."
        )


def with_weights(state: TrainState, parts: Parts, path: str) -> TrainState:
    """The state before the first step with a trained classifier's weights; see `load_variables`.

    Raises:
      UserError: there are none at `path`, or they are of another architecture.
    """
    if paths.is_dir(path):
        path = os.path.join(path, "classifier.safetensors")  # Not a checkpoint half-way.
    own = parts.train_set.class_names
    try:
        theirs = evaluate.metadata(path).get("class_names", own)
        if not data.same_classes(own, theirs):
            raise UserError(
                f"it was trained on the classes {data.listed(theirs)}, and config.dataset has "
                f"{data.listed(own)}: name weights of the same classes in the same order."
            )
        params, net_state, _ = evaluate.load_variables(
            parts.config, parts.classifier, parts.train_set.image_shape, path
        )
    except UserError as error:
        raise UserError(f"config.init_weights={path!r} cannot be used: {error}") from error
    return state._replace(params=params, net_state=net_state)


def make_corruption_nets(
    config: ml_collections.ConfigDict,
) -> tuple[corruption_nets.CorruptionNet, ...]:
    """The corruption networks of the attack's part of a config.

    Raises:
      UserError: weights that are missing, damaged or of another network.
    """
    fields = (config.corruption_net, config.corruption_weights, config.corruption_enlarge)
    try:
        return tuple(
            corruption_nets.make(name, weights or None, enlarge=enlarge)
            for name, weights, enlarge in zip(*fields, strict=True)
        )
    except UserError as error:
        weights = tuple(config.corruption_weights)
        raise UserError(f"config.ada.corruption_weights={weights}: {error}") from error


def main(config: ml_collections.ConfigDict, workdir: str) -> int | None:
    """Trains, or goes on training, in `workdir`; returns an exit status."""
    validate(config)
    pictures = ["matplotlib"] if config.method == "ada" and config.figure_examples else []
    require_extra("Training", "grain", "orbax.checkpoint", *pictures)
    paths.check_bucket(f"--workdir={workdir}", workdir)
    paths.check_bucket(f"config.init_weights={config.init_weights!r}", config.init_weights)
    cli.set_up_devices(config.cpu_devices, config.compilation_cache)
    validate_devices(config, jax.device_count())
    hosts.check_shared(workdir)
    parts = build(config)
    data.check_held_out(parts.train_set, parts.eval_set, config.train_split, config.eval_split)
    check_memory(parts)
    with hosts.alone_in(f"--workdir={workdir}", workdir):
        return run(parts, workdir)


def run(parts: Parts, workdir: str) -> int | None:
    """Trains, evaluates and writes in a folder that is locked; returns an exit status."""
    config = parts.config
    key = jax.random.key(config.seed)
    images = data.to_float(next(data.eval_batches(parts.train_set, batch_size=8))["image"])
    state = initial_state(parts.classifier, parts.optimizer, key, images)
    if config.init_weights:
        state = with_weights(state, parts, config.init_weights)

    thetas = tuple(net.theta for net in parts.nets)
    checkpoints = checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints)
    expect = identity(parts, thetas, state)
    former = {"training data": data.sampled_fingerprint(parts.train_set)}
    restored = checkpoints.restore(state, expect, former)
    about = describe(parts, expect)
    extra = {"pending": [], "seconds": 0.0}
    if restored:
        state, extra, step = restored
        logging.info("Going on from step %d of %s.", step, workdir)
    else:
        show_parameters(state.params)
    if jax.process_index() == 0:
        logbook.write_json(os.path.join(workdir, "config.json"), config.to_dict())
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
    parts: Parts,
    state: TrainState,
    thetas: Any,
    key: jax.Array,
    checkpoints: checkpoint.Checkpoints,
    extra: dict[str, Any],
    log: logbook.Logbook,
) -> tuple[TrainState, float, int]:
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
    with cli.StopSignal() as stop:
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


def train_batches(parts: Parts, start_step: int) -> Iterator[dict[str, np.ndarray]]:
    """This process's batches from a step on; see `data.train_batches`."""
    config = parts.config
    return data.train_batches(
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


def compile_update_step(parts: Parts) -> Callable[..., Any]:
    """The update step, mapped over all devices."""
    update_step = make_update_step(
        parts.config, parts.classifier, [net.apply for net in parts.nets], parts.optimizer
    )
    return jax.pmap(update_step, AXIS, in_axes=(0, 0, 0, None), donate_argnums=0)


def clean_error(parts: Parts, state: TrainState) -> dict[str, float]:
    """The replicated state's 'examples', 'wrong', 'error' in percent and 'loss'."""
    variables = state.params, state.net_state
    size = parts.config.eval_batch_size
    return evaluate.measure_one(parts.eval_step, variables, parts.eval_set, size)


def corruption_errors(parts: Parts, state: TrainState) -> dict[str, float]:
    """The replicated state's 'error/NAME/SEVERITY' on some corrupted images, and 'mce'."""
    variables = state.params, state.net_state
    datasets, size = parts.corruption_sets.datasets, parts.config.eval_batch_size
    return evaluate.flat_errors(evaluate.measure(parts.eval_step, variables, datasets, size))


def every_epochs(epochs: float, parts: Parts) -> Callable[[int], bool]:
    """Whether a step is the last of a period of so many epochs; never for 0."""

    def at(step: int) -> bool:
        period = epochs * parts.steps_per_epoch
        return period > 0 and int(step / period) > int((step - 1) / period)

    return at


_BOOKKEEPING = logbook.BOOKKEEPING | {
    *("name", "init_weights", "corruption_seed", "corruption_table"),
    *("ada.microbatch", "ada.corruption_weights"),
}


def identity(parts: Parts, thetas: Any, state: TrainState) -> dict[str, Any]:
    """The values a checkpoint must agree on with the run: all but the bookkeeping.

    Data and weights count by their digests, whatever their files are called. `state` is the one
    before the first step.
    """
    config = parts.config
    unused = {"ada", "pgd"} - {config.method}
    unused |= set() if config.augmix.use else {"augmix"}
    unused |= set() if parts.renderings else {"deepaugment"}
    fields = logbook.comparable(config.to_dict())
    fields = {k: v for k, v in fields.items() if k.partition(".")[0] not in unused}
    if config.init_weights:
        fields["init_weights_digest"] = checkpoint.digest(
            {"params": state.params, "state": state.net_state}
        )
    if parts.renderings:
        fields["deepaugment.set"] = parts.renderings.digest
    if config.method == "ada":
        fields["ada.weights_digest"] = checkpoint.digest(
            {str(i): theta for i, theta in enumerate(thetas)}
        )
    # Batch norm by the batch's own statistics takes them from each microbatch.
    mixing = {"ada.microbatch"} if config.ada.batch_norm == "batch" else set()
    unlisted = _BOOKKEEPING - mixing
    fields = {f"config.{k}": v for k, v in fields.items() if k not in unlisted}
    fields["training data"] = parts.train_set.fingerprint
    return json.loads(json.dumps(fields))  # tuples become lists, as they come back


def describe(parts: Parts, expect: dict[str, Any]) -> dict[str, Any]:
    """What is said of the run's classifier beside its weights.

    Args:
      parts: the run.
      expect: of `identity`.

    Returns:
      'class_names', in the order of the logits; 'dataset'; 'train_split'; 'training', digests of
      the 'data' and, where there are such, of the set of 'deepaugment', the weights of
      'corruption_nets' and 'init_weights'; and 'recipe', a digest of `expect` without the seed.
      Weights to start from count by their own recipe, where their file has one: runs that differ
      in seed alone have one recipe, although each starts from weights of its own seed.
    """
    fields = {name: value for name, value in expect.items() if name != "config.seed"}
    if path := parts.config.init_weights:
        digest = "config.init_weights_digest"
        fields[digest] = evaluate.metadata(path).get("recipe", fields[digest])
    recipe = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    names = {
        "data": "training data",
        "deepaugment": "config.deepaugment.set",
        "corruption_nets": "config.ada.weights_digest",
        "init_weights": "config.init_weights_digest",
    }
    return {
        "class_names": list(parts.train_set.class_names),
        "dataset": parts.config.dataset,
        "train_split": parts.config.train_split,
        "training": {name: fields[field] for name, field in names.items() if field in fields},
        "recipe": recipe,
    }


def finish(
    parts: Parts, workdir: str, state: TrainState, seconds: float, about: dict[str, Any]
) -> None:
    """Writes the run's weights, results and pictures, and prints its table."""
    config, path = parts.config, os.path.join(workdir, "results.json")
    weights = {"params": state.params, "state": state.net_state}
    results = evaluate.new_results(
        config,
        name=config.name,
        step=int(state.step),
        weights_digest=checkpoint.digest(weights),
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
        checkpoint.save_weights(os.path.join(workdir, "classifier.safetensors"), weights, metadata)
    now = results["config"]
    results = evaluate.with_earlier(results, path, replace=True, clean=parts.eval_set)
    results |= {"config": now}
    variables = replicate((state.params, state.net_state))
    results = evaluate.complete(
        results, path, parts.eval_step, variables, parts.sets.datasets, config.eval_batch_size
    )
    rows = evaluate.rows(results)
    shown = zip(parts.nets, net_labels(config.ada), strict=False)
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
    evaluate.write(path, results)
    rows += [
        ("weights", os.path.join(workdir, "classifier.safetensors")),
        ("results", path),
        ("time", logbook.clock(results["seconds"])),
    ]
    print("\n" + logbook.table(rows), flush=True)


def show_attack(
    parts: Parts, net: corruption_nets.CorruptionNet, state: TrainState, path: str
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
    batch = next(data.eval_batches(parts.eval_set, batch_size=config.figure_examples))
    real = batch["mask"] > 0
    x, y = data.to_float(batch["image"][real]), jnp.asarray(batch["label"][real])
    cast = functools.partial(corruption_nets.cast, dtype=config.compute_dtype)
    at_once = range(1, min(config.ada.microbatch or len(x), len(x)) + 1)

    logits_fn = functools.partial(
        evaluate.apply_classifier, parts.classifier, state.params, state.net_state
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
            **attack_settings(config),
        )
        return images, metrics.get("ssim_after"), logits_fn(x), logits_fn(images)

    images, similarity, clean_logits, logits = attack(jax.random.key(config.seed), x, y)
    for verdicts, what in ((clean_logits, "clean images"), (logits, "images of AdA's attack")):
        guards.check_finite(int(guards.not_finite(verdicts).sum()), len(x), what)
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
    cli.run(main, distributed=True)
