"""The paper's tables with our results."""

import itertools
from collections.abc import Iterable

from ada_jax import results as results_files
from ada_jax.report import grouping
from ada_jax.report.tables import Cell, Table

_SUMMARY = {  # Value: (heading, digits).
    "clean": ("clean error", 2),
    "mce": ("mCE, un-normalised", 2),
    "mce_alexnet": ("mCE, AlexNet's errors as 100%", 2),
    **{group: (group, 1) for group in results_files.GROUPS},
    "extra": ("extra", 1),
    "cbar": ("C-bar", 1),
    "cifar10_1": ("CIFAR-10.1", 2),
}
_EACH = {
    "clean": ("clean error", 2),
    "mce": ("mCE, un-normalised", 2),
    **{name: (name.split("_")[0], 1) for name in results_files.NAMES},
    **{name: (name.replace("_", " ").removesuffix(" noise"), 1) for name in results_files.EXTRA},
    **{name: (name.replace("_", " "), 1) for name in results_files.CBAR["cifar"]},
    **{name: (name.replace("_", " "), 1) for name in results_files.CBAR["imagenet"]},
}
_BALLS = {
    "clean": ("clean error", 2),
    **{f"l2 {r}": (f"l2 {r}", 2) for r in results_files.RADII["l2"]},
    **{f"linf {r}": (f"linf {r}", 2) for r in results_files.RADII["linf"]},
    "cifar10_1": ("CIFAR-10.1", 2),
}
_ALWAYS = {"clean", "mce", *results_files.GROUPS, *results_files.NAMES}


def table_1(ours: list[grouping.Row], paper: list[grouping.Row]) -> Table:
    """Table 1: clean error, mCE and the means of the groups of corruptions, sorted by mCE.

    Args:
      ours: rows of results.
      paper: published rows. Those of the paper's table 1 are shown, and each of our rows that is
        comparable to the paper's is followed by the difference, ours minus theirs.
    """
    return _table("Table 1: robustness to common corruptions", _SUMMARY, ours, paper, "1")


def table_beside(ours: list[grouping.Row], paper: list[grouping.Row]) -> Table:
    """Our rows of table 1 with two columns of the paper's clean error and mCE."""
    theirs = {row.method: row.values for row in paper}
    head, lines = ["setup"], [[Cell(row.label)] for row in ours]
    for key in ("clean", "mce", *results_files.GROUPS):
        heading, digits = _SUMMARY[key]
        compared = key not in results_files.GROUPS
        head += [heading, f"{heading.split(',')[0]}, paper"] if compared else [heading]
        for line, row in zip(lines, ours, strict=True):
            line.append(Cell(row.values.get(key), digits, row.spread.get(key)))
            if compared:
                line.append(Cell(theirs.get(row.method, {}).get(key), digits))
    groups = [[[*line, Cell(row.seeds)]] for line, row in zip(lines, ours, strict=True)]
    return Table("Our results beside the paper's", [*head, "seeds"], groups, _notes(ours))


def table_2(ours: list[grouping.Row], paper: list[grouping.Row]) -> Table:
    """Like `table_1`, with robust accuracies: the worst case of AutoAttack and MultiTargeted."""
    shown = [row for row in ours if any(key in row.values for key in _BALLS if " " in key)]
    return _table("Table 2: accuracy in balls of pixels", _BALLS, shown, paper, "2")


def table_3(ours: list[grouping.Row], paper: list[grouping.Row]) -> Table:
    """Like `table_1`, with the error on every corruption, averaged over its five severities."""
    return _table("Table 3: errors on each corruption", _EACH, ours, paper, "3")


def _table(
    title: str,
    columns: dict[str, tuple[str, int]],
    ours: list[grouping.Row],
    paper: list[grouping.Row],
    name: str,
) -> Table:
    by_method = {row.method: row for row in paper}
    shown = sorted(
        [*ours, *(r for r in paper if name in r.tables)],
        key=lambda row: grouping.by_mce(row.values),
    )
    columns = {
        key: column
        for key, column in columns.items()
        if key in _ALWAYS or any(key in row.values for row in shown)
    }
    groups = []
    for row in shown:
        cells = [Cell(row.values.get(k), d, row.spread.get(k)) for k, (_, d) in columns.items()]
        group = [[Cell(row.label), *cells, Cell(row.seeds or None)]]
        if row.comparable and row.method in by_method:
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
    notes = _notes_on_balls(shown) if name == "2" else _notes(shown)
    return Table(title, head, groups, notes, _spans(columns) if name == "3" else [])


