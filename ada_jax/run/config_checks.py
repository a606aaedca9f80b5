"""Measures a classifier's errors on clean, corrupted and newly collected images.

    python -m ada_jax.evaluate --workdir=runs/cifar10 --sets=clean,c,extra,cifar10_1
    python -m ada_jax.evaluate --config=FILE --weights=FILE.safetensors --out=results.json
    python -m ada_jax.evaluate --config=FILE --random --out=results.json

The results file has every number as soon as it is measured, and the same command goes on with
those it lacks.
"""

import functools
import math

import ml_collections

from ada_jax import perturbation, ssim, training
from ada_jax.augment import augmix
from ada_jax.corruptions import parameter_tables
from ada_jax.data import sources
from ada_jax.errors import UserError
from ada_jax.evaluation import evaluators
from ada_jax.nets import classifiers, corruption_nets


def validate_evaluation(config: ml_collections.ConfigDict) -> None:
    """Finds what is wrong with the evaluation's part of a config.

    Raises:
      UserError: naming the field, its value and the fix.
    """
    unknown = [name for name in config.eval_sets if name not in evaluators.IMAGE_SETS]
    if unknown or not config.eval_sets:
        raise UserError(
            f"config.eval_sets (--sets) = {tuple(config.eval_sets)} is empty or has an unknown "
            f"name: choose from {', '.join(evaluators.IMAGE_SETS)}; ada_jax.evaluate has "
            f"{', '.join(evaluators.ATTACKS)} besides."
        )
    if not 0 <= config.corruption_seed < 2**32:
        raise UserError(
            f"config.corruption_seed={config.corruption_seed} is out of range: choose it in "
            f"0..{2**32 - 1}."
        )
    if config.corruption_table not in parameter_tables.TABLES:
        raise UserError(
            f"config.corruption_table={config.corruption_table!r} is unknown: choose from "
            f"{', '.join(parameter_tables.TABLES)}."
        )
    if config.eval_batch_size < 1:
        raise UserError(
            f"config.eval_batch_size (--batch_size) = {config.eval_batch_size} must be 1 or more."
        )


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

    one_of("method", config.method, training.METHODS)
    one_of("dataset", config.dataset, sources.NAMES)
    one_of("classifier", config.classifier, classifiers.names())
    validate_evaluation(config)
    require("clean" in config.eval_sets, "eval_sets", "lacks 'clean': add it")
    validate_corruption_nets(config.ada)
    augmix.check(**training.augmix_settings(config))
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
    if scale and config.dataset not in sources.PHOTOGRAPHS:
        raise UserError(
            f"config.crop_scale={scale} needs photographs of any size, as one of "
            f"{', '.join(sources.PHOTOGRAPHS)} has, and config.dataset={config.dataset!r} has "
            "images of one size: set config.crop_scale='()' and config.pad."
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
