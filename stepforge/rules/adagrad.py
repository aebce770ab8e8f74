"""Adagrad. Duchi, Hazan and Singer 2011, "Adaptive Subgradient Methods for Online Learning and
Stochastic Optimization", Figure 1, the diagonal case with no constraint and no regularizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from stepforge.declare import Decay, LearningRate, NonNegative, Seed, full
from stepforge.formats import StateFormat
from stepforge.ops import Value, sqrt
from stepforge.optimizer import Optimizer, ParamsT


def adagrad(h: Any, t: Value, p: Value, g: Value, s: Value) -> tuple[Value, Value]:
    g = g + h.weight_decay * p  # not in the paper
    lr = h.lr / (1 + (t - 1) * h.lr_decay)  # the paper's is constant
    s = s + g * g
    return p - lr * g / (sqrt(s) + h.eps), s  # the paper adds its delta in the same place


class Adagrad(Optimizer, rule=adagrad):
    """Divides each element's step by the root of the sum of its squared gradients so far.

    Takes sparse gradients if ``weight_decay`` is 0, and then reads and writes only the elements
    that they name.

    State: ``sum``, in the parameter's shape and dtype, made by the constructor; ``step``.

    Args:
        params: as for :class:`stepforge.Optimizer`.
        lr: the learning rate, from 0 up; a float or a tensor of one element.
        lr_decay: the learning rate in step t is ``lr / (1 + (t - 1) * lr_decay)``; from 0 up.
        weight_decay: the L2 penalty, from 0 up.
        initial_accumulator_value: the initial ``sum``, from 0 up; of a group, if it has its own.
        eps: added to the root, from 0 up.
        foreach: as for :class:`stepforge.Optimizer`; here it may be given by position.

    The other keyword arguments are those of :class:`stepforge.Optimizer`.

    Raises:
        ValueError: a value is out of its range.
        RuntimeError: a gradient is sparse and ``weight_decay`` is not 0.

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.tensor([1.0]))
        >>> p.grad = torch.tensor([3.0])
        >>> Adagrad([p], lr=0.25).step()
        >>> p.item()
        0.75
    """

    _takes_sparse = True
    _eager_state = True

    lr: LearningRate = 1e-2
    lr_decay: NonNegative = 0
    weight_decay: Decay = 0
    initial_accumulator_value: NonNegative = 0
    eps: NonNegative = 1e-10
    foreach: bool | None = None
    s = full("sum", init="initial_accumulator_value", unsigned=True)

    if TYPE_CHECKING:
        # torch.optim's order: `foreach` stands last among the positional arguments, where no
        # dataclass would put a name that its base has declared already.
        def __init__(
            self,
            params: ParamsT,
            lr: LearningRate = 1e-2,
            lr_decay: NonNegative = 0,
            weight_decay: Decay = 0,
            initial_accumulator_value: NonNegative = 0,
            eps: NonNegative = 1e-10,
            foreach: bool | None = None,
            *,
            maximize: bool = False,
            capturable: bool = False,
            differentiable: bool = False,
            fused: bool | None = None,
            state_format: StateFormat | None = None,
            master_weight_bits: Literal[24, 32] | None = None,
            stochastic_rounding: bool = False,
            rounding_seed: Seed = 0,
            max_grad_norm: float | None = None,
            skip_nonfinite: bool = False,
        ) -> None: ...

    def share_memory(self) -> None:
        """Move the states ``sum`` to shared memory, for training from several processes.

        Scales and low bits move too.
        """
        for group in self.param_groups:
            for p in group["params"]:
                for key, x in self.state[p].items():
                    if key != "step":
                        x.share_memory_()
