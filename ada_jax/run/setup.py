"""Opens what a training config names, and identifies a run."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import ml_collections
import optax
from absl import logging

from ada_jax import ada, paths, training
from ada_jax import results as results_files
from ada_jax.augment import rendered_set
from ada_jax.data import core, sources
from ada_jax.errors import UserError, require_extra
from ada_jax.evaluation import evaluators, scoring
from ada_jax.nets import classifiers, corruption_nets, weight_files
from ada_jax.run import config_checks, devices

_BOOKKEEPING = results_files.BOOKKEEPING | {
    *("name", "init_weights", "corruption_seed", "corruption_table"),
    *("ada.microbatch", "ada.corruption_weights", "pat.weights"),
}


class Parts(NamedTuple):
    """Everything that a run is made of and that training does not change."""

    config: ml_collections.ConfigDict
    train_set: core.Dataset
    renderings: rendered_set.RenderedSet | None  # DeepAugment's, of the training images
    eval_set: core.Dataset
    sets: evaluators.Sets  # for the evaluation after training
    corruption_sets: evaluators.Sets  # for evaluations during training
    # AdA's corruption networks, or the network whose features bound PAT; else empty.
    nets: tuple[ada.CorruptionNet, ...]
    classifier: hk.TransformedWithState
    eval_step: Callable[..., dict[str, jax.Array]]  # mapped over devices
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    steps_per_epoch: float
    total_steps: int


def identity(parts: Parts, thetas: Any, state: training.TrainState) -> dict[str, Any]:
    """The values that identify a run: a checkpoint with other values is not resumed.

    These are the config's fields that change what is trained, and digests of data and weights.

    Args:
      parts: the run.
      thetas: the parameters of `parts.nets`.
      state: the state before the first step.
    """
    config = parts.config
    fields = results_files.comparable(config.to_dict())
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
    if config.method == "pat":
        fields["pat.weights_digest"] = weight_files.digest(thetas[0]) if thetas else ""
    # With statistics of the batch, those of batch norm depend on the microbatch.
    mixing = {"ada.microbatch"} if config.ada.batch_norm == "batch" else set()
    unlisted = _BOOKKEEPING - mixing
    fields = {f"config.{k}": v for k, v in fields.items() if k not in unlisted}
    fields["training data"] = parts.train_set.fingerprint
    return json.loads(json.dumps(fields))  # Tuples become lists, as in a checkpoint.


def describe(parts: Parts, expect: dict[str, Any]) -> dict[str, Any]:
    """Metadata of the run's classifier, stored with its weights.

    Args:
      parts: the run.
      expect: the result of `identity`.

    Returns:
      'class_names', in the order of the logits; 'dataset'; 'train_split'; 'training', digests of
      'data' and, if they are used, of 'deepaugment', 'corruption_nets', 'bounding_net' and
      'init_weights'; and 'recipe', a digest of `expect` without the seed. Initial weights enter the
      recipe by their own recipe, if their file has one, so that runs with different seeds have the
      same recipe.
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
        "bounding_net": "config.pat.weights_digest",
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
    """Raises UserError for weights or rendered images that are missing, before data are read."""
    # init_weights may yet have to be trained, by an earlier point of the same sweep.
    weights = config.ada.corruption_weights if config.method == "ada" else ()
    if missing := [path for path in weights if path and not paths.exists(path)]:
        raise UserError(
            f"config.ada.corruption_weights names {missing[0]!r}, which does not exist: check it."
        )
    if config.deepaugment.copies:
        rendered_set.read_manifest(config.deepaugment.dir)


def build(config: ml_collections.ConfigDict) -> Parts:
    """Opens everything that a valid config names: files, data, networks and optimiser.

    Raises:
      UserError: a package, a file or data is missing or does not fit the config; the devices cannot
        share the batches or have too little memory.
    """
    pictures = ["matplotlib"] if config.method == "ada" and config.figure_examples else []
    require_extra("Training", "grain", "orbax.checkpoint", *pictures)
    config_checks.validate_devices(config, jax.device_count())
    check_files(config)
    nets = make_corruption_nets(config.ada) if config.method == "ada" else ()
    bounding = make_bounding_net(config.pat) if config.method == "pat" else ()
    at_once = config_checks.attacked_at_once(config, jax.device_count())
    perturbed = [ada.restricted(net, config.ada.leaves) for net in nets]
    check_memory(perturbed, at_once, config.ada.group)
    load = functools.partial(
        sources.load, config.dataset, data_dir=config.data_dir or None, image_size=config.image_size
    )
    train_set = load(config.train_split, encoded=bool(config.crop_scale))
    eval_set = load(config.eval_split)
    core.check_held_out(train_set, eval_set, config.train_split, config.eval_split)
    if (one := train_set.image_shape) != (other := eval_set.image_shape):
        raise UserError(
            f"config.eval_split={config.eval_split!r} has images of shape {list(other)} and "
            f"config.train_split={config.train_split!r} of {list(one)}: resize one of them."
        )
    if nets:
        names, enlarge = config.ada.corruption_net, config.ada.corruption_enlarge
        shape = train_set.image_shape
        corruption_nets.check_sizes("config.ada.corruption_net", names, enlarge, shape)
        with config_checks.named_in("config.ada."):
            ada.check_size(config.ada.ssim_threshold, jax.ShapeDtypeStruct((1, *shape), float))
    steps_per_epoch, total_steps = _count_steps(config, train_set)
    folder, copies = config.deepaugment.dir, config.deepaugment.copies
    during = ("c",) if config.corruption_eval_epochs else ()
    classifier = scoring.make_classifier(config, train_set.num_classes)
    if config.method in ("pat", "rlat"):
        classifiers.feature_shapes(classifier, train_set.image_shape)  # Raises without any.
    if inner := set(config.mixup.layers) - {"input"} if config.mixup.alpha else ():
        layers = classifiers.feature_shapes(classifier, train_set.image_shape)
        if unknown := sorted(inner - layers.keys()):
            raise UserError(
                f"config.mixup.layers={tuple(config.mixup.layers)} names {unknown[0]!r}, which "
                f"{config.classifier} lacks: choose from input, {', '.join(layers)}."
            )
    optimizer, schedule = training.make_optimizer(config, steps_per_epoch, total_steps)
    return Parts(
        config,
        train_set,
        rendered_set.open_set(folder, train_set, copies) if copies else None,
        eval_set,
        evaluators.open_sets(config, eval_set, config.eval_sets),
        evaluators.open_sets(config, eval_set, during, config.corruption_eval_examples),
        nets or bounding,
        classifier,
        scoring.map_eval_step(classifier),
        optimizer,
        schedule,
        steps_per_epoch,
        total_steps,
    )


