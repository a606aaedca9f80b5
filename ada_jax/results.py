"""The results file: its schema, checks and means. Imports no JAX.

A results file is JSON, one object:

| field | content |
|---|---|
| schema | 1 |
| name, seed, step, config | of the run |
| published | true in files of published numbers, which have `rows` and `source` instead |
| commit, device, devices, seconds | of the code, the machine and the time |
| weights_digest, training, class_names | of the classifier; digests of weights and data |
| data | `name`, `split`, `examples` and `fingerprint` of the clean images |
| trained_on | number of these images that were in the training set; absent for 0 |
| clean | `examples`, `wrong`, `error` in percent, `loss` in nats |
| cifar10_1 | `examples`, `wrong`, `error`; so has any further image set |
| corruptions | for each corruption a list of `severity`, `examples`, `wrong`, `error` |
| corruption_source | where the corrupted images come from |
| mce_unnormalised, mean_extra | mean error over the 15 corruptions, over the extra ones |
| mean_cbar | mean error over the ten corruptions of CIFAR-10-C-bar or ImageNet-C-bar |
| mce_alexnet | ImageNet only: mCE relative to AlexNet, in percent |
| lp, lp_accuracy | for each norm and radius: attack reports; robust accuracy in percent |
| under_ada | errors under AdA's attack, a list over networks and radii; `loss` and `ssim` too |
| under_shared_ada | the same under one perturbation for all images |
| perceptual | errors under LPA and PPGD, a list |
| ada | as under_ada, at the end of training: `examples`, `error`, `ssim` for each network |

`ada_jax.evaluation.evaluators` lists which evaluator writes which field.
"""

import json
import os
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

from ada_jax import paths
from ada_jax.corruptions import parameter_tables
from ada_jax.errors import UserError

# Fields of a config that do not change the trained weights.
BOOKKEEPING = frozenset(
    {
        *("data_dir", "deepaugment.dir", "compilation_cache", "cpu_devices", "ada.remat"),
        *("log_steps", "checkpoint_epochs", "keep_checkpoints", "figure_examples"),
        *("eval_epochs", "eval_batch_size", "eval_split", "eval_sets", "eval_c_dir"),
        *("corruption_eval_epochs", "corruption_eval_examples"),
    }
)

# Groups of a config's fields, each with the field that switches it on.
SWITCHES = {"trivial_augment": "use", "noise": "share", "mixup": "alpha"}
# Groups of a config's fields that are each of the method of their name.
METHODS = ("ada", "pgd", "pat", "rlat")


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """The flattened config without fields that have no effect, such as those of other methods.

    Args:
      config: of nested dicts, with tuples or, from JSON, lists.

    Returns:
      A dict such as {'seed': 0, 'ada.nu': 0.02}.
    """
    fields = flat(config)
    off = set() if fields.get("crop_scale") else {"crop_scale", "crop_ratio"}
    later = {"ada.every": (1,), "ada.group": (1,), "ada.leaves": ("",)}
    later["ada.choice"] = (("delta",), ["delta"])
    later |= {"augmix.clean_view": (False,), "augmix.label_views": (False,)}
    later |= {"label_smoothing": (0.0,), "ema_decay": (0.0,)}
    off |= {name for name, defaults in later.items() if fields.get(name) in defaults}
    others = {*METHODS} - {fields.get("method")}
    switches = SWITCHES | {"augmix": "use", "deepaugment": "copies"}
    others |= {group for group, switch in switches.items() if not fields.get(f"{group}.{switch}")}
    off |= {name for name in fields if name.partition(".")[0] in others}
    return {name: value for name, value in fields.items() if name not in off}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, {'ada': {'nu': 0.02}} as {'ada.nu': 0.02}, all below a prefix."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v
        for name, inner in value.items()
        for k, v in flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }


def clock(seconds: float) -> str:
    """'1:02:03' or '02:03'."""
    return tqdm.tqdm.format_interval(seconds)


