"""How long a step takes: arms in turn, on fresh gradients, with only ``step()`` timed."""

from __future__ import annotations

import gc
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

import stepforge
from stepforge.backends.native.build import BuildError
from stepforge.cli.bounds import Access, Copy, Limit, Stepper, traffic
from stepforge.cli.clock import Clock, HostClock, Lap
from stepforge.cli.workloads import Shape

__all__ = [
    "ACCESS",
    "ARMS",
    "GPU_ARMS",
    "LIMIT",
    "OURS",
    "TORCH",
    "WARM_UPS",
    "Arm",
    "Stepped",
    "make_gradients",
    "measure",
    "measure_arms",
    "measure_groups",
    "memory_needed",
    "started",
]

#: The first rounds allocate state, compile kernels and fill caches; they are no part of a result.
WARM_UPS = 2
#: The optimizers that torch.optim and stepforge both have.

_HOST = HostClock()


class Stepped:
    """Parameters with an optimizer.

    Args:
        params: the parameters.
        optimizer: what steps them.
    """

    def __init__(self, params: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.params = params
        self.optimizer = optimizer

    def feed(self, gradients: Sequence[Tensor]) -> None:
        """Gives every parameter a fresh copy of its gradient in its own dtype; not timed."""
        # The old gradient is let go of after the new one has its memory, so that no two steps in
        # turn find gradients in the same place.
        for p, gradient in zip(self.params, gradients):
            p.grad = gradient.to(p.dtype, copy=True)

    def step(self) -> object:
        """Steps; timed."""
        return self.optimizer.step()


@dataclass(frozen=True)
class Arm:
    """One way to run an optimizer.

    Attributes:
        name: what tables and files call it.
        what: what it is, for a legend.
        library: where its optimizer comes from; None if it is a bound on all of them.
        flags: arguments of its constructor.
        bound: what does a part of every step, given the optimizer's name and the parameters.
        missing: what is raised, by the first step at the latest, where a machine lacks it.
    """

    name: str
    what: str
    library: ModuleType | None = None
    flags: Mapping[str, bool] = field(default_factory=dict)
    bound: Callable[[str, list[Tensor]], Stepper] | None = None
    missing: tuple[type[Exception], ...] = ()

    def exists(self, optimizer: str) -> bool:
        """Whether the library has that optimizer with these flags; RAdam has no ``fused``."""
        if self.library is None:
            return True
        arguments = inspect.signature(getattr(self.library, optimizer)).parameters
        return all(flag in arguments for flag in self.flags)

    def start(self, optimizer: str, gradients: Sequence[Tensor], groups: int = 1) -> Stepper:
        """Parameters in the shapes of the gradients, and what steps them.

        Args:
            optimizer: the optimizer's name.
            gradients: a gradient for each parameter.
            groups: into how many param groups to split them, each with another learning rate.

        Raises:
            Exception: one that ``missing`` names, if this machine lacks what the arm needs.
        """
        params = [gradient.clone() for gradient in gradients]
        if self.bound is not None:
            return self.bound(optimizer, params)
        make = cast(Callable[..., torch.optim.Optimizer], getattr(self.library, optimizer))
        if groups == 1:
            return Stepped(params, make(params, **self.flags))
        split = [
            {"params": params[start::groups], "lr": 1e-3 * (1 - start / groups / 2)}
            for start in range(groups)
        ]
        return Stepped(params, make(split, **self.flags))


LIMIT = Arm(
    "limit",
    "a C loop that reads and writes what a step does, and adds",
    bound=Limit,
    missing=(BuildError,),
)
ACCESS = Arm("access", "reads gradients and addresses in Python, counts versions", bound=Access)
TORCH = Arm("torch", "torch.optim, default flags", torch.optim)
_FOREACH = Arm("torch foreach", "torch.optim, foreach=True", torch.optim, {"foreach": True})
_FUSED = Arm("torch fused", "torch.optim, fused=True", torch.optim, {"fused": True})
OURS = Arm("stepforge", "stepforge, default flags", stepforge)
_OUR_FOREACH = Arm("stepforge foreach", "stepforge, foreach=True", stepforge, {"foreach": True})
#: Everything is made from this tuple: an arm more is a line more.
ARMS = (
    LIMIT,
    ACCESS,
    TORCH,
    _FOREACH,
    _FUSED,
    OURS,
    _OUR_FOREACH,
    Arm("stepforge reference", "stepforge, foreach=False", stepforge, {"foreach": False}),
)
#: And on a GPU from this one. It has the same names, so that the same ratios are taken. Some of
#: torch's constructors take ``fused`` where there is no kernel for the device. The reference is
#: left out: a launch for each operation of each tensor measures launches, and they would fill the
#: queue of the device, which then makes the host wait.
GPU_ARMS = (
    Arm("limit", "one copy on the device, of as many bytes as a step moves", bound=Copy),
    ACCESS,
    TORCH,
    _FOREACH,
    replace(_FUSED, missing=(NotImplementedError,)),
    OURS,
    _OUR_FOREACH,
)


def make_gradients(shapes: Sequence[Shape], device: torch.device | str = "cpu") -> list[Tensor]:
    """Random float32 gradients of those shapes, the same at each call and on each device."""
    generator = torch.Generator().manual_seed(0)
    random_ones = (torch.randn(shape, generator=generator).mul_(0.01) for shape in shapes)
    return [gradient.to(device) for gradient in random_ones]


def started(arm: Arm, optimizer: str, gradients: Sequence[Tensor]) -> Stepper | None:
    """What steps with an arm; None if the library or this machine lacks it.

    Args:
        arm: the arm.
        optimizer: the optimizer's name.
        gradients: a gradient for each parameter.
    """
    if not arm.exists(optimizer):
        return None
    try:
        stepper = arm.start(optimizer, gradients)
        if arm.missing:
            stepper.feed(gradients)
            stepper.step()
    except arm.missing:
        return None
    return stepper


def measure(
    steppers: Mapping[str, Stepper],
    gradients: Sequence[Tensor],
    *,
    rounds: int,
    warm_ups: int = WARM_UPS,
    clock: Clock = _HOST,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[Lap]]:
    """Times the steps of several arms that take turns.

    Args:
        steppers: the arms, by name.
        gradients: what each step gets fresh copies of.
        rounds: how many steps of each arm count.
        warm_ups: how many steps of each arm come before.
        clock: what times a step where the gradients are.
        tick: called after each round, also those of the warm-up.

    Returns:
        What each step that counts took, by the arm's name.
    """
    laps: dict[str, list[Lap]] = {name: [] for name in steppers}
    # Who steps after whom decides what is in the caches; the order changes from round to round.
    shuffle = random.Random(0)
    with _no_garbage_collection():
        for number in range(warm_ups + rounds):
            for name in shuffle.sample(list(steppers), len(steppers)):
                stepper = steppers[name]
                stepper.feed(gradients)
                lap = clock.time(stepper.step)
                if number >= warm_ups:
                    laps[name].append(lap)
            tick()
    return laps


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def measure_arms(
    optimizer: str,
    gradients: Sequence[Tensor],
    *,
    rounds: int,
    arms: Sequence[Arm] = ARMS,
    clock: Clock = _HOST,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[Lap]]:
    """Times every arm that exists; one that this machine lacks is left out.

    Args:
        optimizer: the optimizer's name.
        gradients: what each step gets fresh copies of.
        rounds: how many steps of each arm count.
        arms: the arms for where the gradients are.
        clock: what times a step there.
        tick: called after each round, also those of the warm-up.
    """
    steppers = {arm.name: started(arm, optimizer, gradients) for arm in arms}
    there = {name: stepper for name, stepper in steppers.items() if stepper is not None}
    return measure(there, gradients, rounds=rounds, clock=clock, tick=tick)


def measure_groups(
    optimizer: str,
    gradients: Sequence[Tensor],
    groups: int,
    *,
    rounds: int,
    clock: Clock = _HOST,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, dict[int, list[float]]]:
    """Times one param group against many, with default flags.

    Args:
        optimizer: the optimizer's name.
        gradients: what each step gets fresh copies of.
        groups: how many are many.
        rounds: how many steps of each arm count.
        clock: what times a step where the gradients are.
        tick: called after each round, also those of the warm-up.

    Returns:
        The seconds of each step by arm and by number of groups.
    """
    arms = {(arm.name, number): arm for arm in (TORCH, OURS) for number in (1, groups)}
    steppers = {
        f"{name}/{number}": arm.start(optimizer, gradients, number)
        for (name, number), arm in arms.items()
    }
    laps = measure(steppers, gradients, rounds=rounds, clock=clock, tick=tick)
    return {
        arm.name: {n: [lap.seconds for lap in laps[f"{arm.name}/{n}"]] for n in (1, groups)}
        for arm in (TORCH, OURS)
    }


def memory_needed(
    optimizer: str, elements: int, arms: Sequence[Arm] = ARMS, temporaries: int = 3
) -> int:
    """About how many bytes :func:`measure_arms` needs for float32 parameters.

    Args:
        optimizer: the optimizer's name.
        elements: how many elements the parameters have together.
        arms: the arms that are measured.
        temporaries: how often the parameters' size comes on top: the original gradients, and what
            the slowest arm holds at once.
    """
    count = sum(arm.exists(optimizer) for arm in arms)
    return 4 * elements * (count * len(traffic(optimizer).varying.inputs) + temporaries)
