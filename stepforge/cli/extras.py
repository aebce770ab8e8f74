"""Check that a command's optional dependencies are installed."""

from __future__ import annotations

import importlib

__all__ = ["require"]

#: The packages whose name differs from the name of their module.
_PACKAGES = {"sklearn": "scikit-learn"}


def require(*modules: str, extra: str) -> None:
    """Import modules of an optional extra, or exit with one sentence.

    Args:
        modules: their names, as in an ``import`` statement.
        extra: the extra that installs them.

    Raises:
        SystemExit: if a module is not installed. The message says what to install.

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
                raise  # the module is installed, but broken
            missing.append(_PACKAGES.get(module, module))
    if missing:
        raise SystemExit(
            f"stepforge: this command needs {' and '.join(missing)}: "
            f"pip install 'stepforge[{extra}]'"
        )