def _count_steps(config: ml_collections.ConfigDict, train_set: core.Dataset) -> tuple[float, int]:
    """Steps per epoch, and steps in all."""
    size, batch_size = len(train_set), config.batch_size
    if batch_size > size:
        raise UserError(
            f"config.batch_size={batch_size} is larger than the {size} examples of "
            f"config.train_split={config.train_split!r}: make it smaller."
        )
    steps_per_epoch = size / batch_size
    steps = config.train_steps or config.epochs * steps_per_epoch
    if not 0.5 < steps < 2**31:
        raise UserError(
            f"config.epochs={config.epochs} must be at least one step ({batch_size} of {size} "
            "examples) and less than 2**31 steps."
        )
    return steps_per_epoch, round(steps)


def check_memory(nets: Sequence[ada.CorruptionNet], attacked: int, group: int = 1) -> None:
    """Checks that the devices have the memory for the perturbations.

    Args:
      nets: the corruption networks.
      attacked: examples attacked at once on each device.
      group: examples that share a perturbation.

    Raises:
      UserError: a device has too little memory.
    """
    available = devices.device_memory()
    if not nets or available is None:
        return
    parameters = max(sum(a.size for a in jax.tree.leaves(net.theta)) for net in nets)
    per_example = 3 * 4 * parameters / group  # float32: theta + delta, its gradient, the next one
    if per_example * attacked > available:
        divisors = [n for n in range(group, attacked + 1, group) if attacked % n == 0]
        fits = [n for n in divisors if 2 * n * per_example <= available]
        fix = f"{fits[-1]}, or a smaller divisor" if fits else f"{group}, or use a smaller network"
        raise UserError(
            f"config.ada.microbatch attacks {attacked} examples at once on each device: their "
            f"perturbations need at least {per_example * attacked / 2**30:.1f} GiB, and a device "
            f"has {available / 2**30:.1f}. Set it to {fix}."
        )


def with_weights(state: training.TrainState, parts: Parts, path: str) -> training.TrainState:
    """The initial state with a trained classifier's weights; see `scoring.load_variables`.

    The last layer of a classifier of another number of classes is replaced by a new one.

    Raises:
      UserError: there are no weights at `path`, or they are of another architecture, or of as many
        classes with other names.
    """
    paths.check_bucket(f"config.init_weights={path!r}", path)
    if paths.is_dir(path):
        path = os.path.join(path, "classifier.safetensors")  # Not a checkpoint.
    own = parts.train_set.class_names
    with config_checks.named_in(f"config.init_weights={path!r} cannot be used: "):
        about = scoring.metadata(path)
        theirs = about.get("class_names", own)
        classes = about.get("classes", len(theirs))
        if classes == len(own) and not core.same_classes(own, theirs):
            raise UserError(
                f"it was trained on the classes {core.quoted_some(theirs)}, and config.dataset has "
                f"{core.quoted_some(own)}: name weights of the same classes in the same order."
            )
        classifier = scoring.make_classifier(parts.config, classes)
        params, net_state, _ = scoring.load_variables(
            parts.config, classifier, parts.train_set.image_shape, path
        )
    if classes != len(own):
        new = {layer: p for layer, p in state.params.items() if layer.endswith("logits")}
        params = params | new
        logging.info(
            "%s was trained on %d classes, and config.dataset has %d: the last layer (%s) is new.",
            path,
            classes,
            len(own),
            *new,
        )
    return state._replace(params=params, net_state=net_state)


def make_corruption_nets(settings: ml_collections.ConfigDict) -> tuple[ada.CorruptionNet, ...]:
    """The corruption networks of config.ada.

    Raises:
      UserError: weights that are missing, damaged or of another network.
    """
    fields = (settings.corruption_net, settings.corruption_weights, settings.corruption_enlarge)
    with config_checks.named_in(
        f"config.ada.corruption_weights={tuple(settings.corruption_weights)}: "
    ):
        return tuple(
            corruption_nets.make(name, weights or None, enlarge=enlarge)
            for name, weights, enlarge in zip(*fields, strict=True)
        )


def make_bounding_net(settings: ml_collections.ConfigDict) -> tuple[ada.CorruptionNet, ...]:
    """The network of config.pat whose features bound PAT, frozen; empty for the classifier itself.

    Raises:
      UserError: weights that are missing, damaged or of another network.
    """
    if settings.network == "self":
        return ()
    with config_checks.named_in(f"config.pat.weights={settings.weights!r}: "):
        apply, theta, name = scoring.load_features(settings.weights)
        if name != settings.network:
            raise UserError(
                f"the weights are of {name}, and config.pat.network={settings.network!r}: make "
                "them agree."
            )
    return (ada.CorruptionNet(apply, theta),)
