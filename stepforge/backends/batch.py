"""What a backend is given: one graph and the rows it is to be run on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stepforge.expr import Expr, Graph


@dataclass(frozen=True)
class Batch:
    """Rows that share a graph, a device and an arithmetic; one row for each parameter.

    Attributes:
        graph: what to compute.
        columns: for each varying input its tensors, one a row: parameters ``p``, gradients ``g``
            and states, all real, a row's all of one shape. Results are stored into the column
            of the same name. Storage may be of any floating dtype and any strides.
        coefficients: for each of ``graph.coefficients`` its values, one a row: Python numbers
            already rounded to ``dtype``, or tensors without dimensions.
        dtype: the dtype of the arithmetic, float32 or float64, whatever the storage.
        differentiable: whether autograd must see the step.
    """

    graph: Graph
    columns: dict[str, list[torch.Tensor]]
    coefficients: dict[Expr, list[Any]]
    dtype: torch.dtype
    differentiable: bool = False

    def __len__(self) -> int:
        return len(self.columns["p"])
