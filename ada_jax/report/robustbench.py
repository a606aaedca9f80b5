"""Results in the formats of RobustBench's leaderboard of common corruptions."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from ada_jax import paths
from ada_jax.corruptions import parameter_tables
from ada_jax.errors import UserError
from ada_jax.results import NAMES, Result

TABLE = "unaggregated_results.csv"

# Ours, and the leaderboard's names of data sets.
_DATASETS = {"cifar10": "cifar10", "cifar100": "cifar100", "imagenet2012": "imagenet"}
# The corruptions in the order of the leaderboard's columns.
COLUMNS = (
    *("shot_noise", "motion_blur", "snow", "pixelate", "gaussian_noise", "defocus_blur"),
    *("brightness", "fog", "zoom_blur", "frost", "glass_blur", "impulse_noise", "contrast"),
    *("jpeg_compression", "elastic_transform"),
)


def model_info(result: Result) -> dict[str, Any]:
    """The leaderboard's description of a model, model_info/DATASET/corruptions/NAME.json there.

    Args:
      result: a results file with the clean error and all 15 corruptions.

    Returns:
      The fields, accuracies in percent as strings. 'link', 'authors', 'venue' and 'reported' are
      empty; 'name' is to be replaced by the paper's title.

    Raises:
      UserError: a measurement is missing, or the leaderboard does not have the data set.

    Source: RobustBench's `update_json` and the files in its model_info/.
    """
    _check(result)
    config, values = result.fields["config"], result.values
    info = {
        "link": "",
        "name": result.fields["name"],
        "authors": "",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": _DATASETS[result.fields["data"]["name"]],
        "venue": "",
        "architecture": config.get("classifier", ""),
        "eps": None,
        "clean_acc": f"{100 - values['clean']:.2f}",
        "reported": "",
        "corruptions_acc": f"{100 - values['mce']:.2f}",
    }
    if "mce_alexnet" in values:
        info["corruptions_mce"] = f"{values['mce_alexnet']:.2f}"
    return info


def table(results: Sequence[Result]) -> str:
    """The leaderboard's table of accuracies in [0,1], a line per model and a column per severity.

    Args:
      results: results files with all 15 corruptions.

    Returns:
      CSV with two header lines, the corruptions and the severities, as pandas writes it.

    Raises:
      UserError: as `model_info`.

    Source: RobustBench's `corruptions_evaluation`.
    """
    cells = [(name, severity) for name in COLUMNS for severity in parameter_tables.SEVERITIES]
    with io.StringIO() as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["", *(name for name, _ in cells)])
        lines.writerow(["", *(severity for _, severity in cells)])
        for result in results:
            _check(result)
            errors = [result.values[f"{name}/{severity}"] for name, severity in cells]
            lines.writerow([model_name(result), *(round(1 - e / 100, 6) for e in errors)])
        return file.getvalue()


def model_name(result: Result) -> str:
    """A name for the model's file and line: the run's, with its seed if that is not 0."""
    name, seed = result.fields["name"], result.fields["seed"]
    return f"{name}_seed{seed}" if seed else name


def write(folder: str, results: Sequence[Result]) -> list[str]:
    """Writes NAME.json for each result, and `TABLE`.

    Args:
      folder: the folder, which exists.
      results: results files, not published numbers.

    Returns:
      The files.

    Raises:
      UserError: as `model_info`; or there are no results, two of one name, or several data sets.
    """
    names = [model_name(result) for result in results]
    for name in names:
        paths.check_name("name", name)
    if not names or len({*names}) < len(names):
        raise UserError(
            f"--format=robustbench has the models {', '.join(names) or 'of no results'}: give "
            "results files or folders of runs, one of each name and seed."
        )
    if len(datasets := {result.fields["data"]["name"] for result in results}) > 1:
        raise UserError(
            f"--format=robustbench has results of {', '.join(sorted(datasets))}, and every "
            "leaderboard is of one data set: write them to separate folders."
        )
    files = {f"{model_name(r)}.json": json.dumps(model_info(r), indent=2) + "\n" for r in results}
    files[TABLE] = table(results)
    for name, content in files.items():
        paths.write(paths.at(folder) / name, content)
    return [str(paths.at(folder) / name) for name in files]


def remarks(result: Result) -> list[str]:
    """Why a result is not comparable to the leaderboard's; [] if it is."""
    data, source = result.fields["data"], result.fields.get("corruption_source", {})
    found = []
    if source.get("kind") == "on_the_fly" or "recipe" in source:
        found.append("the images were corrupted by ada_jax, not read from the published archive")
    full = 5_000 if data["name"] == "imagenet2012" else 10_000
    if data["examples"] < full:
        found.append(f"{data['examples']:,} images were evaluated instead of {full:,}")
    return found


def _check(result: Result) -> None:
    data = result.fields["data"]["name"]
    if data not in _DATASETS:
        raise UserError(
            f"{result.file} is of the data set {data!r}, and RobustBench has leaderboards of "
            f"{', '.join(_DATASETS)}: leave it out."
        )
    needed = ["clean", *(f"{n}/{s}" for n in NAMES for s in parameter_tables.SEVERITIES)]
    if missing := [name for name in needed if name not in result.values]:
        raise UserError(
            f"{result.file} lacks {missing[0]} and RobustBench needs the clean error and all 15 "
            "corruptions: evaluate with --sets=clean,c."
        )
