"""The table of what can be evaluated, and the image sets of a config.

A new image set or attack is one entry of `EVALUATORS`. Its name then works in --sets.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from ada_jax import results as results_files
from ada_jax.corruptions import parameter_tables
from ada_jax.data import core
from ada_jax.evaluation import image_sets, perceptual_attacks, worst_case


class Evaluator(NamedTuple):
    """One name of --sets: an image set, on which errors are counted, or an attack.

    Exactly one of `corruptions`, `images` and `attack` is set.

    Attributes:
      fields: the fields of the results file that it writes; the last one is written at its end.
      corruptions: for each config.corruption_table the corruptions to read from config.eval_c_dir
        or to apply on the fly. They need no more than a function in `corruptions`, or .npy files in
        the layout of CIFAR-10-C.
      images: `(config, clean) -> dataset`, which opens any other set. Its errors are written to
        the field with the set's name.
      attack: `(logits_fn, images, labels, *, options, measured, save) -> dict` of `fields`. Images
        are [N,H,W,3] float32 in [0,1]; `logits_fn` is `scoring.apply_classifier`, closed over its
        classifier and variables; `options` are `worst_case.Options`; `measured` are the
        fields of an earlier, interrupted call; `save(fields)` may write intermediate results.
      check: `(options, image_shape)`, which raises `UserError` before an attack starts.
    """

    fields: tuple[str, ...]
    corruptions: Mapping[str, tuple[str, ...]] | None = None
    images: Callable[[ml_collections.ConfigDict, core.Dataset], core.Dataset] | None = None
    attack: Callable[..., dict[str, Any]] | None = None
    check: Callable[[worst_case.Options, Sequence[int]], None] = lambda options, image_shape: None


EVALUATORS = {
    "clean": Evaluator(("clean",), images=lambda config, clean: clean),
    "c": Evaluator(
        ("corruptions", "mce_alexnet", "mce_unnormalised"),
        corruptions=dict.fromkeys(parameter_tables.TABLES, parameter_tables.NAMES),
    ),
    "extra": Evaluator(
        ("corruptions", "mean_extra"),
        corruptions=dict.fromkeys(parameter_tables.TABLES, parameter_tables.EXTRA),
    ),
    "cbar": Evaluator(("corruptions", "mean_cbar"), corruptions=parameter_tables.CBAR),
    "cifar10_1": Evaluator(("cifar10_1",), images=image_sets.cifar10_1),
    "lp": Evaluator(("lp", "lp_accuracy"), attack=worst_case.pixel_balls),
    "ada": Evaluator(
        ("under_ada", "under_shared_ada"),
        attack=worst_case.under_ada,
        check=worst_case.check_under_ada,
    ),
    "perceptual": Evaluator(
        ("perceptual",), attack=perceptual_attacks.measure, check=perceptual_attacks.check
    ),
}
ATTACKS = tuple(name for name, entry in EVALUATORS.items() if entry.attack)
IMAGE_SETS = tuple(name for name in EVALUATORS if name not in ATTACKS)  # also for training


class Sets(NamedTuple):
    """The images of an evaluation.

    Attributes:
      datasets: images and labels of every set, and of every corruption at every severity.
      source: where the corrupted images come from, the results' 'corruption_source'; empty without
        corruptions.
    """

    datasets: dict[results_files.Condition, core.Dataset]
    source: dict[str, Any]


def open_sets(
    config: ml_collections.ConfigDict,
    clean: core.Dataset,
    names: Sequence[str],
    examples: int | None = None,
) -> Sets:
    """Opens image sets and checks them before anything is compiled.

    Args:
      config: reads 'eval_c_dir', 'corruption_seed', 'corruption_table' and 'data_dir'.
      clean: the clean images.
      names: names in `IMAGE_SETS`.
      examples: number of corrupted images to take from the start; None takes all.

    Raises:
      UserError: files are missing or damaged, do not belong to the clean images, or have other
        classes.
    """
    entries = {name: EVALUATORS[name] for name in names}
    datasets = {(n, 0): e.images(config, clean) for n, e in entries.items() if e.images}
    source = {}
    by_table = [entry.corruptions for entry in entries.values() if entry.corruptions]
    if corruptions := [c for tables in by_table for c in tables[config.corruption_table]]:
        size = min(examples or len(clean), len(clean))
        corrupted, source = image_sets.corrupted(config, clean, corruptions, size)
        datasets |= corrupted
    classes = clean.class_names
    return Sets({key: core.renumbered(d, classes) for key, d in datasets.items()}, source)
