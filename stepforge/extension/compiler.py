"""The C++ compiler: its command, its flags, and the headers of torch and Python."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

from stepforge.backends.disk_cache import BuildError
from stepforge.backends.native import build
from stepforge.backends.native import compiler as c_compiler

__all__ = ["FLAGS", "checked_tool", "cxx11_abi", "identity", "libraries", "with_flags"]

#: The standard is that of torch 2.13 for extensions; the headers of older versions allow it.
FLAGS = ("-O2", "-std=c++20", "-DNDEBUG", "-fPIC", "-shared", "-fvisibility=hidden")

#: Symbols are for debuggers, and double the file.
_NO_SYMBOLS = "-s"


def _tool() -> tuple[str, ...]:
    """Return the command of the C++ compiler: ``CXX``, or ``c++``, ``g++`` or ``clang++``.

    Raises:
        BuildError: there is none.
    """
    return c_compiler.command_of("C++", "CXX", ("c++", "g++", "clang++"))


def checked_tool() -> tuple[str, ...]:
    """Return the command of the C++ compiler if it has the headers that it needs.

    Raises:
        BuildError: there is none, headers are missing, or Python has no global interpreter lock.
    """
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise BuildError("the C++ guards need the global interpreter lock, which this Python lacks")
    command = _tool()
    python = Path(sysconfig.get_path("include"), "Python.h")
    if not python.exists():
        raise BuildError(f"Python's headers are missing ({python}): install those of this Python")
    tensor = _torch() / "include" / "ATen" / "core" / "Tensor.h"
    if not tensor.exists():
        raise BuildError(f"torch's headers are missing ({tensor})")
    return command


def identity(command: Sequence[str]) -> str:
    """Return the hash of a compiler's command and file. A step cannot wait for its ``--version``.

    Raises:
        BuildError: it is gone.
    """
    modified = c_compiler.modified_ns(tuple(command))
    return build.digest("\0".join([*command, str(modified)]).encode())[:8]


def cxx11_abi() -> str:
    """Return "1" if torch was compiled with the strings of C++11, else "0"."""
    return str(int(torch.compiled_with_cxx11_abi()))


def with_flags(command: Sequence[str], *extra: str) -> list[str]:
    """Return the command of a compiler with all flags.

    Args:
        command: the command.
        extra: flags for tests, such as those of a sanitizer, which reads symbols.
    """
    # Headers of the system warn of nothing.
    headers = [argument for folder in _headers() for argument in ("-isystem", str(folder))]
    return [
        *command,
        *FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={cxx11_abi()}",
        *(extra or [_NO_SYMBOLS]),
        *headers,
    ]


def libraries() -> list[str]:
    """Return the linker's arguments. No path is kept: the process has torch's libraries already."""
    if sys.platform == "darwin":
        return ["-undefined", "dynamic_lookup"]
    return [f"-L{_torch() / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10"]


def _headers() -> list[Path]:
    include = _torch() / "include"
    python = dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude"))
    return [include, include / "torch" / "csrc" / "api" / "include", *map(Path, python)]


def _torch() -> Path:
    return Path(os.path.abspath(torch.__file__)).parent
