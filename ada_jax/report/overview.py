"""A picture of all rows: mCE against clean error, as SVG."""

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ada_jax.report import grouping, label_places, style

_COLOURS = 4  # Colours of our groups in the style sheet; more groups repeat them.
_LEFT, _RIGHT, _BOTTOM = 40, 14, 44  # Margins of the plot.
_LONGEST = 47  # Characters of a label; longer ones are cut in the middle.
_WIDTH = 0.63  # Width of a character relative to the size of the text, of a wide font.


class Size(NamedTuple):
    """Size of a picture and of its text in pixels."""

    width: int
    height: int
    text: int


WIDE, NARROW = Size(1100, 600, 13), Size(380, 700, 11)  # For screens and for telephones.


class Group(NamedTuple):
    """Rows of one network and duration of training."""

    name: str
    colour: str  # CSS class.
    rows: list[grouping.Row]


class Axes(NamedTuple):
    """Positions of the axes' ends, in percent and in pixels."""

    x: tuple[float, float]
    y: tuple[float, float]
    box: tuple[float, float, float, float]  # (left, top, right, bottom)
    text: int  # Size of text.

    def at(self, clean: float, mce: float) -> tuple[float, float]:
        """The pixel of a point."""
        left, top, right, bottom = self.box
        across = (clean - self.x[0]) / (self.x[1] - self.x[0])
        up = (mce - self.y[0]) / (self.y[1] - self.y[0])
        return left + across * (right - left), bottom - up * (bottom - top)


def groups(ours: Sequence[grouping.Row], paper: Sequence[grouping.Row]) -> list[Group]:
    """The rows with a clean error and an mCE, by network and duration of training.

    Args:
      ours: rows of results.
      paper: published rows. Those of the paper's table 1 are shown, and others if they correspond
        to ours or there are none of ours.
    """
    compared = {row.method for row in ours}
    shown = [row for row in paper if "1" in row.tables or row.method in compared or not ours]
    by_scale: dict[str, list[grouping.Row]] = {}
    for row in [*ours, *shown]:
        if {"clean", "mce"} <= row.values.keys():
            by_scale.setdefault(row.scale, []).append(row)
    found = []
    for name, rows in by_scale.items():
        colour = f"c{len(found) % _COLOURS}" if rows[0].seeds else "c-paper"
        found.append(Group(name, colour, rows))
    return found


def colours(shown: Sequence[Group], rows: Iterable[grouping.Row]) -> dict[str, str]:
    """The CSS classes of rows by label: their group's, and the paper's for published rows."""
    of_scale = {group.name: group.colour for group in shown}
    return {
        row.label: of_scale.get(row.scale, "") if row.seeds else "c-paper"
        for row in rows
        if row.scale in of_scale or not row.seeds
    }


def short_labels(group: Group) -> list[str]:
    """The labels without the words that all rows of the group begin or end with.

    'cifar10_ada_small' and 'cifar10_ada+augmix_small (ada.nu=0.02)' become 'ada' and
    'ada+augmix (nu=0.02)'.
    """
    if not group.rows[0].seeds:
        return [row.label.removesuffix(" (paper)") for row in group.rows]
    pairs = [row.label.partition(" (") for row in group.rows]
    words = [name.split("_") for name, _, _ in pairs]
    start = _shared(words)
    end = _shared([w[start:][::-1] for w in words])
    names = ["_".join(w[start : len(w) - end]) for w in words]
    settings = [space + rest.replace("ada.", "") for _, space, rest in pairs]
    labels = [name + setting for name, setting in zip(names, settings, strict=True)]
    kept = _LONGEST // 2
    return [t if len(t) <= _LONGEST else f"{t[:kept]}…{t[-kept:]}" for t in labels]


def _shared(words: Sequence[Sequence[str]]) -> int:
    """Number of leading words common to all, not counting any one's last; 0 if all are equal."""
    if all(w == words[0] for w in words):
        return 0
    columns = zip(*(w[:-1] for w in words), strict=False)
    return len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns)))


