"""Checks of a training config, made before data are read or anything is compiled.

A field is checked by the module that uses it, if that has a check: here the message gets the name
of the field. Ranges and choices of the others are in `RULES` and `CHOICES`.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from ada_jax import ada, checks, perturbation, training
from ada_jax import results as results_files
from ada_jax.attacks import loops
from ada_jax.attacks import perceptual as perceptual_attacks
from ada_jax.augment import augmix, mixup, norm_noise
from ada_jax.corruptions import parameter_tables
from ada_jax.data import sources
from ada_jax.errors import UserError
from ada_jax.evaluation import evaluators
from ada_jax.nets import classifiers, corruption_nets

Rule = tuple[Callable[[Any], bool], str, Sequence[str]]

CHOICES = {
    "method": training.METHODS,
    "dataset": sources.NAMES,
    "classifier": classifiers.names(),
    "compute_dtype": ("float32", "bfloat16"),
    "pgd.batch_norm": ("batch", "running"),
    "pat.network": ("self", *classifiers.names()),
    "ada.batch_norm": ("batch", "running"),
}
AT_LEAST_1 = (lambda value: value >= 1, "must be 1 or more")
AT_LEAST_0 = (lambda value: value >= 0, "must be 0 (off) or more")
POSITIVE = (lambda value: value > 0, "must be positive")
SIDE = (lambda value: 1 <= value <= 4096, "must be 1 to 4096 pixels")
DEVICES = (lambda value: 0 <= value <= 1024, "must be 0 (off) to 1024")
SEED = (lambda value: 0 <= value < 2**32, "must be in 0..2**32-1")
RULES = (
    (*AT_LEAST_1, ("batch_size", "log_steps", "keep_checkpoints", "ada.every")),
    (*AT_LEAST_1, ("corruption_eval_examples", "ada.group")),
    (*AT_LEAST_0, ("eval_epochs", "corruption_eval_epochs", "checkpoint_epochs")),
    (*AT_LEAST_0, ("figure_examples", "deepaugment.copies", "augmix.jsd_weight")),
    (*AT_LEAST_0, ("mixup.alpha", "weight_decay", "warmup_epochs", "epochs", "train_steps")),
    (*POSITIVE, ("learning_rate", "pgd.step_scale", "pat.gradient_clip", "rlat.epsilon")),
    (
        lambda value: len({*value} & {*ada.CHOICES}) == len(value) > 0,
        f"must name one or both of {', '.join(ada.CHOICES)}, such as ('delta',)",
        ("ada.choice",),
    ),
    (
        lambda value: 0 <= value < 1,
        "must be in [0, 1)",
        ("momentum", "bn_decay", "ema_decay", "label_smoothing"),
    ),
    (
        lambda value: len({*value}) == len(value) > 0,
        "must name layers, each once, such as ('input', 'stage1')",
        ("mixup.layers",),
    ),
    (*SIDE, ("image_size",)),
    (*DEVICES, ("cpu_devices",)),
    (*SEED, ("seed",)),
    (
        lambda value: not any(isinstance(number, str) for number in value),
        "must be numbers",
        ("mean", "std", "crop_scale", "crop_ratio"),
    ),
    (
        lambda value: len(value) == 3 and 0 <= min(value) <= max(value) <= 1,
        "must be three numbers in [0, 1], one per channel",
        ("mean",),
    ),
    (
        lambda value: len(value) == 3 and min(value) > 0,
        "must be three positive numbers, one per channel",
        ("std",),
    ),
)


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for the first field that is out of range, with its name, value and fix."""
    fields = results_files.flat(config.to_dict())
    check_values(fields)
    check_fields(fields, CHOICES, RULES)
    validate_evaluation(config)
    require(fields, "eval_sets", "clean" in config.eval_sets, "lacks 'clean': add it")
    _check_nets(config.ada)
    with named_in("config.ada."):
        ada.check_settings(**training.attack_settings(config.ada))
        checks.check_integers(0, microbatch=config.ada.microbatch)
    with named_in("config.pgd."):
        loops.check(config.pgd.epsilon, config.pgd.norm)
        checks.check_integers(1, steps=config.pgd.steps)
    with named_in("config.pat."):
        perceptual_attacks.check(config.pat.bound)
        perceptual_attacks.check_settings(**training.pat_settings(config.pat))
    bounded = config.pat.network == "self" or config.pat.weights
    weights = f"is missing for config.pat.network={config.pat.network!r}: name a run's folder"
    require(fields, "pat.weights", bounded, weights)
    with named_in("config.augmix."):
        augmix.check(**training.augmix_settings(config.augmix))
    unused = "is not used for config.pat.network='self', the trained network: leave it empty"
    own = config.pat.network == "self"
    require(fields, "pat.weights", not (own and config.pat.weights), unused)
    alone = "needs config.augmix.use: set it too"
    require(fields, "augmix.jsd_weight", config.augmix.use or not config.augmix.jsd_weight, alone)
    views = config.augmix.use and config.augmix.jsd_weight
    for field in ("augmix.clean_view", "augmix.label_views"):
        several = "needs config.augmix.use and a positive config.augmix.jsd_weight: set both"
        require(fields, field, views or not fields[field], several)
    both = "and config.method='rlat' both perturb features: set it to 0"
    require(fields, "mixup.alpha", not (config.mixup.alpha and config.method == "rlat"), both)
    with named_in("config.mixup."):
        mixup.check_levels(**training.mixup_levels(config.mixup))
    with named_in("config.noise."):
        norm_noise.check(**training.noise_settings(config.noise))
    _check_crops(config)
    pixels = f"must be pixels, from 0 to image_size={config.image_size}"
    require(fields, "pad", 0 <= config.pad <= config.image_size, pixels)
    steps = f"and config.train_steps={config.train_steps}"
    both = f"{steps} must not both be set: make one of them 0"
    require(fields, "epochs", not config.epochs * config.train_steps, both)
    neither = f"{steps} are both 0: set one of them"
    require(fields, "epochs", config.epochs + config.train_steps > 0, neither)


