"""A compiled kernel: a spec made into a library, and its call."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np
import torch

from stepforge.backends import cache
from stepforge.backends.disk_cache import BuildError
from stepforge.backends.native import prebuilt
from stepforge.backends.native.openmp import thread_pool
from stepforge.backends.native.source import KernelArgs, c_source
from stepforge.backends.spec import KernelSpec

__all__ = ["PARALLEL_MIN", "Kernel", "kernel_for", "threads_for"]

#: Below so many elements one thread steps alone. Two threads break even with one here, measured
#: 10 ms after the last parallel work, as in training: at 2**14 one is a third faster, at 2**19 two.
PARALLEL_MIN = 2**16


class Kernel:
    """A compiled kernel.

    Args:
        spec: its computation and storage.

    Attributes:
        args: the layout of a parameter's record in the table.
        number: numpy's type of the coefficients.
        reductions: the number of reductions of what it stores.

    Raises:
        BuildError: it cannot be compiled.
    """

    def __init__(self, spec: KernelSpec) -> None:
        self.args = KernelArgs.of(spec)
        self.number = np.float64 if spec.arithmetic == torch.float64 else np.float32
        self._run = prebuilt.load(c_source(spec)).stepforge_run
        self.reductions = len(spec.graph.reductions)
        pointer = ctypes.c_void_p
        threads: list[Any] = [ctypes.c_int, pointer, pointer, pointer]
        tables: list[Any] = [pointer] * 3
        found: list[Any] = []
        if self.reductions:
            tables, found = [pointer] * 4, [pointer] * 2
        self._run.argtypes = [ctypes.c_int64, *tables, ctypes.c_double, *found, *threads]
        self._run.restype = None

    def __call__(
        self,
        starts: np.ndarray[Any, Any],
        records: np.ndarray[Any, Any],
        coefficients: np.ndarray[Any, Any],
    ) -> None:
        """Step parameters of dense memory.

        Args:
            starts: int64, parameters + 1; the elements before each parameter, and of all.
            records: uint64, parameters x the width of :class:`KernelArgs`.
            coefficients: parameters x coefficients, in the dtype of the arithmetic.
        """
        tables = (array.ctypes.data for array in (starts, records, coefficients))
        self.launch(len(starts) - 1, int(starts[-1]), *tables)

    def launch(
        self,
        params: int,
        elements: int,
        starts: int,
        records: int,
        coefficients: int,
        grad_factor: float = 1.0,
    ) -> None:
        """Step parameters, given the addresses of the tables.

        Args:
            params: the number of parameters.
            elements: the elements of all parameters together.
            starts: the address of params + 1 int64: the elements before each parameter, and of all;
                counted in blocks if elements share scales.
            records: the address of params x width words of 64 bits.
            coefficients: the address of params x coefficients in the dtype of the arithmetic.
            grad_factor: the factor of all gradients.
        """
        threads = threads_for(elements)
        self._run(params, starts, records, coefficients, grad_factor, *threads)

    def launch_metered(
        self,
        params: int,
        elements: int,
        starts: int,
        sizes: int,
        records: int,
        coefficients: int,
        partial: int,
        totals: int,
        grad_factor: float = 1.0,
    ) -> None:
        """Step parameters, and make the reductions of what is stored.

        Args:
            params: the number of parameters.
            elements: the elements of all parameters together.
            starts: the address of params + 1 int64: the blocks of the reduction before each
                parameter, and of all.
            sizes: the address of params int64: the elements of each; with those that chunks lack,
                if elements share scales.
            records: the address of params x width words of 64 bits.
            coefficients: the address of params x coefficients in the dtype of the arithmetic.
            partial: the address of float64 to work in: reductions x blocks, or x params if those
                are more.
            totals: the address of params + 1 x reductions float64, which are written: those of each
                parameter, then those of all.
            grad_factor: the factor of all gradients.
        """
        threads = threads_for(elements)
        tables = (starts, sizes, records, coefficients)
        self._run(params, *tables, grad_factor, partial, totals, *threads)


def threads_for(elements: int) -> tuple[int, int, int, int]:
    """Return the number of threads for some elements, and the addresses of a pool's functions."""
    pool = thread_pool() if elements >= PARALLEL_MIN and not _forked else None
    return (torch.get_num_threads(), *pool) if pool else (1, 0, 0, 0)


# A forked child has the thread pool's memory but not its threads: waiting for them would not end.
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def kernel_for(spec: KernelSpec) -> Kernel | str:
    """Return the kernel of a spec, compiled at its first use; or why there is none."""
    return _kernel_for(spec, os.environ.get("STEPFORGE_ISA"))


@cache.made_once(prebuilt.circumstances)
def _kernel_for(spec: KernelSpec, _isa: str | None) -> Kernel | str:
    try:
        return Kernel(spec)
    except BuildError as error:
        return str(error)
