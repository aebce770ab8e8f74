"""NAdam. Dozat 2016, "Incorporating Nesterov Momentum into Adam", Algorithm 2, with the schedule
of its section 3."""

from __future__ import annotations

from typing import Any

from stepforge.declare import Betas, Decay, LearningRate, NonNegative, hyper, scalar, zeros
from stepforge.ops import Value, decay, ema, round_to_state_dtype, sqrt
from stepforge.optimizer import Optimizer


def nadam(
    h: Any, t: Value, p: Value, g: Value, m: Value, v: Value, mu_product: Value
) -> tuple[Value, ...]:
    beta1, beta2 = h.betas
    g, shrink = decay(h, p, g)  # not in the paper
    mu = beta1 * (1 - 0.5 * 0.96 ** (t * h.momentum_decay))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * h.momentum_decay))
    # Kept, and used, in float32 as torch.optim does.
    mu_product = round_to_state_dtype(mu_product * round_to_state_dtype(mu))
    m, v = ema(m, g, beta1), ema(v, g * g, beta2)  # the paper averages m with mu instead of beta1
    m_hat = mu_next * m / (1 - mu_product * mu_next) + (1 - mu) * g / (1 - mu_product)
    v_hat = v / (1 - beta2**t)
    return p - (h.lr * m_hat / (sqrt(v_hat) + h.eps) + shrink), m, v, mu_product


class NAdam(Optimizer, rule=nadam):
    """Adam with Nesterov momentum: the average gradient as it will stand one step ahead.

    State: ``exp_avg`` and ``exp_avg_sq`` in the parameter's shape and dtype; ``mu_product`` and
    ``step``, one number each.

    Args:
        params: as for :class:`stepforge.Optimizer`.
        lr: the learning rate, from 0 up; a float or a tensor of one element.
        betas: the weights of the two averages, each in [0, 1).
        eps: added to the root, from 0 up.
        weight_decay: from 0 up.
        momentum_decay: how fast the momentum approaches ``betas[0]``, from 0 up.
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
        >>> NAdam([p], lr=0.25).step()
        >>> round(p.item(), 3)
        0.736
    """

    lr: LearningRate = 2e-3
    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: Decay = 0
    momentum_decay: NonNegative = 4e-3
    decoupled_weight_decay: bool = hyper(default=False, optional_in_checkpoint=True)
    m, v, mu_product = (
        zeros("exp_avg"),
        zeros("exp_avg_sq", unsigned=True),
        scalar("mu_product", init=1.0),
    )