# ------------------------------------------------------------------------ checks of any config


def check_values(fields: Mapping[str, Any]) -> None:
    """Raises UserError for a value that no field takes, of a flat config, {'ada.nu': 0.02}.

    Numbers must be finite and integers fit into 31 bits; a tuple holds values of one kind.
    """
    for field, value in fields.items():
        parts = value if isinstance(value, tuple | list) else (value,)
        mixed = len({isinstance(part, str) for part in parts}) > 1
        require(fields, field, not mixed, "mixes numbers and words: give one kind")
        bits = 32 if field.endswith("seed") else 31
        for number in parts:
            if isinstance(number, float):
                require(fields, field, math.isfinite(number), "must be finite")
            if isinstance(number, int):
                small = abs(number) < 2**bits
                require(fields, field, small, f"is too large: use less than 2**{bits}")


def check_fields(
    fields: Mapping[str, Any], choices: Mapping[str, Sequence[str]], rules: Sequence[Rule]
) -> None:
    """Checks choices, {field: known words}, and rules, (predicate, what it demands, fields)."""
    needed = [*choices, *(field for _, _, names in rules for field in names)]
    if missing := [field for field in needed if field not in fields]:
        raise UserError(
            f"The config has no field {missing[0]!r}: the file of --config may be for another "
            "command, see --help."
        )
    for field, known in choices.items():
        fix = f"is unknown: choose one of {', '.join(known)}"
        require(fields, field, fields[field] in known, fix)
    for holds, must, names in rules:
        for field in names:
            require(fields, field, holds(fields[field]), must)


def require(fields: Mapping[str, Any], field: str, good: bool, fix: str) -> None:
    """Raises UserError with a field's name, its value and the fix, unless it is good."""
    if not good:
        raise UserError(f"config.{field}={fields[field]!r} {fix}.")