def svg(shown: Sequence[Group], size: Size, name: str) -> str:
    """Draws the picture.

    Args:
      shown: groups of rows, at least one.
      size: of the picture.
      name: CSS class of the picture.

    Returns:
      An SVG element, which takes its colours from `style.COLOURS`.
    """
    legend, top = _legend(shown, size)
    box = (_LEFT, top + 40, size.width - _RIGHT, size.height - _BOTTOM)
    rows = [row for group in shown for row in group.rows]
    clean, mce = (
        _range([row.values[k] + s * row.spread.get(k, 0.0) for row in rows for s in (-1, 1)])
        for k in ("clean", "mce")
    )
    axes = Axes(clean, mce, box, size.text)
    what = html.escape(f"mCE against clean error of {len(rows)} rows")
    return (
        f'<svg class="{name}" xmlns="http://www.w3.org/2000/svg" font-size="{size.text}" '
        f'viewBox="0 0 {size.width} {size.height}" role="img" aria-label="{what}">\n'
        f"{legend}\n{_frame(axes)}\n{_points(shown, axes)}\n</svg>"
    )


def figure(shown: Sequence[Group]) -> str:
    """The picture for wide and narrow pages as HTML, with its key figures and a caption.

    Args:
      shown: groups of rows, at least one.
    """
    facts = "".join(filter(None, map(_fact, shown)))
    return (
        (f'<ul class="facts">{facts}</ul>\n' if facts else "")
        + f"<figure>{svg(shown, WIDE, 'overview')}\n{svg(shown, NARROW, 'narrow')}\n"
        f"<figcaption>{html.escape(_caption(shown))}</figcaption></figure>"
    )


def _caption(shown: Sequence[Group]) -> str:
    """Explains the arrows and bars, if there are any, and says which images were evaluated."""
    rows = [row for group in shown for row in group.rows]
    parts = []
    if any("ada" in {row.method for row in _like_nominal(group)} for group in shown):
        parts.append("An arrow leads from nominal training to AdA.")
    if any(row.spread for row in rows):
        parts.append("Bars are one standard deviation over seeds.")
    names: dict[str, list[str]] = {}
    for group in shown:
        for images in dict.fromkeys(row.measured_on for row in group.rows):
            name = group.name if group.rows[0].seeds else "paper"
            names.setdefault(images, []).append(name)
    for images, measured in names.items():
        parts.append(f"{'; '.join(dict.fromkeys(measured))}: {images}.")
    return " ".join(parts)


def _fact(group: Group) -> str:
    """The mCE of nominal training and of the best row on the same images; '' without these."""
    rows = _like_nominal(group)
    if not rows:
        return ""
    nominal, best = rows[0], min(rows, key=lambda row: row.values["mce"])
    if nominal is best:
        return ""
    label = short_labels(group)[group.rows.index(best)]
    changes = {
        key: " → ".join(f"{row.values[key]:.1f}" for row in (nominal, best))
        for key in ("mce", "clean", "cbar")
        if key in nominal.values and key in best.values
    }
    cbar = f", C-bar {changes['cbar']}" if "cbar" in changes else ""
    return (
        f'<li class="{group.colour}"><b>{html.escape(group.name)}</b>'
        f"<strong>{changes['mce']}</strong>mCE in percent, nominal → {html.escape(label)}<br>"
        f"clean error {changes['clean']}{cbar}</li>"
    )


def _like_nominal(group: Group) -> list[grouping.Row]:
    """Nominal training and the group's other rows that were evaluated on the same images."""
    nominal = next((row for row in group.rows if row.method == "nominal"), None)
    if nominal is None:
        return []
    others = [row for row in group.rows if row.measured_on == nominal.measured_on]
    return [nominal, *(row for row in others if row is not nominal)]


