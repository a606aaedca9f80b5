"""Measures a classifier's errors on clean, corrupted, newly collected and attacked images.

    python -m ada_jax.evaluate --workdir=runs/cifar10 --sets=clean,c,extra,cbar,cifar10_1
    python -m ada_jax.evaluate --config=FILE --weights=FILE.safetensors --out=results.json
    python -m ada_jax.evaluate --config=FILE --random --out=results.json

The results file is updated after every measurement. The same command measures what is missing.
"""

import functools
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import ml_collections
from absl import flags, logging

from ada_jax import locks, paths
from ada_jax import results as results_files
from ada_jax.data import core, sources
from ada_jax.errors import UserError, renamed
from ada_jax.evaluation import evaluators, scoring, worst_case
from ada_jax.nets import weight_files
from ada_jax.run import cli, config_checks, logbook
from ada_jax.sharding import replicate

DATA_FLAGS = {  # the flags of binaries with --split and --data_dir, for fields in messages
    "config.train_split or config.eval_split": "--split",
    "--config.data_dir": "--data_dir",
}
_FIELDS = {  # of the config, set by flags
    "c_dir": "eval_c_dir",
    "corruption_seed": "corruption_seed",
    "corruption_table": "corruption_table",
    "batch_size": "eval_batch_size",
    "split": "eval_split",
    "data_dir": "data_dir",
}


