"""``stepforge report``: a page on a training run, and what looks wrong in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from stepforge.cli.extras import require
from stepforge.cli.output_files import file_option, write_text
from stepforge.cli.report.findings import Finding, find
from stepforge.cli.report.page import render
from stepforge.cli.report.read import UnreadableError, read

__all__ = ["report"]


def report(
    run: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            readable=True,
            metavar="RUN",
            help="The JSON lines that stepforge.MetricsLogger wrote.",
        ),
    ],
    output: Annotated[Path, file_option("File for the page")] = Path("report.html"),
) -> None:
    """Say what looks wrong in a training run, and draw it.

    The page has the loss, learning rates, norms and the update-to-weight ratio of every layer. The
    exit code is 0 if nothing looks wrong, 1 if something does, and 2 if the file has no metrics.
    """
    require("jinja2", "matplotlib", extra="report")
    try:
        measured = read(run)
    except UnreadableError as error:
        raise typer.BadParameter(str(error), param_hint="RUN") from None
    except OSError as error:
        raise typer.BadParameter(
            f"{run} cannot be read: {error.strerror}.", param_hint="RUN"
        ) from None
    found = find(measured)
    write_text(output, render(measured, found))

    console = Console(highlight=False)
    for remark in measured.remarks:
        console.print(escape(remark), soft_wrap=True)
    for finding in found:
        console.print(_printable(finding), soft_wrap=True)
    if not found:
        console.print(
            f"Nothing looks wrong in {len(measured):,} lines, until step {measured.steps[-1]:,}.",
            soft_wrap=True,
        )
    console.print(f"Charts: [bold]{escape(str(output))}[/]", soft_wrap=True)
    if found:
        raise typer.Exit(1)


def _printable(finding: Finding) -> str:
    where = f" ({finding.where})" if finding.steps else ""
    return (
        f"[bold]{finding.severity}[/], {finding.kind}: {escape(finding.sentence)}"
        f"{where} {escape(finding.advice)}"
    )
