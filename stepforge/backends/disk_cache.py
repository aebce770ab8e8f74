"""The cache of generated code on disk: a private folder, and private folders for builds.

Nobody else may be able to write to it, since a process runs the code in it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from stepforge.backends import trust

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]


__all__ = [
    "ABANDONED_S",
    "PRIVATE",
    "PUBLIC",
    "BuildError",
    "answer",
    "cache_circumstances",
    "cache_folder",
    "locked",
    "unwritable",
    "work_folder",
]

#: The age, in seconds, from which a build folder without a lock belongs to a killed process. It is
#: far more than the timeout of a compiler, since some file systems have no locks.
ABANDONED_S = 24 * 3600.0


#: The files of a build folder: sources and their libraries, and the lock.
_WORK_FILES = ("kernel.c", "kernel.so", "kernel.py", "guards.cpp", "guards.so", "failed", "lock")


#: The errors of a file system without locks; a build folder is then in use while it is young.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


#: The modes of files, whatever the umask: in the cache, and in a folder for other users.
PRIVATE, PUBLIC = 0o600, 0o644


class BuildError(Exception):
    """A kernel cannot be built; the reason is one sentence."""


def cache_folder(subfolder: str = "", *, make: bool = True) -> Path:
    """Return the folder of compiled kernels; made with mode 0700 if it is missing.

    ``STEPFORGE_CACHE`` if set, else ``stepforge`` in the user's cache folder.

    Args:
        subfolder: the name of a folder in it to return instead.
        make: False to leave a missing folder missing.

    Raises:
        BuildError: it cannot be made, or others than its owner may write to it or replace it.
    """
    folder = _named_cache(subfolder)
    try:
        # Both before and after: nothing is made where others may write.
        untrusted = trust.untrusted_way(folder)
        if untrusted is None:
            if not make and not folder.exists():
                return folder
            trust.make_folder(folder, 0o700)
            untrusted = trust.untrusted_way(folder)
        status = folder.stat() if untrusted is None else None
    except OSError as error:
        raise BuildError(
            f"the kernel cache {folder} cannot be made ({error.strerror}): "
            "set STEPFORGE_CACHE to a folder of yours"
        ) from None
    if status is None:
        raise BuildError(
            f"the kernel cache {folder} is not safe: {untrusted}, or set STEPFORGE_CACHE to "
            "a folder of yours"
        )
    if not trust.belongs_to_user(status):
        raise BuildError(f"the kernel cache {folder} belongs to another user")
    if trust.others_may_write(status):
        raise BuildError(
            f"the kernel cache {folder} can be written to by others, who could put code "
            f"there: chmod 700 {folder}"
        )
    return folder


def _named_cache(subfolder: str) -> Path:
    """Return the resolved path of the cache, or of a folder in it.

    Raises:
        BuildError: the user has no home to keep it in.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the specification says to ignore it
        base = os.path.join("~", ".cache")
    named = os.environ.get("STEPFORGE_CACHE") or os.path.join(base, "stepforge")
    path = os.path.expanduser(named)
    if path.startswith("~"):  # it would name a folder in the current one
        raise BuildError(
            f"the kernel cache {named} has no place, as no home folder is known: "
            "set HOME, or STEPFORGE_CACHE to a folder of yours"
        )
    return Path(os.path.realpath(os.path.join(path, subfolder)))


def unwritable(folder: Path, error: OSError) -> BuildError:
    """Return the error for a cache that cannot be written to."""
    return BuildError(
        f"the kernel cache {folder} cannot be written to ({error.strerror}): "
        "set STEPFORGE_CACHE to a folder of yours"
    )


def answer(ask: Callable[[], object]) -> object:
    """Return the result of a function, or the reason of its failure."""
    try:
        return ask()
    except BuildError as error:
        return str(error)


def cache_circumstances() -> tuple[object, ...]:
    """Return the circumstances of a build in the cache: its folder, and if it is writable."""
    folder = answer(cache_folder)
    return folder, isinstance(folder, Path) and os.access(folder, os.W_OK)


@contextlib.contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """Yield a private folder for a build beside its result; removed at the end.

    Raises:
        OSError: the folder cannot be written to.
    """
    _sweep(folder)
    # No TemporaryDirectory: a forked child would remove it, too, at its end.
    work = Path(tempfile.mkdtemp(dir=folder, prefix="build-"))
    try:
        with locked(work / "lock"):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[int]:
    """Hold the lock of a file, made if it is missing; released when the process ends.

    A file system without locks gives them to everyone.

    Args:
        path: the file.
        wait: True to wait for another process that holds it.

    Yields:
        The descriptor. A child that inherits it holds the lock, too.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is False.
        OSError: the file cannot be made.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE)) as file:
        _lock_files.add(file)
        try:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                except BlockingIOError:
                    raise
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise
            yield file.fileno()
        finally:
            _lock_files.discard(file)


#: The open files of locks.
_lock_files: set[IO[str]] = set()


def _after_fork() -> None:
    """Let go of the parent's locks, which a child would hold for its life, and wait for itself."""
    for file in list(_lock_files):
        file.close()
    _lock_files.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _sweep(folder: Path) -> None:
    """Remove the folders of processes that were killed while they built."""
    for left in folder.glob("build-????????"):
        with contextlib.suppress(OSError):  # it is another user's, in use, or just being swept
            old = time.time() - left.stat().st_mtime > ABANDONED_S
            if old and set(os.listdir(left)) <= set(_WORK_FILES):
                with locked(left / "lock"):
                    shutil.rmtree(left)
