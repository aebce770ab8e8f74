"""Files and folders that commands write: a path that is wrong is refused before any work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer

__all__ = ["file_option", "folder_option", "write"]


def file_option(purpose: str, *names: str) -> Any:
    """An option for a file to write.

    The value is refused at once if the file cannot be written, or if its folder does not exist:
    a mistyped path must not make folders. Nothing is changed in either case.

    Args:
        purpose: the help, without a full stop.
        names: as typer takes them.
    """
    return typer.Option(
        *names, dir_okay=False, callback=_writable, help=f"{purpose}; its folder must exist."
    )


def folder_option(purpose: str, *names: str) -> Any:
    """An option for a folder to fill, which the command makes; the one around it must exist.

    Args:
        purpose: the help, without a full stop.
        names: as typer takes them.
    """
    return typer.Option(
        *names,
        file_okay=False,
        callback=_in_existing_folder,
        help=f"{purpose}; it is made in a folder that must exist.",
    )


def write(path: Path, text: str) -> None:
    """Writes a file.

    Raises:
        SystemExit: it can no longer be written, as on a disk that is full by now.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"stepforge: {path} cannot be written to: {error.strerror}") from None


def _in_existing_folder(path: Path | None) -> Path | None:
    if path is not None:
        _check_parent(path)
    return path


def _writable(path: Path | None) -> Path | None:
    if path is not None:
        _check_parent(path)
        _try_out(path)
    return path


def _check_parent(path: Path) -> None:
    if not os.path.isdir(path.parent):
        raise typer.BadParameter(f"there is no folder {path.parent}: make it, or name another.")


def _try_out(path: Path) -> None:
    """Opens the file, as permissions alone do not tell; a new one is removed again."""
    is_new = not os.path.exists(path)
    if not (is_new or os.path.isfile(path)):
        return  # the reader of a pipe would take the first close for the end
    try:
        path.open("ab").close()
        if is_new:
            os.unlink(os.path.realpath(path))  # a link to no file yet stays one
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written to: {error.strerror}.") from None
