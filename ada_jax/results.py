"""The results file: its schema, checks and means."""

import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm
from absl import logging

from ada_jax import paths
from ada_jax.corruptions import parameter_tables
from ada_jax.errors import UserError

# Fields of a config that change what is written, kept or measured, not what is trained.
BOOKKEEPING = frozenset(
    {
        *("data_dir", "deepaugment.dir", "compilation_cache", "cpu_devices", "ada.remat"),
        *("log_steps", "checkpoint_epochs", "keep_checkpoints", "figure_examples"),
        *("eval_epochs", "eval_batch_size", "eval_split", "eval_sets", "eval_c_dir"),
        *("corruption_eval_epochs", "corruption_eval_examples"),
    }
)


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """A config, flattened, without the fields that older ones lack where they are switched off.

    Args:
      config: of nested dicts, with tuples or, from JSON, lists.

    Returns:
      As {'seed': 0, 'ada.nu': 0.02}.
    """
    fields = flat(config)
    off = set() if fields.get("crop_scale") else {"crop_scale", "crop_ratio"}
    off |= {"ada.every"} if fields.get("ada.every") == 1 else set()
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

Cell = tuple[str, int]  # A corruption and its severity; another set and 0.
Counts = dict[str, Any]
Results = dict[str, Any]


def with_earlier(
    results: Results,
    path: str | os.PathLike[str],
    *,
    replace: bool = False,
    recognises: Callable[[str | None], bool] = lambda fingerprint: False,
) -> Results:
    """Adds what a results file of the same weights and data has measured already, if there is one.

    Args:
      results: from `new_results`.
      path: the file, which need not exist.
      replace: take a file of other weights for none.
      recognises: whether a fingerprint, perhaps of an older version, is of the same images; what
        is returned has the one of now.

    Raises:
      UserError: it is damaged, of another schema, or of other weights, data or corruptions.
    """
    if not paths.exists(path):
        return results
    try:
        before = dict(paths.read_json(path))
        if replace and before["weights_digest"] != results["weights_digest"]:
            return results
        if recognises(before["data"].get("fingerprint")):
            if before["data"]["fingerprint"] != results["data"]["fingerprint"]:
                logging.warning(
                    "%s is of an older version, which knew data by 256 examples: rename it to "
                    "measure anew if the others may have changed.",
                    path,
                )
            before["data"]["fingerprint"] = results["data"]["fingerprint"]
        _check_same(results, before, path)
        _check_rows(before)
        seconds = float(before["seconds"])
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"The results file {path} cannot be read ({error!r}): rename it, or name another with "
            "--out."
        ) from error
    if "corruption_source" in results and "corruption_source" in before:
        files = [of["corruption_source"].get("files", {}) for of in (before, results)]
        if any(files):
            before["corruption_source"]["files"] = files[0] | files[1]
    # What the file says of the run itself stays, as what it was trained and first measured by.
    return results | before | {"seconds": seconds} | means_of(before)


def _check_same(results: Results, before: Results, path: paths.AnyPath) -> None:
    """Refuses a file whose numbers cannot stand beside those that are to be measured."""

    def facts(of: Results) -> dict[str, Any]:
        kept = {name: of.get(name) for name in ("schema", "weights_digest", "data")}
        config = dict(of.get("config") or {})
        return kept | {name: config.get(name) for name in ("classifier", "mean", "std")}

    now, then = facts(results), facts(before)
    if "corruption_source" in results and "corruption_source" in before:
        now["corruption_source"] = dict(results["corruption_source"])
        then["corruption_source"] = dict(before["corruption_source"])
        files = [of["corruption_source"].pop("files", {}) for of in (now, then)]
        if all(files):  # Of the images themselves, wherever they lie.
            both = files[0].keys() & files[1].keys()
            for of, digests in zip((now, then), files, strict=True):
                of["corruption_source"].pop("folder", None)
                of["corruption_source.files"] = {name: digests[name] for name in sorted(both)}
    for field, value in now.items():
        if (old := then[field]) == value:
            continue
        if isinstance(value, dict) and isinstance(old, dict):  # What differs of them is enough.
            part = next(k for k in (*value, *old) if value.get(k) != old.get(k))
            field, value, old = f"{field}.{part}", value.get(part), old.get(part)
        raise UserError(
            f"The results file {path} has {field} = {json.dumps(old)}, and this evaluation has "
            f"{json.dumps(value)}: move it away, or name another with "
            "python -m ada_jax.evaluate --out."
        )


