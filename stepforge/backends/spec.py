"""KernelSpec: the computation of a kernel, and the storage of its tensors."""

from __future__ import annotations

import functools
from collections.abc import Container, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from stepforge.formats import Format, tensor_name, tensor_names
from stepforge.program import Graph
from stepforge.state.sharding import is_plain, local

__all__ = ["KernelSpec", "ParamSpec", "arithmetic_of", "memory_problem"]


def arithmetic_of(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a step's arithmetic: float64 for float64 parameters, else float32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


@dataclass(frozen=True)
class KernelSpec:
    """One kernel: its computation, and the dtypes and formats of its tensors.

    Two kernels with equal specs are the same kernel. A column is ``p``, ``g`` or the letter of a
    state; a tensor is a column, or a part of its format such as ``m.scale``.

    Attributes:
        graph: the computation.
        dtypes: the real dtype of each of :attr:`tensors`, in order.
        arithmetic: float32 or float64.
        format_items: the columns that have a format, each with it, in the order of :attr:`columns`.
    """

    graph: Graph
    dtypes: tuple[torch.dtype, ...]
    arithmetic: torch.dtype
    format_items: tuple[tuple[str, Format], ...] = ()

    @classmethod
    def of(
        cls,
        graph: Graph,
        dtypes: Mapping[str, torch.dtype],
        formats: Mapping[str, Format] = MappingProxyType({}),
        arithmetic: torch.dtype | None = None,
    ) -> KernelSpec:
        """Return the spec of a graph.

        Args:
            graph: the computation.
            dtypes: the dtype of each tensor, by name; others may be among them.
            formats: the format of each column that has one; others may be among them.
            arithmetic: float32 or float64; None for the arithmetic of ``p``'s dtype.
        """
        columns = _columns(graph)
        used = {column: formats[column] for column in columns if column in formats}
        names = [name for column in columns for name in tensor_names(column, used)]
        return cls(
            graph,
            tuple(_real(dtypes[name]) for name in names),
            arithmetic or arithmetic_of(dtypes["p"]),
            tuple(used.items()),
        )

    @functools.cached_property
    def formats(self) -> Mapping[str, Format]:
        """The format of each column that has one."""
        return dict(self.format_items)

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that the kernel reads, then those it only writes."""
        return _columns(self.graph)

    @functools.cached_property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors that the kernel takes for a parameter."""
        return tuple(name for column in self.columns for name in tensor_names(column, self.formats))

    @functools.cached_property
    def elements(self) -> tuple[str, ...]:
        """The tensors with one element per element: all but scales."""
        scales = {
            tensor_name(column, part)
            for column, format_ in self.format_items
            for part in format_.parts
            if part.of_block
        }
        return tuple(name for name in self.tensors if name not in scales)

    @functools.cached_property
    def written(self) -> tuple[str, ...]:
        """The tensors that a step writes."""
        return tuple(
            name for column in self.graph.results for name in tensor_names(column, self.formats)
        )

    @functools.cached_property
    def read(self) -> tuple[str, ...]:
        """The tensors that a step reads."""
        inputs = self.graph.varying.inputs
        return tuple(name for column in inputs for name in tensor_names(column, self.formats))

    @functools.cached_property
    def dtype_of(self) -> Mapping[str, torch.dtype]:
        """The dtype of each tensor, by name."""
        return dict(zip(self.tensors, self.dtypes, strict=True))

    @functools.cached_property
    def block_columns(self) -> tuple[str, ...]:
        """The columns whose elements share scales."""
        return tuple(column for column, format_ in self.format_items if format_.in_blocks)

    @functools.cached_property
    def block_results(self) -> tuple[str, ...]:
        """The results whose elements share scales, in the order of the results."""
        return tuple(column for column in self.graph.results if column in self.block_columns)

    @functools.cached_property
    def in_blocks(self) -> bool:
        """True if elements of some column share scales."""
        return bool(self.block_columns)

    @functools.cached_property
    def is_random(self) -> bool:
        """True if a format rounds at random."""
        return any(format_.is_random for _, format_ in self.format_items)


@dataclass(frozen=True)
class ParamSpec:
    """A parameter, with everything that decides which backend can step it.

    Attributes:
        p: the parameter.
        g: its gradient, if it has one.
        group: the options of its param group.
        kernel: the kernel that would step it.
    """

    p: torch.Tensor
    g: torch.Tensor | None
    group: Mapping[str, Any]
    kernel: KernelSpec


def memory_problem(param: ParamSpec, storable: Container[torch.dtype]) -> str | None:
    """Say why a kernel cannot read a parameter or its gradient from memory; None if it can.

    Args:
        param: the parameter.
        storable: the dtypes that the kernel reads and writes.
    """
    tensors = (param.p, param.p if param.g is None else param.g)
    for tensor in tensors:
        if not is_plain(local(tensor)):
            return f"a {type(tensor).__name__} may have no memory of its own"
    if param.g is not None and param.g.is_sparse:
        return "its gradient is sparse"
    for tensor in tensors:
        if _real(tensor.dtype) not in storable:
            return f"it does not store {_real(tensor.dtype)}"
    return None


def _columns(graph: Graph) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*graph.varying.inputs, *graph.results]))


def _real(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the real and imaginary parts of a complex dtype; else the dtype."""
    return dtype.to_real() if dtype.is_complex else dtype
