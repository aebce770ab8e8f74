"""How long a step takes: arms in turn, on fresh gradients, with only ``step()`` timed."""

from __future__ import annotations

import gc
import inspect
import itertools
import operator
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

import stepforge
from stepforge.backends.native import Kernel
from stepforge.backends.native.build import BuildError
from stepforge.cli.workloads import Shape
from stepforge.expr import Graph, Trace

__all__ = [
    "ACCESS",
    "ARMS",
    "LIMIT",
    "OPTIMIZERS",
    "OURS",
    "TORCH",
    "WARM_UPS",
    "Arm",
    "Stepper",
    "bytes_per_element",
    "make_gradients",
    "measure",
    "measure_arms",
    "measure_groups",
    "memory_needed",
]

#: The first rounds allocate state, compile kernels and fill caches; they are no part of a result.
WARM_UPS = 2
#: The optimizers that torch.optim and stepforge both have.
OPTIMIZERS = ("Adagrad", "Adam", "AdamW", "NAdam", "RAdam")


class Stepper(Protocol):
    """Parameters, and something that steps them."""

    def feed(self, gradients: Sequence[Tensor]) -> None:
        """Gives every parameter a fresh copy of its gradient; not timed."""

    def step(self) -> object:
        """Steps; timed."""


class _Stepped:
    """Parameters with an optimizer."""

    def __init__(self, params: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.params = params
        self.optimizer = optimizer

    def feed(self, gradients: Sequence[Tensor]) -> None:
        # The old gradient is let go of after the new one has its memory, so that no two steps in
        # turn find gradients in the same place.
        for p, gradient in zip(self.params, gradients):
            p.grad = gradient.clone()

    def step(self) -> object:
        return self.optimizer.step()


class _Limit:
    """The memory traffic of an optimizer, through the driver and the threads of its kernel.

    Only the C call counts as the step: the tables that it is given are laid out before.
    """

    def __init__(self, optimizer: str, params: list[Tensor]) -> None:
        graph = _traffic(optimizer)
        float32 = (torch.float32,) * len({*graph.varying.inputs, *graph.results})
        self.kernel = Kernel(graph, float32, torch.float32)
        self.tensors = {
            column: params if column == "p" else [torch.zeros_like(p) for p in params]
            for column in self.kernel.columns
        }
        sizes = [p.numel() for p in params]
        self.starts = np.cumsum([0, *sizes], dtype=np.int64)
        self.numbers = np.empty((len(params), 0), dtype=np.float32)

    def feed(self, gradients: Sequence[Tensor]) -> None:
        self.tensors["g"] = [gradient.clone() for gradient in gradients]
        columns = [[t.data_ptr() for t in self.tensors[name]] for name in self.kernel.columns]
        self.pointers = np.array(columns, dtype=np.uint64).T.copy()

    def step(self) -> None:
        self.kernel(self.starts, self.pointers, self.numbers)


class _Access:
    """What no step written in Python can leave out, however fast its kernel.

    Each gradient has to be asked for and each tensor for its address, as both may have changed; and
    autograd has to be told which tensors were written.
    """

    def __init__(self, optimizer: str, params: list[Tensor]) -> None:
        states = len(set(_traffic(optimizer).varying.inputs) - {"p", "g"})
        self.params = params
        self.kept = [*params, *(torch.zeros_like(p) for _ in range(states) for p in params)]

    def feed(self, gradients: Sequence[Tensor]) -> None:
        for p, gradient in zip(self.params, gradients):
            p.grad = gradient.clone()

    def step(self) -> None:
        gradients = map(operator.attrgetter("grad"), self.params)
        list(map(Tensor.data_ptr, itertools.chain(self.kept, gradients)))
        torch.autograd.graph.increment_version(self.kept)


@dataclass(frozen=True)
class Arm:
    """One way to run an optimizer.

    Attributes:
        name: what tables and files call it.
        what: what it is, for a legend.
        library: where its optimizer comes from; None if it is a bound on all of them.
        flags: arguments of its constructor.
        bound: what does a part of every step, given the optimizer's name and the parameters.
    """

    name: str
    what: str
    library: ModuleType | None = None
    flags: Mapping[str, bool] = field(default_factory=dict)
    bound: Callable[[str, list[Tensor]], Stepper] | None = None

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
            BuildError: it is the limit, and its kernel cannot be had.
        """
        params = [gradient.clone() for gradient in gradients]
        if self.bound is not None:
            return self.bound(optimizer, params)
        make = cast(Callable[..., torch.optim.Optimizer], getattr(self.library, optimizer))
        if groups == 1:
            return _Stepped(params, make(params, **self.flags))
        split = [
            {"params": params[start::groups], "lr": 1e-3 * (1 - start / groups / 2)}
            for start in range(groups)
        ]
        return _Stepped(params, make(split, **self.flags))


LIMIT = Arm("limit", "a C loop that reads and writes what a step does, and adds", bound=_Limit)
ACCESS = Arm("access", "reads gradients and addresses in Python, counts versions", bound=_Access)
TORCH = Arm("torch", "torch.optim, default flags", torch.optim)
OURS = Arm("stepforge", "stepforge, default flags", stepforge)
#: Everything is made from this tuple: an arm more is a line more.
ARMS = (
    LIMIT,
    ACCESS,
    TORCH,
    Arm("torch foreach", "torch.optim, foreach=True", torch.optim, {"foreach": True}),
    Arm("torch fused", "torch.optim, fused=True", torch.optim, {"fused": True}),
    OURS,
    Arm("stepforge foreach", "stepforge, foreach=True", stepforge, {"foreach": True}),
    Arm("stepforge reference", "stepforge, foreach=False", stepforge, {"foreach": False}),
)


def make_gradients(shapes: Sequence[Shape]) -> list[Tensor]:
    """Random float32 gradients of those shapes, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).mul_(0.01) for shape in shapes]


