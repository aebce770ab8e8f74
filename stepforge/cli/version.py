"""``stepforge --version``."""

from __future__ import annotations

from typing import Annotated

import typer

import stepforge

__all__ = ["global_options"]


def _print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"stepforge {stepforge.__version__}")
        raise typer.Exit


def global_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Take the options that stand before the name of a command."""
