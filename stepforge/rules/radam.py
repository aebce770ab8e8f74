"""RAdam. Liu et al. 2020, "On the Variance of the Adaptive Learning Rate and Beyond",
Algorithm 2."""

from __future__ import annotations

from typing import Any

from stepforge.declare import Betas, Decay, LearningRate, NonNegative, hyper, zeros
from stepforge.ops import Value, decay, ema, maximum, sqrt, where
from stepforge.optimizer import Optimizer


def radam(h: Any, t: Value, p: Value, g: Value, m: Value, v: Value) -> tuple[Value, ...]:
    beta1, beta2 = h.betas
    g, shrink = decay(h, p, g)  # not in the paper's algorithm
    m, v = ema(m, g, beta1), ema(v, g * g, beta2)
    m_hat = m / (1 - beta1**t)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    r = rectification(maximum(rho, 5), maximum(rho_inf, 5))
    adaptive = h.lr * m_hat * r * sqrt(1 - beta2**t) / (sqrt(v) + h.eps)  # the paper has no eps
    step = where(rho > 5, adaptive, h.lr * m_hat)  # the paper's bound is 4; its code's is 5
    return p - (step + shrink), m, v


def rectification(rho: Value, rho_inf: Value) -> Value:
    """Return r_t. It is a number, and used, for 5 <= rho <= rho_inf only."""
    return sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))


class RAdam(Optimizer, rule=radam):
    """Adam with a warm-up of its own: no division until the average it divides by is reliable.

    The average of squared gradients counts as reliable from step 6 on for ``betas[1]`` from 0.9
    to 0.999, and never for 2/3 and below.

    State: ``exp_avg`` and ``exp_avg_sq`` in the parameter's shape and dtype; ``step``.

    Args:
        params: as for :class:`stepforge.Optimizer`.
        lr: the learning rate, from 0 up; a float or a tensor of one element.
        betas: the weights of the two averages, each in [0, 1).
        eps: added to the root, from 0 up.
        weight_decay: from 0 up.
        decoupled_weight_decay: take the decay off the parameter instead of adding it to the
            gradient.

    The other keyword arguments are those of :class:`stepforge.Optimizer`.

    Raises:
        ValueError: a value is out of its range.
        RuntimeError: a gradient is sparse.

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.tensor([1.0]))
        >>> p.grad = torch.tensor([3.0])
        >>> RAdam([p], lr=0.25).step()
        >>> p.item()
        0.25
    """

    lr: LearningRate = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: Decay = 0
    decoupled_weight_decay: bool = hyper(default=False, optional_in_checkpoint=True)
    m, v = zeros("exp_avg"), zeros("exp_avg_sq", unsigned=True)
