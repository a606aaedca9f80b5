"""Joins results that differ only in their seed, and finds their row in the paper's table 1."""

import hashlib
import json
import math
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from ada_jax import results as results_files
from ada_jax.errors import UserError

# Fields of the config that do not distinguish two methods. The evaluation data are compared by
# 'data' and 'corruption_source'.
_BOOKKEEPING = results_files.BOOKKEEPING | {"seed"}

# Fields that are in the comparable config when switched on, and that none of the paper's rows uses.
_NOT_THE_PAPERS = {
    *("trivial_augment.use", "noise.share", "mixup.alpha", "label_smoothing"),
    *("augmix.clean_view", "augmix.label_views", "ada.every", "ada.group", "ada.leaves"),
}

# The paper's evaluation images, and its network and epochs for AdA and for PAT (Laidlaw et al.).
_PAPER_IMAGES = {"name": "cifar10", "split": "test", "examples": 10_000}
_PAPER_NETWORK = "preact_resnet50"
_PAPER_EPOCHS = {"pat": 100.0}
_OTHER_EPOCHS = 300.0


class Row(NamedTuple):
    """A line of a table with all its values."""

    label: str
    method: str  # The paper's row to compare with; '' for none.
    values: dict[str, float]  # Means over seeds, without missing ones.
    spread: dict[str, float]  # Standard deviations over seeds, if there are several.
    seeds: int = 0  # 0 for published numbers.
    measured_on: str = ""
    tables: tuple[str, ...] = ()  # The paper's tables that have this row.
    sampling: float = 0.0  # Standard error of one seed's clean error; 0 if unknown.
    attacked: str = ""  # Description of the attacked images and attacks.
    scale: str = ""  # Network and duration of training.
    comparable: bool = False  # Whether images and scale are those of the paper's row.


def method(config: dict[str, Any]) -> str:
    """The row of the paper's table 1 or 3 that corresponds to a config, whatever the run's name.

    Args:
      config: the config in the results file.

    Returns:
      A row such as 'nominal' or 'ada+deepaugment10x+augmix', or, of table 3, 'pat_self' or
      'pat_alexnet'; '' if the tables have no such row.
    """
    copies = config.get("deepaugment", {}).get("copies", 0)
    if config.get("method") == "pat" and not copies and not config.get("augmix", {}).get("use"):
        network = config["pat"]["network"].removesuffix("_small")
        return f"pat_{network}" if network in ("self", "alexnet") else ""
    if config.get("method") not in ("nominal", "ada") or copies not in (0, 1, 10):
        return ""
    words = ["ada"] if config["method"] == "ada" else []
    words += {1: ["deepaugment"], 10: ["deepaugment10x"]}.get(copies, [])
    words += ["augmix"] if config.get("augmix", {}).get("use") else []
    return "+".join(words) or "nominal"


# ------------------------------------------------------------------------ rows


def rows(results: Iterable[results_files.Result]) -> list[Row]:
    """Joins results that differ only in their seed to one row each, sorted by mCE.

    If several settings have the same name, the differing fields are added to the label. A value is
    missing if any of the seeds lacks it.

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
                attacked=attacked_on(same),
                scale=scale(same[0]),
                comparable=comparable(same[0]),
            )
        )
    return sorted(found, key=lambda row: by_mce(row.values))


def by_mce(values: dict[str, float]) -> tuple[float, float]:
    """Sorting key: mCE, then clean error; missing values come last."""
    return values.get("mce", math.inf), values.get("clean", math.inf)


def _check_seeds(same: list[results_files.Result]) -> None:
    files: dict[Any, str] = {}
    for result in same:
        seed = result.fields.get("seed")
        if seed in files:
            raise UserError(
                f"{files[seed]} and {result.file} have the same name={result.fields['name']}, "
                f"settings and seed={seed}: remove one of them."
            )
        files[seed] = result.file


def settings(result: results_files.Result) -> dict[str, Any]:
    """The fields that are equal for results that differ only in their seed.

    These are the config, steps, data and corruptions. Training and evaluation data are compared by
    digest; files of older versions have no digests and are joined only with each other. Initial
    weights are compared by the data that they were trained on, see `setup.describe`. Images that
    ada_jax corrupted are the same on the fly and in a folder.
    """
    flat = {"published": result.published, "corrupted": _corrupted(result)}
    flat |= results_files.comparable(result.fields.get("config") or {})
    source = result.fields.get("corruption_source") or {}
    if "recipe" in source:
        source = {k: v for k, v in source.items() if k not in ("kind", "folder", "files")}
    compared = result.fields | {"corruption_source": source}
    for key in ("data", "corruption_source", "step"):
        flat |= results_files.flat(compared.get(key), key)
    digests = results_files.flat(result.fields.get("training") or {}, "training")
    flat |= {name: str(digest)[:12] for name, digest in digests.items()}
    if "data.fingerprint" in flat:
        flat["data.fingerprint"] = str(flat["data.fingerprint"])[:12]
    if files := source.get("files"):
        where = ("corruption_source.folder", "corruption_source.files")
        flat = {k: v for k, v in flat.items() if not k.startswith(where)}
        text = json.dumps(files, sort_keys=True).encode()
        flat["corruption_source.files"] = hashlib.sha256(text).hexdigest()[:12]
    if flat.get("init_weights") and "training.init_weights" in flat:
        flat["init_weights"] = "trained"  # Every seed starts from other weights.
    unused = {"ada.microbatch"} if flat.get("ada.batch_norm") != "batch" else set()
    return {k: v for k, v in flat.items() if k not in _BOOKKEEPING | unused}


def _difference(result: results_files.Result, others: list[results_files.Result]) -> str:
    """The settings of a result, in brackets, that differ from others of the same name.

    A group of fields that others lack because it is off, or another method's, is named by its
    switch or the method alone, and the corruption networks only if others have different ones. A
    switch is named as off if it is on in all others.
    """
    mine, theirs, missing = settings(result), list(map(settings, others)), object()

    def differs(key: str) -> bool:
        group, _, field = key.partition(".")
        implied = results_files.SWITCHES.get(group, field) != field
        if implied or key == "training.corruption_nets":
            return any(other.get(key, mine[key]) != mine[key] for other in theirs)
        of_method = group in results_files.METHODS
        alike = [o for o in theirs if not of_method or o.get("method") == mine["method"]]
        return any(other.get(key, missing) != mine[key] for other in alike)

    named = [k if mine[k] is True else f"{k}={mine[k]}" for k in mine if differs(k)]
    switches = {f"{group}.{field}" for group, field in results_files.SWITCHES.items()}
    off = switches.intersection(*(other for other in theirs if other != mine)) - mine.keys()
    values = {k: v for other in theirs for k, v in other.items()}
    named += [f"{switch}={type(values[switch])(0)}" for switch in sorted(off) if switch in values]
    return f" ({', '.join(named)})" if named else ""


def paper_row(result: results_files.Result) -> str:
    """The row of the paper's table 1 to compare a result with; '' for none."""
    fields = result.fields
    if result.published:
        return fields["name"]
    config = fields["config"]
    attack = config.get("ada", {})
    # The paper's tables do not have fine-tuning, random perturbations, AdvMix, averaged weights or
    # AugMix's consistency loss either.
    other = config.get("init_weights") or attack.get("steps") == 0
    other = other or fields["name"].endswith("_ema")
    other = other or "mixing" in attack.get("choice", ())
    other = other or _NOT_THE_PAPERS & results_files.comparable(config).keys()
    mixed = config.get("augmix", {})
    other = other or (mixed.get("use") and mixed.get("jsd_weight"))
    if other or fields["data"].get("name") != "cifar10":
        return ""
    return method(config)


