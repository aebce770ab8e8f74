"""The command line: ``stepforge demo | bench | doctor | plan | prebuild | report | selftest``.

Each command is a module or a folder with a ``command.py``, and imports no other command. The other
modules at this level, and those of ``timing``, are shared by several commands.
"""

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
    """Run the command line. The ``stepforge`` script calls this.

    Args:
        arguments: the command and its options; ``sys.argv[1:]`` if None.
    """
    # An encoding without a check mark must not lose minutes of measurement.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="namereplace")
    make_app()(arguments)


def make_app() -> typer.Typer:
    """Return the typer app with every command.

    Raises:
        SystemExit: if an extra is not installed. The message names the extra to install.
    """
    # Imported here, because the script must be able to report a missing extra.
    require("typer", "rich", extra="cli")
    import typer

    from stepforge.cli.bench.command import bench
    from stepforge.cli.demo.command import demo
    from stepforge.cli.doctor import doctor
    from stepforge.cli.plan import plan
    from stepforge.cli.prebuild import prebuild
    from stepforge.cli.report.command import report
    from stepforge.cli.selftest.command import selftest
    from stepforge.cli.version import global_options

    app = typer.Typer(
        name="stepforge",
        help="Optimizers for PyTorch, each update rule written once and run in every way.",
        no_args_is_help=True,
        add_completion=False,
        # Print errors as one plain sentence. A rich box would break it into lines.
        rich_markup_mode=None,
        # Print Python's own traceback for a bug: people know how to read and report it.
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )

    app.callback()(global_options)
    for command in (demo, bench, doctor, plan, prebuild, report, selftest):
        app.command()(command)
    return app
