"""The reference: a graph evaluated with torch operations, one parameter at a time.

Serves everything: differentiable steps, sparse gradients, any device and tensor subclass. The
other backends are held to its bits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from stepforge.backends.batch import Batch
from stepforge.backends.rounding import correct_sqrt
from stepforge.expr import evaluate
from stepforge.ops import VOCABULARY

name = "reference"


def refuses(p: torch.Tensor, g: torch.Tensor | None, group: Mapping[str, Any]) -> str | None:
    """Why this backend cannot serve a parameter; None, as it serves all."""
    return None


def run(batch: Batch) -> None:
    """Computes every row and stores its results."""
    inputs = [node for node in batch.graph.inputs if node.varying]
    operations = VOCABULARY if batch.differentiable else OPERATIONS
    for index in range(len(batch)):
        stored = {name: column[index] for name, column in batch.columns.items()}
        row = _sparse_row(stored) if stored["g"].is_sparse else stored
        values: dict[Any, Any] = {
            node: column[index] for node, column in batch.coefficients.items()
        }
        for node in inputs:
            tensor = row[str(node.value)].to(batch.dtype)
            # Autograd keeps operands for the backward pass, and the step overwrites them.
            values[node] = tensor.clone() if batch.differentiable else tensor
        evaluate(batch.graph.varying, values, operations)
        results = {
            name: values[node].clone() if node.op in ("input", "where") else values[node]
            for name, node in batch.graph.outputs.items()
            if node.varying and not (node.op == "input" and node.value == name)
        }
        for name, result in results.items():
            if row is stored:
                stored[name].copy_(result)
            else:
                stored[name][_indices(stored["g"])] = result.to(stored[name].dtype)


def _indices(g: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(g._indices())


def _sparse_row(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The elements of a row that its sparse (coalesced) gradient names."""
    where = _indices(stored["g"])
    return {
        name: tensor._values() if name == "g" else tensor[where] for name, tensor in stored.items()
    }


def _divide(x: Any, y: Any) -> Any:
    # `number / tensor` is computed by torch as a reciprocal and a product: two roundings.
    if not isinstance(x, torch.Tensor):
        x = torch.tensor(x, dtype=y.dtype, device=y.device)
    return torch.div(x, y)


#: What each operation of the vocabulary does here.
OPERATIONS: dict[str, Callable[..., Any]] = VOCABULARY | {
    "add": operator.add,
    "div": _divide,
    "sqrt": correct_sqrt,
}
