"""LAMB. You et al. 2020, "Large Batch Optimization for Deep Learning", Algorithm 2.

An optimizer whose steps depend on norms: each parameter moves in proportion to its own size. The
norms are reductions, which every backend makes in a pass before the step.

Run ``python examples/lamb.py`` to compare LAMB with AdamW.
"""

from __future__ import annotations

from typing import Any

from lion import fit

import stepforge
from stepforge.declare import Betas, Decay, LearningRate, NonNegative, zeros
from stepforge.ops import Value, ema, norm, sqrt, where


def lamb(h: Any, t: Value, p: Value, g: Value, m: Value, v: Value) -> tuple[Value, Value, Value]:
    beta1, beta2 = h.betas
    m, v = ema(m, g, beta1), ema(v, g * g, beta2)
    update = m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + h.eps) + h.weight_decay * p
    size, length = norm(p), norm(update)
    # The paper leaves open what a parameter of zeros does: it moves as in Adam.
    ratio = where(size > 0, where(length > 0, size / length, 1.0), 1.0)
    return p - h.lr * ratio * update, m, v


class LAMB(stepforge.Optimizer, rule=lamb):
    """LAMB: Adam's step, made as long as the parameter times the learning rate."""

    lr: LearningRate = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-6
    weight_decay: Decay = 0.0
    m = zeros("exp_avg")
    v = zeros("exp_avg_sq", unsigned=True)


def main() -> None:
    """Print the first and last losses of LAMB and AdamW."""
    for optimizer_class, lr in ((LAMB, 3e-2), (stepforge.AdamW, 1e-2)):
        losses = fit(optimizer_class, lr)
        print(f"{optimizer_class.__name__:6} {losses[0]:.4f} -> {losses[-1]:.2e}")


if __name__ == "__main__":
    main()
