"""A kernel in Triton: the module that a graph becomes, and how it is launched."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import linecache
import os
import types
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from stepforge.backends import retry, trust
from stepforge.backends.memory import tensors_of_graph
from stepforge.backends.native import build
from stepforge.backends.triton.source import (
    Record,
    named,
    triton_source,
    writer_source,
)
from stepforge.expr import Graph
from stepforge.formats import Format

#: How many elements a program of a launch steps. A launch can have 2**31 programs, which is more
#: elements than any memory holds. Four warps of 32 then have two words of 16 bytes of float32 in
#: each column to move.
BLOCK = 1024
WARPS = 4
#: An address that is a multiple of this many bytes allows the widest loads and stores.
WIDEST = 16


def is_interpreted() -> bool:
    """Whether Triton runs kernels in Python, on a CPU: ``TRITON_INTERPRET=1``."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


class Kernel:
    """A kernel, which Triton compiles when it is launched.

    Args:
        graph: what it computes.
        dtypes: the dtype of each of :func:`tensors_of_graph`, in order.
        arithmetic: float32 or float64.
        dims: how many dimensions the tensors of a row have for it; 0 if all are dense.
        formats: of the columns that have one.

    Raises:
        BuildError: its source cannot be kept.
        ImportError: Triton cannot be imported.
    """

    def __init__(
        self,
        graph: Graph,
        dtypes: tuple[torch.dtype, ...],
        arithmetic: torch.dtype,
        dims: int,
        formats: Mapping[str, Format] = MappingProxyType({}),
    ) -> None:
        self.tensors = tensors_of_graph(graph, formats)
        self.record = Record.of(graph, dims, formats)
        self.dtype = arithmetic
        stored = dict(zip(self.tensors, dtypes, strict=True))
        self._step = load(triton_source(graph, stored, arithmetic, dims, formats)).step

    def launch(
        self,
        blocks: int,
        owners: torch.Tensor,
        rows: torch.Tensor,
        gradients: torch.Tensor,
        numbers: torch.Tensor,
        keys: torch.Tensor | None,
        aligned: Mapping[str, int],
        scaling: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Steps rows.

        Args:
            blocks: how many blocks of elements the rows have together.
            owners: int32 of blocks: the row of each.
            rows: int64 of rows x numbers: the records of the rows.
            gradients: int64 of rows: where their gradients begin.
            numbers: of rows x coefficients, or of 1 x coefficients if they are those of all rows.
            keys: int64 of rows: the words from which their random bits follow; None if rounding
                takes none.
            aligned: for each tensor the bytes that its addresses are multiples of.
            scaling: what gradients are multiplied by, in the dtype of the arithmetic, and a number
                that is not zero if nothing is to be changed; an element each.
        """
        stride = numbers.shape[1] if len(numbers) > 1 else 0
        elements = () if self.record.dims else self.record.elements
        given: dict[str, Any] = {named(x, "aligned"): aligned[x] for x in elements}
        if keys is not None:
            given["keys"] = keys
        with _device(rows.device):
            self._step[(blocks,)](
                owners,
                rows,
                gradients,
                numbers,
                stride,
                *(scaling or (None, None)),
                **given,
                SCALED=scaling is not None,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )


def _device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What a launch on a device needs around it."""
    if device.type == "cpu":
        return np.errstate(all="ignore")  # the interpreter computes with numpy
    guard: contextlib.AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return guard


def load(source: str) -> types.ModuleType:
    """The module of a source, which is kept under the name of its content for Triton and readers.

    What runs is the source given, whatever the file holds.

    Raises:
        BuildError: it cannot be kept.
        ImportError: Triton cannot be imported.
    """
    name = f"stepforge-{hashlib.sha256(source.encode()).hexdigest()[:32]}"
    path = build.cache_folder() / f"{name}.py"
    _keep(source, path)
    # Triton reads the source of a function by way of this cache; no time: it is never outdated.
    linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
    module = types.ModuleType(name)
    module.__file__ = str(path)
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def _keep(source: str, path: Path) -> None:
    content = source.encode()
    with contextlib.suppress(OSError), trust.open_trusted(path) as file:
        if file.read() == content:
            return
    try:
        with build.work_folder(path.parent) as work:
            written = work / "kernel.py"
            written.write_bytes(content)
            written.chmod(build.PRIVATE)
            os.replace(written, path)  # readers see the whole file or none
    except OSError as error:
        raise build.unwritable(path.parent, error) from None


#: How many numbers a launch of :func:`write` carries.
_WORDS = 32


def write(table: torch.Tensor, words: np.ndarray[Any, Any]) -> None:
    """Writes numbers into a table by launches that carry them.

    Args:
        table: int32 on a device.
        words: int32, as many.
    """
    kernel = _writer().write[(1,)]
    with _device(table.device):
        for begin in range(0, len(words), _WORDS):
            given = words[begin : begin + _WORDS].tolist()
            kernel(table, begin, len(given), *given, *[0] * (_WORDS - len(given)))


@functools.cache
def load_writer(device: torch.device) -> None:
    """Makes :func:`write` ready: a device that captures a graph cannot load its kernel."""
    write(torch.empty(1, dtype=torch.int32, device=device), np.zeros(1, np.int32))


@functools.cache
def _writer() -> types.ModuleType:
    return load(writer_source(_WORDS))


def kernel_for(
    graph: Graph,
    dtypes: tuple[torch.dtype, ...],
    arithmetic: torch.dtype,
    dims: int = 0,
    formats: Mapping[str, Format] = MappingProxyType({}),
) -> Kernel | str:
    """The kernel; or why it cannot be had.

    Args:
        graph: what it computes.
        dtypes: the dtype of each of :func:`tensors_of_graph`, in order.
        arithmetic: float32 or float64.
        dims: how many dimensions the tensors of a row have for it; 0 if all are dense.
        formats: of the columns that have one.
    """
    return _kernel_for(graph, dtypes, arithmetic, dims, tuple(formats.items()), is_interpreted())


@retry.made_once(build.cache_circumstances)
def _kernel_for(
    graph: Graph,
    dtypes: tuple[torch.dtype, ...],
    arithmetic: torch.dtype,
    dims: int,
    formats: tuple[tuple[str, Format], ...],
    _interpreted: bool,
) -> Kernel | str:
    try:
        return Kernel(graph, dtypes, arithmetic, dims, dict(formats))
    except build.BuildError as error:
        return str(error)
    except ImportError as error:
        return f"triton cannot be imported ({error})"