def comparable(result: results_files.Result) -> bool:
    """Whether a result is of the paper's test images, network and number of epochs.

    Whether the images were corrupted here or read from the published archive is not checked.
    """
    if result.published:
        return False
    config, data = result.fields["config"], result.fields["data"]
    epochs = _PAPER_EPOCHS.get(config.get("method"), _OTHER_EPOCHS)
    return (
        all(data.get(key) == value for key, value in _PAPER_IMAGES.items())
        and config.get("classifier") == _PAPER_NETWORK
        and config.get("epochs") == epochs
    )


def scale(result: results_files.Result) -> str:
    """Describes the network and the duration of training, such as 'resnet9, 12 epochs'."""
    if result.published:
        known = "1" in result.fields["tables"]
        return f"paper: {_PAPER_NETWORK}, {_OTHER_EPOCHS:g} epochs" if known else "paper: others"
    config, data = result.fields["config"], result.fields["data"]
    steps = config.get("train_steps")
    words = f"{steps} steps" if steps else f"{config.get('epochs', 0):g} epochs"
    words += " of fine-tuning" if config.get("init_weights") else ""
    where = "" if data.get("name") == "cifar10" else f"{data.get('name')}: "
    return f"{where}{config.get('classifier', 'network')}, {words}"


def _corrupted(result: results_files.Result) -> int | None:
    """Number of images of the corruptions; None if it is not equal for all."""
    cells = [e for entries in result.fields.get("corruptions", {}).values() for e in entries]
    counts = {cell.get("examples") for cell in cells}
    return counts.pop() if len(counts) == 1 else None


def _sampling_error(result: results_files.Result) -> float:
    """Standard error of the clean error in percentage points; 0 if unknown."""
    clean = result.fields.get("clean", {})
    if result.published or not clean.get("examples"):
        return 0.0
    return math.sqrt(clean["error"] * (100 - clean["error"]) / clean["examples"])


def measured_on(result: results_files.Result) -> str:
    """Describes the evaluation data of a result, or the source of published numbers."""
    if result.published:
        return result.fields["source"].rstrip(".")
    data, source = result.fields["data"], result.fields.get("corruption_source", {})
    words = f"{data.get('examples')} images of {data.get('name')}, split {data.get('split')}"
    if count := result.fields.get("trained_on"):
        words += f", {count} of them TRAINED ON"
    if not source or not result.fields.get("corruptions"):
        return words
    count = _corrupted(result)
    words += ", " if count == data.get("examples") else f", {count or 'some'} of them "
    if source.get("kind") == "on_the_fly" or "recipe" in source:
        table = f"seed {source.get('seed')}, {source.get('table')} table"
        return f"{words}corrupted by ada_jax ({table})"
    return f"{words}corrupted in {source.get('folder', source.get('kind'))}"


def attacked_on(results: list[results_files.Result]) -> str:
    """Describes the attacked images and attacks of table 2; '' if the attacks are not the same."""
    balls = [
        ball
        for result in results
        for radii in result.fields.get("lp", {}).values()
        for ball in radii.values()
    ]
    attacks, counts = ({ball.get(key) for ball in balls} for key in ("attacks", "examples"))
    if len(attacks) != 1 or None in attacks | counts:
        return ""
    few, many = min(counts), max(counts)
    images = f"{few} images" if few == many else f"{few} to {many} images"
    return f"{attacks.pop()} on {images}; standard errors are at most {50 / math.sqrt(few):.1f}"
