"""Checks a training config, and says what of it identifies a run."""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import ml_collections
import optax

from ada_jax import ada, paths, training
from ada_jax import results as results_files
from ada_jax.data import core, rendered_set, sources
from ada_jax.errors import UserError
from ada_jax.evaluation import evaluators, scoring
from ada_jax.nets import corruption_nets, weight_files
from ada_jax.run import devices

_BOOKKEEPING = results_files.BOOKKEEPING | {
    *("name", "init_weights", "corruption_seed", "corruption_table"),
    *("ada.microbatch", "ada.corruption_weights"),
}


class Parts(NamedTuple):
    """What a run is made of; nothing here changes during training."""

    config: ml_collections.ConfigDict
    train_set: core.Dataset
    renderings: rendered_set.RenderedSet | None  # of the training images, for DeepAugment
    eval_set: core.Dataset
    sets: evaluators.Sets  # what the finished classifier is measured on
    corruption_sets: evaluators.Sets  # and what it is measured on while it trains
    nets: tuple[ada.CorruptionNet, ...]  # none without AdA
    classifier: hk.TransformedWithState
    eval_step: Callable[..., dict[str, jax.Array]]  # mapped over devices
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    steps_per_epoch: float
    total_steps: int


def identity(parts: Parts, thetas: Any, state: training.TrainState) -> dict[str, Any]:
    """The values a checkpoint must agree on with the run: all but the bookkeeping.

    Data and weights count by their digests, whatever their files are called. `state` is the one
    before the first step.
    """
    config = parts.config
    unused = {"ada", "pgd"} - {config.method}
    unused |= set() if config.augmix.use else {"augmix"}
    unused |= set() if parts.renderings else {"deepaugment"}
    fields = results_files.comparable(config.to_dict())
    fields = {k: v for k, v in fields.items() if k.partition(".")[0] not in unused}
    if config.init_weights:
        fields["init_weights_digest"] = weight_files.digest(
            {"params": state.params, "state": state.net_state}
        )
    if parts.renderings:
        fields["deepaugment.set"] = parts.renderings.digest
    if config.method == "ada":
        fields["ada.weights_digest"] = weight_files.digest(
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
        fields[digest] = scoring.metadata(path).get("recipe", fields[digest])
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


# ------------------------------------------------------------------------ the run


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
        rendered_set.read_manifest(config.deepaugment.dir)


def build(config: ml_collections.ConfigDict) -> Parts:
    """Loads the data and the corruption network and makes the classifier and its optimiser."""
    check_files(config)
    nets = make_corruption_nets(config.ada) if config.method == "ada" else ()
    load = functools.partial(
        sources.load, config.dataset, data_dir=config.data_dir or None, image_size=config.image_size
    )
    train_set = load(config.train_split, encoded=bool(config.crop_scale))
    if nets:
        names, enlarge = config.ada.corruption_net, config.ada.corruption_enlarge
        shape = train_set.image_shape
        corruption_nets.check_sizes("config.ada.corruption_net", names, enlarge, shape)
    eval_set = load(config.eval_split)
    during = ("c",) if config.corruption_eval_epochs else ()
    classifier = scoring.make_classifier(config, train_set.num_classes)
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
    schedule = training.learning_rate_schedule(config, steps_per_epoch, total_steps)
    folder, copies = config.deepaugment.dir, config.deepaugment.copies
    return Parts(
        config,
        train_set,
        rendered_set.open_set(folder, train_set, copies) if copies else None,
        eval_set,
        evaluators.open_sets(config, eval_set, config.eval_sets),
        evaluators.open_sets(config, eval_set, during, config.corruption_eval_examples),
        nets,
        classifier,
        scoring.map_eval_step(classifier),
        training.make_optimizer(config, schedule),
        schedule,
        steps_per_epoch,
        total_steps,
    )


def check_memory(parts: Parts) -> None:
    """Checks that the devices have memory for the perturbations, before anything is compiled.

    Raises:
      UserError: they have not.
    """
    per_device, there = parts.config.batch_size // jax.device_count(), devices.device_memory()
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


def with_weights(state: training.TrainState, parts: Parts, path: str) -> training.TrainState:
    """The state before the first step with a trained classifier's weights; see `load_variables`.

    Raises:
      UserError: there are none at `path`, or they are of another architecture.
    """
    if paths.is_dir(path):
        path = os.path.join(path, "classifier.safetensors")  # Not a checkpoint half-way.
    own = parts.train_set.class_names
    try:
        theirs = scoring.metadata(path).get("class_names", own)
        if not core.same_classes(own, theirs):
            raise UserError(
                f"it was trained on the classes {core.quoted_some(theirs)}, and config.dataset has "
                f"{core.quoted_some(own)}: name weights of the same classes in the same order."
            )
        params, net_state, _ = scoring.load_variables(
            parts.config, parts.classifier, parts.train_set.image_shape, path
        )
    except UserError as error:
        raise UserError(f"config.init_weights={path!r} cannot be used: {error}") from error
    return state._replace(params=params, net_state=net_state)


def make_corruption_nets(
    config: ml_collections.ConfigDict,
) -> tuple[ada.CorruptionNet, ...]:
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
