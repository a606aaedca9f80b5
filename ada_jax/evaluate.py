"""Measures a classifier's errors on clean, corrupted and newly collected images.

    python -m ada_jax.evaluate --workdir=runs/cifar10 --sets=clean,c,extra,cifar10_1
    python -m ada_jax.evaluate --config=FILE --weights=FILE.safetensors --out=results.json
    python -m ada_jax.evaluate --config=FILE --random --out=results.json

The results file has every number as soon as it is measured, and the same command goes on with
those it lacks.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
from absl import flags, logging

from ada_jax import locks, paths
from ada_jax import results as results_files
from ada_jax.data import core, sources
from ada_jax.errors import UserError, renamed
from ada_jax.evaluation import image_sets, scoring, worst_case
from ada_jax.nets import corruption_nets, weight_files
from ada_jax.run import cli, config_checks, logbook
from ada_jax.sharding import replicate

# ------------------------------------------------------------------------ results


def new_results(
    config: ml_collections.ConfigDict,
    *,
    name: str,
    step: int,
    weights_digest: str,
    clean: core.Dataset,
    source: Mapping[str, Any],
) -> results_files.Results:
    """A results file's content before anything is measured.

    Args:
      config: of the run.
      name: what tables call the run.
      step: updates made.
      weights_digest: of {'params': ..., 'state': ...}, see `weight_files.digest`.
      clean: the clean images of config.eval_split.
      source: see `Sets`.
    """
    results = {
        "schema": results_files.SCHEMA,
        "name": name,
        "published": False,
        "seed": config.seed,
        "step": step,
        "config": config.to_dict(),
        "commit": logbook.commit(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "seconds": 0.0,
        "weights_digest": weights_digest,
        "data": {
            "name": clean.name,
            "split": config.eval_split,
            "examples": len(clean),
            "fingerprint": clean.fingerprint,
        },
        "class_names": list(clean.class_names),
    }
    results |= {"corruption_source": dict(source)} if source else {}
    return json.loads(json.dumps(results))  # Tuples become lists, as they come back.


# ------------------------------------------------------------------------ the config

_NEEDED = {  # and the kinds of their values; a tuple's elements are of one kind
    **dict.fromkeys(("name", "dataset", "data_dir", "train_split", "eval_split"), str),
    **dict.fromkeys(("classifier", "compute_dtype", "compilation_cache"), str),
    **dict.fromkeys(("eval_c_dir", "corruption_table"), str),
    **dict.fromkeys(("seed", "image_size", "eval_batch_size", "cpu_devices"), int),
    **dict.fromkeys(("corruption_seed",), int),
    **dict.fromkeys(("cross_replica_bn", "zero_init_logits"), bool),
    **{"bn_decay": float, "mean": (float,), "std": (float,), "eval_sets": (str,)},
}
DATA_FLAGS = {  # of binaries with --split and --data_dir, for the fields that `data` names
    "config.train_split or config.eval_split": "--split",
    "--config.data_dir": "--data_dir",
}
_FLAGS = {
    "sets": "eval_sets",
    "c_dir": "eval_c_dir",
    "corruption_seed": "corruption_seed",
    "corruption_table": "corruption_table",
    "batch_size": "eval_batch_size",
    "split": "eval_split",
    "data_dir": "data_dir",
}


def _with_flags(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    if missing := [name for name in _NEEDED if name not in config]:
        raise UserError(
            f"The config has no field {missing[0]!r}, so it is not of a classifier's training: "
            "name another with --config or --workdir."
        )
    if wrong := [name for name, kind in _NEEDED.items() if not _is_kind(config[name], kind)]:
        raise UserError(
            f"config.{wrong[0]}={config[wrong[0]]!r} is of another type than a run's: name another "
            "config with --config or --workdir, or set the value back."
        )
    values = {field: flags.FLAGS[flag].value for flag, field in _FLAGS.items()}
    config = config.copy_and_resolve_references().unlock()
    with config.ignore_type():
        config.update({field: v for field, v in values.items() if v is not None})
    return config.lock()


def _is_kind(value: Any, kind: Any) -> bool:
    """Whether a config's value is of a kind in `_NEEDED`."""
    if isinstance(kind, tuple):
        return isinstance(value, tuple | list) and all(_is_kind(v, kind[0]) for v in value)
    kinds = (int, float) if kind is float else kind
    return isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))


