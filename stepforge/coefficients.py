"""The uniform values of a step: what the uniform program makes of hyperparameters and step numbers.

They are computed for all rows together, in float64: on the host, or where capturable demands it on
the device, or row by row in tensors where autograd has to see them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from stepforge.backends.batch import Coefficient
from stepforge.expr import Graph, evaluate
from stepforge.ops import VOCABULARY


def host_values(graph: Graph, columns: Mapping[str, Any]) -> list[Any]:
    """The results of the uniform program as numbers or float64 arrays, one element a row.

    Args:
        graph: its ``uniform`` program is run.
        columns: for each input a number, or an array with one element a row.
    """
    with np.errstate(all="ignore"):
        return evaluate(graph.uniform, columns, (), VOCABULARY)


def differentiable_values(graph: Graph, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The results for each row: numbers, and float64 tensors where an input is a tensor.

    Args:
        graph: its ``uniform`` program is run.
        rows: the inputs of each row.
    """
    results = [
        evaluate(graph.uniform, {n: _wide(row[n]) for n in graph.uniform.inputs}, (), VOCABULARY)
        for row in rows
    ]
    return [list(column) for column in zip(*results)]


def device_values(graph: Graph, columns: Mapping[str, Any]) -> list[Any]:
    """The results as float64 vectors on the device, without waiting for it.

    Args:
        graph: its ``uniform`` program is run.
        columns: for each input a number, a tensor of one element, or a vector of one a row.
    """
    inputs = {name: _wide(columns[name]) for name in graph.uniform.inputs}
    return evaluate(graph.uniform, inputs, (), VOCABULARY)


def _wide(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return float(value)
    value = value.to(torch.float64)
    return value.reshape(()) if value.numel() == 1 and value.dim() != 1 else value


def rounded(values: Any, count: int, dtype: torch.dtype) -> Coefficient:
    """A result for each row, rounded to the dtype of the arithmetic."""
    if isinstance(values, torch.Tensor) or (
        isinstance(values, list) and any(isinstance(value, torch.Tensor) for value in values)
    ):
        rows = for_each_row(values, count)
        return [torch.as_tensor(value, dtype=torch.float64).to(dtype) for value in rows]
    array = np.asarray(values)
    column = np.empty(count, _NUMPY[bool if array.dtype == np.bool_ else dtype])
    with np.errstate(over="ignore"):
        column[:] = array
    return column


_NUMPY: dict[Any, Any] = {bool: np.bool_, torch.float32: np.float32, torch.float64: np.float64}


def as_tensors(column: Coefficient, device: torch.device) -> Coefficient:
    """A coefficient as tensors without dimensions."""
    if isinstance(column, np.ndarray):
        return list(torch.from_numpy(column).to(device).unbind())
    return column


def for_each_row(values: Any, count: int) -> list[Any]:
    """A result as a list with one value a row."""
    if isinstance(values, list):
        return values
    if isinstance(values, np.ndarray):
        return list(np.broadcast_to(values, (count,)).tolist())
    if isinstance(values, torch.Tensor) and values.dim() == 1:
        return list(values.expand(count).unbind())
    return [values] * count
