"""Checks that nobody else can change the code that is loaded from disk.

A process runs what a kernel's file says. So the file, its folder and every folder on the way to it
must belong to somebody who is trusted anyway, and others must not be able to write to them. A
folder with the sticky bit, such as ``/tmp``, may lie on the way: in it nobody can exchange what is
another's. Systems without POSIX permissions are left to their own.
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
#: The package itself. Its Python runs already: who may change that needs no kernel to be run.
_PACKAGE = Path(os.path.realpath(__file__)).parents[1]


def others_may_write(status: os.stat_result) -> bool:
    """True if others than its owner may write to a file, or put something into a folder."""
    return _HAS_OWNERS and bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def belongs_to_user(status: os.stat_result) -> bool:
    """True if the user who runs this process owns a file or folder."""
    return not _HAS_OWNERS or status.st_uid == os.geteuid()


def untrusted_folder(folder: Path) -> str | None:
    """Why code is not to be loaded from a folder, in a clause; None if it may be.

    Args:
        folder: its resolved path: symbolic links are themselves changed by who may write to the
            folder that they lie in. What does not exist yet is passed over.

    Raises:
        OSError: it, or a folder on the way to it, cannot be looked at.
    """
    return _untrusted(folder, others_may_write) or untrusted_way(folder)


def untrusted_way(folder: Path) -> str | None:
    """As :func:`untrusted_folder`, of the folders on the way to one."""
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
    """Opens a file that only trusted users can change; its folder is taken as checked.

    What is read from the open file, or loaded by its number, is what was checked.

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
    """Makes a folder, and what is missing on the way to it, of that mode whatever the umask.

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
    """True if the owner of a file or folder decides what this process runs in any case."""
    return not _HAS_OWNERS or status.st_uid == os.geteuid() or status.st_uid in _other_owners()


@functools.cache
def _other_owners() -> frozenset[int]:
    """The users beside one's own who are trusted.

    They are root; the owner of ``/``, who is root under another number where a container maps no
    root; and the owner of this package, in an environment that many share often an administrator of
    another name, who may well own a folder of kernels too.
    """
    return frozenset({0, os.stat("/").st_uid, _PACKAGE.stat().st_uid})


def _as_safe_as_package(path: Path, status: os.stat_result) -> bool:
    """True if a place is in the package, and nobody may write to it who may not to the package.

    An installer makes all of a package by one umask: a kernel in it is as safe as its modules.
    """
    if not path.is_relative_to(_PACKAGE):
        return False
    package = _PACKAGE.stat()
    allowed = (
        package.st_mode if status.st_gid == package.st_gid else package.st_mode & ~stat.S_IWGRP
    )
    return not status.st_mode & ~allowed & (stat.S_IWGRP | stat.S_IWOTH)


def _others_may_rename_in(status: os.stat_result) -> bool:
    """True if others may exchange what somebody else has in a folder."""
    return (
        others_may_write(status)
        and not status.st_mode & stat.S_ISVTX
        and not _is_of_private_group(status)
    )


def _is_of_private_group(status: os.stat_result) -> bool:
    """True if a folder's group, which may write to it, has its owner as the only member.

    Many systems give every user a group of the same name and let it write to all that the user
    makes. Root's group has members on some.
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