def _spans(columns: Iterable[str]) -> list[tuple[str, int]]:
    """The groups of corruptions, each with its number of columns."""
    group_of = {name: group for group, names in results_files.GROUPS.items() for name in names}
    group_of |= dict.fromkeys(results_files.EXTRA, "extra")
    group_of |= {name: "C-bar" for names in results_files.CBAR.values() for name in names}
    headings = ["", *(group_of.get(key, "") for key in columns), ""]
    return [(heading, len(list(same))) for heading, same in itertools.groupby(headings)]


def _notes(shown: list[grouping.Row]) -> list[str]:
    notes = ["Errors in percent; mCE is the mean over the 15 corruptions and five severities."]
    if any(row.seeds > 1 for row in shown):
        notes.append("Over seeds: mean ± sample standard deviation.")
    if errors := [row.sampling for row in shown if row.sampling]:
        notes.append(
            f"Sampling error (one standard error): at most {max(errors):.2f} points for the clean "
            "error, and about the same for means over corruptions."
        )
    return notes + _data_notes(shown, {row.label: row.measured_on for row in shown})


def _notes_on_balls(shown: list[grouping.Row]) -> list[str]:
    notes = ["In percent. Accuracies count the images that no attack broke."]
    if any(row.seeds > 1 for row in shown):
        notes.append("Over seeds: mean ± sample standard deviation.")
    descriptions = {row.label: row.attacked or row.measured_on for row in shown}
    return notes + _data_notes(shown, descriptions)


def _data_notes(shown: list[grouping.Row], descriptions: dict[str, str]) -> list[str]:
    """One note for each description of the data, with the labels of its rows."""
    labels_of: dict[str, list[str]] = {}
    for row in shown:
        labels = labels_of.setdefault(descriptions[row.label], [])
        labels += [row.label] if row.seeds else ["(paper)"] * (not labels)
    ours = [words for words, labels in labels_of.items() if labels != ["(paper)"]]
    names = {words: ", ".join(labels) for words, labels in labels_of.items()}
    if len(ours) == 1 and len(labels_of[ours[0]]) > 1:
        names[ours[0]] = "all rows except the paper's" if len(labels_of) > 1 else "all rows"
    return [f"{name}: {words}." for words, name in names.items()]


def table_list(results: list[results_files.Result], paper: list[grouping.Row]) -> Table:
    """One line for each results file with its provenance, sorted by mCE.

    Args:
      results: results of `results.read`.
      paper: published rows; if a result is comparable to one of them, its line has that row's mCE
        and the difference, ours minus theirs.
    """
    theirs = {row.method: row.values["mce"] for row in paper if "mce" in row.values}
    sets = ("clean", "extra", "cbar", "cifar10_1")
    sets = [k for k in sets if any(k in r.values for r in results)]
    ordered = sorted(results, key=lambda r: grouping.by_mce(r.values))
    compared = [
        theirs.get(grouping.paper_row(r)) if grouping.comparable(r) else None for r in ordered
    ]
    any_compared = any(mce is not None for mce in compared)
    lines = []
    for result, paper_mce in zip(ordered, compared, strict=True):
        fields, mce = result.fields, result.values.get("mce")
        difference = None if None in (mce, paper_mce) else mce - paper_mce
        lines.append(
            [
                Cell(fields["name"]),
                Cell(fields.get("seed")),
                Cell(mce, 2),
                *([Cell(paper_mce, 2), Cell(difference, 2, signed=True)] if any_compared else []),
                *(Cell(result.values.get(key), 2) for key in sets),
                Cell(fields.get("step")),
                Cell(grouping.measured_on(result)),
                Cell(fields.get("device")),
                Cell(results_files.clock(fields["seconds"]) if "seconds" in fields else None),
                Cell(fields.get("commit", "")[:12]),
                Cell(fields.get("weights_digest", "")[:12]),
                Cell(result.file),
            ]
        )
    head = ["name", "seed", "mCE, un-normalised"]
    head += ["mCE, paper", "difference"] if any_compared else []
    head += [_SUMMARY[key][0] for key in sets]
    head += ["step", "measured on", "device", "time", "commit", "weights", "file"]
    return Table("All results", head, [[line] for line in lines])
