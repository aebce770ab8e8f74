"""Lion. Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", Algorithm 2.

An optimizer that stepforge does not have, in fifteen lines: the paper's update and a declaration.
Backends, checks, hooks and checkpoints come for free.

Run ``python examples/lion.py`` to compare Lion with AdamW.
"""

from __future__ import annotations

from typing import Any

import torch

import stepforge
from stepforge.declare import Betas, Decay, LearningRate, zeros
from stepforge.ops import Value, ema, sign


def lion(h: Any, t: Value, p: Value, g: Value, m: Value) -> tuple[Value, Value]:
    beta1, beta2 = h.betas
    update = sign(ema(m, g, beta1))
    p = p - h.lr * (update + h.weight_decay * p)
    m = ema(m, g, beta2)
    return p, m


class Lion(stepforge.Optimizer, rule=lion):
    """Lion: moves every element by the same amount, along the sign of an average gradient."""

    lr: LearningRate = 1e-4
    betas: Betas = (0.9, 0.99)
    weight_decay: Decay = 0.0
    m = zeros("exp_avg")


def fit(optimizer_class: type[stepforge.Optimizer], lr: float, steps: int = 500) -> list[float]:
    """Fit a small network to a sine, with a learning rate that falls to zero.

    Args:
        optimizer_class: Lion, or any other optimizer.
        lr: the initial learning rate.
        steps: how many steps to take.

    Returns:
        The mean squared error before each step.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    inputs = torch.linspace(-2, 2, 128).unsqueeze(1)
    optimizer = optimizer_class(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), torch.sin(2 * inputs))
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Print the first and last losses of Lion and AdamW."""
    for optimizer_class, lr in ((Lion, 3e-3), (stepforge.AdamW, 1e-2)):
        losses = fit(optimizer_class, lr)
        print(f"{optimizer_class.__name__:6} {losses[0]:.4f} -> {losses[-1]:.2e}")


if __name__ == "__main__":
    main()
