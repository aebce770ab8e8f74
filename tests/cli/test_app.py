"""The command line as a whole: help, version, encodings, terminals, and its modules."""

from __future__ import annotations

import ast
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

import stepforge
from stepforge.cli import main, make_app
from stepforge.cli.tables import print_whole

CLI = Path(__file__).parents[2] / "stepforge" / "cli"
COMMANDS = ("bench", "demo", "doctor", "plan", "prebuild", "report", "selftest")


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(make_app(), arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_version_is_told() -> None:
    assert invoke("--version") == f"stepforge {stepforge.__version__}\n"


def test_the_list_of_commands_has_a_whole_sentence_for_each() -> None:
    output = invoke("--help")
    _, _, listed = output.partition("Commands:\n")
    assert len(listed.splitlines()) >= 5
    # typer ends what it cuts off with three dots.
    assert all(line.endswith(".") and not line.endswith("..") for line in listed.splitlines())
    assert invoke("-h") == output


def test_h_is_help_of_a_command_too() -> None:
    assert invoke("plan", "-h") == invoke("plan", "--help")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_character_that_the_output_lacks_is_named(monkeypatch, encoding) -> None:
    """A million parameters take microseconds. Oracle: Python's codec for the encoding."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--params", "1M"])
    sys.stdout.flush()
    micro = "µ".encode(encoding, errors="namereplace")
    assert ended.value.code == 0
    assert b"A step takes at least 8.36 " + micro + b"s" in written.getvalue()


def test_a_table_is_printed_in_full_on_a_narrow_terminal() -> None:
    """Oracle: a wide console."""
    printed = []
    for width in (200, 10):
        table = Table("float32", "float16")
        table.add_row("served by native", "served by foreach")
        console = Console(file=io.StringIO(), width=width)
        print_whole(console, table)
        printed.append(console.file.getvalue())
    assert "served by native" in printed[0]
    assert printed[1] == printed[0]


def imports_of_cli(path: Path) -> set[str]:
    """Return the modules and folders in stepforge/cli that a module imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names]
    return {part[2] for part in parts if part[:2] == ["stepforge", "cli"]}


@pytest.mark.parametrize(
    "path", sorted(CLI.rglob("*.py")), ids=lambda path: str(path.relative_to(CLI))
)
def test_commands_do_not_import_each_other_and_shared_modules_import_none(path: Path) -> None:
    own = path.relative_to(CLI).parts[0].removesuffix(".py")
    if own != "__init__":  # it assembles the app
        assert imports_of_cli(path) & set(COMMANDS) <= {own} & set(COMMANDS)
