"""Kernels that were compiled ahead, so that a step needs no compiler.

There is a subfolder for each instruction set. Files are named as in the cache, by the hash of
everything that went into them and the hash of their content. So a kernel of another source is never
found, and an altered one is skipped.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Container, Iterator
from pathlib import Path

from stepforge.backends import disk_cache, trust
from stepforge.backends.disk_cache import BuildError
from stepforge.backends.native import build, compiler

#: The package's own folder; wheels for a platform have it, pure ones do not.
FOLDER = Path(__file__).with_name("kernels")

# On one thread and in its cache, a processor of level 4 steps 2 to 3 times as fast with -v3 as with
# the plain set (10 times in float16), and 1.4 times as fast with -v4 as with -v3 (1.7 times in
# bfloat16). -v2 gains a quarter, and only for processors made before 2013: they get the plain set.
_WORTH_IT = ("x86-64-v4", "x86-64-v3", "")


def instruction_sets() -> tuple[str, ...]:
    """Return the levels to compile ahead for, whatever this processor is."""
    return _WORTH_IT if compiler.on_x86() else ("",)


def folder() -> Path | None:
    """Return the folder of prebuilt kernels, which need not exist; None if it is disabled.

    The environment variable ``STEPFORGE_PREBUILT`` replaces the package's own folder; an empty one
    disables prebuilt kernels.

    Raises:
        BuildError: it is no folder, or others may put code there.
    """
    named = os.environ.get("STEPFORGE_PREBUILT")
    if named is None:
        return trusted(FOLDER)
    if not named:
        return None
    if not os.path.isdir(named):
        raise BuildError(f"STEPFORGE_PREBUILT is {named!r}, which is no folder")
    return trusted(Path(named))


def trusted(folder: Path) -> Path:
    """Return the resolved path of a folder of kernels.

    Raises:
        BuildError: others may put code there.
    """
    resolved = Path(os.path.realpath(folder))
    try:
        untrusted = trust.untrusted_folder(resolved)
    except OSError as error:
        untrusted = f"it cannot be looked at ({error.strerror})"
    if untrusted:
        raise BuildError(f"the kernels in {folder} are not safe: {untrusted}")
    return resolved


def shelf(folder: Path, isa: str) -> Path:
    """Return the subfolder for an instruction set."""
    return folder / (isa or "plain")


def find(folder: Path, source: str, isa: str) -> Iterator[Path]:
    """Yield the kernels of a source for an instruction set that may be loaded.

    Raises:
        BuildError: others may put code there.
    """
    return build.intact(trusted(shelf(folder, isa)), build.key_of(source, isa))


def _opened(folder: Path, source: str, isa: str) -> ctypes.CDLL | None:
    return build.opened(trusted(shelf(folder, isa)), build.key_of(source, isa))


def load(source: str) -> ctypes.CDLL:
    """Return the library of a source: compiled ahead, from the cache, or compiled now.

    A kernel for a lesser instruction set than the best has the same bits, but is slower. It is used
    only if there is none for the best.

    Raises:
        BuildError: it was not compiled ahead and cannot be compiled now.
    """
    best, *lesser = compiler.instruction_sets()
    ahead = folder()
    if ahead is None:
        return build.load(source)
    library = _opened(ahead, source, best)
    if library is not None:
        return library
    try:
        return build.load(source)
    except BuildError:
        for isa in lesser:
            library = _opened(ahead, source, isa)
            if library is not None:
                return library
        raise


def circumstances() -> tuple[object, ...]:
    """Return what :func:`load` looks at before it compiles: folders, settings, compiler."""
    return (
        disk_cache.answer(folder),
        disk_cache.answer(_compiler),
        *disk_cache.cache_circumstances(),
    )


def _compiler() -> tuple[object, ...]:
    command = compiler.compiler()
    return command, compiler.modified_ns(command)


def compile_ahead(folder: Path, source: str, isa: str, command: tuple[str, ...]) -> Path:
    """Compile a source into a folder of kernels; return the kernel's file.

    Args:
        folder: the folder of all kernels; made if it is missing.
        source: C source.
        isa: the level to compile for; "" for the plain one.
        command: the command of the compiler.

    Raises:
        BuildError: the compiler fails.
        OSError: the folder cannot be written to.
    """
    place = shelf(folder, isa)
    trust.make_folder(place, 0o755)
    name = build.key_of(source, isa)
    # Symbols are for debuggers, and take a twentieth of the file.
    return build.compile_into(place, name, source, isa, command, "-s", mode=disk_cache.PUBLIC)


def prune(folder: Path, isa: str, keep: Container[Path]) -> None:
    """Remove the kernels for an instruction set that are not to be kept.

    Raises:
        OSError: the folder cannot be written to.
    """
    for path in shelf(folder, isa).glob("*.so"):
        if path not in keep and re.fullmatch("[0-9a-f]{32}-[0-9a-f]{32}", path.stem):
            path.unlink(missing_ok=True)
