"""A compiled kernel: what a graph becomes, and how it is called."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from stepforge.backends import retry
from stepforge.backends.native import build, prebuilt
from stepforge.backends.native.source import Record, c_source
from stepforge.expr import Graph
from stepforge.formats import Format

#: Elements below which one thread steps alone. Two break even with one here, measured 10 ms after
#: the last parallel work, as in training: at 2**14 one is a third faster, at 2**19 two are.
SERIAL = 2**16


class Kernel:
    """A compiled kernel.

    Args:
        graph: what it computes.
        dtypes: the dtype of each tensor of its :class:`Record`, in order.
        arithmetic: float32 or float64.
        formats: of the columns that have one.

    Attributes:
        record: what it is told of a row.
        number: numpy's type of the coefficients.

    Raises:
        BuildError: it cannot be compiled.
    """

    def __init__(
        self,
        graph: Graph,
        dtypes: tuple[torch.dtype, ...],
        arithmetic: torch.dtype,
        formats: Mapping[str, Format] = MappingProxyType({}),
    ) -> None:
        self.record = Record.of(graph, formats)
        self.number = np.float64 if arithmetic == torch.float64 else np.float32
        stored = dict(zip(self.record.tensors, dtypes, strict=True))
        source = c_source(graph, stored, arithmetic, formats)
        self._run = prebuilt.load(source).stepforge_run
        pointer = ctypes.c_void_p
        self._run.argtypes = [
            ctypes.c_int64, pointer, pointer, pointer, ctypes.c_double,
            ctypes.c_int, pointer, pointer, pointer,
        ]  # fmt: skip
        self._run.restype = None

    def __call__(
        self,
        starts: np.ndarray[Any, Any],
        records: np.ndarray[Any, Any],
        numbers: np.ndarray[Any, Any],
    ) -> None:
        """Steps rows of dense memory.

        Args:
            starts: int64 of rows + 1; the number of elements before each row, and of all.
            records: uint64 of rows x the record's width.
            numbers: of rows x coefficients, in the dtype of the arithmetic.
        """
        tables = (array.ctypes.data for array in (starts, records, numbers))
        self.launch(len(starts) - 1, int(starts[-1]), *tables)

    def launch(
        self,
        rows: int,
        elements: int,
        starts: int,
        records: int,
        numbers: int,
        unscale: float = 1.0,
    ) -> None:
        """The same, given where the tables are.

        Args:
            rows: how many they are.
            elements: how many elements they have together.
            starts: the address of rows + 1 int64: the elements before each row, and all; the
                blocks, if elements share scales.
            records: the address of rows x the record's width words of 64 bits.
            numbers: the address of rows x coefficients in the dtype of the arithmetic.
            unscale: what gradients are multiplied by before all else.
        """
        pool = build.thread_pool() if elements >= SERIAL and not _forked else None
        threads = torch.get_num_threads() if pool else 1
        self._run(rows, starts, records, numbers, unscale, threads, *(pool or (0, 0, 0)))


# A child of fork has the pool's memory but not its threads: waiting for them would never end.
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def kernel_for(
    graph: Graph,
    dtypes: tuple[torch.dtype, ...],
    arithmetic: torch.dtype,
    formats: Mapping[str, Format] = MappingProxyType({}),
) -> Kernel | str:
    """The kernel, compiled at its first use; or why it cannot be had.

    Args:
        graph: what it computes.
        dtypes: the dtype of each tensor of its :class:`Record`, in order.
        arithmetic: float32 or float64.
        formats: of the columns that have one.
    """
    isa = os.environ.get("STEPFORGE_ISA")
    return _kernel_for(graph, dtypes, arithmetic, tuple(formats.items()), isa)


@retry.made_once(prebuilt.circumstances)
def _kernel_for(
    graph: Graph,
    dtypes: tuple[torch.dtype, ...],
    arithmetic: torch.dtype,
    formats: tuple[tuple[str, Format], ...],
    _isa: str | None,
) -> Kernel | str:
    try:
        return Kernel(graph, dtypes, arithmetic, dict(formats))
    except build.BuildError as error:
        return str(error)
