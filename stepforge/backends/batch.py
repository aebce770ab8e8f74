"""What a backend is given: one graph and the rows it is to be run on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from stepforge.expr import Graph

#: How many elements a part of a batch has, so that the dozen tensors of a step stay in the cache
#: of a CPU. Between 2**16 and 2**18 measures the same; the whole of a large tensor 10 times more.
CACHED = 2**17


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which parameters of a dtype are stepped: float32, or float64 for float64."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


#: The values of a uniform node.
Coefficient: TypeAlias = "float | np.ndarray[Any, Any] | list[torch.Tensor]"


class Prepared(Protocol):
    """What a backend keeps of a batch for the next step of the same tensors."""

    def aim(self, gradients: list[torch.Tensor]) -> None:
        """Takes the next step's gradients; raises before anything has run if it cannot."""


@dataclass(frozen=True)
class Batch:
    """Rows that share a graph, a device and an arithmetic; one row for each parameter.

    Attributes:
        graph: what to compute.
        columns: for each varying input its tensors, one a row: parameters ``p``, gradients ``g``
            and states, all real, a row's all of one shape. Results are stored into the column
            of the same name. Storage may be of any floating dtype and any strides.
        coefficients: for each of ``graph.coefficients``, in order, its value, rounded to ``dtype``
            or true or false: a number for all rows, an array with one a row, or a list of tensors
            without dimensions.
        dtype: the dtype of the arithmetic, float32 or float64, whatever the storage.
        differentiable: whether autograd must see the step.
        prepared: what the backend's ``prepare`` made of these rows with other gradients of the
            same layout and other coefficients; None if it made nothing.
    """

    graph: Graph
    columns: dict[str, list[torch.Tensor]]
    coefficients: list[Coefficient]
    dtype: torch.dtype
    differentiable: bool = False
    prepared: Prepared | None = None

    def __len__(self) -> int:
        return len(self.columns["p"])

    def pieces(self, limit: int) -> Iterator[Batch]:
        """The same work in parts of about ``limit`` elements each.

        An operation on a part leaves its result in the processor's cache, where the next one finds
        it; on the whole each would go through memory. Long rows are cut, short ones share a part.
        """
        rows: list[dict[str, torch.Tensor]] = []
        origins: list[int] = []
        size = 0
        for index in range(len(self)):
            for row in _cut({name: c[index] for name, c in self.columns.items()}, limit):
                if rows and size + row["p"].numel() > limit:
                    yield self._part(rows, origins)
                    rows, origins, size = [], [], 0
                rows.append(row)
                origins.append(index)
                size += row["p"].numel()
        if rows:
            yield self._part(rows, origins)

    def numbers(self) -> list[list[Any]]:
        """The coefficients as lists, one element a row, of Python numbers or of tensors."""
        return [
            c.tolist()
            if isinstance(c, np.ndarray)
            else c
            if isinstance(c, list)
            else [c] * len(self)
            for c in self.coefficients
        ]

    def rows(self, indices: list[int]) -> Batch:
        """Only the rows of those numbers."""
        return self._part(
            [{name: c[index] for name, c in self.columns.items()} for index in indices], indices
        )

    def with_columns(self, columns: dict[str, list[torch.Tensor]]) -> Batch:
        """The same rows in other tensors."""
        return replace(self, columns=columns, prepared=None)

    def _part(self, rows: list[dict[str, torch.Tensor]], origins: list[int]) -> Batch:
        return replace(
            self,
            prepared=None,
            columns={name: [row[name] for row in rows] for name in self.columns},
            coefficients=[_of_rows(c, origins) for c in self.coefficients],
        )


def _of_rows(coefficient: Coefficient, rows: list[int]) -> Coefficient:
    if isinstance(coefficient, np.ndarray):
        return coefficient[rows]
    return [coefficient[row] for row in rows] if isinstance(coefficient, list) else coefficient


def _cut(row: dict[str, torch.Tensor], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """A row in parts of at most ``limit`` elements, or nearly, each a view."""
    p = row["p"]
    if p.numel() <= limit or row["g"].is_sparse:
        yield row
        return
    if all(tensor.is_contiguous() for tensor in row.values()):
        row, dim = {name: tensor.view(-1) for name, tensor in row.items()}, 0
    else:
        dim = max(range(p.dim()), key=p.size)
    length = row["p"].size(dim)
    step = max(1, limit * length // p.numel())
    for start in range(0, length, step):
        size = min(step, length - start)
        yield {name: tensor.narrow(dim, start, size) for name, tensor in row.items()}
