"""Compilers: their commands, and a kernel's flags and instruction sets on this processor."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from stepforge.backends.disk_cache import BuildError

__all__ = [
    "COMPILE_TIMEOUT_S",
    "FLAGS",
    "LEVELS",
    "command_of",
    "compiler",
    "compiler_version",
    "first_line",
    "instruction_set",
    "instruction_sets",
    "modified_ns",
    "on_x86",
    "run",
]

#: IEEE results from vector code: no re-association (no -ffast-math), no contraction of a product
#: and a sum into one rounding; sqrt need not set errno, and nothing reads floating point traps.
FLAGS = (
    "-O3",
    "-std=gnu11",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
)


#: x86-64 levels, best first, with the features of a processor of that level.
LEVELS = {
    "x86-64-v4": frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    "x86-64-v3": frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}),
    "x86-64-v2": frozenset({"sse4_2", "ssse3", "popcnt"}),
}


#: Seconds that a compiler may take for a kernel; it takes a fraction of one.
COMPILE_TIMEOUT_S = 120.0


def on_x86() -> bool:
    """Return True if :data:`LEVELS` apply to this machine."""
    return platform.machine() in ("x86_64", "AMD64")


def instruction_sets() -> tuple[str, ...]:
    """Return the levels that this processor can run, the best first; "" is the plain one.

    The environment variable ``STEPFORGE_ISA`` leaves one of them.

    Raises:
        BuildError: it names one that this processor has not.
    """
    features = _processor_features()
    usable = [level for level, needed in LEVELS.items() if needed <= features]
    forced = os.environ.get("STEPFORGE_ISA")
    if forced is None:
        return (*usable, "")
    if forced not in (*usable, ""):
        known = ", ".join(usable) or "empty"
        raise BuildError(f"STEPFORGE_ISA is {forced!r}; on this processor it must be {known}")
    return (forced,)


def instruction_set() -> str:
    """Return the level to compile for: the best of :func:`instruction_sets`."""
    return instruction_sets()[0]


@functools.cache
def _processor_features() -> frozenset[str]:
    if not on_x86():
        return frozenset()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line for line in text.splitlines() if line.startswith("flags"))
    return frozenset(next(lines, "").split())


def compiler() -> tuple[str, ...]:
    """Return the command of the C compiler: ``CC``, or ``cc``, ``gcc`` or ``clang``.

    Raises:
        BuildError: there is none.
    """
    return command_of("C", "CC", ("cc", "gcc", "clang"))


def command_of(language: str, variable: str, programs: Sequence[str]) -> tuple[str, ...]:
    """Return the command of a compiler.

    Args:
        language: the language that it compiles.
        variable: the environment variable that names it.
        programs: the programs to look for if the variable is not set: the system's, and those that
            can be installed.

    Raises:
        BuildError: there is none.
    """
    value = os.environ.get(variable, "")
    try:
        named = shlex.split(value)
    except ValueError as error:
        raise BuildError(f"{variable} is {value!r}, which is no command ({error})") from None
    for program, *arguments in [named] if named else [[program] for program in programs]:
        path = shutil.which(program)
        if path:
            return path, *arguments
    missing = (
        f"{variable} names {named[0]!r}, which is not" if named else f"no {language} compiler is"
    )
    raise BuildError(f"{missing} on the PATH: install {' or '.join(programs[1:])}")


def compiler_version(command: tuple[str, ...]) -> str:
    """Return the first line of a compiler's ``--version``.

    Raises:
        BuildError: it cannot be run.
    """
    return _version_of(command, modified_ns(command))


def modified_ns(command: tuple[str, ...]) -> int:
    """Return the time of a compiler's last change: another version may have replaced it.

    Raises:
        BuildError: it is gone.
    """
    try:
        return os.stat(command[0]).st_mtime_ns
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({error.strerror})") from None


@functools.cache
def _version_of(command: tuple[str, ...], modified_ns: int) -> str:
    lines = run([*command, "--version"]).stdout.splitlines()
    return lines[0] if lines else " ".join(command)


def run(command: list[str], timeout_s: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run a compiler, for at most :data:`COMPILE_TIMEOUT_S` unless told otherwise.

    Raises:
        BuildError: it cannot be run, or takes too long.
    """
    timeout_s = COMPILE_TIMEOUT_S if timeout_s is None else timeout_s
    try:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # so that its children can be ended with it
        ) as process:
            try:
                output, errors = process.communicate(timeout=timeout_s)
            except BaseException:  # also Ctrl-C, which does not reach another session
                _kill(process)
                raise
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} did not finish within {timeout_s:g} s") from None
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({error.strerror})") from None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and its children: a compiler's driver runs the compiler as one."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(OSError):  # they have just ended
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def first_line(text: str) -> str:
    """Return the first line of a compiler's errors."""
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
    return lines[0].strip() if lines else "it said nothing"
