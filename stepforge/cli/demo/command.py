"""``stepforge demo``: every optimizer beside its torch.optim twin, on handwritten digits."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from stepforge.cli.demo.digits import LEARNING_RATES, load_digits
from stepforge.cli.demo.page import render
from stepforge.cli.demo.result_tables import ResultTable, tabulate
from stepforge.cli.demo.side_by_side import Comparison, Task, train
from stepforge.cli.demo.variants import OURS, TWIN, VARIANTS
from stepforge.cli.extras import require
from stepforge.cli.options import OptimizerNames, optimizer_names
from stepforge.cli.output_files import file_option, write_text
from stepforge.cli.tables import new_table, print_whole

__all__ = ["demo"]


def demo(
    output: Annotated[Path, file_option("File for the page")] = Path("demo.html"),
    epochs: Annotated[
        int, typer.Option(min=1, help="Number of passes over the training images.")
    ] = 25,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**63 - 1, help="Determines the initial weights and the batches."),
    ] = 0,
    optimizer: OptimizerNames = None,
) -> None:
    """Train beside torch.optim, print tables and write a page.

    A small network learns handwritten digits, each optimizer beside its torch.optim twin. The page
    has the charts. This takes a minute or so.
    """
    require("jinja2", "matplotlib", "sklearn", extra="demo")
    names = optimizer_names(optimizer)
    # So small a network gains nothing from threads, and step times are steadier without them.
    torch.set_num_threads(1)

    console = Console()
    comparisons = _train(console, load_digits(), names, epochs=epochs, seed=seed)
    tables = tabulate(comparisons)
    for table in tables:
        print_whole(console, _printable(table))
        console.print()
    for variant in VARIANTS:
        console.print(f"  [bold]{variant.name:<7}[/] {variant.description}", highlight=False)
    page = render(tables, comparisons, VARIANTS, ours=OURS, twin=TWIN, epochs=epochs, seed=seed)
    write_text(output, page)
    console.print(
        f"\n  How to read it, with pictures: [bold]{escape(str(output))}[/]",
        highlight=False,
        soft_wrap=True,
    )


def _train(
    console: Console, task: Task, names: list[str], *, epochs: int, seed: int
) -> list[Comparison]:
    progress = Progress(
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs {task.fields[accuracy]}"),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,  # a thread that draws would be timed with the steps
    )
    with progress:
        bars = {
            name: progress.add_task(name, total=epochs, accuracy="", start=False) for name in names
        }

        def advance(comparison: Comparison) -> None:
            accuracy = comparison.traces[OURS.name].accuracies[-1]
            bar = bars[comparison.optimizer]
            progress.update(bar, advance=1, accuracy=f"{accuracy:6.1%} right", refresh=True)

        comparisons = []
        for name in names:
            progress.start_task(bars[name])
            comparisons.append(
                train(
                    task,
                    name,
                    LEARNING_RATES[name],
                    VARIANTS,
                    TWIN,
                    epochs=epochs,
                    seed=seed,
                    on_epoch=advance,
                )
            )
    return comparisons


def _printable(table: ResultTable) -> Table:
    printable = new_table(is_dense=True)
    # rich has no heading that spans columns, so the columns of a group become one column whose
    # cells are aligned by spaces.
    columns_of_cells = []
    numbered = enumerate(table.columns)
    for group, columns in groupby(numbered, key=lambda column: column[1].group):
        heading, *cells = map("  ".join, zip(*(_aligned(table, i) for i, _ in columns)))
        printable.add_column(
            f"{group}\n{heading}", justify="right" if group else "left", no_wrap=True
        )
        columns_of_cells.append(cells)
    for row in zip(*columns_of_cells):
        printable.add_row(*row)
    return printable


def _aligned(table: ResultTable, index: int) -> list[str]:
    """Return the name and the cells of a column, padded to the same width."""
    cells = [table.columns[index].name, *(row[index] for row in table.rows)]
    width = max(map(len, cells))
    return [cell.rjust(width) if index else cell.ljust(width) for cell in cells]
