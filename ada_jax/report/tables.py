"""Tables of numbers with standard deviations, formatted as Markdown, LaTeX and CSV."""

import csv as csv_format
import io
import re
from typing import NamedTuple


class Cell(NamedTuple):
    """One cell: a text, a number, or None, which is left empty."""

    value: float | int | str | None = None
    digits: int = 0  # After the decimal point.
    spread: float | None = None  # Standard deviation, printed after a plus-minus.
    signed: bool = False  # Whether to print a plus sign, for differences.


class Table(NamedTuple):
    """A table; a group is a line and the lines that belong to it, such as differences."""

    title: str
    head: list[str]
    groups: list[list[list[Cell]]]  # Groups of lines of cells.
    notes: list[str] = []  # noqa: RUF012 (never modified)
    # Headings above the head on the web page, each with its number of columns, which are coloured
    # by value if the heading is not ''.
    spans: list[tuple[str, int]] = []  # noqa: RUF012

    @property
    def lines(self) -> list[list[Cell]]:
        """All lines from top to bottom."""
        return [line for group in self.groups for line in group]


def text(cell: Cell) -> str:
    """Formats a cell: '12.49', '12.49 ± 0.12', '+0.30' or ''."""
    if cell.value is None or isinstance(cell.value, str):
        return cell.value or ""
    sign = "+" if cell.signed else ""
    spread = "" if cell.spread is None else f" ± {cell.spread:.{cell.digits}f}"
    return f"{cell.value:{sign}.{cell.digits}f}{spread}"


def markdown(table: Table) -> str:
    """Formats a table as Markdown, with aligned columns."""
    numeric = _numeric(table)
    cells = [[_escape_markdown(text(c)) for c in line] for line in table.lines]
    cells.insert(0, [_escape_markdown(name) for name in table.head])
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rules = [
        "-" * (width - 1) + (":" if right else "-")
        for width, right in zip(widths, numeric, strict=True)
    ]
    rows = []
    for line in (cells[0], rules, *cells[1:]):
        padded = [
            word.rjust(width) if right else word.ljust(width)
            for word, width, right in zip(line, widths, numeric, strict=True)
        ]
        rows.append(f"| {' | '.join(padded)} |")
    notes = "".join(f"\n- {_escape_markdown(note)}" for note in table.notes)
    return f"**{table.title}**\n\n" + "\n".join(rows) + ("\n" + notes if notes else "")


def latex(table: Table) -> str:
    r"""Formats a table as LaTeX, for \usepackage{booktabs}; the notes are in the caption."""
    numeric = _numeric(table)
    body = [" & ".join(_escape_latex(text(c)) for c in line) + r" \\" for line in table.lines]
    head = " & ".join(map(_escape_latex, table.head)) + r" \\"
    caption = " ".join(f"{note.rstrip('.')}." for note in (table.title, *table.notes))
    return "\n".join(
        (
            r"\begin{table}",
            r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{_escape_latex(caption)}}}",
            rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in numeric)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        )
    )


def csv(table: Table) -> str:
    """Formats a table as CSV with six digits and columns of standard deviations, without notes."""
    spreads = [any(c.spread is not None for c in column) for column in _columns(table)]
    file = io.StringIO()
    writer = csv_format.writer(file, lineterminator="\n")
    pairs = zip(table.head, spreads, strict=True)
    writer.writerow([h for name, spread in pairs for h in [name, f"{name}, std"][: 1 + spread]])
    for line in table.lines:
        pairs = zip(line, spreads, strict=True)
        values = [v for c, spread in pairs for v in [c.value, c.spread][: 1 + spread]]
        writer.writerow([round(v, 6) if isinstance(v, float) else v for v in values])
    return file.getvalue().rstrip("\n")


FORMATS = {"markdown": markdown, "latex": latex, "csv": csv}


def _columns(table: Table) -> list[list[Cell]]:
    """The columns without their headings."""
    return [[line[i] for line in table.lines] for i in range(len(table.head))]


def _numeric(table: Table) -> list[bool]:
    """Whether each column has a number."""
    return [any(not isinstance(c.value, str | None) for c in col) for col in _columns(table)]


def _escape_markdown(words: str) -> str:
    # Underscores inside words are not emphasis, and only '&word;' is an entity.
    words = re.sub(r"([|*`\\<$~]|&(?=#?\w+;)|(?<!\w)_|_(?!\w))", r"\\\1", words)
    return " ".join(words.splitlines())


def _escape_latex(words: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    special |= {"±": r"$\pm$", "−": "$-$", "\n": " "} | {c: rf"\{c}" for c in "&%$#_{}"}
    words = "".join(special.get(c, c) for c in words)
    return re.sub(r"^([+-])(?=\d)", r"$\1$", words)
