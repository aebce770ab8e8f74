"""Memory per parameter in training, counted from the tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch

import stepforge
from experiments.low_precision.training import (
    AT_RANDOM,
    BFLOAT16,
    INT8,
    OPTIMIZERS,
    PRECISIONS,
    SMALLEST,
    Precision,
)

#: As in torch.optim: moments in the dtype of the weights.
PURE = Precision("bfloat16 weights and moments, as in torch.optim", {}, torch.bfloat16)
COMBINATIONS = (
    *PRECISIONS[:3],
    *(precision for precision in PRECISIONS[3:] if precision is not SMALLEST),
    Precision(
        "bfloat16 weights + 24 bits, bfloat16 moments",
        {**SMALLEST.options, **BFLOAT16.options},
        torch.bfloat16,
    ),
    SMALLEST,
    Precision(
        "bfloat16 weights, rounded at random, int8 moments",
        {**AT_RANDOM.options, **INT8.options},
        torch.bfloat16,
    ),
    PURE,
)


def measure(
    optimizer: str, precision: Precision, shape: tuple[int, int] = (1024, 1024)
) -> dict[str, float]:
    """Return the bytes per element of a matrix after a step.

    Args:
        optimizer: the name of the optimizer.
        precision: the dtypes and formats of weights and moments.
        shape: the shape of the matrix.

    Returns:
        The bytes of "weight", "gradient" and "state", and their sum as "total".
    """
    p = torch.nn.Parameter(torch.ones(shape, dtype=precision.weights))
    p.grad = torch.zeros_like(p)
    stepper = getattr(stepforge, optimizer)([p], **precision.options)
    stepper.step()
    tensors = {"weight": [p], "gradient": [p.grad], "state": stepper.state[p].values()}
    found = {name: _bytes(group) / p.numel() for name, group in tensors.items()}
    return found | {"total": sum(found.values())}


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def table() -> dict[str, dict[str, dict[str, float]]]:
    """Return the results of :func:`measure`, by precision and optimizer."""
    return {
        precision.name: {optimizer: measure(optimizer, precision) for optimizer in OPTIMIZERS}
        for precision in COMBINATIONS
    }
