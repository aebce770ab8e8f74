"""The OpenMP runtime of torch, whose threads the kernels use."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

__all__ = ["thread_pool"]

_OPENMP = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_parallel")


@functools.cache
def thread_pool() -> tuple[int, int, int] | None:
    """Return the addresses of three functions of torch's OpenMP, in a kernel's order.

    They are ``omp_get_thread_num``, ``omp_get_num_threads`` and ``GOMP_parallel``. None if
    torch has loaded no runtime with them; kernels then run on one thread.
    """
    for library in _openmp_libraries():
        try:
            runtime = ctypes.CDLL(library)
            functions = [getattr(runtime, name) for name in _OPENMP]
        except (OSError, AttributeError):
            continue
        thread, team, parallel = (ctypes.cast(f, ctypes.c_void_p).value for f in functions)
        if thread and team and parallel:
            return thread, team, parallel
    return None


def _openmp_libraries() -> list[str]:
    """Return the OpenMP libraries in this process, torch's own first."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux
        folder = Path(torch.__file__).parent / "lib"
        return [str(path) for path in sorted(folder.glob("lib*omp*"))]
    paths = [line.split(maxsplit=5)[-1] for line in lines if "/" in line]
    loaded = dict.fromkeys(path for path in paths if "omp" in Path(path).name)
    return sorted(loaded, key=lambda path: "/torch/" not in path)
