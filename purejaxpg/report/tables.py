"""Tables of text, for the terminal and for Markdown, and rows as CSV files."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_WIDEST = 24  # characters of a column that a narrow terminal leaves whole


@dataclass(frozen=True)
class Table:
    """A table: names in the first column, numbers in the others.

    Attributes:
        title: above it.
        headers: of the columns.
        rows: their cells.
        note: below it; "" for none.
        best_first: whether the first of several rows is in bold on a terminal.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    best_first: bool = False


def show(table: Table, console: "Console") -> None:
    """Print a table on a terminal."""
    from rich import box
    from rich.table import Table as Printed
    from rich.text import Text

    # Text objects, so that rich does not read values such as [64, 64] as markup.
    printed = Printed(
        title=Text(table.title),
        caption=Text(table.note) if table.note else None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        show_edge=False,
        padding=(0, 0, 0, 1),
    )
    for i, (header, *column) in enumerate(zip(table.headers, *table.rows, strict=True)):
        # On a narrow terminal headers may wrap, but values stay whole.
        widest = max(len(line) for cell in column for line in cell.splitlines() or [""])
        whole: Any = {"min_width": min(widest, _WIDEST), "overflow": "fold"}
        printed.add_column(Text(header), justify="right" if i else "left", **whole)
    for i, row in enumerate(table.rows):
        bold = table.best_first and i == 0 and len(table.rows) > 1
        printed.add_row(*map(Text, row), style="bold" if bold else None)
    console.print(printed)


def markdown_lines(found: Iterable[Table], level: int) -> list[str]:
    """Return the lines of tables as Markdown, their titles as headings of this level."""
    lines = []
    for table in found:
        lines += [f"{'#' * level} {table.title}", "", _line(table.headers)]
        lines.append("|" + " --- |" + " ---: |" * (len(table.headers) - 1))
        lines += [*map(_line, table.rows), ""]
        lines += [table.note, ""] if table.note else []
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV; a row leaves the columns empty that only others have."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