SCHEMA = 1
NAMES, EXTRA, CBAR = parameter_tables.NAMES, parameter_tables.EXTRA, parameter_tables.CBAR

Condition = tuple[str, int]  # a corruption and its severity; another image set and 0
Counts = dict[str, Any]
Results = dict[str, Any]


def with_earlier(
    results: Results, path: str | os.PathLike[str], *, replace: bool = False
) -> Results:
    """Adds the measurements of an earlier results file of the same weights and data, if any.

    Args:
      results: of `evaluate.new_results`.
      path: the file, which need not exist.
      replace: ignore a file of other weights.

    Returns:
      The results; what the earlier file says of the run itself is kept.

    Raises:
      UserError: the file is damaged, of another schema, or of other weights, data or corruptions.
    """
    if not paths.exists(path):
        return results
    try:
        before = dict(paths.read_json(path))
        if replace and before["weights_digest"] != results["weights_digest"]:
            return results
        flatten(os.fspath(path), before)
        source = before.get("corruption_source", {})
        for part in (before.get("config") or {}, source, source.get("files", {})):
            dict.items(part)  # TypeError unless it is a dict.
        seconds = float(before["seconds"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"The results file {path} cannot be read ({error}): rename it, or name another with "
            "--out."
        ) from error
    _check_same(results, before, path)
    if files := results.get("corruption_source", {}).get("files"):
        source = before.get("corruption_source", {})
        source["files"] = source.get("files", {}) | files
    return results | before | {"seconds": seconds} | means_of(before)


def _check_same(results: Results, before: Results, path: paths.AnyPath) -> None:
    """Checks that two results are of the same weights, data and corruptions."""

    def identity(of: Results) -> dict[str, Any]:
        config = of.get("config") or {}
        facts = {name: of.get(name) for name in ("schema", "weights_digest", "data")}
        return facts | {name: config.get(name) for name in ("classifier", "mean", "std")}

    now, then = identity(results), identity(before)
    sources = [dict(of.get("corruption_source") or {}) for of in (results, before)]
    if all(sources):
        files = [source.pop("files", {}) for source in sources]
        for facts, source, digests in zip((now, then), sources, files, strict=True):
            if all(files):  # The content counts, not the folder.
                source.pop("folder", None)
                source["files"] = {k: v for k, v in digests.items() if all(k in f for f in files)}
            facts["corruption_source"] = source
    now, then = flat(now), flat(then)
    for field in now | then:
        if now.get(field) != then.get(field):
            raise UserError(
                f"The results file {path} has {field} = {json.dumps(then.get(field))}, and this "
                f"evaluation has {json.dumps(now.get(field))}: move it away, or name another with "
                "python -m ada_jax.evaluate --out."
            )


def write(path: str | os.PathLike[str], results: Results) -> None:
    """Writes a results file whole or not at all."""
    paths.make_folder(paths.at(path).parent)
    paths.write_json(path, results)


def is_measured(results: Results, condition: Condition) -> bool:
    """Whether the results have this set, or this corruption at this severity."""
    name, severity = condition
    if not severity:
        return name in results
    return any(row["severity"] == severity for row in results.get("corruptions", {}).get(name, ()))


def with_counts(results: Results, condition: Condition, counts: Counts) -> Results:
    """The results with the counts of one more condition, and the means that it completes."""
    name, severity = condition
    measured = {field: counts[field] for field in ("examples", "wrong", "error")}
    if not severity:
        return results | {name: counts if name == "clean" else measured}
    grid = results.get("corruptions", {})
    entries = [*grid.get(name, ()), {"severity": severity, **measured}]
    entries.sort(key=lambda entry: entry["severity"])
    results = results | {"corruptions": grid | {name: entries}}
    return results | means_of(results)


def mean_error(
    grid: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str]
) -> float | None:
    """The mean over corruptions of the mean error over severities, such as the un-normalised mCE.

    Args:
      grid: results' 'corruptions'.
      names: which of them; NAMES of `corruptions` for the mCE.

    Returns:
      Percent; None where a severity of one of them is missing.

    Source: Calian et al. (2021), section 4; not divided by AlexNet's errors.
    """
    rows = [grid.get(name, ()) for name in names]
    if any(len(r) != len(parameter_tables.SEVERITIES) for r in rows):
        return None
    return float(np.mean([np.mean([row["error"] for row in r]) for r in rows]))


