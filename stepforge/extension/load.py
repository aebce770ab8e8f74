"""Loading of an extension's file: the same file that was checked."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

from stepforge.backends.disk_cache import BuildError
from stepforge.backends.native import build

__all__ = ["opened"]

_MODULE = "stepforge.extension._guards"


def opened(folder: Path, name: str) -> ModuleType | None:
    """Return the first extension of that name (a pattern) that loads; None if there is none.

    Raises:
        BuildError: no such extension loads.
    """
    problem: OSError | None = None
    for path in build.intact(folder, name):
        try:
            return _load(path)
        except OSError as error:
            problem = error
    if problem is not None:
        raise BuildError(f"the compiled extension cannot be loaded ({problem})")
    return None


def _load(path: Path) -> ModuleType:
    """Load the file of an extension.

    Raises:
        OSError: it must not be loaded, or does not load.
    """
    with build.place_to_load(path) as place:
        loader = ExtensionFileLoader(_MODULE, place)
        spec = importlib.util.spec_from_file_location(_MODULE, place, loader=loader)
        assert spec is not None
        try:
            module = importlib.util.module_from_spec(spec)
            loader.exec_module(module)
        except Exception as error:  # whatever its init function raises: steps do without it
            raise OSError(str(error).replace(place, path.name)) from None
    # The path in ``place`` means nothing later.
    spec.origin = module.__file__ = str(path)
    return module
