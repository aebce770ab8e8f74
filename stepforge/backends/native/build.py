"""From C source to a loaded function: compiled at its first use, and cached.

A kernel's file is named by the hash of everything that went into it and the hash of its content. A
file that was cut short or altered does not match its name, and is built again. So is a file that
others may change, or that does not load.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from stepforge.backends import trust
from stepforge.backends.disk_cache import PRIVATE, BuildError, cache_folder, unwritable, work_folder
from stepforge.backends.native.compiler import (
    FLAGS,
    compiler,
    compiler_version,
    first_line,
    instruction_set,
    run,
)

__all__ = [
    "compile_into",
    "compile_library",
    "digest",
    "intact",
    "key_of",
    "load",
    "opened",
    "place_to_load",
]


def load(source: str) -> ctypes.CDLL:
    """Return the library of a source, from the cache or compiled now.

    Without a compiler, a library that any compiler has built from the same source will do.

    Raises:
        BuildError: it is not in the cache and cannot be built.
    """
    isa = instruction_set()
    folder = cache_folder()
    key = key_of(source, isa)
    try:
        command = compiler()
    except BuildError:
        library = opened(folder, f"{key}-*")
        if library is None:
            raise
        return library
    version = digest("\0".join([compiler_version(command), *command]).encode())[:8]
    library = opened(folder, f"{key}-{version}")
    if library is not None:
        return library
    try:
        built = compile_into(folder, f"{key}-{version}", source, isa, command)
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        return _library(built)
    except OSError as error:
        raise BuildError(f"the compiled kernel cannot be loaded ({error})") from None


def compile_into(
    folder: Path,
    name: str,
    source: str,
    isa: str,
    command: tuple[str, ...],
    *extra: str,
    mode: int = PRIVATE,
) -> Path:
    """Compile a kernel's source into a file whose name begins with ``name``.

    Args:
        folder: an existing folder.
        name: the start of the file's name; the hash of its content follows.
        source: C source.
        isa: the level to compile for; "" for the plain one.
        command: the command of the compiler.
        extra: arguments for the compiler that do not change the kernel's instructions.
        mode: the mode of the file, whatever the umask.

    Raises:
        BuildError: the compiler fails.
        OSError: the folder cannot be written to.
    """
    march = [f"-march={isa}"] if isa else []
    flagged = [*command, *FLAGS, *march, *extra]
    return compile_library(folder, name, source, "kernel.c", flagged, ["-lm"], mode=mode)


def compile_library(
    folder: Path,
    name: str,
    source: str,
    source_name: str,
    command: Sequence[str],
    libraries: Sequence[str],
    *,
    mode: int = PRIVATE,
    timeout_s: float | None = None,
) -> Path:
    """Compile a source into a file whose name begins with ``name``.

    Args:
        folder: an existing folder.
        name: the start of the file's name; the hash of its content follows.
        source: the text of the source.
        source_name: the name of its file, for the compiler and its messages.
        command: the command of the compiler, with its flags.
        libraries: its arguments for linking.
        mode: the mode of the file, whatever the umask.
        timeout_s: the seconds that the compiler may take; None for those of a kernel.

    Raises:
        BuildError: the compiler fails.
        OSError: the folder cannot be written to.
    """
    with work_folder(folder) as work:
        source_file = work / source_name
        library = source_file.with_suffix(".so")
        source_file.write_text(source, encoding="utf-8")
        done = run([*command, str(source_file), "-o", str(library), *libraries], timeout_s)
        if done.returncode != 0 or not library.exists():
            said = first_line(done.stderr.replace(str(source_file), source_name))
            raise BuildError(f"{command[0]} failed: {said}")
        built = folder / f"{name}-{digest(library.read_bytes())}.so"
        library.chmod(mode)
        # Readers see the whole file or none, even if others build the same one now.
        os.replace(library, built)
        return built


def key_of(source: str, isa: str) -> str:
    """Return the hash of all inputs of a kernel except the compiler."""
    return digest("\0".join([source, *FLAGS, isa, platform.machine()]).encode())


def digest(content: bytes) -> str:
    """Return the hash that names a file of this content."""
    return hashlib.sha256(content).hexdigest()[:32]


def intact(folder: Path, name: str) -> Iterator[Path]:
    """Yield the libraries with that name (a pattern) that may be loaded.

    Their content matches their name, and nobody else may change them.
    """
    for candidate in _files(folder, name):
        with contextlib.suppress(OSError), _verified(candidate):
            yield candidate


def opened(folder: Path, name: str) -> ctypes.CDLL | None:
    """Return the first kernel of that name (a pattern) that loads; None if there is none."""
    for candidate in _files(folder, name):
        with contextlib.suppress(OSError):
            return _library(candidate)
    return None


def _files(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-*.so"))


@contextlib.contextmanager
def _verified(path: Path) -> Iterator[BinaryIO]:
    """Open the file of a library.

    Raises:
        OSError: it cannot be opened, others may change it, or its name is not that of its content.
    """
    with trust.open_trusted(path) as file:
        if path.stem.split("-")[-1] != digest(file.read()):
            raise OSError(f"{path.name} does not hold what its name says")
        yield file


def _library(path: Path) -> ctypes.CDLL:
    """Load the file of a kernel: the same file that was checked.

    Raises:
        OSError: it must not be loaded, does not load, or is no kernel.
    """
    with place_to_load(path) as place:
        try:
            # Name it after the file, since the path in ``place`` means nothing later.
            library = ctypes.CDLL(str(path), handle=ctypes.CDLL(place)._handle)
        except OSError as error:
            raise OSError(str(error).replace(place, path.name)) from None
    if not hasattr(library, "stepforge_run"):
        raise OSError(f"{path.name} has no function stepforge_run")
    return library


#: The folder of a process's open files, on Linux.
_OPEN_FILES = "/proc/self/fd"


_loads = itertools.count(1)


@contextlib.contextmanager
def place_to_load(path: Path) -> Iterator[str]:
    """Yield a path that names the checked file of a library until it has been loaded.

    It is new each time: the loader takes one path for one library, even if the file changes.

    Raises:
        OSError: the file must not be loaded.
    """
    with _verified(path) as file, _place_of(file, path) as place:
        yield place


@contextlib.contextmanager
def _place_of(file: BinaryIO, path: Path) -> Iterator[str]:
    number = str(file.fileno())
    if os.path.exists(f"{_OPEN_FILES}/{number}"):
        # A new spelling of the folder: "/." for every 1 in the bits of a number, "/" for every 0.
        spelled = f"{next(_loads):b}".replace("0", "/").replace("1", "/.")
        yield f"{_OPEN_FILES}{spelled}/{number}"
    elif os.name == "posix":
        with tempfile.TemporaryDirectory() as private:
            copy = Path(private, path.name)
            file.seek(0)
            copy.write_bytes(file.read())
            yield str(copy)
    else:  # a library in use cannot be removed, and files have no owners here
        yield str(path)