def document(shown: Sequence[Group]) -> str:
    """The picture as an SVG file."""
    sheet = f"<style>{style.COLOURS}{style.PICTURE}svg {{ background: var(--paper); }}</style>"
    head, rest = svg(shown, WIDE, "overview").split(">", 1)
    return f'{head} width="{WIDE.width}" height="{WIDE.height}">{sheet}{rest}\n'


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis: from zero, unless that leaves half of it empty."""
    low, high = min(values), max(values)
    if low < high / 2 or low == high:
        return 0.0, 1.08 * high or 1.0
    margin = 0.15 * (high - low)
    return low - margin, high + margin


def _ticks(ends: tuple[float, float], most: int) -> list[float]:
    """Round values between the ends, which are at most `most` steps apart."""
    steps = [m * 10.0**e for e in range(-3, 3) for m in (1, 2, 5)]
    step = next(s for s in steps if (ends[1] - ends[0]) / s <= most)
    return [step * i for i in range(math.ceil(ends[0] / step), math.floor(ends[1] / step) + 1)]


def _frame(axes: Axes) -> str:
    """Grid, numbers and names of the axes, and the line on which mCE is the clean error."""
    left, top, right, bottom = axes.box
    parts = []
    for value in _ticks(axes.x, max(4, int(right - left) // 90)):
        x, _ = axes.at(value, 0)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>')
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{bottom + 18}">{value:g}</text>')
    for value in _ticks(axes.y, 8):
        _, y = axes.at(0, value)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text class="tick end" x="{left - 8}" y="{y + 4:.1f}">{value:g}</text>')
    parts += _equality(axes)[0]
    parts.append(f'<text class="axis" x="{left - 32}" y="{top - 12}">mCE, %</text>')
    parts.append(f'<text class="axis end" x="{right}" y="{bottom + 36}">clean error, %</text>')
    return "\n".join(parts)


def _equality(axes: Axes) -> tuple[list[str], np.ndarray]:
    """The line on which mCE is the clean error, and boxes [M,4] of its name."""
    low, high = max(axes.x[0], axes.y[0]), min(axes.x[1], axes.y[1])
    if low >= high:
        return [], np.zeros((0, 4))
    start, end = np.array(axes.at(low, low)), np.array(axes.at(high, high))
    along = (end - start) / np.hypot(*(end - start))
    beside = np.array([-along[1], along[0]])  # To the lower right.
    text = "mCE = clean error"
    at = end - along * (_WIDTH * axes.text * len(text) + 8) + 15 * beside
    turned = math.degrees(math.atan2(along[1], along[0]))
    line = f"M{start[0]:.1f} {start[1]:.1f}L{end[0]:.1f} {end[1]:.1f}"
    drawn = [
        f'<path class="equal" d="{line}"/>',
        f'<text class="tick" transform="translate({at[0]:.1f} {at[1]:.1f}) rotate({turned:.1f})">'
        f"{text}</text>",
    ]
    middles = at + np.arange(4, _WIDTH * axes.text * len(text), 8)[:, None] * along - 4 * beside
    return drawn, np.concatenate([middles - 7, middles + 7], -1)


def _legend(shown: Sequence[Group], size: Size) -> tuple[str, int]:
    """The groups' names with their marks, and the height that they take."""
    parts, x, y = [], 8.0, 16
    for group in shown:
        length = 16 + _WIDTH * size.text * len(group.name) + 20
        if x > 8 and x + length > size.width:
            x, y = 8.0, y + 20
        parts.append(
            f'<g class="{group.colour}"><circle class="mark" cx="{x + 5:.0f}" cy="{y - 4}" r="5"/>'
            f'<text class="name" x="{x + 16:.0f}" y="{y}">{html.escape(group.name)}</text></g>'
        )
        x += length
    return "\n".join(parts), y