@contextlib.contextmanager
def named_in(prefix: str) -> Iterator[None]:
    """Puts a prefix, such as 'config.ada.', in front of the messages of a module's own check."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{prefix}{error}") from error


# ------------------------------------------------------------------------ parts of a config


def validate_evaluation(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for a field of the evaluation that is out of range."""
    unknown = [name for name in config.eval_sets if name not in evaluators.IMAGE_SETS]
    if unknown or not config.eval_sets:
        raise UserError(
            f"config.eval_sets (--sets) = {tuple(config.eval_sets)} is empty or has an unknown "
            f"name: choose from {', '.join(evaluators.IMAGE_SETS)}; ada_jax.evaluate also accepts "
            f"{', '.join(evaluators.ATTACKS)}."
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


def _check_crops(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for random crops with wrong ranges, or of images without them."""
    scale, ratio = tuple(config.crop_scale), tuple(config.crop_ratio)
    if scale and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
        raise UserError(
            f"config.crop_scale={scale} must be two shares of the area in (0, 1], such as (0.08, "
            "1.0), or () for no random resized crops."
        )
    if not (len(ratio) == 2 and 0 < ratio[0] <= ratio[1] < math.inf):
        raise UserError(
            f"config.crop_ratio={ratio} must be two positive ratios in increasing order, such "
            "as (0.75, 1.3333)."
        )
    if scale and config.dataset not in sources.PHOTOGRAPHS:
        raise UserError(
            f"config.crop_scale={scale} needs photographs of any size (one of "
            f"{', '.join(sources.PHOTOGRAPHS)}), and config.dataset={config.dataset!r} has "
            "images of one size: set config.crop_scale='()' and config.pad."
        )
    if scale and config.deepaugment.copies:
        raise UserError(
            f"config.crop_scale={scale} crops photographs, and config.deepaugment.copies="
            f"{config.deepaugment.copies} takes images that are rendered after the crop: make one "
            "of them () or 0."
        )


def _check_nets(settings: ml_collections.ConfigDict) -> None:
    """Raises UserError for corruption networks, weights or enlargements that do not fit."""
    nets, key = tuple(settings.corruption_net), jax.eval_shape(jax.random.key, 0)
    with named_in("config.ada."):
        for name in nets or ("",):
            theta = jax.eval_shape(corruption_nets.architecture(name).init, key)
            perturbation.split(theta, settings.leaves)
        for factor in settings.corruption_enlarge:
            checks.check_integers(1, corruption_enlarge=factor)
    for field in ("corruption_weights", "corruption_enlarge"):
        if len(settings[field]) != len(nets):
            raise UserError(
                f"config.ada.{field}={tuple(settings[field])} has {len(settings[field])} values "
                f"for the {len(nets)} networks of config.ada.corruption_net={nets}: give one each."
            )
    if not all(isinstance(path, str) for path in settings.corruption_weights):
        raise UserError(
            f"config.ada.corruption_weights={tuple(settings.corruption_weights)} must be paths; "
            "'' takes the shipped weights."
        )


def net_labels(settings: Mapping[str, Any]) -> list[str]:
    """Names of config.ada's networks in results and files; repeated names get a number."""
    nets = list(settings["corruption_net"])
    return [n if nets.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(nets, 1)]


def attacked_at_once(config: ml_collections.ConfigDict, devices: int) -> int:
    """How many examples each device attacks at a time."""
    return config.ada.microbatch or config.batch_size // devices // config.ada.every


def validate_devices(config: ml_collections.ConfigDict, devices: int) -> None:
    """Raises UserError for a batch size that cannot be split over so many devices."""
    if config.batch_size % devices:
        raise UserError(
            f"config.batch_size={config.batch_size} is not divisible by the {devices} devices: "
            f"use a multiple of {devices}."
        )
    if config.method != "ada":
        return
    local = config.batch_size // devices
    if local % config.ada.every:
        raise UserError(
            f"config.ada.every={config.ada.every} does not divide the {local} examples of a "
            "device: use a divisor."
        )
    attacked = local // config.ada.every
    if config.ada.microbatch and attacked % config.ada.microbatch:
        raise UserError(
            f"config.ada.microbatch={config.ada.microbatch} does not divide the {attacked} "
            "examples of a device that are attacked: use a divisor."
        )
    at_once = attacked_at_once(config, devices)
    if at_once % config.ada.group:
        raise UserError(
            f"config.ada.group={config.ada.group} does not divide the {at_once} examples that a "
            "device attacks at a time: use a divisor."
        )
