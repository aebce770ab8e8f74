"""What training keeps for each parameter, measured from the tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch

import stepforge
from low_precision.training import ARMS, AT_RANDOM, BFLOAT16, INT8, OPTIMIZERS, SMALLEST, Arm

#: As torch.optim has it: moments in the dtype of the weights.
PURE = Arm("bfloat16 weights and moments, as in torch.optim", {}, torch.bfloat16)
COMBINATIONS = (
    *ARMS[:3],
    *(arm for arm in ARMS[3:] if arm is not SMALLEST),
    Arm(
        "bfloat16 weights + 24 bits, bfloat16 moments",
        {**SMALLEST.options, **BFLOAT16.options},
        torch.bfloat16,
    ),
    SMALLEST,
    Arm(
        "bfloat16 weights, rounded at random, int8 moments",
        {**AT_RANDOM.options, **INT8.options},
        torch.bfloat16,
    ),
    PURE,
)


def measure(optimizer: str, arm: Arm, shape: tuple[int, int] = (1024, 1024)) -> dict[str, float]:
    """Bytes an element of a matrix after a step.

    Args:
        optimizer: its name.
        arm: how weights and moments are stored.
        shape: of the matrix.

    Returns:
        Those of the weight, of the gradient and of the state; and of all of them as "total".
    """
    p = torch.nn.Parameter(torch.ones(shape, dtype=arm.weights))
    p.grad = torch.zeros_like(p)
    stepper = getattr(stepforge, optimizer)([p], **arm.options)
    stepper.step()
    tensors = {"weight": [p], "gradient": [p.grad], "state": stepper.state[p].values()}
    found = {name: _bytes(kept) / p.numel() for name, kept in tensors.items()}
    return found | {"total": sum(found.values())}


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def table() -> dict[str, dict[str, dict[str, float]]]:
    """What :func:`measure` finds, by arm and optimizer."""
    return {
        arm.name: {optimizer: measure(optimizer, arm) for optimizer in OPTIMIZERS}
        for arm in COMBINATIONS
    }
