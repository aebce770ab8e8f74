"""``stepforge demo``: every optimizer beside its torch.optim twin, on handwritten digits."""

from __future__ import annotations

from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from stepforge.cli.arms import ARMS, OURS, TWIN, Table, tabulate
from stepforge.cli.digits import LEARNING_RATES, load_digits
from stepforge.cli.extras import require
from stepforge.cli.lockstep import Comparison, Task, train
from stepforge.cli.output import file_option, write
from stepforge.cli.page import render
from stepforge.cli.tables import print_whole

__all__ = ["demo"]

#: The names that ``--optimizer`` takes.
OptimizerName = StrEnum("OptimizerName", [(name, name) for name in LEARNING_RATES])  # type: ignore[misc]


def demo(
    output: Annotated[Path, file_option("Where to write the page")] = Path("demo.html"),
    epochs: Annotated[
        int, typer.Option(min=1, help="How often to go through the training images.")
    ] = 25,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**63 - 1, help="Determines the initial weights and the batches."),
    ] = 0,
    optimizer: Annotated[
        list[OptimizerName] | None,
        typer.Option(case_sensitive=False, help="Repeat it for several; all if not given."),
    ] = None,
) -> None:
    """Trains beside torch.optim, prints tables and writes a page.

    A small network learns handwritten digits, each optimizer beside its torch.optim twin. The page
    has the pictures; a minute or so in all.
    """
    require("matplotlib", "sklearn", extra="demo")
    names = [str(name) for name in dict.fromkeys(optimizer or OptimizerName)]
    # So small a network gains nothing from threads, and step() is timed more steadily without.
    torch.set_num_threads(1)

    console = Console()
    comparisons = _train(console, load_digits(), names, epochs=epochs, seed=seed)
    tables = tabulate(comparisons)
    for table in tables:
        print_whole(console, _printable(table))
        console.print()
    for arm in ARMS:
        console.print(f"  [bold]{arm.name:<7}[/] {arm.what}", highlight=False)
    page = render(tables, comparisons, ARMS, ours=OURS, twin=TWIN, epochs=epochs, seed=seed)
    write(output, page)
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
                    ARMS,
                    TWIN,
                    epochs=epochs,
                    seed=seed,
                    on_epoch=advance,
                )
            )
    return comparisons


def _printable(table: Table) -> RichTable:
    printed = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    # rich cannot let a heading span columns: those of a group share one, aligned by spaces.
    spans = []
    numbered = enumerate(table.columns)
    for group, columns in groupby(numbered, key=lambda column: column[1].group):
        heading, *span = map("  ".join, zip(*(_aligned(table, i) for i, _ in columns)))
        printed.add_column(
            f"{group}\n{heading}", justify="right" if group else "left", no_wrap=True
        )
        spans.append(span)
    for row in zip(*spans):
        printed.add_row(*row)
    return printed


def _aligned(table: Table, index: int) -> list[str]:
    """The cells of a column, its name first, all of one width."""
    cells = [table.columns[index].name, *(row[index] for row in table.rows)]
    width = max(map(len, cells))
    return [cell.rjust(width) if index else cell.ljust(width) for cell in cells]
