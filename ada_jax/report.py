"""Tables and pictures out of results files; nothing in them is typed by hand.

python -m ada_jax.report RESULTS...                      a results.json or a run's folder each
python -m ada_jax.report RESULTS... --paper              with the paper's own numbers beside
python -m ada_jax.report --paper --table=3 --format=csv  the paper's table alone
python -m ada_jax.report RESULTS... --figures=DIR        pictures, and a page with everything

Table 1 has a line for each method, table 2 its accuracy in balls of pixels, table 3 its errors on
each corruption; 'list' has every results file, where it comes from and what it was measured on;
'beside' is table 1 with the paper's clean error and mCE in columns of their own.
Results that share their name and settings and differ in seed become one line, with mean and
standard deviation. All errors are in percent, and mCE is the plain mean over corruptions and
severities (un-normalised).
"""

import hashlib
import json
import math
import os
import re
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from absl import flags, logging

from ada_jax import (
    cli,
    corruptions,
    evaluate,
    figures,
    gallery,
    locks,
    logbook,
    paths,
    tables,
    worst_case,
)
from ada_jax.errors import UserError, require_extra
from ada_jax.tables import Cell, Table

PUBLISHED = paths.EXPERIMENTS / "results" / "published.json"
METHODS = ("nominal", "ada", "deepaugment", "deepaugment10x", "augmix")
NAMES, EXTRA = corruptions.NAMES, corruptions.EXTRA
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
# Two runs are one method, whatever these are. What was evaluated is in 'data' and
# 'corruption_source'.
_BOOKKEEPING = logbook.BOOKKEEPING | {"seed"}


class Result(NamedTuple):
    """One results file, or one row of a file of published numbers."""

    file: str
    fields: dict[str, Any]
    values: dict[str, float]  # see `flatten`

    @property
    def published(self) -> bool:
        """Whether it is somebody else's."""
        return "label" in self.fields