def alexnet_mce(grid: Mapping[str, Sequence[Mapping[str, Any]]]) -> float | None:
    """ImageNet-C's mCE: the mean over corruptions of the error relative to AlexNet's.

    Args:
      grid: results' 'corruptions'.

    Returns:
      Percent of AlexNet's error; None where a severity of one of the 15 is missing.

    Source: Hendrycks & Dietterich (2019), section 4.2.
    """
    errors = {name: mean_error(grid, [name]) for name in parameter_tables.NAMES}
    if None in errors.values():
        return None
    return float(np.mean([errors[n] / a for n, a in parameter_tables.ALEXNET_ERRORS.items()]))


def _means(grid: Collection[str]) -> dict[str, tuple[str, Sequence[str]]]:
    """The fields that are written once all severities of these corruptions are measured."""
    return {
        "mce_unnormalised": ("mCE, un-normalised", NAMES),
        "mean_extra": (f"mean of the {len(EXTRA)} extra", EXTRA),
        "mean_cbar": ("mean of C-bar", _cbar_of(grid)),
    }


def _cbar_of(measured: Collection[str]) -> Sequence[str]:
    """The ten corruptions of ImageNet-C-bar if all were measured, else CIFAR-10-C-bar's."""
    return CBAR["imagenet" if set(CBAR["imagenet"]) <= set(measured) else "cifar"]


def means_of(results: Results) -> Results:
    """The means over corruptions that are complete."""
    grid = results.get("corruptions", {})
    means = {field: mean_error(grid, names) for field, (_, names) in _means(grid).items()}
    if results["data"]["name"] == "imagenet2012":
        means["mce_alexnet"] = alexnet_mce(grid)
    return {field: mean for field, mean in means.items() if mean is not None}


def flat_errors(measured: Iterable[tuple[Condition, Counts]]) -> dict[str, float]:
    """Corruption errors for a log: 'error/NAME/SEVERITY' and 'mce', in percent."""
    errors = {f"error/{name}/{severity}": c["error"] for (name, severity), c in measured}
    # Every corruption has all its severities, so that the mean of means is the mean.
    return errors | {"mce": float(np.mean(list(errors.values())))}


def summary(results: Results) -> list[tuple[str, str]]:
    """The results as (name, value) lines of the commands' final table."""

    def of(counts: Counts) -> str:
        return f"{counts['error']:.2f}% of {counts['examples']} images"

    lines = [("clean error", of(results["clean"]))] if "clean" in results else []
    grid = results.get("corruptions", {})
    for field, (title, names) in _means(grid).items():
        errors = {name: mean_error(grid, [name]) for name in names}
        lines += [(n.replace("_", " "), f"{e:.2f}%") for n, e in errors.items() if e is not None]
        lines += [(title, f"{results[field]:.2f}%")] if field in results else []
    if "mce_alexnet" in results:
        lines.append(("mCE, AlexNet's errors as 100%", f"{results['mce_alexnet']:.2f}%"))
    for name, counts in results.items():  # other image sets
        if name != "clean" and isinstance(counts, dict) and {"error", "examples"} <= counts.keys():
            title = "CIFAR-10.1 v6" if name == "cifar10_1" else name
            lines.append((f"{title} error", of(counts)))
    for norm, balls in results.get("lp", {}).items():
        for radius, ball in balls.items():
            value = f"{ball['accuracy']:.2f}% of {ball['examples']} ({ball['autoattack']:.2f}%)"
            lines.append((f"robust, {norm} {radius} (AutoAttack alone)", value))
    for field, attack in (("under_ada", "AdA"), ("under_shared_ada", "AdA, shared by all")):
        for entry in results.get(field, []):
            about = f"{entry['net']}, nu {entry['nu']:g}, {entry['steps']} steps"
            about += f", {entry['restarts']} restarts" if entry.get("restarts", 1) > 1 else ""
            value = f"{entry['error']:.2f}% of {entry['examples']}"
            lines.append((f"error under {attack}, {about}", value))
    for entry in results.get("perceptual", []):
        title = f"error under {entry['attack']}, LPIPS of {entry['features']}, {entry['bound']:g}"
        title += f", {entry['steps']} steps" if "steps" in entry else ""
        lines.append((title, f"{entry['error']:.2f}% of {entry['examples']}"))
    return lines


