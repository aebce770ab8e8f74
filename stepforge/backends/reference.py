"""The reference: a graph evaluated with torch operations, one parameter at a time.

Serves everything: differentiable steps, sparse gradients, any device and tensor subclass. The
other backends are held to its bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from stepforge.backends.batch import CACHED, Batch
from stepforge.backends.exact import choose, correct_sqrt, divide
from stepforge.expr import Graph, evaluate
from stepforge.formats import Storage
from stepforge.ops import VOCABULARY

name = "reference"
asynchronous = False


def refuses(
    p: torch.Tensor,
    g: torch.Tensor | None,
    group: Mapping[str, Any],
    graph: Graph,
    storage: Storage,
) -> str | None:
    """Why this backend cannot serve a parameter; None, as it serves all."""
    return None


def prepare(batch: Batch) -> None:
    """Nothing of a batch is worth keeping here."""


def run(batch: Batch) -> None:
    """Computes every row and stores its results."""
    whole = batch.differentiable or batch.columns["p"][0].device.type != "cpu"
    for part in [batch] if whole else batch.pieces(CACHED):
        part = part.unscaled()
        numbers = part.numbers()
        for index in range(len(part)):
            _run_row(part, index, [column[index] for column in numbers])


def _run_row(batch: Batch, index: int, given: list[Any]) -> None:
    program = batch.graph.varying
    stored = {name: column[index] for name, column in batch.columns.items()}
    sparse = stored["g"].is_sparse
    if sparse:
        named = _named_elements(stored)
        inputs = {name: named[name].to(batch.dtype) for name in program.inputs}
    else:
        inputs = {name: batch.read(name, index) for name in program.inputs}
    if batch.differentiable:
        # Autograd keeps operands for the backward pass, and the step overwrites them.
        inputs = {name: tensor.clone() for name, tensor in inputs.items()}
    operations = _operations(batch.dtype, batch.differentiable)
    results = evaluate(program, inputs, given, operations)
    # No result may change because another is stored first.
    results = [
        result.clone() if program.may_alias(register) else result
        for register, result in zip(program.outputs, results)
    ]
    for name, result in zip(batch.graph.results, results):
        if sparse:
            stored[name][_indices(stored["g"])] = result.to(stored[name].dtype)
        else:
            batch.store(name, index, result)


def _indices(g: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(g._indices())


def _named_elements(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The elements of a row that its sparse (coalesced) gradient names."""
    where = _indices(stored["g"])
    return {
        name: tensor._values() if name == "g" else tensor[where] for name, tensor in stored.items()
    }


def _where(condition: Any, x: Any, y: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    like = next(operand for operand in (x, y, condition) if isinstance(operand, torch.Tensor))
    return choose(condition, x, y, like, dtype)


#: What each operation of the vocabulary does here.
OPERATIONS: dict[str, Callable[..., Any]] = VOCABULARY | {
    "div": divide,
    "sqrt": correct_sqrt,
    "where": _where,
}


@functools.cache
def _operations(dtype: torch.dtype, differentiable: bool) -> dict[str, Callable[..., Any]]:
    """The operations in an arithmetic. A root through numpy is out of autograd's sight."""
    operations = OPERATIONS | {"where": functools.partial(_where, dtype=dtype)}
    return operations | {"sqrt": torch.sqrt} if differentiable else operations