# ------------------------------------------------------------------------ the binary


def _check_flags(argv: list[str]) -> None:
    values = flags.FLAGS
    if len(argv) > 1:
        raise UserError(f"The argument {argv[1]!r} is not a flag: write --flag=value.")
    given = [f for f in ("workdir", "weights", "random") if values[f].value]
    if len(given) != 1:
        raise UserError(
            f"There are {len(given)} of --workdir, --weights and --random: give one, a run's "
            "folder, a file of weights or none at all, to say what to evaluate."
        )
    if values.workdir and values.config:
        raise UserError(
            f"--workdir={values.workdir} has a config.json of its own: leave --config out."
        )
    for flag in ("config", "out"):
        if not values.workdir and not values[flag].value:
            raise UserError(f"--{given[0]} needs --{flag}=FILE beside it: give both.")
    for flag in ("workdir", "weights", "out"):
        paths.check_bucket(f"--{flag}={values[flag].value}", values[flag].value or "")


def main(argv: list[str]) -> None:
    """Evaluates what the flags describe."""
    try:
        _check_flags(argv)
        with contextlib.ExitStack() as locked:
            _evaluate(flags.FLAGS, locked)
    except UserError as error:
        raise renamed(error, DATA_FLAGS) from error


def _lock(out: str) -> Any:
    """What is locked to write a results file: of a run its folder, as in training."""
    path = paths.at(out)
    return locks.of_folder(path.parent) if path.name == "results.json" else locks.of_file(path)


def _evaluate(values: flags.FlagValues, locked: contextlib.ExitStack) -> None:
    started, workdir, weights = time.monotonic(), values.workdir, values.weights
    worst = [name for name in image_sets.WORST if name in (values.sets or ())]
    if worst:
        values.sets = [name for name in values.sets if name not in image_sets.WORST] or ["clean"]
    config = _with_flags(scoring.config_of_run(workdir) if workdir else values.config)
    config_checks.validate_evaluation(config)
    _check_worst(values, worst)
    cli.set_up_devices(config.cpu_devices, config.compilation_cache)
    clean = sources.load(
        config.dataset,
        config.eval_split,
        data_dir=config.data_dir or None,
        image_size=config.image_size,
    )
    if "ada" in worst:
        unscaled = [1] * len(values.ada_nets)
        corruption_nets.check_sizes("--ada_nets", values.ada_nets, unscaled, clean.image_shape)
    sets = image_sets.open_sets(config, clean, config.eval_sets)
    about = {} if values.random else scoring.metadata(workdir or weights)
    class_names = about.get("class_names", clean.class_names)
    datasets = {
        cell: core.renumbered(dataset, class_names) for cell, dataset in sets.datasets.items()
    }
    classifier = scoring.make_classifier(config, len(class_names))
    if values.random:
        name, step = f"{config.name}_random", 0
        params, state = scoring.random_variables(classifier, clean, config.seed)
    else:
        name = config.name if workdir else pathlib.Path(weights).stem
        params, state, step = scoring.load_variables(
            config, classifier, clean.image_shape, workdir or weights
        )
    out = values.out or os.path.join(workdir, "results.json")
    locked.enter_context(locks.hold(f"--out={out}", _lock(out)))
    results = new_results(
        config,
        name=name,
        step=step,
        weights_digest=weight_files.digest({"params": params, "state": state}),
        clean=clean,
        source=sets.source,
    )
    results["class_names"] = list(class_names)
    results |= {"training": about["training"]} if "training" in about else {}
    if count := _trained_on(config, workdir, about, clean):
        results["trained_on"] = count
        logging.warning("%d of these %d images were trained on.", count, len(clean))
    results = results_files.with_earlier(
        results, out, recognises=functools.partial(core.recognises, clean)
    )
    clean = core.renumbered(clean, class_names)
    variables, eval_step = replicate((params, state)), scoring.map_eval_step(classifier)
    results = scoring.complete(results, out, eval_step, variables, datasets, config.eval_batch_size)
    logits_fn = functools.partial(scoring.apply_classifier, classifier, params, state)
    settings = {"examples": values.worst_examples, "seed": config.seed}
    settings |= {"batch_size": min(config.eval_batch_size, 256)}
    save = functools.partial(scoring.write_results, out)
    if "lp" in worst:
        results = worst_case.pixel_balls(
            results, save, logits_fn, clean, state_dir=f"{out}.attacks", **settings
        )
    if "ada" in worst:
        results = worst_case.under_ada(
            results,
            save,
            logits_fn,
            clean,
            nets=values.ada_nets,
            radii=[float(nu) for nu in values.ada_radii],
            steps=values.ada_steps,
            restarts=values.ada_restarts,
            **settings,
        )
    table = [
        *results_files.rows(results),
        *worst_case.rows(results),
        ("results", out),
        ("time of this evaluation", results_files.clock(time.monotonic() - started)),
    ]
    print("\n" + logbook.table(table), flush=True)


