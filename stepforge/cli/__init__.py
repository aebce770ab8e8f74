"""The command line: ``stepforge demo | bench | doctor | plan | prebuild | selftest``."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stepforge.cli.extras import require

if TYPE_CHECKING:
    import typer

__all__ = ["main", "make_app"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; the ``stepforge`` script calls it.

    Args:
        arguments: the command and its options; those of the process if None.
    """
    # A check mark must not end minutes of measurement where the encoding lacks it.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="namereplace")
    make_app()(arguments)


def make_app() -> typer.Typer:
    """The typer app with every command.

    Raises:
        SystemExit: an extra is not installed; it says which one to install.
    """
    # Imported here and not above: without the extras, the script must still be able to say so.
    require("typer", "rich", extra="cli")
    import typer

    from stepforge.cli.bench import bench
    from stepforge.cli.demo import demo
    from stepforge.cli.doctor import doctor
    from stepforge.cli.plan import plan
    from stepforge.cli.prebuild import prebuild
    from stepforge.cli.selftest import selftest
    from stepforge.cli.version import options

    app = typer.Typer(
        name="stepforge",
        help="Optimizers for PyTorch, each update rule written once and run in every way.",
        no_args_is_help=True,
        add_completion=False,
        # Errors as one plain sentence, which a box would break into lines.
        rich_markup_mode=None,
        # A bug's traceback should be Python's own, which people know how to read and report.
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )

    app.callback()(options)
    for command in (demo, bench, doctor, plan, prebuild, selftest):
        app.command()(command)
    return app