def _check_rows(results: Results) -> None:
    for name, rows in results.get("corruptions", {}).items():
        severities = [row["severity"] for row in rows]
        known = name in parameter_tables.NAMES + parameter_tables.EXTRA
        if not known or not set(severities) <= set(parameter_tables.SEVERITIES):
            raise ValueError(f"no corruption {name} of the severities {severities}")
        if len(set(severities)) != len(rows):
            raise ValueError(f"a severity of {name} is there twice")
        for row in rows:
            if row["error"] != 100 * row["wrong"] / row["examples"]:
                raise ValueError(f"the counts and errors of {name} do not agree")


def write(path: str | os.PathLike[str], results: Results) -> None:
    """Writes a results file whole or not at all; of several processes call it in the first."""
    path = paths.at(path)
    try:
        paths.make_folder(path.parent)
        paths.write_json(path, results)
    except OSError as error:
        raise UserError(
            f"The results file {path} cannot be written ({error.strerror}): free some space, or "
            "name another with --out."
        ) from error


def has_cell(results: Results, cell: Cell) -> bool:
    """Whether a cell has been measured."""
    name, severity = cell
    if not severity:
        return name in results
    return any(row["severity"] == severity for row in results.get("corruptions", {}).get(name, ()))


def with_cell(results: Results, cell: Cell, counts: Counts) -> Results:
    """The results with one more cell."""
    name, severity = cell
    measured = {field: counts[field] for field in ("examples", "wrong", "error")}
    if not severity:
        return results | {name: counts if name == "clean" else measured}
    grid = results.get("corruptions", {})
    rows = [*grid.get(name, ()), {"severity": severity, **measured}]
    results = results | {"corruptions": grid | {name: sorted(rows, key=lambda r: r["severity"])}}
    return results | means_of(results)


def mean_error(
    grid: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str]
) -> float | None:
    """The mean over corruptions of the mean error over severities: mCE, un-normalised.

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


def means_of(results: Results) -> Results:
    """The means that the results are complete enough for."""
    names = {"mce_unnormalised": parameter_tables.NAMES, "mean_extra": parameter_tables.EXTRA}
    grid = results.get("corruptions", {})
    means = {f: mean_error(grid, names[f]) for f in names}
    if results["data"]["name"] == "imagenet2012":
        means["mce_alexnet"] = alexnet_mce(grid)
    return {field: mean for field, mean in means.items() if mean is not None}


def flat_errors(
    measured: Iterable[tuple[Cell, Counts]],
) -> dict[str, float]:
    """The corruption errors of `measure` for a log: 'error/NAME/SEVERITY' and 'mce', in percent."""
    errors = {f"error/{name}/{severity}": c["error"] for (name, severity), c in measured}
    # Every corruption has all its severities, so that the mean of means is the mean.
    return errors | {"mce": float(np.mean(list(errors.values())))}


def rows(results: Results) -> list[tuple[str, str]]:
    """The results as a table's (name, value)."""

    def of(counts: Counts) -> str:
        return f"{counts['error']:.2f}% of {counts['examples']} images"

    shown = [("clean error", of(results["clean"]))] if "clean" in results else []
    grid = results.get("corruptions", {})
    for names, field, title in (
        (parameter_tables.NAMES, "mce_unnormalised", "mCE, un-normalised"),
        (parameter_tables.EXTRA, "mean_extra", "mean of the 4 extra"),
    ):
        errors = {name: mean_error(grid, [name]) for name in names}
        shown += [(n.replace("_", " "), f"{e:.2f}%") for n, e in errors.items() if e is not None]
        shown += [(title, f"{results[field]:.2f}%")] if field in results else []
    if "mce_alexnet" in results:
        shown.append(("mCE, AlexNet's errors as 100%", f"{results['mce_alexnet']:.2f}%"))
    if "cifar10_1" in results:
        shown.append(("CIFAR-10.1 v6 error", of(results["cifar10_1"])))
    return shown