def _points(shown: Sequence[Group], axes: Axes) -> str:
    """Marks, bars of the deviations, labels, and arrows from nominal training to AdA."""
    rows = [(g, *pair) for g in shown for pair in zip(g.rows, short_labels(g), strict=True)]
    points = np.array([axes.at(row.values["clean"], row.values["mce"]) for _, row, _ in rows])
    sizes = np.array([(_WIDTH * axes.text * len(text), axes.text + 3) for _, _, text in rows])
    marks = np.concatenate([points - 7, points + 7], -1)
    bars = np.array([_extent(row, axes) for _, row, _ in rows])
    arrows = _improvements(shown, axes)
    shares = np.linspace(0, 1, 20)[:, None]
    along = [ends[0] + shares * (ends[1] - ends[0]) for _, ends in arrows]
    lines = [np.concatenate([line - 2, line + 2], -1) for line in along]
    obstacles = np.concatenate([marks, bars, *lines, _equality(axes)[1]])
    boxes = label_places.place(points, sizes, obstacles, axes.box)
    return "".join(itertools.starmap(_arrow, arrows)) + "\n".join(
        f'<g class="{group.colour}"><title>{html.escape(_sentence(row))}</title>'
        f"{_bars(row, axes)}"
        f'<circle class="mark" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="5"/>'
        f"{_label(text, point, box)}</g>"
        for (group, row, text), point, box in zip(rows, points, boxes, strict=True)
    )


def _improvements(shown: Sequence[Group], axes: Axes) -> list[tuple[Group, np.ndarray]]:
    """The groups with nominal training and AdA, with the points [2,2] of these."""
    found = []
    for group in shown:
        rows = _like_nominal(group)
        if ada := [row for row in rows if row.method == "ada"]:
            ends = [axes.at(row.values["clean"], row.values["mce"]) for row in (rows[0], ada[0])]
            found.append((group, np.array(ends)))
    return found


def _arrow(group: Group, ends: np.ndarray) -> str:
    """An arrow from nominal training to AdA, which ends short of the marks."""
    along = (ends[1] - ends[0]) / max(1, np.hypot(*(ends[1] - ends[0])))
    (x0, y0), (x1, y1) = ends[0] + 10 * along, ends[1] - 10 * along
    across = np.array([-along[1], along[0]])
    (x2, y2), (x3, y3) = (ends[1] - 17 * along + sign * across for sign in (-5, 5))
    return (
        f'<path class="arrow {group.colour}" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}'
        f'M{x2:.1f} {y2:.1f}L{x1:.1f} {y1:.1f}L{x3:.1f} {y3:.1f}"/>\n'
    )


def _label(text: str, point: np.ndarray, box: np.ndarray) -> str:
    """A label, aligned to its point, with a leader if it is far."""
    (x, y), (left, _, right, bottom) = point, box
    at, anchor = ((left + right) / 2, "middle")
    if left > x:
        at, anchor = left, "start"
    elif right < x:
        at, anchor = right, "end"
    end_x, end_y = np.clip(point, box[:2], box[2:])
    leader = f'<path class="leader" d="M{x:.1f} {y:.1f}L{end_x:.1f} {end_y:.1f}"/>'
    return (
        leader if math.hypot(end_x - x, end_y - y) > 12 else ""
    ) + f'<text class="label {anchor}" x="{at:.1f}" y="{bottom - 4:.1f}">{html.escape(text)}</text>'


def _sentence(row: grouping.Row) -> str:
    values = ", ".join(
        f"{name} {row.values[key]:.2f}" + (f" ± {row.spread[key]:.2f}" if key in row.spread else "")
        for key, name in (("clean", "clean error"), ("mce", "mCE"))
    )
    return f"{row.label}: {values}"


def _extent(row: grouping.Row, axes: Axes) -> tuple[float, float, float, float]:
    """The box of one standard deviation to all sides; the point itself for a single seed."""
    clean, mce = row.values["clean"], row.values["mce"]
    x, y = row.spread.get("clean", 0.0), row.spread.get("mce", 0.0)
    return *axes.at(clean - x, mce + y), *axes.at(clean + x, mce - y)


def _bars(row: grouping.Row, axes: Axes) -> str:
    """Lines of one standard deviation to all sides, if there are several seeds."""
    if not row.spread:
        return ""
    left, top, right, bottom = _extent(row, axes)
    x, y = axes.at(row.values["clean"], row.values["mce"])
    line = f"M{left:.1f} {y:.1f}H{right:.1f}M{x:.1f} {top:.1f}V{bottom:.1f}"
    return f'<path class="spread" d="{line}"/>'
