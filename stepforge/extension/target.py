"""The torch and Python of this process, for which its extension is built.

A file is named by both, for people, and by the hash of everything that went into it.
"""

from __future__ import annotations

import functools
import platform
import re
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch

from stepforge.backends.disk_cache import BuildError
from stepforge.backends.native import build
from stepforge.extension.compiler import FLAGS, cxx11_abi
from stepforge.extension.order import SOURCE_NAME

__all__ = ["description", "is_outdated", "name", "source", "why_unused"]

#: The source is beside its twin in Python.
_SOURCE = Path(__file__).parents[1] / "step" / SOURCE_NAME

_NAME = re.compile(
    r"guards-torch(?P<torch>[^-]+)-(?P<python>.+)-(?P<key>[0-9a-f]{32})(-[0-9a-f]{8})?-[0-9a-f]{32}"
)


@functools.cache
def source() -> str:
    """Return the text of the source.

    Raises:
        BuildError: it cannot be read.
    """
    try:
        return _SOURCE.read_text(encoding="utf-8")
    except OSError as error:
        raise BuildError(f"{_SOURCE} cannot be read ({error.strerror})") from None


def name(*extra: str) -> str:
    """Return the start of the name of an extension for this process.

    Args:
        extra: flags of the compiler besides the usual ones.

    Raises:
        BuildError: the source cannot be read.
    """
    return f"guards-torch{torch.__version__}-{_python()}-{_key(extra)}"


def _key(extra: tuple[str, ...]) -> str:
    flags = [*FLAGS, cxx11_abi(), *extra]
    versions = [torch.__version__, str(torch.version.git_version), _python(), platform.machine()]
    return build.digest("\0".join([source(), *flags, *versions]).encode())


@functools.cache
def _python() -> str:
    """Return the name of Python's binary interface, such as ``cpython-311-x86_64-linux-gnu``."""
    return str(sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag)


def description() -> str:
    """Return the versions that an extension for this process was built for."""
    return f"torch {torch.__version__}, {_python()}"


def why_unused(paths: Iterable[Path]) -> str | None:
    """Say, in a predicate, why the extensions among files do not serve this process.

    Returns:
        The predicate of the one that is nearest to this process; None if there is no extension.
    """
    found = [match for path in paths if (match := _NAME.fullmatch(path.stem))]
    if not found:
        return None
    own = {"torch": str(torch.__version__), "python": _python(), "key": _key(())}
    nearest = max(found, key=lambda match: [match[part] == own[part] for part in own])
    if nearest["torch"] != own["torch"]:
        return f"was built for torch {nearest['torch']}, and this is {own['torch']}"
    if nearest["python"] != own["python"]:
        return f"was built for {nearest['python']}, and this is {own['python']}"
    if nearest["key"] != own["key"]:
        return "was built from another source"
    return "does not load, is damaged, or can be changed by others"


def is_outdated(path: Path) -> bool:
    """Return True for an extension of this torch and Python, whatever its source."""
    match = _NAME.fullmatch(path.stem)
    return match is not None and (match["torch"], match["python"]) == (
        torch.__version__,
        _python(),
    )
