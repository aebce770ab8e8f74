"""The extension: C++ against torch's own headers, built for one torch and one Python.

It is looked for in the folder of prebuilt kernels, then in the cache. If it is in neither, a
process in the background builds it into the cache. Until then, and wherever it cannot be built,
steps do the same in Python.

The environment variable ``STEPFORGE_GUARDS`` is ``python`` for steps without it, and ``cpp`` for
steps that need it: they build it themselves, and raise an error if they cannot.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Container
from pathlib import Path
from types import ModuleType

from stepforge.backends import cache, disk_cache, trust
from stepforge.backends.disk_cache import PRIVATE, PUBLIC, BuildError
from stepforge.backends.native import build, prebuilt
from stepforge.extension import background, compiler, load, target
from stepforge.extension.order import Order

__all__ = ["build_into", "build_into_cache", "described", "module", "prune", "status"]

#: The subfolder of extensions, in the cache and in the folder of prebuilt kernels.
_SUBFOLDER = "extension"
#: Seconds between looks for an extension that was not there.
_LOOK_S = 1.0
#: A look is followed by at least this many times its duration without one, as on a slow disk.
_LOOK_FACTOR = 20.0

_BUILDING = "the C++ guards are being built in the background"
_NOT_BUILT = "the C++ guards are not built yet: the first step has them built"
_ASKED_FOR_PYTHON = "STEPFORGE_GUARDS asks for python"

_module: ModuleType | None = None
_reason = _BUILDING
_next_look = 0.0

# A signal handler may step while the thread that it interrupts looks: it enters again.
_looking = threading.RLock()
#: True while a thread of this process builds, and in a child that was forked meanwhile.
_building_here = False


def _after_fork() -> None:
    """Take a new lock: in the child, no thread can release the old one."""
    global _looking
    _looking = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def module() -> ModuleType | str:
    """Return the loaded extension; or why there is none, in one sentence.

    This waits for no compiler, unless ``STEPFORGE_GUARDS`` is ``cpp``.

    Raises:
        ValueError: ``STEPFORGE_GUARDS`` has a value that it cannot have.
        RuntimeError: ``STEPFORGE_GUARDS`` is ``cpp``, and there is no extension.
    """
    asked = _asked()
    if asked == "python":
        return _ASKED_FOR_PYTHON
    if _module is not None:
        return _module
    if asked == "cpp":
        built = _needed()
        if isinstance(built, str):
            raise RuntimeError(f"STEPFORGE_GUARDS=cpp cannot be served: {built}")
        return built
    return _reason if time.monotonic() < _next_look else _look()


def status() -> ModuleType | str:
    """Return the loaded extension, or why there is none now. This starts no build.

    Raises:
        ValueError: ``STEPFORGE_GUARDS`` has a value that it cannot have.
    """
    if _asked() == "python":
        return _ASKED_FOR_PYTHON
    if _module is not None:
        return _module
    with _looking:
        found = _found()
    if isinstance(found, ModuleType):
        return _keep(found)
    if isinstance(found, Order):
        running = background.is_running(found)
        found = _BUILDING if running else found.failure() or _NOT_BUILT
    return _sentence(found)


def build_into_cache() -> ModuleType | str:
    """Return the loaded extension, built now if it is nowhere; or why it cannot be built."""
    if _module is not None:
        return _module
    with _looking:
        found = _found()
        if isinstance(found, Order):
            found = _built(found)
    return _keep(found) if isinstance(found, ModuleType) else _sentence(found)


def build_into(folder: Path, *extra: str) -> Path:
    """Build the extension into a folder of prebuilt kernels; return its file.

    Args:
        folder: the folder of all kernels; made if it is missing.
        extra: flags of the compiler besides the usual ones. An extension with such flags is not
            found by steps.

    Raises:
        BuildError: it cannot be built.
        OSError: the folder cannot be written to.
    """
    command = compiler.checked_tool()
    shelf = prebuilt.shelf(folder, _SUBFOLDER)
    trust.make_folder(shelf, 0o755)
    return _order(shelf, target.name(*extra), command, *extra, mode=PUBLIC).compile()


def prune(folder: Path, keep: Container[Path]) -> None:
    """Remove extensions that are not to be kept from a folder of prebuilt kernels.

    Those for another torch or Python stay: several environments may share the folder.

    Raises:
        OSError: the folder cannot be written to.
    """
    for path in prebuilt.shelf(folder, _SUBFOLDER).glob("*.so"):
        if path not in keep and target.is_outdated(path):
            path.unlink(missing_ok=True)


def described(found: ModuleType | str) -> str:
    """Return the language of the guards for what :func:`module` has returned, and the reason.

    Example:
        >>> described("no C++ compiler is on the PATH: install g++ or clang++")
        'Python: no C++ compiler is on the PATH: install g++ or clang++'
    """
    return f"Python: {found}" if isinstance(found, str) else "C++"


def _asked() -> str | None:
    """Return the value of ``STEPFORGE_GUARDS``.

    Raises:
        ValueError: it cannot have it.
    """
    asked = os.environ.get("STEPFORGE_GUARDS")
    if asked and asked not in ("python", "cpp"):
        raise ValueError(f"STEPFORGE_GUARDS is {asked!r}; it must be one of python, cpp")
    return asked


def _look() -> ModuleType | str:
    """Look for the extension; start a build if there is none. Other threads go on meanwhile."""
    global _reason, _next_look
    if not _looking.acquire(blocking=False):
        return _reason
    try:
        began = time.monotonic()
        found = _found()
        took = time.monotonic() - began
        if isinstance(found, ModuleType):
            return _keep(found)
        _reason = _sentence(found if isinstance(found, str) else _start(found))
        _next_look = time.monotonic() + max(_LOOK_S, _LOOK_FACTOR * took)
        return _reason
    finally:
        _looking.release()


def _found() -> ModuleType | Order | str:
    """Return the extension, the order of its build, or why it cannot be built."""
    try:
        return _find()
    except BuildError as error:
        return str(error)


def _find() -> ModuleType | Order:
    """Return the extension, or the order of its build.

    Raises:
        BuildError: it is nowhere, and cannot be built.
    """
    name = target.name()
    ahead = _prebuilt_shelf()
    if ahead is not None:
        with contextlib.suppress(BuildError):  # one that does not load
            found = load.opened(ahead, name)
            if found is not None:
                return found
    folder = disk_cache.cache_folder(_SUBFOLDER, make=False)
    try:
        command = compiler.checked_tool()
    except BuildError:
        found = load.opened(folder, f"{name}-*")
        if found is None:
            raise
        return found
    order = _order(folder, f"{name}-{compiler.identity(command)}", command)
    return load.opened(folder, order.name) or order


def _prebuilt_shelf() -> Path | None:
    """Return the folder of prebuilt extensions; None if it is disabled.

    Raises:
        BuildError: it is no folder, or others may put code there.
    """
    folder = prebuilt.folder()
    return None if folder is None else prebuilt.trusted(prebuilt.shelf(folder, _SUBFOLDER))


def _order(
    folder: Path, name: str, command: tuple[str, ...], *extra: str, mode: int = PRIVATE
) -> Order:
    flagged, linked = compiler.with_flags(command, *extra), compiler.libraries()
    return Order(str(folder), name, target.source(), flagged, linked, mode)


def _start(order: Order) -> str:
    """Start a build in the background unless it runs; return that, or why there is none."""
    try:
        disk_cache.cache_folder(_SUBFOLDER)  # made if it is missing
        background.start(order)
    except BuildError as error:
        return str(error)
    except OSError as error:
        return str(disk_cache.unwritable(Path(order.folder), error))
    return _BUILDING


def _built(order: Order) -> ModuleType | str:
    """Build the extension now, or wait for another process that builds it, and load it.

    Returns:
        The extension; or why it cannot be built, or does not load.
    """
    global _building_here
    outer, _building_here = _building_here, True
    try:
        folder = disk_cache.cache_folder(_SUBFOLDER)
        # A signal handler must not wait for the build that it interrupts, nor a child for that of
        # its parent, which may wait for the end of a pipe that the child has inherited.
        with contextlib.nullcontext() if outer else disk_cache.locked(order.lock, wait=True):
            if not any(build.intact(folder, order.name)):
                order.run()
        return load.opened(folder, order.name) or f"the compiled extension is gone from {folder}"
    except BuildError as error:
        return str(error)
    except OSError as error:
        return str(disk_cache.unwritable(Path(order.folder), error))
    finally:
        _building_here = outer


def _circumstances() -> tuple[object, ...]:
    """Return what a failure depends on: folders, settings, compiler."""
    return (
        disk_cache.answer(_prebuilt_shelf),
        disk_cache.answer(lambda: compiler.identity(compiler.checked_tool())),
        *disk_cache.cache_circumstances(),
    )


_needed = cache.made_once(_circumstances)(build_into_cache)


def _keep(found: ModuleType) -> ModuleType:
    """Keep the loaded extension for the life of the process."""
    global _module
    if _module is None:
        _module = found
    return _module


def _sentence(reason: str) -> str:
    """Return a reason, with why the prebuilt extension is none for this process."""
    try:
        shelf = _prebuilt_shelf()
    except BuildError:  # this is the reason
        return reason
    unused = None if shelf is None else target.why_unused(sorted(shelf.glob("*.so")))
    if unused is None:
        return reason
    where = "the package" if shelf == prebuilt.shelf(prebuilt.FOLDER, _SUBFOLDER) else shelf
    return f"{reason}; the extension in {where} {unused}"
