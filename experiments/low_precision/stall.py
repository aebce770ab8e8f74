"""Weights of 16 bits that a step does not move."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import stepforge
from low_precision.training import AT_RANDOM, BITS_24, BITS_32, FLOAT32, OPTIMIZERS, PLAIN, Arm

ARMS = (FLOAT32, BITS_32, BITS_24, AT_RANDOM, PLAIN)
TORCH = Arm("torch.optim, bfloat16 weights", {}, torch.bfloat16)
#: Above 1 a bfloat16 moves by 2**-7 and below by 2**-8: half of that is twice this.
LR = 1e-3


def measure(steps: int, arms: Sequence[Arm] = (*ARMS, TORCH)) -> dict[str, dict[str, float]]:
    """Where weights that begin at 1 are after steps with a gradient of 1.

    Args:
        steps: how many.
        arms: how weights are stored.

    Returns:
        For each arm and optimizer the mean of the weights as they are stored.
    """
    return {arm.name: {name: _mean(arm, name, steps) for name in OPTIMIZERS} for arm in arms}


def _mean(arm: Arm, name: str, steps: int) -> float:
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=arm.weights))
    library = torch.optim if arm is TORCH else stepforge
    optimizer = getattr(library, name)([p], lr=LR, weight_decay=0.0, **arm.options)
    p.grad = torch.ones_like(p)
    for _ in range(steps):
        optimizer.step()
    return p.detach().double().mean().item()
