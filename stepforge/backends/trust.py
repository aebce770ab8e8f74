"""Checks that nobody else can change the code that is loaded from disk.

A process runs the code in a kernel's file. So the file, its folder and every parent folder must
belong to a trusted user, and nobody else may write to them. A parent may have the sticky bit, as
``/tmp`` does: nobody can replace another user's files there. Systems without POSIX permissions are
not checked.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "belongs_to_user",
    "make_folder",
    "open_trusted",
    "others_may_write",
    "untrusted_folder",
    "untrusted_way",
]

_HAS_OWNERS = hasattr(os, "geteuid")
#: The package itself. Its Python code runs anyway, so its owner is trusted.
_PACKAGE = Path(os.path.realpath(__file__)).parents[1]


def others_may_write(status: os.stat_result) -> bool:
    """Return True if others than the owner may write to a file, or into a folder."""
    return _HAS_OWNERS and bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def belongs_to_user(status: os.stat_result) -> bool:
    """Return True if the user of this process owns a file or folder."""
    return not _HAS_OWNERS or status.st_uid == os.geteuid()


def untrusted_folder(folder: Path) -> str | None:
    """Say, in one clause, why code must not be loaded from a folder; None if it may.

    Args:
        folder: its resolved path, since whoever may write to the folder of a symbolic link can
            change the link. Folders that do not exist yet are skipped.

    Raises:
        OSError: it, or a folder on the way to it, cannot be looked at.
    """
    return _untrusted(folder, others_may_write) or untrusted_way(folder)


def untrusted_way(folder: Path) -> str | None:
    """Check the folders on the way to a folder, as :func:`untrusted_folder` does."""
    for place in folder.parents:
        if place == _PACKAGE:
            return None
        untrusted = _untrusted(place, _others_may_rename_in)
        if untrusted:
            return untrusted
    return None


def _untrusted(place: Path, is_open: Callable[[os.stat_result], bool]) -> str | None:
    try:
        status = place.lstat()
    except FileNotFoundError:
        return None
    if not _has_trusted_owner(status):
        return f"{place} belongs to another user"
    if is_open(status) and not _as_safe_as_package(place, status):
        return f"{place} can be written to by others, who could put code there: chmod go-w {place}"
    return None


@contextmanager
def open_trusted(path: Path) -> Iterator[BinaryIO]:
    """Open a file that only trusted users can change; its folder must be checked already.

    The open file, read or loaded by its descriptor, is the one that was checked.

    Raises:
        OSError: it cannot be opened, or others may change it.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise PermissionError(f"{path} is no ordinary file")
        is_open = others_may_write(status) and not _as_safe_as_package(path, status)
        if is_open or not _has_trusted_owner(status):
            raise PermissionError(f"{path} can be changed by others")
        yield file


def make_folder(folder: Path, mode: int) -> None:
    """Make a folder and its missing parents with that mode, whatever the umask.

    Raises:
        OSError: it cannot be made.
    """
    if folder.is_dir():
        return
    if folder != folder.parent and not folder.parent.exists():
        make_folder(folder.parent, mode)
    try:
        folder.mkdir(mode)
    except FileExistsError:
        if not folder.is_dir():
            raise
        return  # another process was faster
    # The umask may have taken permissions, but has added none.
    folder.chmod(stat.S_IMODE(folder.stat().st_mode) | mode)


def _has_trusted_owner(status: os.stat_result) -> bool:
    """Return True if the owner already decides what this process runs."""
    return not _HAS_OWNERS or status.st_uid == os.geteuid() or status.st_uid in _other_owners()


@functools.cache
def _other_owners() -> frozenset[int]:
    """Return the users besides the current one who are trusted.

    They are root; the owner of ``/``, which is root under another id in a container without a root
    mapping; and the owner of this package, often an administrator in a shared environment, who may
    own a folder of kernels too.
    """
    return frozenset({0, os.stat("/").st_uid, _PACKAGE.stat().st_uid})


def _as_safe_as_package(path: Path, status: os.stat_result) -> bool:
    """Return True for a place in the package that nobody else may write to than to it.

    An installer uses one umask for a whole package, so a kernel in it is as safe as its modules.
    """
    if not path.is_relative_to(_PACKAGE):
        return False
    package = _PACKAGE.stat()
    allowed = (
        package.st_mode if status.st_gid == package.st_gid else package.st_mode & ~stat.S_IWGRP
    )
    return not status.st_mode & ~allowed & (stat.S_IWGRP | stat.S_IWOTH)


def _others_may_rename_in(status: os.stat_result) -> bool:
    """Return True if others may replace another user's files in a folder."""
    return (
        others_may_write(status)
        and not status.st_mode & stat.S_ISVTX
        and not _is_of_private_group(status)
    )


def _is_of_private_group(status: os.stat_result) -> bool:
    """Return True if the owner is the only member of a folder's group, which may write.

    Many systems give every user a group of the same name, which may write to the user's files.
    Root's group has members on some systems.
    """
    if status.st_mode & stat.S_IWOTH or status.st_uid == 0:
        return False
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    same = user.pw_gid == status.st_gid and group.gr_name == user.pw_name
    return same and set(group.gr_mem) <= {user.pw_name}