def measure(
    steppers: Mapping[str, Stepper],
    gradients: Sequence[Tensor],
    *,
    rounds: int,
    warm_ups: int = WARM_UPS,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Times the steps of several arms that take turns.

    Args:
        steppers: the arms, by name.
        gradients: what each step gets fresh copies of.
        rounds: how many steps of each arm count.
        warm_ups: how many steps of each arm come before.
        tick: called after each round, also those of the warm-up.

    Returns:
        The seconds of each step that counts, by the arm's name.
    """
    times: dict[str, list[float]] = {name: [] for name in steppers}
    # Who steps after whom decides what is in the caches; the order changes from round to round.
    shuffle = random.Random(0)
    with _no_garbage_collection():
        for number in range(warm_ups + rounds):
            for name in shuffle.sample(list(steppers), len(steppers)):
                stepper = steppers[name]
                stepper.feed(gradients)
                begin = time.perf_counter()
                stepper.step()
                seconds = time.perf_counter() - begin
                if number >= warm_ups:
                    times[name].append(seconds)
            tick()
    return times


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
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Times every arm that exists; the limit is left out if its kernel cannot be built.

    Args:
        optimizer: the optimizer's name.
        gradients: what each step gets fresh copies of.
        rounds: how many steps of each arm count.
        tick: called after each round, also those of the warm-up.
    """
    steppers = {}
    for arm in ARMS:
        if arm.exists(optimizer):
            try:
                steppers[arm.name] = arm.start(optimizer, gradients)
            except BuildError:
                if arm != LIMIT:
                    raise
    return measure(steppers, gradients, rounds=rounds, tick=tick)


def measure_groups(
    optimizer: str,
    gradients: Sequence[Tensor],
    groups: int,
    *,
    rounds: int,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, dict[int, list[float]]]:
    """Times one param group against many, with default flags.

    Args:
        optimizer: the optimizer's name.
        gradients: what each step gets fresh copies of.
        groups: how many are many.
        rounds: how many steps of each arm count.
        tick: called after each round, also those of the warm-up.

    Returns:
        The seconds of each step by arm and by number of groups.
    """
    arms = {(arm.name, number): arm for arm in (TORCH, OURS) for number in (1, groups)}
    steppers = {
        f"{name}/{number}": arm.start(optimizer, gradients, number)
        for (name, number), arm in arms.items()
    }
    times = measure(steppers, gradients, rounds=rounds, tick=tick)
    return {
        arm.name: {number: times[f"{arm.name}/{number}"] for number in (1, groups)}
        for arm in (TORCH, OURS)
    }


def memory_needed(optimizer: str, elements: int) -> int:
    """About how many bytes :func:`measure_arms` needs for float32 parameters.

    Args:
        optimizer: the optimizer's name.
        elements: how many elements the parameters have together.
    """
    arms = sum(arm.exists(optimizer) for arm in ARMS)
    temporaries = 3  # what torch.optim's slowest arm holds at once, and the original gradients
    return 4 * elements * (arms * len(_traffic(optimizer).varying.inputs) + temporaries)


def bytes_per_element(optimizer: str) -> int:
    """What a step of a float32 parameter reads and writes for each of its elements, in bytes.

    Example:
        >>> bytes_per_element("Adam"), bytes_per_element("Adagrad")
        (28, 20)
    """
    graph = _traffic(optimizer)
    return 4 * (len(graph.varying.inputs) + len(graph.results))


def _traffic(optimizer: str) -> Graph:
    """A rule that reads and writes what the optimizer's does: everything written gets g added."""
    made = getattr(stepforge, optimizer)([torch.zeros(1)])
    rule = made._rule.graph(made.param_groups[0])
    trace = Trace()
    read = {name: trace.input(name, varying=True) for name in rule.varying.inputs}
    return Graph.of({name: read[name] + read["g"] for name in rule.results})