# The paper's table 2, and 8/255 beside it.
RADII = {
    "l2": {"0.5": 0.5, "1": 1.0},
    "linf": {f"{n}/255": n / 255 for n in (1, 2, 4, 8)},
}


PUBLISHED = paths.EXPERIMENTS / "results" / "published.json"
GROUPS = {  # the paper's headings
    "noise": NAMES[:3],
    "blur": NAMES[3:7],
    "weather": NAMES[7:11],
    "digital": NAMES[11:],
}
MEANS = GROUPS | {"mce": NAMES, "extra": EXTRA}

_REQUIRED = (
    *("name", "seed", "step", "config", "data"),
    *("commit", "device", "seconds", "weights_digest"),
)
_REQUIRED_PUBLISHED = ("name", "label", "tables")
_OBJECTS = {
    *("config", "data", "training", "clean", "cifar10_1", "corruptions", "corruption_source"),
    *("corruption_errors", "lp", "lp_accuracy"),
}


class Result(NamedTuple):
    """One results file, or one row of a file of published numbers."""

    file: str
    fields: dict[str, Any]
    values: dict[str, float]  # see `flatten`

    @property
    def published(self) -> bool:
        """Whether the numbers are published ones, not our own."""
        return "label" in self.fields


def read(path: str) -> list[Result]:
    """Reads a results file, a run's folder, or a file of published numbers.

    Raises:
      UserError: the file is missing, truncated, of another schema, or inconsistent.
    """
    paths.check_bucket(path, path)
    file = os.path.join(path, "results.json") if paths.is_dir(path) else path
    if not paths.at(file).is_file():
        raise UserError(
            f"{file} is not there: name results files or folders of runs. To evaluate a run: "
            "python -m ada_jax.evaluate --workdir=DIR."
        )
    try:
        content = paths.read_json(file)
    except ValueError as error:  # bad JSON or bad UTF-8
        raise UserError(f"{file} is not whole JSON ({error}): evaluate again.") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise UserError(
            f"{file} has schema={schema!r} and this report reads schema={SCHEMA}: "
            "evaluate again with this version of ada_jax."
        )
    if not content.get("published"):
        return [_result(file, content, _REQUIRED, rounding=0.005)]
    source, rows = {"source": content.get("source", "")}, content.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file} has published=true and no list of rows: add them.")
    return [_result(file, row | source, _REQUIRED_PUBLISHED, rounding=0.05) for row in rows]


def _result(file: str, fields: dict[str, Any], required: Sequence[str], rounding: float) -> Result:
    if missing := [name for name in required if name not in fields]:
        raise UserError(f"{file} lacks the field {missing[0]!r}: evaluate again with this version.")
    for name in _OBJECTS & fields.keys():
        if not isinstance(fields[name], dict):
            raise UserError(
                f"{file} has {name}={fields[name]!r}, which must be an object: evaluate again."
            )
    if not isinstance(fields["name"], str) or not isinstance(fields.get("seed", 0), int):
        raise UserError(f"{file} has a name or seed of another type: evaluate again.")
    try:
        return Result(file, fields, flatten(file, fields, rounding))
    except (AttributeError, TypeError) as error:
        raise UserError(f"{file} has a value of a wrong type ({error}): evaluate again.") from error


