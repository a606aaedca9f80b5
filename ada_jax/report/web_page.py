"""A report as one self-contained HTML page of tables and pictures, which loads nothing else."""

import base64
import html
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ada_jax import paths
from ada_jax.report import overview, style, tables
from ada_jax.report.tables import Cell, Table


class Picture(NamedTuple):
    """A PNG for the page."""

    path: str
    alt: str  # Text alternative.
    caption: str
    section: str  # 'figures' or 'pairs'.


_SECTIONS = {"figures": "Figures", "pairs": "Clean and augmented images"}


def page(
    title: str,
    shown: list[Table],
    pictures: list[Picture],
    groups: Sequence[overview.Group] = (),
    colours: Mapping[str, str] | None = None,
) -> str:
    """Makes the HTML page; pictures are embedded in it.

    Args:
      title: heading of the page.
      shown: tables, in order.
      pictures: pictures, in order.
      groups: rows of the picture that the page opens with; none draws no such picture.
      colours: CSS classes of rows by label; see `overview.colours`.
    """
    parts = [
        (f"table{i}", table.title, _table(table, colours or {})) for i, table in enumerate(shown)
    ]
    for section, heading in _SECTIONS.items():
        if drawn := [_figure(p) for p in pictures if p.section == section]:
            parts.append((section, heading, "\n".join(drawn)))
    links = "".join(f'<li><a href="#{key}">{html.escape(name)}</a></li>' for key, name, _ in parts)
    sections = "\n".join(
        f'<section id="{key}"><h2>{html.escape(name)}</h2>\n{body}\n</section>'
        for key, name, body in parts
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>{style.COLOURS}{style.PICTURE}{style.PAGE}</style>
</head>
<body>
<header>
<h1>{html.escape(title)}</h1>
<nav aria-label="Contents"><ul>{links}</ul></nav>
</header>
<main>
{overview.figure(groups) if groups else ""}
{sections}
</main>
</body>
</html>
"""


def _table(table: Table, colours: Mapping[str, str]) -> str:
    """A table, with a mark of its colour before each label that has one."""
    shaded = [bool(heading) for heading, count in table.spans for _ in range(count)]
    shaded = shaded or [False] * len(table.head)
    ends = _ends(cell for line in table.lines for cell in itertools.compress(line, shaded))
    classes = ["shade" if s else _align(c) for s, c in zip(shaded, _samples(table), strict=True)]
    above = "".join(
        f'<th class="span" colspan="{count}">{html.escape(heading)}</th>'
        for heading, count in table.spans
    )
    head = "".join(
        f'<th scope="col" class="{name}"><span>{html.escape(heading)}</span></th>'
        for heading, name in zip(table.head, classes, strict=True)
    )
    bodies = "\n".join(
        f"<tbody>{''.join(_line(line, shaded, ends, colours) for line in group)}</tbody>"
        for group in table.groups
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    return (
        f'<div class="scroll" role="region" aria-label="{html.escape(table.title)}" tabindex="0">\n'
        f'<table class="{"heat" if any(shaded) else ""}"><thead>'
        + (f"<tr>{above}</tr>" if above else "")
        + f"<tr>{head}</tr></thead>\n{bodies}\n</table></div>"
        + (f'\n<ul class="notes">{notes}</ul>' if notes else "")
    )


def _line(
    line: list[Cell], shaded: list[bool], ends: tuple[float, float], colours: Mapping[str, str]
) -> str:
    label, *cells = line
    mark = f"dot {colours[label.value]}" if label.value in colours else ""
    first = f'<th scope="row" class="{mark}">{_breakable(tables.text(label))}</th>'
    rest = (
        _shaded(cell, ends) if shade else _plain(cell)
        for cell, shade in zip(cells, shaded[1:], strict=True)
    )
    return f"<tr>{first}{''.join(rest)}</tr>"


def _breakable(label: str) -> str:
    """A label that may be broken after its words."""
    return re.sub("([_+])", r"\1<wbr>", html.escape(label))


def _ends(cells: Iterable[Cell]) -> tuple[float, float]:
    """The smallest and the largest value; differences do not count."""
    values = [cell.value for cell in cells if cell.value is not None and not cell.signed]
    return (min(values), max(values)) if values else (0.0, 0.0)


def _samples(table: Table) -> list[Cell]:
    """The first non-empty cell of each column."""
    columns = zip(*table.lines, strict=True)
    return [next((c for c in column if c.value is not None), Cell()) for column in columns]


def _plain(cell: Cell) -> str:
    return f'<td class="{_align(cell)}">{html.escape(tables.text(cell))}</td>'


def _shaded(cell: Cell, ends: tuple[float, float]) -> str:
    """A cell coloured by its value between the ends; its deviation is shown under the mouse."""
    words = html.escape(tables.text(cell._replace(spread=None)))
    if cell.value is None or cell.signed:
        return f'<td class="shade">{words}</td>'
    share = (cell.value - ends[0]) / max(ends[1] - ends[0], 1e-9)
    return (
        f'<td class="shade" style="--share: {share:.3f}" title="{html.escape(tables.text(cell))}">'
        f"{words}</td>"
    )


def _align(cell: Cell) -> str:
    return "number" if isinstance(cell.value, int | float) else ""


def _figure(picture: Picture) -> str:
    data = base64.b64encode(paths.read(picture.path)).decode()
    return (
        f'<figure><div class="scroll" role="region" aria-label="Figure" tabindex="0">'
        f'<img src="data:image/png;base64,{data}" alt="{html.escape(picture.alt)}"></div>\n'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )
