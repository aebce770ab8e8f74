"""The Triton backend: a graph compiled for a GPU, one launch for all tensors of the same dtypes.

Serves CUDA and ROCm devices, and Intel's where Triton does. With ``TRITON_INTERPRET=1`` and
``STEPFORGE_BACKEND=triton`` it serves a CPU too, slowly: the same kernels run in Python there.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from stepforge.backends import reference
from stepforge.backends.batch import Batch, arithmetic
from stepforge.backends.memory import (
    Spans,
    count_writes,
    elements_of_graph,
    overlaps,
    stored_dtypes,
    tensors_of_graph,
    unreadable,
)
from stepforge.backends.triton.kernel import is_interpreted, kernel_for
from stepforge.backends.triton.source import (
    NUMBERS,
    OPERATIONS,
)
from stepforge.backends.triton.strides import dimensions, may_overlap
from stepforge.backends.triton.table import Table
from stepforge.expr import Graph
from stepforge.formats import Storage

__all__ = ["OPERATIONS", "Tables", "asynchronous", "name", "prepare", "refuses", "run"]

name = "triton"
asynchronous = True

#: The types of the devices that Triton compiles for.
_DEVICES = ("cuda", "xpu")
#: Of NVIDIA's, the least that it compiles for.
_CAPABILITY = (7, 0)


def refuses(
    p: torch.Tensor,
    g: torch.Tensor | None,
    group: Mapping[str, Any],
    graph: Graph,
    storage: Storage,
) -> str | None:
    """Why this backend cannot serve a parameter, or None if it can."""
    why_not = _device_refused(p.device)
    if not (why_not or is_interpreted()):
        why_not = _out_of_order() or _too_old(p.device)
    if why_not:
        return why_not
    if group["differentiable"]:
        return "autograd does not go through a compiled kernel"
    why_not = unreadable(p, g, NUMBERS)
    if why_not:
        return why_not
    dtype, gradient = stored_dtypes(p, g)
    names = tensors_of_graph(graph, storage.formats)
    dtypes = tuple(gradient if name == "g" else storage.real_dtype(name) for name in names)
    kernel = kernel_for(graph, dtypes, arithmetic(dtype), formats=storage.formats)
    return kernel if isinstance(kernel, str) else None


def _device_refused(device: torch.device) -> str | None:
    if device.type in _DEVICES:
        if is_interpreted():
            return "TRITON_INTERPRET has kernels run in Python, which cannot read a GPU's memory"
    elif not (is_interpreted() and os.environ.get("STEPFORGE_BACKEND") == name):
        return f"it runs on a GPU, not on {device.type}"
    elif device.type != "cpu":
        return f"TRITON_INTERPRET has kernels run on a CPU, not on {device.type}"
    return None if _is_installed() else "Triton is not installed: pip install triton"


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _out_of_order() -> str | None:
    """Why Triton, which is installed, can launch nothing here; None if it can."""
    try:
        importlib.import_module("triton.runtime").driver.active.get_current_target()
    except Exception as error:  # of whatever kind: it calls compilers and loads libraries
        return f"Triton does not work here: {(str(error).splitlines() or [''])[0]}"
    return None


@functools.cache
def _too_old(device: torch.device) -> str | None:
    """Why Triton compiles nothing for a device of NVIDIA's; None if it does, or it is AMD's."""
    if device.type != "cuda" or torch.version.hip:
        return None
    found = torch.cuda.get_device_capability(device)
    if found >= _CAPABILITY:
        return None
    major, minor = found
    return f"Triton needs compute capability {_CAPABILITY[0]}, and the device has {major}.{minor}"


class Tables:
    """The rows of a batch, in a table for each launch.

    Args:
        batch: the rows; they may be aimed at other gradients, and run with other coefficients.

    Raises:
        RuntimeError: there is no kernel for some of them, or a tensor has no memory.
    """

    def __init__(self, batch: Batch) -> None:
        graph, formats, columns = batch.graph, batch.formats, batch.columns
        dtypes = ([x.dtype for x in columns[name]] for name in tensors_of_graph(graph, formats))
        rows = zip(*(columns[name] for name in elements_of_graph(graph, formats)))
        dense = (_is_dense(row, in_order=bool(formats)) for row in rows)
        alike: dict[Any, list[int]] = {}
        for index, kind in enumerate(zip(zip(*dtypes), dense)):
            alike.setdefault(kind, []).append(index)
        self._kept = Spans([x for key, c in columns.items() if key != "g" for x in c])
        self.tables = [Table(batch, members, dense=kind[1]) for kind, members in alike.items()]

    def aim(self, gradients: list[torch.Tensor]) -> None:
        """Takes other gradients of the same layouts.

        Raises:
            RuntimeError: one has no memory.
        """
        for table in self.tables:
            table.aim(gradients)

    def run(self, batch: Batch) -> None:
        """Steps the rows with the coefficients of a batch of just these rows."""
        for table in self.tables:
            table.run(batch)
        count_writes(batch)

    def overlap(self) -> bool:
        """Whether memory that is kept is also another tensor's of these rows."""
        return self._kept.overlap or any(
            self._kept.touch(*table.gradient_spans()) for table in self.tables
        )


def prepare(batch: Batch) -> Tables | None:
    """The tables of a batch, to be kept while its tensors stay; None if it needs another way."""
    return None if _needs_order(batch) else Tables(batch)


def run(batch: Batch) -> None:
    """Steps all rows in place, one launch for those that share their dtypes."""
    if isinstance(batch.prepared, Tables) and not batch.prepared.overlap():
        batch.prepared.run(batch)
    elif _needs_order(batch):
        _run_in_order(batch)
    else:
        Tables(batch).run(batch)


def _run_in_order(batch: Batch) -> None:
    """Steps all rows by the reference, which has an order of reads and writes.

    It computes with numbers of the host, so it waits for what a gradient scaler says.
    """
    scale = batch.loss_scale and batch.loss_scale.read()
    if not (scale and scale.found_inf):
        reference.run(replace(batch, loss_scale=scale))


def _needs_order(batch: Batch) -> bool:
    """Whether a kernel would not find in memory what tensors are.

    They share memory that is written, or stand for the negative of what it holds, or are scales
    that do not lie one behind the other.
    """
    kept = [x for name in batch.written for x in batch.columns[name]]
    tensors = [x for column in batch.columns.values() for x in column]
    elements = elements_of_graph(batch.graph, batch.formats)
    scales = [x for name in batch.written if name not in elements for x in batch.columns[name]]
    return (
        overlaps(batch)
        or any(map(may_overlap, kept))
        or any(x.is_neg() for x in tensors)
        or not all(x.is_contiguous() for x in scales)
    )


def _is_dense(row: Sequence[torch.Tensor], *, in_order: bool) -> bool:
    """Whether all tensors of a row have their elements in one order without gaps.

    Args:
        row: the tensors.
        in_order: whether it must be the order of a contiguous tensor.
    """
    return (
        not row[0].numel()
        or all(x.is_contiguous() for x in row)
        or not dimensions(row, in_order=in_order)
    )
