"""The implementations of an optimizer that the benchmark compares."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

import stepforge
from stepforge.backends.disk_cache import BuildError
from stepforge.cli.bench.lower_bounds import Access, Copy, Limit, Runner

__all__ = [
    "ACCESS",
    "GPU_IMPLEMENTATIONS",
    "IMPLEMENTATIONS",
    "LIMIT",
    "OURS",
    "TORCH",
    "Implementation",
    "OptimizerRunner",
    "start_if_available",
]


class OptimizerRunner:
    """Parameters with an optimizer.

    Args:
        params: the parameters.
        optimizer: their optimizer.
    """

    def __init__(self, params: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.params = params
        self.optimizer = optimizer

    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Give every parameter a fresh copy of its gradient, in its own dtype; not timed."""
        # The old gradient is freed after the new one is allocated, so that no two steps in a row
        # find gradients at the same addresses.
        for p, gradient in zip(self.params, gradients):
            p.grad = gradient.to(p.dtype, copy=True)

    def step(self) -> object:
        """Step all parameters; timed."""
        return self.optimizer.step()


@dataclass(frozen=True)
class Implementation:
    """An implementation of an optimizer, or a lower bound on all of them.

    Attributes:
        name: its name in tables and files.
        description: text for a legend.
        library: the module of its optimizers; None for a lower bound.
        flags: arguments of the optimizer's constructor.
        bound: for a lower bound, makes a runner from the optimizer's name and the parameters.
        missing: the exceptions, raised by the first step at the latest, that mean that this machine
            lacks it.
    """

    name: str
    description: str
    library: ModuleType | None = None
    flags: Mapping[str, bool] = field(default_factory=dict)
    bound: Callable[[str, list[Tensor]], Runner] | None = None
    missing: tuple[type[Exception], ...] = ()

    def exists(self, optimizer: str) -> bool:
        """Return True if the library's optimizer takes these flags; RAdam has no ``fused``."""
        if self.library is None:
            return True
        arguments = inspect.signature(getattr(self.library, optimizer)).parameters
        return all(flag in arguments for flag in self.flags)

    def start(self, optimizer: str, gradients: Sequence[Tensor], groups: int = 1) -> Runner:
        """Return parameters in the shapes of the gradients, with their optimizer.

        Args:
            optimizer: the optimizer's name.
            gradients: a gradient for each parameter.
            groups: the number of param groups, each with its own learning rate.

        Raises:
            Exception: one of ``missing``, if this machine lacks the implementation.
        """
        params = [gradient.clone() for gradient in gradients]
        if self.bound is not None:
            return self.bound(optimizer, params)
        make = cast(Callable[..., torch.optim.Optimizer], getattr(self.library, optimizer))
        if groups == 1:
            return OptimizerRunner(params, make(params, **self.flags))
        split = [
            {"params": params[start::groups], "lr": 1e-3 * (1 - start / groups / 2)}
            for start in range(groups)
        ]
        return OptimizerRunner(params, make(split, **self.flags))


def start_if_available(
    implementation: Implementation, optimizer: str, gradients: Sequence[Tensor]
) -> Runner | None:
    """Return the runner of an implementation, or None if the library or this machine lacks it.

    Args:
        implementation: the implementation.
        optimizer: the optimizer's name.
        gradients: a gradient for each parameter.
    """
    if not implementation.exists(optimizer):
        return None
    try:
        runner = implementation.start(optimizer, gradients)
        if implementation.missing:
            runner.set_gradients(gradients)
            runner.step()
    except implementation.missing:
        return None
    return runner


LIMIT = Implementation(
    "limit",
    "a C loop that only adds, with the reads and writes of a step",
    bound=Limit,
    missing=(BuildError,),
)
ACCESS = Implementation(
    "access", "reads gradients and addresses in Python, counts versions", bound=Access
)
TORCH = Implementation("torch", "torch.optim, default flags", torch.optim)
_FOREACH = Implementation(
    "torch foreach", "torch.optim, foreach=True", torch.optim, {"foreach": True}
)
_FUSED = Implementation("torch fused", "torch.optim, fused=True", torch.optim, {"fused": True})
OURS = Implementation("stepforge", "stepforge, default flags", stepforge)
_OUR_FOREACH = Implementation(
    "stepforge foreach", "stepforge, foreach=True", stepforge, {"foreach": True}
)
_OUR_REFERENCE = Implementation(
    "stepforge reference", "stepforge, foreach=False", stepforge, {"foreach": False}
)
#: The implementations on a CPU. Tables and reports follow this tuple.
IMPLEMENTATIONS = (LIMIT, ACCESS, TORCH, _FOREACH, _FUSED, OURS, _OUR_FOREACH, _OUR_REFERENCE)
#: The implementations on a GPU. The names are the same, so that the same ratios are taken. Some of
#: torch's constructors take ``fused`` even if the device has no such kernel. The reference is left
#: out: a launch for each operation of each tensor measures launches, and they would fill the
#: device's queue, which then makes the host wait.
GPU_IMPLEMENTATIONS = (
    Implementation("limit", "one copy on the device, of as many bytes as a step moves", bound=Copy),
    ACCESS,
    TORCH,
    _FOREACH,
    replace(_FUSED, missing=(NotImplementedError,)),
    OURS,
    _OUR_FOREACH,
)