def new_results(
    config: ml_collections.ConfigDict,
    *,
    name: str,
    step: int,
    weights_digest: str,
    clean: core.Dataset,
    source: Mapping[str, Any],
) -> results_files.Results:
    """The content of a results file before anything is measured.

    Args:
      config: of the run.
      name: name of the run in tables.
      step: updates made.
      weights_digest: of {'params': ..., 'state': ...}, see `weight_files.digest`.
      clean: the clean images of config.eval_split.
      source: see `evaluators.Sets`.
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
    return json.loads(json.dumps(results))  # Tuples become lists, as in the file.


# ------------------------------------------------------------------------ the command


class _Subject(NamedTuple):
    """The classifier to evaluate."""

    name: str
    step: int
    classifier: hk.TransformedWithState
    params: hk.Params
    state: hk.State
    class_names: tuple[str, ...]
    metadata: Mapping[str, Any]  # of the weights


def main(argv: list[str]) -> None:
    """Evaluates what the flags describe."""
    try:
        del argv
        _check_flags()
        _evaluate(flags.FLAGS)
    except UserError as error:
        raise renamed(error, DATA_FLAGS) from error


def _check_flags() -> None:
    values = flags.FLAGS
    given = [f for f in ("workdir", "weights", "random") if values[f].value]
    if len(given) != 1:
        raise UserError(
            f"{len(given)} of the flags --workdir, --weights and --random are given: give exactly "
            "one, which names the classifier."
        )
    if values.workdir and values.config:
        raise UserError(
            f"--workdir={values.workdir} has a config.json of its own: leave --config out."
        )
    for flag in ("config", "out"):
        if not values.workdir and not values[flag].value:
            raise UserError(f"--{given[0]} needs --{flag}=FILE: give both.")
    for flag in ("workdir", "weights", "out", "lpips_weights"):
        paths.check_bucket(f"--{flag}={values[flag].value}", values[flag].value or "")
    worst_case.check_radii("ada_radii", values.ada_radii)


def _evaluate(values: flags.FlagValues) -> None:
    started, workdir = time.monotonic(), values.workdir
    attacks = [name for name in values.sets or () if name in evaluators.ATTACKS]
    config = _config(values, attacks)
    config_checks.validate_evaluation(config)
    cli.set_up_devices(config.cpu_devices, config.compilation_cache)
    clean = sources.load(
        config.dataset,
        config.eval_split,
        data_dir=config.data_dir or None,
        image_size=config.image_size,
    )
    out = values.out or os.path.join(workdir, "results.json")
    options = _options(values, config, out)
    for name in attacks:
        evaluators.EVALUATORS[name].check(options, clean.image_shape)
    sets = evaluators.open_sets(config, clean, config.eval_sets)
    subject = _load(values, config, clean)
    with locks.hold(f"--out={out}", _lock(out)):
        results = _start(config, subject, clean, sets.source, out, workdir)
        if "lp" in attacks:
            count = min(values.worst_examples or len(clean), len(clean))
            worst_case.check_replaced(results, count, options.seed)
        renumber = functools.partial(core.renumbered, class_names=subject.class_names)
        results = scoring.complete(
            results,
            out,
            scoring.map_eval_step(subject.classifier),
            replicate((subject.params, subject.state)),
            {key: renumber(dataset) for key, dataset in sets.datasets.items()},
            config.eval_batch_size,
        )
        if attacks:
            examples = worst_case.first_examples(renumber(clean), values.worst_examples)
            results = _attack(results, attacks, subject, examples, options, out)
    table = [
        *results_files.summary(results),
        ("results", out),
        ("time of this evaluation", results_files.clock(time.monotonic() - started)),
    ]
    print("\n" + logbook.table(table), flush=True)


def _config(values: flags.FlagValues, attacks: Sequence[str]) -> ml_collections.ConfigDict:
    """The run's config with the flags' values; its 'eval_sets' are the image sets."""
    config = scoring.config_of_run(values.workdir) if values.workdir else values.config
    config = config.copy_and_resolve_references().unlock()
    fields = {field: values[flag].value for flag, field in _FIELDS.items()}
    if values.sets is not None:
        image_sets = [name for name in values.sets if name not in attacks]
        fields["eval_sets"] = ["clean"] if attacks and not image_sets else image_sets
    with config.ignore_type():
        config.update({field: value for field, value in fields.items() if value is not None})
    return config.lock()


def _options(
    values: flags.FlagValues, config: ml_collections.ConfigDict, out: str
) -> worst_case.Options:
    return worst_case.Options(
        seed=config.seed,
        batch_size=min(config.eval_batch_size, 256),
        state_dir=f"{out}.attacks",
        nets=values.ada_nets,
        radii=[float(nu) for nu in values.ada_radii],
        steps=values.ada_steps,
        restarts=values.ada_restarts,
        lpips_weights=values.lpips_weights,
        lpips_bound=values.lpips_bound,
        lpips_steps=values.lpips_steps,
    )


def _load(
    values: flags.FlagValues, config: ml_collections.ConfigDict, clean: core.Dataset
) -> _Subject:
    """The classifier that the flags name."""
    path = values.workdir or values.weights
    about = {} if values.random else scoring.metadata(path)
    class_names = tuple(about.get("class_names", clean.class_names))
    classifier = scoring.make_classifier(config, len(class_names))
    if values.random:
        name, step = f"{config.name}_random", 0
        params, state = scoring.random_variables(classifier, clean, config.seed)
    else:
        name = config.name if values.workdir else pathlib.Path(path).stem
        params, state, step = scoring.load_variables(config, classifier, clean.image_shape, path)
    return _Subject(name, step, classifier, params, state, class_names, about)


def _lock(out: str) -> Any:
    """The lock file: that of the folder for a run's own results files, else one beside the file."""
    path = paths.at(out)
    of_run = path.name in ("results.json", "results_ema.json")
    return locks.of_folder(path.parent) if of_run else locks.of_file(path)


def _start(
    config: ml_collections.ConfigDict,
    subject: _Subject,
    clean: core.Dataset,
    source: Mapping[str, Any],
    out: str,
    workdir: str | None,
) -> results_files.Results:
    """The results before this evaluation, with what an earlier one has measured."""
    results = new_results(
        config,
        name=subject.name,
        step=subject.step,
        weights_digest=weight_files.digest({"params": subject.params, "state": subject.state}),
        clean=clean,
        source=source,
    )
    results["class_names"] = list(subject.class_names)
    if "training" in subject.metadata:
        results["training"] = subject.metadata["training"]
    if count := _trained_on(config, workdir, subject.metadata, clean):
        results["trained_on"] = count
        logging.warning("%d of these %d images were trained on.", count, len(clean))
    return results_files.with_earlier(results, out)