# The paper's table 2, and 8/255 beside it.
RADII = {
    "l2": {"0.5": 0.5, "1": 1.0},
    "linf": {f"{n}/255": n / 255 for n in (1, 2, 4, 8)},
}


PUBLISHED = paths.EXPERIMENTS / "results" / "published.json"
NAMES, EXTRA = parameter_tables.NAMES, parameter_tables.EXTRA
GROUPS = {  # the paper's headings
    "noise": NAMES[:3],
    "blur": NAMES[3:7],
    "weather": NAMES[7:11],
    "digital": NAMES[11:],
}
MEANS = GROUPS | {"mce": NAMES, "extra": EXTRA}

_FIELDS: dict[str, Any] = {
    "name": str,
    "seed": int | None,
    "step": int | None,
    "config": dict,
    "data": dict,
    "commit": str,
    "device": str,
    "seconds": int | float,
    "weights_digest": str,
}
_PUBLISHED_FIELDS: dict[str, Any] = {"name": str, "label": str, "tables": list}
_SETS: dict[str, Any] = {  # absent where they were not evaluated
    "clean": dict,
    "cifar10_1": dict,
    "corruptions": dict,
    "corruption_errors": dict,
    "corruption_source": dict,
    "mce_unnormalised": int | float,
    "mean_extra": int | float,
    "ada": dict,
    "lp_accuracy": dict,
    "training": dict,
    "trained_on": int,
}


class Result(NamedTuple):
    """One results file, or one row of a file of published numbers."""

    file: str
    fields: dict[str, Any]
    values: dict[str, float]  # see `flatten`

    @property
    def published(self) -> bool:
        """Whether it is somebody else's."""
        return "label" in self.fields


# ------------------------------------------------------------------------ results files


