"""Figures that compare results."""

import math
import os
import re
import statistics

from absl import logging

from ada_jax import paths
from ada_jax import results as results_files
from ada_jax.corruptions import parameter_tables
from ada_jax.report import figures, grouping, web_page
from ada_jax.run import logbook


def draw(
    folder: str,
    ours: list[grouping.Row],
    paper: list[grouping.Row],
    results: list[results_files.Result],
) -> list[web_page.Picture]:
    """Draws all figures that the results have the values for.

    Args:
      folder: output folder of the PNGs.
      ours: rows of results.
      paper: published rows; those that correspond to ours are drawn too, or all if there are none
        of ours.
      results: the results files, whose folders may hold a metrics.jsonl with records of kind
        'corruptions', and pictures adversarial_*.png.

    Returns:
      The pictures in the order of the page: curves, heat maps, pairs.
    """
    compared = {row.method for row in ours}
    shown = ours + [row for row in paper if row.method in compared or not ours]
    drawn = []
    path = os.path.join(folder, "severities.png")
    if _curves(path, shown):
        what = "Error at each severity"
        drawn.append(web_page.Picture(path, _alt(what, shown), f"{what}.", "figures"))
    return drawn + _maps(folder, results) + _pairs(results)


def _curves(path: str, shown: list[grouping.Row]) -> bool:
    """Draws the curves of the rows that have errors by severity; False if there are none."""
    curves = {
        row.label: {
            name: [row.values.get(f"{name}/{s}", math.nan) for s in parameter_tables.SEVERITIES]
            for name in ("mce", *results_files.NAMES, *results_files.EXTRA)
            if any(f"{name}/{s}" in row.values for s in parameter_tables.SEVERITIES)
        }
        for row in shown
    }
    curves = {label: found for label, found in curves.items() if found}
    if curves:
        figures.severity_curves(
            path, curves, order=("mce", *results_files.NAMES, *results_files.EXTRA)
        )
    return bool(curves)


def _alt(what: str, shown: list[grouping.Row]) -> str:
    means = [f"{row.label} {row.values['mce']:.1f}%" for row in shown if "mce" in row.values]
    return f"{what}. mCE: {', '.join(means)}." if means else f"{what}."


def _maps(folder: str, results: list[results_files.Result]) -> list[web_page.Picture]:
    """Draws the paper's figure 2 for every run that was evaluated on corruptions in training."""
    found = []
    for i, result in enumerate(results, 1):
        if _averaged(result):
            continue  # Training evaluates the last weights.
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
            f"{what} (like the paper's figure 2): absolute, scaled within each step, and scaled "
            "within each corruption. Brighter is better."
        )
        found.append(web_page.Picture(path, alt, caption, "figures"))
    return found


def through_training(records: list[logbook.Record]) -> tuple[list[int], dict[str, list[float]]]:
    """Collects the values of the paper's figure 2.

    Args:
      records: records with 'step' and fields 'error/NAME/SEVERITY' in percent.

    Returns:
      The steps [T] and, for each corruption that occurs, the accuracies in percent [T], averaged
      over the severities measured; NaN if a record lacks the corruption.
    """
    accuracies = {}
    for name in results_files.NAMES + results_files.EXTRA:
        errors = [
            [v for k, v in record.items() if k.startswith(f"error/{name}/")] for record in records
        ]
        if any(errors):
            accuracies[name] = [100 - statistics.fmean(e) if e else math.nan for e in errors]
    return [int(record["step"]) for record in records], accuracies


def _averaged(result: results_files.Result) -> bool:
    """Whether a results file is of a run's averaged weights, see `train.finish`."""
    return os.path.basename(result.file) == "results_ema.json"


def _pairs(results: list[results_files.Result]) -> list[web_page.Picture]:
    """Finds the pictures of clean and augmented images in the folders of the results."""
    found = []
    for result in results:
        for path in paths.glob(os.path.dirname(result.file), "adversarial_*.png"):
            if path.stem.endswith("_ema") != _averaged(result):
                continue
            net = path.stem.removeprefix("adversarial_").removesuffix("_ema")
            alt = (
                f"{result.fields['name']}, seed {result.fields['seed']}, attacked through {net}: "
                "clean images, what AdA renders of them, and the difference."
            )
            caption = "Wrong predictions are red."
            if attacked := result.fields.get("ada", {}).get(net):
                caption += (
                    f" Of {attacked['examples']} attacked images {attacked['error']:.2f}% are "
                    "misclassified"
                    + (f"; mean SSIM {attacked['ssim']:.3f}." if "ssim" in attacked else ".")
                )
            found.append(web_page.Picture(str(path), alt, f"{alt} {caption}", "pairs"))
    return found


def with_results(named: list[str]) -> list[str]:
    """Removes folders without results, as in runs/*; returns the argument if all lack them."""
    empty = [
        path
        for path in named
        if paths.is_dir(path) and not paths.at(os.path.join(path, "results.json")).is_file()
    ]
    if len(empty) == len(named):
        return named
    for path in empty:
        logging.warning("%s has no results.json and is ignored.", path)
    return [path for path in named if path not in empty]
