"""Files and folders that commands write: a bad path is refused before any work."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

__all__ = ["file_option", "folder_option", "write_json", "write_text"]


def file_option(purpose: str, *names: str) -> Any:
    """Return an option for a file to write.

    The value is refused at once if the file cannot be written, or if its folder does not exist: a
    mistyped path must not create folders. The check changes no file.

    Args:
        purpose: the help text, without a full stop.
        names: the option's names, as in ``typer.Option``.
    """
    return typer.Option(
        *names, dir_okay=False, callback=_writable, help=f"{purpose}; its folder must exist."
    )


def folder_option(purpose: str, *names: str) -> Any:
    """Return an option for a folder to fill. The command creates it in a folder that must exist.

    Args:
        purpose: the help text, without a full stop.
        names: the option's names, as in ``typer.Option``.
    """
    return typer.Option(
        *names,
        file_okay=False,
        callback=_in_existing_folder,
        help=f"{purpose}; it is created in a folder that must exist.",
    )


def write_text(path: Path, text: str, *, hint: str = "") -> None:
    """Write a text file.

    Args:
        path: the file.
        text: its content.
        hint: what to do about an error, appended to its message.

    Raises:
        SystemExit: if the file can no longer be written, as on a disk that has filled up.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SystemExit(
            f"stepforge: {path} cannot be written to: {error.strerror}{hint}"
        ) from None


def write_json(path: Path, content: Mapping[str, Any], *, hint: str = "") -> None:
    """Write a JSON file; see :func:`write_text`."""
    write_text(path, json.dumps(content, indent=1) + "\n", hint=hint)


def _in_existing_folder(path: Path | None) -> Path | None:
    if path is not None:
        _check_parent(path)
    return path


def _writable(path: Path | None) -> Path | None:
    if path is not None:
        _check_parent(path)
        _try_to_open(path)
    return path


def _check_parent(path: Path) -> None:
    if not os.path.isdir(path.parent):
        raise typer.BadParameter(f"there is no folder {path.parent}: make it, or name another.")


def _try_to_open(path: Path) -> None:
    """Open the file, since permissions alone do not decide; remove it again if it is new."""
    is_new = not os.path.exists(path)
    if not (is_new or os.path.isfile(path)):
        return  # the reader of a pipe would take the first close for the end
    try:
        path.open("ab").close()
        if is_new:
            os.unlink(os.path.realpath(path))  # keep a link whose target does not exist
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written to: {error.strerror}.") from None