def read(path: str) -> list[Result]:
    """The results in a file or in a run's folder: one, or the many rows of published numbers.

    Raises:
      UserError: there is no such file, it is cut short, of another schema, or its numbers
        contradict each other.
    """
    paths.check_bucket(path, path)
    file = os.path.join(path, "results.json") if paths.is_dir(path) else path
    if not paths.at(file).is_file():
        raise UserError(
            f"{file} is not there: name results files or folders of runs, and evaluate a run first "
            "with python -m ada_jax.evaluate --workdir=DIR."
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
    if content.get("published"):
        _check_fields(file, content, {"rows": list})
        source = {"source": content.get("source", "")}
        return [
            _result(file, row | source, _PUBLISHED_FIELDS, rounding=0.05) for row in content["rows"]
        ]
    return [_result(file, content, _FIELDS, rounding=0.005)]


def _result(file: str, fields: dict[str, Any], needed: dict[str, Any], rounding: float) -> Result:
    _check_fields(file, fields, needed)
    _check_fields(file, fields, {k: kind for k, kind in _SETS.items() if k in fields})
    return Result(file, fields, flatten(file, fields, rounding))


def _check_fields(file: str, fields: dict[str, Any], kinds: dict[str, Any]) -> None:
    for key, kind in kinds.items():
        if key not in fields:
            raise UserError(f"{file} lacks the field {key!r}: evaluate again with this version.")
        if not isinstance(fields[key], kind):
            raise UserError(
                f"{file} has {key}={fields[key]!r}, which is not of the kind "
                f"{getattr(kind, '__name__', kind)}: evaluate again with this version."
            )


def flatten(file: str, fields: dict[str, Any], rounding: float = 0.005) -> dict[str, float]:
    """All errors of a result under plain names.

    Args:
      file: for messages.
      fields: a result of schema 1; 'corruption_errors' (by name) may stand for 'corruptions'.
      rounding: by how much a mean in the file may differ from the mean of what it is of.

    Returns:
      Percent, for what was measured: 'clean', 'cifar10_1', 'fog/3' and so on (severity 3), 'fog'
      (mean over the five severities), 'noise', 'blur', 'weather' and 'digital' (means over the
      paper's groups), 'extra' (the additional four), 'mce', and 'mce/3' (severity 3 of the 15);
      of ImageNet 'mce_alexnet', in percent of AlexNet's errors; and, not errors but robust
      accuracies, 'l2 0.5', 'linf 1/255' and so on.

    Raises:
      UserError: an error that is no percentage or not wrong / examples, an unknown corruption or
        severity, or a mean that is not the mean.
    """
    errors = {k: _error(file, k, fields[k]) for k in ("clean", "cifar10_1") if k in fields}
    for name, entries in fields.get("corruptions", {}).items():
        _check_corruption(file, name, entries)
        errors |= {f"{name}/{e['severity']}": _error(file, name, e) for e in entries}
        if len(entries) == len(parameter_tables.SEVERITIES):
            errors[name] = statistics.fmean(e["error"] for e in entries)
    for name, error in fields.get("corruption_errors", {}).items():
        _check_corruption(file, name, [])
        errors[name] = _error(file, name, {"error": error})
    for norm, accuracies in fields.get("lp_accuracy", {}).items():
        for radius, accuracy in accuracies.items():
            errors[f"{norm} {radius}"] = _error(file, f"{norm} {radius}", {"error": accuracy})
    means = MEANS | {
        f"mce/{s}": [f"{name}/{s}" for name in NAMES] for s in parameter_tables.SEVERITIES
    }
    for key, names in means.items():
        if all(name in errors for name in names):
            errors[key] = statistics.fmean(errors[name] for name in names)
    for key, field in (("mce", "mce_unnormalised"), ("extra", "mean_extra")):
        if field in fields:
            stated = _error(file, field, {"error": fields[field]})
            if abs(errors.get(key, stated) - stated) > rounding:
                raise UserError(
                    f"{file} has {field}={stated} and its corruptions give {errors[key]:.3f}: "
                    "evaluate again."
                )
            errors[key] = stated
    if "mce_alexnet" in fields and "mce" in errors:
        relative = (errors[name] / share for name, share in parameter_tables.ALEXNET_ERRORS.items())
        errors["mce_alexnet"] = statistics.fmean(relative)
    return errors


def _check_corruption(file: str, name: str, entries: Any) -> None:
    if name not in NAMES + EXTRA:
        raise UserError(
            f"{file} has the unknown corruption {name!r}: known are {', '.join(NAMES + EXTRA)}."
        )
    rows = isinstance(entries, list) and all(isinstance(e, dict) for e in entries)
    severities = [e.get("severity") for e in entries] if rows else entries
    if not rows or len({*severities} & {*parameter_tables.SEVERITIES}) < len(entries):
        raise UserError(
            f"{file} has the severities {severities!r} for {name}: each of 1..5 may be there once; "
            "evaluate again."
        )


def _error(file: str, what: str, entry: dict[str, Any]) -> float:
    """The error of an entry in percent; see `flatten`."""
    error = entry.get("error")
    if not isinstance(error, int | float) or not 0 <= error <= 100:
        raise UserError(
            f"{file} has error={error!r} for {what}, which is no percentage: evaluate again."
        )
    wrong, examples = entry.get("wrong"), entry.get("examples")
    if None not in (wrong, examples) and abs(100 * wrong - error * examples) > 0.01 * examples:
        raise UserError(
            f"{file} has error={error} for {what}, and {wrong} wrong of {examples}: evaluate again."
        )
    return float(error)
