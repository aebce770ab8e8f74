"""The implementations of an optimizer that the benchmark compares."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor

import stepforge
from stepforge.backends.disk_cache import BuildError
from stepforge.cli.bench.arrangements import Arrangement
from stepforge.cli.bench.lower_bounds import Access, Limit, copy_of_step
from stepforge.cli.timing.turns import Runner

__all__ = [
    "ACCESS",
    "GPU_IMPLEMENTATIONS",
    "IMPLEMENTATIONS",
    "LIMIT",
    "OURS",
    "OUR_FOREACH",
    "PLAINLY",
    "TORCH",
    "Implementation",
    "OptimizerRunner",
    "start_if_available",
]

_PLAIN = Arrangement()


class OptimizerRunner:
    """Parameters with an optimizer.

    Args:
        params: the parameters.
        optimizer: their optimizer.
        arrangement: the arrangement of gradients and steps.
        environment: environment variables during a step.
    """

    def __init__(
        self,
        params: list[Tensor],
        optimizer: torch.optim.Optimizer,
        arrangement: Arrangement = _PLAIN,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.params = params
        self.optimizer = optimizer
        self._environment = environment
        self._gradient = arrangement.gradient
        self._step = arrangement.step(optimizer.step)
        if not isinstance(optimizer, stepforge.Optimizer):
            self._step = arrangement.around(self._step, params)

    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Give every parameter a fresh copy of its gradient, in its own dtype; not timed."""
        # The old gradient is freed after the new one is allocated, so that no two steps in a row
        # find gradients at the same addresses.
        for p, gradient in zip(self.params, gradients):
            p.grad = self._gradient(p, gradient.to(p.dtype, copy=True))

    def step(self) -> object:
        """Step all parameters; timed."""
        if not self._environment:
            return self._step()
        before = {name: os.environ.get(name) for name in self._environment}
        os.environ.update(self._environment)
        try:
            return self._step()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@dataclass(frozen=True)
class Implementation:
    """An implementation of an optimizer, or a lower bound on all of them.

    Attributes:
        name: its name in tables and files.
        description: text for a legend.
        library: the module of its optimizers; None for a lower bound.
        flags: arguments of the optimizer's constructor.
        environment: environment variables during its steps.
        bound: for a lower bound, makes a runner from the optimizer's name and the parameters.
        missing: the exceptions, raised by the first step at the latest, that mean that this machine
            lacks it.
        is_plain: True if its tensors and steps are plain in every workload.
    """

    name: str
    description: str
    library: ModuleType | None = None
    flags: Mapping[str, bool] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    bound: Callable[[str, list[Tensor]], Runner] | None = None
    missing: tuple[type[Exception], ...] = ()
    is_plain: bool = False

    def exists(self, optimizer: str, arrangement: Arrangement = _PLAIN) -> bool:
        """Return True if the library's optimizer takes these flags; RAdam has no ``fused``."""
        if self.library is None:
            return True
        arguments = inspect.signature(getattr(self.library, optimizer)).parameters
        return all(flag in arguments for flag in self._options(arrangement))

    def _options(self, arrangement: Arrangement) -> dict[str, Any]:
        own = arrangement.own_options if self.library is stepforge else {}
        return {**self.flags, **arrangement.options, **own}

    def start(
        self, optimizer: str, initial: Sequence[Tensor], arrangement: Arrangement = _PLAIN
    ) -> Runner:
        """Return copies of parameters, with their optimizer.

        Args:
            optimizer: the optimizer's name.
            initial: the parameters before the first step.
            arrangement: the arrangement of parameters and steps. A lower bound has a plain one.

        Raises:
            Exception: one of ``missing``, if this machine lacks the implementation.
        """
        params = [p.clone() for p in initial]
        if self.bound is not None:
            return self.bound(optimizer, params)
        if self.is_plain:
            arrangement = _PLAIN
        params = [arrangement.tensor(p) for p in params]
        make = cast(Callable[..., torch.optim.Optimizer], getattr(self.library, optimizer))
        count = arrangement.groups
        split = [
            {"params": params[start::count], "lr": 1e-3 * (1 - start / count / 2)}
            for start in range(count)
        ]
        return OptimizerRunner(
            params,
            make(params if count == 1 else split, **self._options(arrangement)),
            arrangement,
            self.environment,
        )


def start_if_available(
    implementation: Implementation,
    optimizer: str,
    gradients: Sequence[Tensor],
    arrangement: Arrangement = _PLAIN,
    initial: Sequence[Tensor] | None = None,
) -> Runner | None:
    """Return the runner of an implementation, or None if the library or this machine lacks it.

    Args:
        implementation: the implementation.
        optimizer: the optimizer's name.
        gradients: a gradient for each parameter.
        arrangement: the arrangement of parameters and steps.
        initial: the parameters before the first step; the same numbers as the gradients if None.
    """
    if not implementation.exists(optimizer, arrangement):
        return None
    try:
        runner = implementation.start(optimizer, initial or gradients, arrangement)
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
# Some of torch's constructors take ``fused`` even if there is no such kernel: for a device, or for
# DTensors.
_FUSED = Implementation(
    "torch fused",
    "torch.optim, fused=True",
    torch.optim,
    {"fused": True},
    missing=(NotImplementedError,),
)
OURS = Implementation("stepforge", "stepforge, default flags", stepforge)
#: The way without a compiler and without prebuilt kernels.
OUR_FOREACH = Implementation(
    "stepforge foreach",
    "stepforge, foreach=True, guards in Python",
    stepforge,
    {"foreach": True},
    {"STEPFORGE_GUARDS": "python"},
)
_OUR_REFERENCE = Implementation(
    "stepforge reference", "stepforge, foreach=False", stepforge, {"foreach": False}
)
#: The same tensors as plainly as possible, beside arranged workloads.
PLAINLY = Implementation(
    "stepforge plainly",
    "stepforge by default on plain tensors in one param group",
    stepforge,
    is_plain=True,
)
#: The implementations on a CPU. Tables and reports follow this tuple.
IMPLEMENTATIONS = (LIMIT, ACCESS, TORCH, _FOREACH, _FUSED, OURS, OUR_FOREACH, _OUR_REFERENCE)
#: The implementations on a GPU. The names are the same, so that the same ratios are taken. The
#: reference is left out: a launch for each operation of each tensor measures launches, and they
#: would fill the device's queue, which then makes the host wait.
GPU_IMPLEMENTATIONS = (
    Implementation(
        "limit", "one copy on the device, of as many bytes as a step moves", bound=copy_of_step
    ),
    ACCESS,
    TORCH,
    _FOREACH,
    _FUSED,
    OURS,
    OUR_FOREACH,
)
