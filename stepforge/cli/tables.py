"""Tables in one style for a terminal, a pipe or a file."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["new_table", "print_whole"]

#: A width in characters that exceeds every table.
_UNLIMITED = 1000


def new_table(
    labels: Iterable[str] = (), numbers: Iterable[str] = (), *, is_dense: bool = False
) -> Table:
    """Return an empty table.

    Args:
        labels: the headings of its first columns, aligned left.
        numbers: the headings of its other columns, aligned right.
        is_dense: True for one space less between columns.
    """
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=is_dense)
    for heading in labels:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def print_whole(console: Console, table: Table) -> None:
    """Print a table at its full width.

    A narrower terminal breaks its lines. By default rich would cut cells to fit, and ``float32``
    and ``float16`` would read alike.
    """
    wide = console.options.update(width=_UNLIMITED)
    table.width = console.measure(table, options=wide).maximum
    console.print(table, crop=False)
