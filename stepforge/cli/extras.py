"""What the command line needs beyond the library's own dependencies."""

from __future__ import annotations

import importlib

__all__ = ["require"]

#: The names under which what we import is installed, where they differ.
_PACKAGES = {"sklearn": "scikit-learn"}


def require(*modules: str, extra: str) -> None:
    """Imports modules of an optional extra, or ends the program with one sentence.

    Args:
        modules: their names, as in an ``import`` statement.
        extra: the extra that brings them.

    Raises:
        SystemExit: one is not installed. Its message says what to install.

    Example:
        >>> require("torch", extra="demo")
        >>> require("torch", "no_such_module", extra="demo")
        Traceback (most recent call last):
        SystemExit: stepforge: this command needs no_such_module: pip install 'stepforge[demo]'
    """
    missing = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise  # it is installed, but broken
            missing.append(_PACKAGES.get(module, module))
    if missing:
        raise SystemExit(
            f"stepforge: this command needs {' and '.join(missing)}: "
            f"pip install 'stepforge[{extra}]'"
        )