def flatten(file: str, fields: dict[str, Any], rounding: float = 0.005) -> dict[str, float]:
    """All errors of a result by name.

    Args:
      file: name of the file, for messages.
      fields: a result; published ones may have 'corruption_errors' (by name) for 'corruptions'.
      rounding: by how much a mean in the file may differ from the mean of its errors.

    Returns:
      Percent, for what was measured: 'clean', 'cifar10_1', 'fog/3' and so on (severity 3), 'fog'
      (mean over the five severities), 'noise', 'blur', 'weather' and 'digital' (means over the
      paper's groups), 'extra' (the additional four), 'cbar' (C-bar's ten), 'mce', and 'mce/3'
      (severity 3 of the 15);
      of ImageNet 'mce_alexnet', in percent of AlexNet's errors; and, not errors but robust
      accuracies, 'l2 0.5', 'linf 1/255' and so on.

    Raises:
      UserError: an error that is not a percentage or not wrong / examples, a severity outside of
        1..5, or a mean that does not fit its errors.
    """
    errors = {k: _error(file, k, fields[k]) for k in ("clean", "cifar10_1") if k in fields}
    for name, entries in fields.get("corruptions", {}).items():
        _check_severities(file, name, entries)
        errors |= {f"{name}/{e['severity']}": _error(file, name, e) for e in entries}
        if len(entries) == len(parameter_tables.SEVERITIES):
            errors[name] = statistics.fmean(e["error"] for e in entries)
    for name, error in fields.get("corruption_errors", {}).items():
        errors[name] = _error(file, name, {"error": error})
    for norm, accuracies in fields.get("lp_accuracy", {}).items():
        for radius, accuracy in accuracies.items():
            errors[f"{norm} {radius}"] = _error(file, f"{norm} {radius}", {"error": accuracy})
    means = MEANS | {"cbar": _cbar_of(errors)}
    means |= {f"mce/{s}": [f"{name}/{s}" for name in NAMES] for s in parameter_tables.SEVERITIES}
    for key, names in means.items():
        if all(name in errors for name in names):
            errors[key] = statistics.fmean(errors[name] for name in names)
    fields_of = {"mce": "mce_unnormalised", "extra": "mean_extra", "cbar": "mean_cbar"}
    for key, field in fields_of.items():
        if field in fields:
            stated = _error(file, field, {"error": fields[field]})
            if abs(errors.get(key, stated) - stated) > rounding:
                raise UserError(
                    f"{file} has {field}={stated}, but its corruptions give {errors[key]:.3f}: "
                    "evaluate again."
                )
            errors[key] = stated
    if "mce_alexnet" in fields and all(name in errors for name in NAMES):
        relative = (errors[name] / share for name, share in parameter_tables.ALEXNET_ERRORS.items())
        errors["mce_alexnet"] = statistics.fmean(relative)
    return errors


def _check_severities(file: str, name: str, entries: Any) -> None:
    rows = isinstance(entries, list) and all(isinstance(e, dict) for e in entries)
    severities = [e.get("severity") for e in entries] if rows else entries
    if not rows or len({*severities} & {*parameter_tables.SEVERITIES}) < len(entries):
        raise UserError(
            f"{file} has the severities {severities!r} for {name}: each of 1..5 may occur once; "
            "evaluate again."
        )


def _error(file: str, what: str, entry: dict[str, Any]) -> float:
    """The error of an entry in percent; see `flatten`."""
    error = entry.get("error")
    if not isinstance(error, int | float) or not 0 <= error <= 100:
        raise UserError(
            f"{file} has error={error!r} for {what}, which must be a percentage: evaluate again."
        )
    wrong, examples = entry.get("wrong"), entry.get("examples")
    if None not in (wrong, examples) and abs(100 * wrong - error * examples) > 0.01 * examples:
        raise UserError(
            f"{file} has error={error} for {what}, but {wrong} wrong of {examples}: evaluate again."
        )
    return float(error)