def _attack(
    results: results_files.Results,
    names: Sequence[str],
    subject: _Subject,
    examples: tuple[Any, Any],
    options: worst_case.Options,
    out: str,
) -> results_files.Results:
    """The results with the fields of the attacks, written to the file as they are measured."""
    logits_fn = functools.partial(
        scoring.apply_classifier, subject.classifier, subject.params, subject.state
    )
    for name in names:
        entry, before = evaluators.EVALUATORS[name], results
        results = before | entry.attack(
            logits_fn,
            *examples,
            options=options,
            measured={field: results[field] for field in entry.fields if field in results},
            save=lambda fields, before=before: scoring.write_results(out, before | fields),
        )
        scoring.write_results(out, results)
    return results


def _trained_on(
    config: ml_collections.ConfigDict,
    workdir: str | None,
    metadata: Mapping[str, Any],
    clean: core.Dataset,
) -> int:
    """Number of the images that the classifier was trained on; 0 without its training images."""
    if metadata.get("training", {}).get("data") == clean.fingerprint:
        return len(clean)
    trained = scoring.config_of_run(workdir) if workdir else config
    split = trained.train_split if workdir else metadata.get("train_split")
    # Own files are those named at training; --data_dir names copies of the known data sets.
    own = trained.dataset in ("folder", "npz")
    other = metadata.get("dataset", trained.dataset) != trained.dataset
    if not split or (not workdir and (own or other)):
        return 0
    data_dir = (trained if own else config).data_dir or None
    size = trained.image_size
    try:
        train_set = sources.load(
            trained.dataset, split, data_dir=data_dir, image_size=size, encoded=True
        )
    except UserError:
        return 0
    return max(core.overlap(train_set, clean))


if __name__ == "__main__":
    from ml_collections import config_flags

    config_flags.DEFINE_config_file(
        "config", None, "Config of the classifier, with --weights or --random."
    )
    flags.DEFINE_string("workdir", None, "Folder of a run, finished or not.")
    flags.DEFINE_string("weights", None, "A classifier's safetensors file.")
    flags.DEFINE_bool("random", False, "Evaluate an untrained classifier.")
    flags.DEFINE_list("sets", None, f"What to measure: {','.join(evaluators.EVALUATORS)}.")
    flags.DEFINE_integer(
        "worst_examples",
        0,
        "lp, ada, perceptual: number of images, from the start; 0 is all.",
        lower_bound=0,
    )
    flags.DEFINE_list("ada_nets", ["edsr_small"], "ada: corruption networks.")
    flags.DEFINE_list("ada_radii", ["0.015", "0.03", "0.06"], "ada: relative radii nu.")
    flags.DEFINE_integer("ada_steps", 10, "ada: steps of gradient ascent.", lower_bound=0)
    flags.DEFINE_integer(
        "ada_restarts",
        1,
        "ada: restarts; an image counts as wrong if any succeeds. Of perturbations shared by all "
        "images the one with the largest loss counts.",
        lower_bound=1,
    )
    flags.DEFINE_string(
        "lpips_weights",
        "",
        "perceptual: folder of the run whose features bound the attacks; '' is the classifier.",
    )
    flags.DEFINE_float("lpips_bound", 0.5, "perceptual: largest LPIPS.")
    flags.DEFINE_integer(
        "lpips_steps", 40, "perceptual: steps of PPGD, and of a round of LPA.", lower_bound=1
    )
    flags.DEFINE_string("c_dir", None, "Folder of a '-C' set, 'tfds', or '' to corrupt on the fly.")
    flags.DEFINE_integer("corruption_seed", None, "Seed of corruptions on the fly.")
    flags.DEFINE_string(
        "corruption_table", None, "Parameters of corruptions on the fly: cifar or imagenet."
    )
    flags.DEFINE_integer("batch_size", None, "Images at a time, over all devices.")
    flags.DEFINE_string("split", None, "Split of clean images, such as test[:500].")
    flags.DEFINE_string("data_dir", None, "Folder or file of the data.")
    flags.DEFINE_string("out", None, "Results file; by default results.json in the workdir.")
    cli.start(main)