def _trained_on(
    config: ml_collections.ConfigDict,
    workdir: str | None,
    about: Mapping[str, Any],
    clean: core.Dataset,
) -> int:
    """How many of the images the classifier was trained on, where its training images are there.

    Args:
      config: of the evaluation.
      workdir: the run's folder; None for weights alone.
      about: `metadata` of the weights; {} for random ones.
      clean: the images.
    """
    if about.get("training", {}).get("data") == clean.fingerprint:
        return len(clean)
    trained = scoring.config_of_run(workdir) if workdir else config
    split = trained.train_split if workdir else about.get("train_split")
    # Files of one's own are those named at training; --data_dir says where copies of others are.
    own = trained.dataset in ("folder", "npz")
    other = about.get("dataset", trained.dataset) != trained.dataset
    if not split or (not workdir and (own or other)):
        return 0
    try:
        train_set = sources.load(
            trained.dataset,
            split,
            data_dir=(trained if own else config).data_dir or None,
            image_size=trained.image_size,
            encoded=True,
        )
    except UserError:
        return 0
    return max(core.overlap(train_set, clean))


def check_radii(flag: str, radii: Sequence[str]) -> None:
    """Refuses what are no relative radii.

    Raises:
      UserError: naming the flag and the first of them.
    """
    for radius in radii:
        if not re.fullmatch(r"\d*\.?\d+", radius):
            raise UserError(f"--{flag}={radius} is no radius: give numbers from 0, as 0.015.")


def _check_worst(values: flags.FlagValues, worst: Sequence[str]) -> None:
    known = corruption_nets.names()
    if "ada" in worst and not (values.ada_nets and values.ada_radii):
        raise UserError("--ada_nets or --ada_radii is empty: name at least one each.")
    if unknown := [name for name in values.ada_nets if name not in known]:
        raise UserError(f"--ada_nets={unknown[0]} is unknown: choose from {', '.join(known)}.")
    check_radii("ada_radii", values.ada_radii)
    for name, least in (("worst_examples", 0), ("ada_steps", 0), ("ada_restarts", 1)):
        if values[name].value < least:
            raise UserError(f"--{name}={values[name].value} must be {least} or more.")


if __name__ == "__main__":
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "As for train, with --weights or --random.")
    flags.DEFINE_string("workdir", None, "Folder of a run, finished or not.")
    flags.DEFINE_string("weights", None, "A classifier's safetensors file.")
    flags.DEFINE_bool("random", False, "Evaluate the classifier as it is before training.")
    flags.DEFINE_list("sets", None, f"Which of {','.join(image_sets.SETS + image_sets.WORST)}.")
    flags.DEFINE_integer("worst_examples", 0, "lp, ada: images, from the start; 0 is all.")
    flags.DEFINE_list("ada_nets", ["edsr_small"], "ada: corruption networks.")
    flags.DEFINE_list("ada_radii", ["0.015", "0.03", "0.06"], "ada: relative radii nu.")
    flags.DEFINE_integer("ada_steps", 10, "ada: steps of ascent.")
    flags.DEFINE_integer("ada_restarts", 1, "ada: attacks, of which one is enough.")
    flags.DEFINE_string("c_dir", None, "Folder of a '-C' set, 'tfds', or '' to corrupt on the fly.")
    flags.DEFINE_integer("corruption_seed", None, "Of the corruptions on the fly.")
    flags.DEFINE_string("corruption_table", None, "Whose parameters on the fly: cifar or imagenet.")
    flags.DEFINE_integer("batch_size", None, "Images at a time over all devices.")
    flags.DEFINE_string("split", None, "Clean images, such as test[:500].")
    flags.DEFINE_string("data_dir", None, "Where the data is.")
    flags.DEFINE_string("out", None, "Results file; by default results.json in the workdir.")
    cli.start(main, computes=True)
