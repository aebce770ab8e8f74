"""Kernels that were compiled ahead, so that a step needs no compiler.

They lie in a folder for each instruction set, named as in the cache by the hash of what went into
them and the hash of what they hold: one that was made from another source is never found, and one
that was altered is passed over.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Container, Iterator
from pathlib import Path

from stepforge.backends import trust
from stepforge.backends.native import build

#: The package's own, which a wheel for a platform carries and a pure one lacks.
FOLDER = Path(__file__).with_name("kernels")

# On one thread and in its cache, a processor of level 4 steps 2 to 3 times as fast with -v3 as with
# the plain set (in float16, 10), and 1.4 times as fast with -v4 as with -v3 (in bfloat16, 1.7). Of
# -v2 it gains a quarter, and that for processors made before 2013: they get the plain one.
_WORTH_IT = ("x86-64-v4", "x86-64-v3", "")


def instruction_sets() -> tuple[str, ...]:
    """Return the levels to compile ahead for, whatever this processor is."""
    return _WORTH_IT if build.on_x86() else ("",)


def folder() -> Path | None:
    """Return the folder of prebuilt kernels, which need not exist; None if it is disabled.

    The environment variable ``STEPFORGE_PREBUILT`` names another than the package's own; none if it
    is empty.

    Raises:
        BuildError: it names no folder, or others may put code there.
    """
    named = os.environ.get("STEPFORGE_PREBUILT")
    if named is None:
        return _trusted(FOLDER)
    if not named:
        return None
    if not os.path.isdir(named):
        raise build.BuildError(f"STEPFORGE_PREBUILT is {named!r}, which is no folder")
    return _trusted(Path(named))


def _trusted(folder: Path) -> Path:
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
        raise build.BuildError(f"the kernels in {folder} are not safe: {untrusted}")
    return resolved


def shelf(folder: Path, isa: str) -> Path:
    """Return the subfolder for an instruction set."""
    return folder / (isa or "plain")


def find(folder: Path, source: str, isa: str) -> Iterator[Path]:
    """Yield the kernels of a source for an instruction set that may be loaded.

    Raises:
        BuildError: others may put code there.
    """
    return build.intact(_trusted(shelf(folder, isa)), build.key_of(source, isa))


def _opened(folder: Path, source: str, isa: str) -> ctypes.CDLL | None:
    return build.opened(_trusted(shelf(folder, isa)), build.key_of(source, isa))


def load(source: str) -> ctypes.CDLL:
    """Return the library of a source: compiled ahead, from the cache, or compiled now.

    What was compiled ahead for a lesser instruction set than the processor's best stores the same
    bits, more slowly: it serves only where none for the best can be had.

    Raises:
        BuildError: it was not compiled ahead and cannot be compiled now.
    """
    best, *lesser = build.instruction_sets()
    ahead = folder()
    if ahead is None:
        return build.load(source)
    library = _opened(ahead, source, best)
    if library is not None:
        return library
    try:
        return build.load(source)
    except build.BuildError:
        for isa in lesser:
            library = _opened(ahead, source, isa)
            if library is not None:
                return library
        raise


def circumstances() -> tuple[object, ...]:
    """Return what :func:`load` looks at before it compiles: folders, settings, compiler."""
    return (build.answer(folder), build.answer(_compiler), *build.cache_circumstances())


def _compiler() -> tuple[object, ...]:
    command = build.compiler()
    return command, build.modified_ns(command)


def compile_ahead(folder: Path, source: str, isa: str, command: tuple[str, ...]) -> Path:
    """Compile a source into a folder of kernels; return the kernel's file.

    Args:
        folder: of all kernels; made if it is missing.
        source: in C.
        isa: the level to compile for; "" for the plain one.
        command: the compiler's.

    Raises:
        BuildError: the compiler fails.
        OSError: the folder cannot be written to.
    """
    place = shelf(folder, isa)
    trust.make_folder(place, 0o755)
    name = build.key_of(source, isa)
    # Symbols are for debuggers, and would be a twentieth of the file.
    return build.compile_into(place, name, source, isa, command, "-s", mode=build.PUBLIC)


def prune(folder: Path, isa: str, keep: Container[Path]) -> None:
    """Remove the kernels for an instruction set that are not to be kept.

    Raises:
        OSError: the folder cannot be written to.
    """
    for path in shelf(folder, isa).glob("*.so"):
        if path not in keep and re.fullmatch("[0-9a-f]{32}-[0-9a-f]{32}", path.stem):
            path.unlink(missing_ok=True)
