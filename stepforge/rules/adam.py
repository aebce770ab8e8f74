"""Adam. Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization", Algorithm 1.

AMSGrad. Reddi, Kale and Kumar 2018, "On the Convergence of Adam and Beyond", Algorithm 2.
AdamW. Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepforge.declare import Decay, LearningRate, NonNegative, TensorBetas, hyper, zeros
from stepforge.ops import Value, decay, ema, maximum, sqrt
from stepforge.optimizer import Optimizer


def adam(
    h: Any, t: Value, p: Value, g: Value, m: Value, v: Value, v_max: Value
) -> tuple[Value, ...]:
    beta1, beta2 = h.betas
    g, shrink = decay(h, p, g)  # L2 (not in the Adam paper), or AdamW's
    m, v = ema(m, g, beta1), ema(v, g * g, beta2)
    if h.amsgrad:
        v_max = maximum(v_max, v)
    m_hat = m / (1 - beta1**t)
    v_hat = (v_max if h.amsgrad else v) / (1 - beta2**t)  # AMSGrad's paper corrects neither
    return p - (h.lr * m_hat / (sqrt(v_hat) + h.eps) + shrink), m, v, v_max


class Adam(Optimizer, rule=adam):
    """Steps along the average gradient, divided by the root of the average squared gradient.

    State: ``exp_avg`` and ``exp_avg_sq``, with ``amsgrad`` also ``max_exp_avg_sq``, in the
    parameter's shape and dtype; ``step``.

    Args:
        params: as for :class:`stepforge.Optimizer`.
        lr: the learning rate, from 0 up; a float or a tensor of one element.
        betas: the weights of the two averages, each in [0, 1); both floats, or both tensors of
            one element.
        eps: added to the root, from 0 up.
        weight_decay: from 0 up.
        amsgrad: divide by the largest average squared gradient so far.
        decoupled_weight_decay: take the decay off the parameter instead of adding it to the
            gradient, as :class:`AdamW` does.

    The other keyword arguments are those of :class:`stepforge.Optimizer`.

    Raises:
        ValueError: a value is out of its range; ``foreach=True`` with a tensor ``lr`` or tensor
            ``betas`` and without ``capturable``.
        RuntimeError: a gradient is sparse.

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.tensor([1.0]))
        >>> p.grad = torch.tensor([3.0])
        >>> Adam([p], lr=0.25).step()
        >>> p.item()
        0.75
    """

    lr: LearningRate = 1e-3
    betas: TensorBetas = (0.9, 0.999)
    eps: NonNegative = 1e-8
    weight_decay: Decay = 0
    amsgrad: bool = False
    decoupled_weight_decay: bool = hyper(default=False, kw_only=True, optional_in_checkpoint=True)
    m, v = zeros("exp_avg"), zeros("exp_avg_sq", unsigned=True)
    v_max = zeros("max_exp_avg_sq", when="amsgrad", unsigned=True)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        super()._check_options(options)
        beta1, beta2 = options["betas"]
        if _is_tensor(beta1) != _is_tensor(beta2):
            raise ValueError("betas must be either both floats or both Tensors")
        tensors = {"lr": options["lr"], "betas[0]": beta1, "betas[1]": beta2}
        for name, value in tensors.items():
            if _is_tensor(value) and options["foreach"] and not options["capturable"]:
                raise ValueError(
                    f"{name} as a Tensor is not supported for capturable=False and foreach=True"
                )

    def _sparse_gradient_error(self) -> str:
        return "Adam does not support sparse gradients, please consider SparseAdam instead"


class AdamW(Adam):
    """Adam with decoupled weight decay, which is not averaged and not divided.

    State and arguments are those of :class:`Adam`; ``decoupled_weight_decay`` is always True,
    also in a checkpoint that was saved without it.

    Args:
        params: as for :class:`stepforge.Optimizer`.
        lr: the learning rate, from 0 up; a float or a tensor of one element.
        betas: the weights of the two averages, each in [0, 1).
        eps: added to the root, from 0 up.
        weight_decay: ``lr * weight_decay`` of the parameter is taken off it in each step.
        amsgrad: divide by the largest average squared gradient so far.

    The other keyword arguments are those of :class:`stepforge.Optimizer`.

    Raises:
        ValueError: as for :class:`Adam`.
        RuntimeError: a gradient is sparse.

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.tensor([1.0]))
        >>> p.grad = torch.tensor([3.0])
        >>> AdamW([p], lr=0.25, weight_decay=0.5).step()
        >>> p.item()
        0.625
    """

    weight_decay: Decay = 1e-2
    decoupled_weight_decay: bool = hyper(default=True, init=False, optional_in_checkpoint=True)


def _is_tensor(value: Any) -> bool:
    return not isinstance(value, (int, float))
