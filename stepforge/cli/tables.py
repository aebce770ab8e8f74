"""Tables on a terminal, in a pipe or in a file."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

__all__ = ["print_whole"]

#: More columns than any table has.
_UNLIMITED = 1000


def print_whole(console: Console, table: Table) -> None:
    """Prints a table as wide as it is.

    A terminal that is narrower breaks its lines; rich would cut its cells, and ``float32`` and
    ``float16`` would read alike.
    """
    wide = console.options.update(width=_UNLIMITED)
    table.width = console.measure(table, options=wide).maximum
    console.print(table, crop=False)
