"""16-bit weights that a step does not move."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import stepforge
from experiments.low_precision.training import (
    AT_RANDOM,
    BITS_24,
    BITS_32,
    FLOAT32,
    OPTIMIZERS,
    PLAIN,
    Precision,
)

PRECISIONS = (FLOAT32, BITS_32, BITS_24, AT_RANDOM, PLAIN)
TORCH = Precision("torch.optim, bfloat16 weights", {}, torch.bfloat16)
#: The spacing of bfloat16 is 2**-7 above 1 and 2**-8 below; half of the latter is twice this rate.
LR = 1e-3


def measure(
    steps: int, precisions: Sequence[Precision] = (*PRECISIONS, TORCH)
) -> dict[str, dict[str, float]]:
    """Return the weights after steps with a gradient of 1, all starting at 1.

    Args:
        steps: how many steps.
        precisions: the precisions to compare.

    Returns:
        The mean of the weights by precision and optimizer, without any extra bits.
    """
    return {
        precision.name: {name: _mean(precision, name, steps) for name in OPTIMIZERS}
        for precision in precisions
    }


def _mean(precision: Precision, name: str, steps: int) -> float:
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=precision.weights))
    library = torch.optim if precision is TORCH else stepforge
    optimizer = getattr(library, name)([p], lr=LR, weight_decay=0.0, **precision.options)
    p.grad = torch.ones_like(p)
    for _ in range(steps):
        optimizer.step()
    return p.detach().double().mean().item()