class Row(NamedTuple):
    """A line of a table before its columns are chosen."""

    label: str
    method: str  # the paper's row it compares with; '' for none
    values: dict[str, float]  # means over seeds; what is missing is absent
    spread: dict[str, float]  # their standard deviations, where there are several seeds
    seeds: int = 0  # 0 for published numbers
    measured_on: str = ""
    tables: tuple[str, ...] = ()  # of the paper, that have this row
    sampling: float = 0.0  # standard error of the clean error, of one seed; 0 is unknown
    attacked: str = ""  # what the accuracies in balls are of, in words


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
    if schema != evaluate.SCHEMA:
        raise UserError(
            f"{file} has schema={schema!r} and this report reads schema={evaluate.SCHEMA}: "
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
        if len(entries) == len(corruptions.SEVERITIES):
            errors[name] = statistics.fmean(e["error"] for e in entries)
    for name, error in fields.get("corruption_errors", {}).items():
        _check_corruption(file, name, [])
        errors[name] = _error(file, name, {"error": error})
    for norm, accuracies in fields.get("lp_accuracy", {}).items():
        for radius, accuracy in accuracies.items():
            errors[f"{norm} {radius}"] = _error(file, f"{norm} {radius}", {"error": accuracy})
    means = MEANS | {f"mce/{s}": [f"{name}/{s}" for name in NAMES] for s in corruptions.SEVERITIES}
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
        relative = (errors[name] / share for name, share in corruptions.ALEXNET_ERRORS.items())
        errors["mce_alexnet"] = statistics.fmean(relative)
    return errors


def _check_corruption(file: str, name: str, entries: Any) -> None:
    if name not in NAMES + EXTRA:
        raise UserError(
            f"{file} has the unknown corruption {name!r}: known are {', '.join(NAMES + EXTRA)}."
        )
    rows = isinstance(entries, list) and all(isinstance(e, dict) for e in entries)
    severities = [e.get("severity") for e in entries] if rows else entries
    if not rows or len({*severities} & {*corruptions.SEVERITIES}) < len(entries):
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


def method(name: str, config: dict[str, Any]) -> str:
    """Which row of the paper a run compares with.

    The words of `METHODS` in the run's name, split at '_', ',' and '+', say so, in the order of
    `METHODS`: 'cifar10_ada+augmix_small' is 'ada+augmix', and 'small' says nothing. Between
    'nominal' and 'ada' config.method decides, where it is there.

    Returns:
      As 'ada+deepaugment10x+augmix'; '' where nothing says what the method is.
    """
    said, trained = (
        set(re.split("[_,+]", str(words))) & set(METHODS)
        for words in (name, config.get("method", ""))
    )
    words = trained | (said - {"nominal", "ada"}) if trained else said
    if len(words) > 1:
        words.discard("nominal")
    return "+".join(word for word in METHODS if word in words)


# ------------------------------------------------------------------------ rows


def rows(results: Iterable[Result]) -> list[Row]:
    """One row for each method, sorted by mCE: results that differ in seed alone are joined.

    Where several settings share a name, what differs is added to it. A value that some of the
    seeds lack is absent.

    Raises:
      UserError: two results have the same name, settings and seed.
    """
    joined: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        key = (result.fields["name"], json.dumps(settings(result), sort_keys=True, default=str))
        joined.setdefault(key, []).append(result)
    found = []
    for (name, _), same in joined.items():
        _check_seeds(same)
        if same[0].published:
            label, others = f"{same[0].fields['label']} (paper)", []
        else:
            label = name
            others = [s[0] for (n, _), s in joined.items() if n == name and not s[0].published]
        keys = set.intersection(*(set(r.values) for r in same))
        lists = {k: [r.values[k] for r in same] for k in sorted(keys)}
        found.append(
            Row(
                label=label + _difference(same[0], others),
                method=_paper_row(same[0]),
                values={k: statistics.fmean(v) for k, v in lists.items()},
                spread={k: statistics.stdev(v) for k, v in lists.items() if len(same) > 1},
                seeds=0 if same[0].published else len(same),
                measured_on=measured_on(same[0]),
                tables=tuple(same[0].fields.get("tables", ())),
                sampling=max(map(_sampling_error, same)),
                attacked=attacked_on(same[0]),
            )
        )
    return sorted(found, key=lambda row: _by_mce(row.values))


def _by_mce(values: dict[str, float]) -> tuple[float, float]:
    return values.get("mce", math.inf), values.get("clean", math.inf)


def _check_seeds(same: list[Result]) -> None:
    files: dict[Any, str] = {}
    for result in same:
        seed = result.fields.get("seed")
        if seed in files:
            raise UserError(
                f"{files[seed]} and {result.file} have the same name={result.fields['name']}, "
                f"settings and seed={seed}: leave one of them out."
            )
        files[seed] = result.file


def settings(result: Result) -> dict[str, Any]:
    """What must agree for results to differ in seed alone: config, steps, data, corruptions.

    What a run was trained from and measured on counts by its content, as far as its file has
    digests: files of older versions have none, and are joined among themselves. Weights that
    training started from count by what they were trained from in turn, see `train.describe`.
    """
    flat = {"published": result.published, "corrupted": _corrupted(result)}
    flat |= logbook.comparable(result.fields.get("config") or {})
    for key in ("data", "corruption_source", "step"):
        flat |= logbook.flat(result.fields.get(key), key)
    digests = logbook.flat(result.fields.get("training") or {}, "training")
    flat |= {name: str(digest)[:12] for name, digest in digests.items()}
    if files := (result.fields.get("corruption_source") or {}).get("files"):
        where = ("corruption_source.folder", "corruption_source.files")
        flat = {k: v for k, v in flat.items() if not k.startswith(where)}
        text = json.dumps(files, sort_keys=True).encode()
        flat["corruption_source.files"] = hashlib.sha256(text).hexdigest()[:12]
    if flat.get("init_weights"):
        flat["init_weights"] = "trained"  # each seed's its own
    unused = {"ada.microbatch"} if flat.get("ada.batch_norm") != "batch" else set()
    return {k: v for k, v in flat.items() if k not in _BOOKKEEPING | unused}


def _difference(result: Result, others: list[Result]) -> str:
    """In brackets, the settings of a result that others of its name do not share."""
    mine, missing = settings(result), object()
    differing = [
        k for k, v in mine.items() if any(settings(o).get(k, missing) != v for o in others)
    ]
    return f" ({', '.join(f'{k}={mine[k]}' for k in differing)})" if differing else ""


def _paper_row(result: Result) -> str:
    fields = result.fields
    if result.published:
        return fields["name"]
    config = fields["config"]
    # The paper has nothing to compare with.
    other = config.get("init_weights") or config.get("ada", {}).get("steps") == 0
    if other or fields["data"].get("name") != "cifar10":
        return ""
    return method(fields["name"], config)


def _corrupted(result: Result) -> int | None:
    """How many images the corruptions were measured on, where it is one number for all."""
    cells = [e for entries in result.fields.get("corruptions", {}).values() for e in entries]
    counts = {cell.get("examples") for cell in cells}
    return counts.pop() if len(counts) == 1 else None


def _sampling_error(result: Result) -> float:
    """The standard error in percent of the clean error for so many images; 0 is unknown."""
    clean = result.fields.get("clean", {})
    if result.published or not clean.get("examples"):
        return 0.0
    return math.sqrt(clean["error"] * (100 - clean["error"]) / clean["examples"])


def measured_on(result: Result) -> str:
    """What a result was measured on, in words; where it is from, for published numbers."""
    if result.published:
        return result.fields["source"].rstrip(".")
    data, source = result.fields["data"], result.fields.get("corruption_source", {})
    words = f"{data.get('examples')} images of {data.get('name')}, split {data.get('split')}"
    if count := result.fields.get("trained_on"):
        words += f", {count} of them TRAINED ON"
    if not source:
        return words
    count = _corrupted(result)
    words += ", " if count == data.get("examples") else f", {count} of them "
    if source.get("kind") == "on_the_fly":
        table = f"seed {source.get('seed')}, {source.get('table')} table"
        return f"{words}corrupted on the fly ({table})"
    return f"{words}corrupted in {source.get('folder', source.get('kind'))}"


def attacked_on(result: Result) -> str:
    """How many images were attacked in balls of pixels, and by what; '' where it is not one way."""
    balls = [ball for radii in result.fields.get("lp", {}).values() for ball in radii.values()]
    ways = {(ball.get("examples"), ball.get("attacks")) for ball in balls}
    if len(ways) != 1 or None in next(iter(ways)):
        return ""
    ((count, attacks),) = ways
    error = 50 / math.sqrt(count)
    return f"{attacks} on {count} images, so that standard errors are at most {error:.1f}"


# ------------------------------------------------------------------------ tables

_SUMMARY = {  # values, headings and digits
    "clean": ("clean error", 2),
    "mce": ("mCE, un-normalised", 2),
    "mce_alexnet": ("mCE, AlexNet's errors as 100%", 2),
    **{group: (group, 1) for group in GROUPS},
    "extra": ("extra four", 1),
    "cifar10_1": ("CIFAR-10.1", 2),
}
_EACH = {
    "clean": ("clean error", 2),
    "mce": ("mCE, un-normalised", 2),
    **{name: (name.split("_")[0], 1) for name in NAMES},
    **{name: (name.replace("_", " ").removesuffix(" noise"), 1) for name in EXTRA},
}
_BALLS = {
    "clean": ("clean error", 2),
    **{f"l2 {r}": (f"l2 {r}", 2) for r in worst_case.RADII["l2"]},
    **{f"linf {r}": (f"linf {r}", 2) for r in worst_case.RADII["linf"]},
    "cifar10_1": ("CIFAR-10.1", 2),
}
_OPTIONAL = {"mce_alexnet", "extra", "cifar10_1", *EXTRA, *_BALLS} - {
    "clean"
}  # columns that are left out where nobody has them


def table_1(ours: list[Row], paper: list[Row]) -> Table:
    """A line for each method: clean error, mCE, means over the paper's groups of corruptions.

    Args:
      ours: rows of results.
      paper: published rows; those of the paper's table 1 get lines of their own, and below each of
        ours comes its difference to the paper's, ours minus theirs.

    Returns:
      A table sorted by mCE, the paper's lines among ours.
    """
    return _table("Table 1: robustness to common corruptions", _SUMMARY, ours, paper, "1")


def table_beside(ours: list[Row], paper: list[Row]) -> Table:
    """Our lines of `table_1`, each with the paper's clean error and mCE of its method beside."""
    theirs = {row.method: row.values for row in paper}
    head, lines = ["setup"], [[Cell(row.label)] for row in ours]
    for key in ("clean", "mce", *GROUPS):
        heading, digits = _SUMMARY[key]
        compared = key not in GROUPS
        head += [heading, f"{heading.split(',')[0]}, paper"] if compared else [heading]
        for line, row in zip(lines, ours, strict=True):
            line.append(Cell(row.values.get(key), digits, row.spread.get(key)))
            if compared:
                line.append(Cell(theirs.get(row.method, {}).get(key), digits))
    groups = [[[*line, Cell(row.seeds)]] for line, row in zip(lines, ours, strict=True)]
    return Table("Our results beside the paper's", [*head, "seeds"], groups, _notes(ours))


def table_2(ours: list[Row], paper: list[Row]) -> Table:
    """As `table_1`, with robust accuracies: the worst case of AutoAttack and MultiTargeted."""
    shown = [row for row in ours if any(key in row.values for key in _BALLS if " " in key)]
    return _table("Table 2: accuracy in balls of pixels", _BALLS, shown, paper, "2")


def table_3(ours: list[Row], paper: list[Row]) -> Table:
    """As `table_1`, with the error on every corruption, averaged over its five severities."""
    return _table("Table 3: errors on each corruption", _EACH, ours, paper, "3")


def _table(
    title: str, columns: dict[str, tuple[str, int]], ours: list[Row], paper: list[Row], name: str
) -> Table:
    by_method = {row.method: row for row in paper}
    shown = sorted(
        [*ours, *(r for r in paper if name in r.tables)], key=lambda row: _by_mce(row.values)
    )
    columns = {
        key: column
        for key, column in columns.items()
        if key not in _OPTIONAL or any(key in row.values for row in shown)
    }
    groups = []
    for row in shown:
        cells = [Cell(row.values.get(k), d, row.spread.get(k)) for k, (_, d) in columns.items()]
        group = [[Cell(row.label), *cells, Cell(row.seeds or None)]]
        if row.seeds and row.method in by_method:
            theirs = by_method[row.method]
            cells = [
                Cell(row.values[k] - theirs.values[k], d, signed=True)
                if k in row.values and k in theirs.values
                else Cell()
                for k, (_, d) in columns.items()
            ]
            group.append([Cell(f"minus {theirs.label}"), *cells, Cell()])
        groups.append(group)
    head = ["setup", *(heading for heading, _ in columns.values()), "seeds"]
    return Table(title, head, groups, _notes_on_balls(shown) if name == "2" else _notes(shown))


def _notes(shown: list[Row]) -> list[str]:
    notes = ["Errors in percent; mCE is the mean over the 15 corruptions and five severities."]
    if any(row.seeds > 1 for row in shown):
        notes.append("Over seeds: mean ± sample standard deviation.")
    if errors := [row.sampling for row in shown if row.sampling]:
        notes.append(
            f"Standard error of a clean error for its number of images: at most {max(errors):.2f}; "
            "of a mean over corruptions of the same images about as much."
        )
    return notes + _where(shown, {row.label: row.measured_on for row in shown})


def _notes_on_balls(shown: list[Row]) -> list[str]:
    notes = ["In percent; of the accuracies, an image counts that no attack broke."]
    if any(row.seeds > 1 for row in shown):
        notes.append("Over seeds: mean ± sample standard deviation.")
    of = {row.label: row.attacked or row.measured_on for row in shown}
    return notes + _where(shown, of)


def _where(shown: list[Row], words_of: dict[str, str]) -> list[str]:
    """A note for all rows of which the same words are true."""
    where: dict[str, list[str]] = {}
    for row in shown:
        labels = where.setdefault(words_of[row.label], [])
        labels += [row.label] if row.seeds else ["(paper)"] * (not labels)
    ours = [words for words, labels in where.items() if labels != ["(paper)"]]
    names = {words: ", ".join(labels) for words, labels in where.items()}
    if len(ours) == 1 and len(where[ours[0]]) > 1:
        names[ours[0]] = "all rows but the paper's" if len(where) > 1 else "all rows"
    return [f"{name}: {words}." for words, name in names.items()]


def table_list(results: list[Result], paper: list[Row]) -> Table:
    """A line for each results file, sorted by mCE, with all that says where it comes from.

    Args:
      results: of `read`.
      paper: published rows to compare with; where there are any, each line has the mCE of the
        paper's row of its method and the difference, ours minus theirs.
    """
    theirs = {row.method: row.values["mce"] for row in paper if "mce" in row.values}
    sets = [k for k in ("clean", "extra", "cifar10_1") if any(k in r.values for r in results)]
    lines = []
    for result in sorted(results, key=lambda r: _by_mce(r.values)):
        fields, mce = result.fields, result.values.get("mce")
        beside = theirs.get(_paper_row(result))
        difference = None if None in (mce, beside) else mce - beside
        lines.append(
            [
                Cell(fields["name"]),
                Cell(fields.get("seed")),
                Cell(mce, 2),
                *([Cell(beside, 2), Cell(difference, 2, signed=True)] if paper else []),
                *(Cell(result.values.get(key), 2) for key in sets),
                Cell(fields.get("step")),
                Cell(measured_on(result)),
                Cell(fields.get("device")),
                Cell(logbook.clock(fields["seconds"]) if "seconds" in fields else None),
                Cell(fields.get("commit", "")[:12]),
                Cell(fields.get("weights_digest", "")[:12]),
                Cell(result.file),
            ]
        )
    head = ["name", "seed", "mCE, un-normalised", *(["mCE, paper", "difference"] if paper else [])]
    head += [_SUMMARY[key][0] for key in sets]
    head += ["step", "measured on", "device", "time", "commit", "weights", "file"]
    return Table("All results", head, [[line] for line in lines])


# ------------------------------------------------------------------------ pictures


def draw(
    folder: str, ours: list[Row], paper: list[Row], results: list[Result]
) -> list[gallery.Picture]:
    """Draws what the results have the numbers for.

    Args:
      folder: where the PNGs go.
      ours: rows of results.
      paper: published rows; those that ours compare with are drawn beside them, all where there
        are none of ours.
      results: the results files, for what lies beside them: a run's metrics.jsonl with records of
        kind 'corruptions', and its pictures adversarial_*.png.

    Returns:
      The pictures in the order of the page: bars, curves, maps, pairs.
    """
    compared = {row.method for row in ours}
    shown = ours + [row for row in paper if row.method in compared or not ours]
    drawn = []
    for name, draw_rows, what in (
        ("corruptions", _bars, "Error on each corruption, mean over the five severities"),
        ("severities", _curves, "Error at each severity"),
    ):
        path = os.path.join(folder, f"{name}.png")
        if labels := draw_rows(path, shown):
            drawn.append(gallery.Picture(path, _alt(what, shown), f"{what}: {labels}.", "figures"))
    return drawn + _maps(folder, results) + _pairs(results)


def _bars(path: str, shown: list[Row]) -> str:
    bars = {
        row.label: {
            name: {"mean": row.values[name], "std": row.spread.get(name, math.nan)}
            for name in NAMES + EXTRA
            if name in row.values
        }
        for row in shown
    }
    bars = {label: found for label, found in bars.items() if found}
    if bars:
        figures.corruption_bars(path, bars, order=NAMES + EXTRA)
    return ", ".join(bars)


def _curves(path: str, shown: list[Row]) -> str:
    curves = {
        row.label: {
            name: [row.values.get(f"{name}/{s}", math.nan) for s in corruptions.SEVERITIES]
            for name in ("mce", *NAMES, *EXTRA)
            if any(f"{name}/{s}" in row.values for s in corruptions.SEVERITIES)
        }
        for row in shown
    }
    curves = {label: found for label, found in curves.items() if found}
    if curves:
        figures.severity_curves(path, curves, order=("mce", *NAMES, *EXTRA))
    return ", ".join(curves)


def _alt(what: str, shown: list[Row]) -> str:
    means = [f"{row.label} {row.values['mce']:.1f}%" for row in shown if "mce" in row.values]
    return f"{what}. mCE: {', '.join(means)}." if means else f"{what}."


def _maps(folder: str, results: list[Result]) -> list[gallery.Picture]:
    """Figure 2 of every run whose log has what it shows."""
    found = []
    for i, result in enumerate(results, 1):
        records = logbook.read(os.path.dirname(result.file))
        steps, accuracies = through_training([r for r in records if r["kind"] == "corruptions"])
        if not accuracies:
            continue
        name = f"{result.fields['name']}, seed {result.fields['seed']}"
        path = os.path.join(folder, f"training_{i}_{re.sub('[^a-z0-9+]+', '_', name)}.png")
        figures.training_maps(path, steps, accuracies)
        what = f"Accuracy of {name} on each corruption through training"
        last = {c: values[-1] for c, values in accuracies.items()}
        alt = f"{what}. At the end: {', '.join(f'{c} {v:.1f}%' for c, v in last.items())}."
        caption = (
            f"{what} (as the paper's figure 2): as it is, relative to the other corruptions of its "
            "step, and relative to the other steps of its corruption. Brighter is better."
        )
        found.append(gallery.Picture(path, alt, caption, "figures"))
    return found


def through_training(records: list[logbook.Record]) -> tuple[list[int], dict[str, list[float]]]:
    """What figure 2 shows, out of a log's records of kind 'corruptions'.

    Args:
      records: with 'step' and fields 'error/NAME/SEVERITY' in percent.

    Returns:
      The steps [T] and, for each corruption that occurs, the accuracies in percent [T], means over
      the severities that were measured; NaN where a record lacks the corruption.
    """
    accuracies = {}
    for name in NAMES + EXTRA:
        errors = [
            [v for k, v in record.items() if k.startswith(f"error/{name}/")] for record in records
        ]
        if any(errors):
            accuracies[name] = [100 - statistics.fmean(e) if e else math.nan for e in errors]
    return [int(record["step"]) for record in records], accuracies


def _pairs(results: list[Result]) -> list[gallery.Picture]:
    """The pictures of clean and augmented images that training left beside the results."""
    found = []
    for result in results:
        for path in paths.glob(os.path.dirname(result.file), "adversarial_*.png"):
            net = path.stem.removeprefix("adversarial_")
            alt = (
                f"{result.fields['name']}, seed {result.fields['seed']}, attacked through {net}: "
                "clean images, what AdA renders of them, and the difference."
            )
            said = "A wrong verdict is red."
            if attacked := result.fields.get("ada", {}).get(net):
                said += (
                    f" Of {attacked['examples']} attacked images {attacked['error']:.2f}% are "
                    "classified wrongly"
                    + (f"; mean SSIM {attacked['ssim']:.3f}." if "ssim" in attacked else ".")
                )
            found.append(gallery.Picture(str(path), alt, f"{alt} {said}", "pairs"))
    return found


# ------------------------------------------------------------------------ the binary


def _evaluated(named: list[str]) -> list[str]:
    """What is named without folders that have no results, as runs/* has; if all are so, all."""
    empty = [
        path
        for path in named
        if paths.is_dir(path) and not paths.at(os.path.join(path, "results.json")).is_file()
    ]
    if len(empty) == len(named):
        return named
    for path in empty:
        logging.warning("%s has no results.json and is left out.", path)
    return [path for path in named if path not in empty]


def main(argv: list[str]) -> None:
    """Prints the tables and draws the pictures."""
    f = flags.FLAGS
    known = ("1", "2", "3", "list", "beside")
    if f.format not in tables.FORMATS:
        raise UserError(f"--format={f.format} is unknown: choose from {', '.join(tables.FORMATS)}.")
    if unknown := [name for name in f.table if name not in known]:
        raise UserError(f"--table={unknown[0]} is unknown: choose from {', '.join(known)}.")
    if not argv[1:] and not f.paper:
        raise UserError(
            "No results are named: give results files or folders of runs, or --paper for the "
            "paper's own numbers."
        )
    if f.figures:
        require_extra(f"--figures={f.figures}", "matplotlib")
    files = [*_evaluated(argv[1:]), *([str(PUBLISHED)] if f.paper else [])]
    everything = [result for file in files for result in read(file)]
    results = [result for result in everything if not result.published]
    ours, paper = rows(results), rows(result for result in everything if result.published)
    attacked = [result for result in results if "lp_accuracy" in result.fields]
    made = {
        "1": table_1(ours, paper),
        # The paper's rows alone compare with nothing of ours.
        "2": table_2(rows(attacked), paper if attacked or not results else []),
        "3": table_3(ours, paper),
        "list": table_list(results or everything, paper if results else []),
    }
    if "beside" in f.table:
        made["beside"] = table_beside(ours, rows(read(str(PUBLISHED))))
    names = [name for name in f.table if made[name].groups]
    if not names:
        raise UserError(
            f"--table={','.join(f.table)} has nothing to show: name results files or folders of "
            "runs that were measured so, or choose another table."
        )
    if f.figures:
        cli.make_folder("figures", f.figures)
        with locks.hold(f"--figures={f.figures}", locks.of_folder(f.figures)):
            pictures = draw(f.figures, ours, paper, results)
            page = os.path.join(f.figures, "index.html")
            title = "Robustness to common corruptions"
            paths.write(page, gallery.page(title, [t for t in made.values() if t.groups], pictures))
        for path in (*(p.path for p in pictures if p.section == "figures"), page):
            logging.info("wrote %s", path)
    print("\n\n".join(tables.FORMATS[f.format](made[name]) for name in names))


if __name__ == "__main__":
    flags.DEFINE_string("format", "markdown", "markdown, latex or csv.")
    flags.DEFINE_list("table", ["1", "2", "3", "list"], "Which: 1, 2, 3, list, beside.")
    flags.DEFINE_bool("paper", False, "Put the paper's own numbers beside.")
    flags.DEFINE_string("figures", "", "Folder for pictures and a page, index.html.")
    cli.start(main)
