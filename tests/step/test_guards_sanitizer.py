"""The guards in C++ under the address sanitizer, while an optimizer changes between its steps.

Oracle: the sanitizer, which ends a process that reads freed memory or beyond an object.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepforge import extension
from stepforge.backends.disk_cache import BuildError
from stepforge.extension import compiler
from tests.step.mutations import MUTATIONS

FLAGS = ("-fsanitize=address", "-fno-omit-frame-pointer", "-O1")

# Memory that is freed and read by the runtime's own memcpy.
MISTAKE = """
import ctypes
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
place = ctypes.c_void_p(c.malloc(64))
c.free(place)
c.memcpy(ctypes.create_string_buffer(64), place, 64)
"""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Return an environment in which the sanitizer's runtime is loaded first."""
    try:
        command = compiler.checked_tool()
    except BuildError as error:
        pytest.skip(str(error))
    asked = [*command, "-print-file-name=libasan.so"]
    runtime = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("the compiler has no address sanitizer")
    return os.environ | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps much until its end
        "PYTHONMALLOC": "malloc",  # Python's own pools would hide what is freed
    }


def test_no_change_makes_them_read_what_is_not_theirs(
    environment: dict[str, str], tmp_path: Path
) -> None:
    built = extension.build_into(tmp_path, *FLAGS)
    assert b"__asan_report" in built.read_bytes()
    done = run(environment, "-m", "tests.step.sanitized_steps", str(built))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == [str(2 * len(MUTATIONS)), "changes"]


def test_the_sanitizer_finds_a_read_of_freed_memory(environment: dict[str, str]) -> None:
    done = run(environment, "-c", MISTAKE)
    assert done.returncode != 0
    assert "heap-use-after-free" in done.stderr


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
