"""Files that commands write. Oracle: the file system, before and after."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stepforge.cli import make_app

#: Each command that writes a file, its option, and another option with a value that is refused.
COMMANDS = {
    "demo": (("demo",), "--output", ("--epochs", "0")),
    "bench": (("bench",), "--json", ("--scale", "0")),
    "plan": (("plan", "--params", "8B"), "--json", ("--bandwidth", "0")),
}
each_command = pytest.mark.parametrize(
    ("command", "option", "wrong"), COMMANDS.values(), ids=COMMANDS
)


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(make_app(), [*map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.output


def assert_refused(command: tuple[str, ...], option: str, path: Path, sentence: str) -> None:
    code, output = invoke(*command, option, path)
    assert code == 2
    assert output.startswith("Usage: ")  # no work has begun
    assert output.splitlines()[-1] == f"Error: Invalid value for '{option}': {sentence}"


@each_command
def test_a_missing_folder_is_not_made(tmp_path: Path, command, option, wrong) -> None:
    folder = tmp_path / "mistyped"
    sentence = f"there is no folder {folder}: make it, or name another."
    assert_refused(command, option, folder / "file", sentence)
    assert not folder.exists()
    folder.touch()
    assert_refused(command, option, folder / "file", sentence)


@each_command
def test_a_name_that_no_file_can_have_is_refused_before_the_work(
    tmp_path: Path, command, option, wrong
) -> None:
    """Permissions do not show it, so the command must try to open the file."""
    path = tmp_path / (1000 * "x")
    assert_refused(command, option, path, f"{path} cannot be written to: File name too long.")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="permissions do not bind the superuser",
)
@each_command
def test_what_may_not_be_written_is_refused_before_the_work(
    tmp_path: Path, command, option, wrong
) -> None:
    existing = tmp_path / "existing"
    existing.touch(mode=0o400)
    tmp_path.chmod(0o500)
    for path in (existing, tmp_path / "new"):
        assert_refused(command, option, path, f"{path} cannot be written to: Permission denied.")


@each_command
def test_a_wrong_option_beside_it_leaves_every_file_as_it_was(
    tmp_path: Path, command, option, wrong
) -> None:
    old, new, link = (tmp_path / name for name in ("old", "new", "link"))
    old.write_text("content")
    os.utime(old, (1, 1))
    link.symlink_to(tmp_path / "nowhere")
    for path in (old, new, link):
        code, output = invoke(*command, option, path, *wrong)
        assert code == 2
        assert wrong[0] in output.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"old", "link"}
    assert old.read_text() == "content"
    assert old.stat().st_mtime == 1
    assert link.is_symlink()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /dev")
def test_a_pipe_gets_the_whole_report() -> None:
    """A file in /dev/fd, as in ``--json >(command)``, is neither created nor removed."""
    reading, writing = os.pipe()
    try:
        code, _ = invoke("plan", "--params", "8B", "--json", f"/dev/fd/{writing}")
        assert code == 0
        assert json.loads(os.read(reading, 65536))["parameters"] == 8_000_000_000
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /dev/full")
def test_a_disk_that_is_full_at_the_end_gets_one_sentence() -> None:
    code, output = invoke("plan", "--params", "8B", "--json", "/dev/full")
    assert code == 1
    assert output.splitlines()[-1] == (
        "stepforge: /dev/full cannot be written to: No space left on device"
    )
