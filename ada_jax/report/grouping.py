"""Joins results that differ in seed alone, and names their row of the paper."""

import hashlib
import json
import math
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from ada_jax import results as results_files
from ada_jax.errors import UserError

# Two runs are one method, whatever these are. What was evaluated is in 'data' and
# 'corruption_source'.
_BOOKKEEPING = results_files.BOOKKEEPING | {"seed"}


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


def method(config: dict[str, Any]) -> str:
    """Which row of the paper's table 1 a run compares with, by its config, whatever its name.

    Args:
      config: of the results file.

    Returns:
      As 'nominal' or 'ada+deepaugment10x+augmix'; '' where table 1 has no such row.
    """
    copies = config.get("deepaugment", {}).get("copies", 0)
    if config.get("method") not in ("nominal", "ada") or copies not in (0, 1, 10):
        return ""
    words = ["ada"] if config["method"] == "ada" else []
    words += {1: ["deepaugment"], 10: ["deepaugment10x"]}.get(copies, [])
    words += ["augmix"] if config.get("augmix", {}).get("use") else []
    return "+".join(words) or "nominal"


# ------------------------------------------------------------------------ rows


def rows(results: Iterable[results_files.Result]) -> list[Row]:
    """One row for each method, sorted by mCE: results that differ in seed alone are joined.

    Where several settings share a name, what differs is added to it. A value that some of the
    seeds lack is absent.

    Raises:
      UserError: two results have the same name, settings and seed.
    """
    joined: dict[tuple[str, str], list[results_files.Result]] = {}
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
                method=paper_row(same[0]),
                values={k: statistics.fmean(v) for k, v in lists.items()},
                spread={k: statistics.stdev(v) for k, v in lists.items() if len(same) > 1},
                seeds=0 if same[0].published else len(same),
                measured_on=measured_on(same[0]),
                tables=tuple(same[0].fields.get("tables", ())),
                sampling=max(map(_sampling_error, same)),
                attacked=attacked_on(same[0]),
            )
        )
    return sorted(found, key=lambda row: by_mce(row.values))


def by_mce(values: dict[str, float]) -> tuple[float, float]:
    """The key that sorts by mCE, then by clean error; what is missing comes last."""
    return values.get("mce", math.inf), values.get("clean", math.inf)


def _check_seeds(same: list[results_files.Result]) -> None:
    files: dict[Any, str] = {}
    for result in same:
        seed = result.fields.get("seed")
        if seed in files:
            raise UserError(
                f"{files[seed]} and {result.file} have the same name={result.fields['name']}, "
                f"settings and seed={seed}: leave one of them out."
            )
        files[seed] = result.file


def settings(result: results_files.Result) -> dict[str, Any]:
    """What must agree for results to differ in seed alone: config, steps, data, corruptions.

    What a run was trained from and measured on counts by its content, as far as its file has
    digests: files of older versions have none, and are joined among themselves. Weights that
    training started from count by what they were trained from in turn, see `setup.describe`.
    """
    flat = {"published": result.published, "corrupted": _corrupted(result)}
    flat |= results_files.comparable(result.fields.get("config") or {})
    for key in ("data", "corruption_source", "step"):
        flat |= results_files.flat(result.fields.get(key), key)
    digests = results_files.flat(result.fields.get("training") or {}, "training")
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


def _difference(result: results_files.Result, others: list[results_files.Result]) -> str:
    """In brackets, the settings of a result that others of its name do not share."""
    mine, missing = settings(result), object()
    differing = [
        k for k, v in mine.items() if any(settings(o).get(k, missing) != v for o in others)
    ]
    return f" ({', '.join(f'{k}={mine[k]}' for k in differing)})" if differing else ""


def paper_row(result: results_files.Result) -> str:
    """The paper's row that a result compares with; '' for none."""
    fields = result.fields
    if result.published:
        return fields["name"]
    config = fields["config"]
    # The paper has nothing to compare with.
    other = config.get("init_weights") or config.get("ada", {}).get("steps") == 0
    if other or fields["data"].get("name") != "cifar10":
        return ""
    return method(config)


def _corrupted(result: results_files.Result) -> int | None:
    """How many images the corruptions were measured on, where it is one number for all."""
    cells = [e for entries in result.fields.get("corruptions", {}).values() for e in entries]
    counts = {cell.get("examples") for cell in cells}
    return counts.pop() if len(counts) == 1 else None


def _sampling_error(result: results_files.Result) -> float:
    """The standard error in percent of the clean error for so many images; 0 is unknown."""
    clean = result.fields.get("clean", {})
    if result.published or not clean.get("examples"):
        return 0.0
    return math.sqrt(clean["error"] * (100 - clean["error"]) / clean["examples"])


def measured_on(result: results_files.Result) -> str:
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


def attacked_on(result: results_files.Result) -> str:
    """How many images were attacked in balls of pixels, and by what; '' where it is not one way."""
    balls = [ball for radii in result.fields.get("lp", {}).values() for ball in radii.values()]
    ways = {(ball.get("examples"), ball.get("attacks")) for ball in balls}
    if len(ways) != 1 or None in next(iter(ways)):
        return ""
    ((count, attacks),) = ways
    error = 50 / math.sqrt(count)
    return f"{attacks} on {count} images, so that standard errors are at most {error:.1f}"
