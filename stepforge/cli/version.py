"""``stepforge --version``."""

from __future__ import annotations

from typing import Annotated

import typer

import stepforge

__all__ = ["options"]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stepforge {stepforge.__version__}")
        raise typer.Exit


def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Takes the options that stand before the name of a command."""
