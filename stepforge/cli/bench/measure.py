"""Measurement of step times: runners take turns on fresh gradients; only ``step()`` is timed."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from stepforge.cli.bench.implementations import (
    IMPLEMENTATIONS,
    OURS,
    TORCH,
    Implementation,
    start_if_available,
)
from stepforge.cli.bench.lower_bounds import Runner, traffic
from stepforge.cli.bench.timing import HostTimer, StepTime, Timer
from stepforge.cli.bench.workloads import Shape

__all__ = [
    "WARM_UPS",
    "make_gradients",
    "measure",
    "measure_groups",
    "measure_implementations",
    "memory_needed",
]

#: The rounds before the measured ones. They allocate state, compile kernels and fill caches.
WARM_UPS = 2

_HOST_TIMER = HostTimer()


def make_gradients(shapes: Sequence[Shape], device: torch.device | str = "cpu") -> list[Tensor]:
    """Return random float32 gradients, the same in every call and on every device."""
    generator = torch.Generator().manual_seed(0)
    on_cpu = (torch.randn(shape, generator=generator).mul_(0.01) for shape in shapes)
    return [gradient.to(device) for gradient in on_cpu]


def measure(
    runners: Mapping[str, Runner],
    gradients: Sequence[Tensor],
    *,
    rounds: int,
    warm_ups: int = WARM_UPS,
    timer: Timer = _HOST_TIMER,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[StepTime]]:
    """Time the steps of several runners in turn.

    Args:
        runners: the runners, by name.
        gradients: the gradients. Each step gets fresh copies.
        rounds: the number of measured steps per runner.
        warm_ups: the number of steps per runner before them.
        timer: the timer for the gradients' device.
        tick: called after each round, warm-up rounds included.

    Returns:
        The time of each measured step, by the runner's name.
    """
    times: dict[str, list[StepTime]] = {name: [] for name in runners}
    # The previous runner determines the content of the caches, so the order changes every round.
    shuffle = random.Random(0)
    with _no_garbage_collection():
        for index in range(warm_ups + rounds):
            for name in shuffle.sample(list(runners), len(runners)):
                runner = runners[name]
                runner.set_gradients(gradients)
                time = timer.time(runner.step)
                if index >= warm_ups:
                    times[name].append(time)
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


def measure_implementations(
    optimizer: str,
    gradients: Sequence[Tensor],
    *,
    rounds: int,
    implementations: Sequence[Implementation] = IMPLEMENTATIONS,
    timer: Timer = _HOST_TIMER,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[StepTime]]:
    """Time every implementation of an optimizer that this machine has.

    Args:
        optimizer: the optimizer's name.
        gradients: the gradients. Each step gets fresh copies.
        rounds: the number of measured steps per implementation.
        implementations: the implementations for the gradients' device.
        timer: the timer for that device.
        tick: called after each round, warm-up rounds included.
    """
    runners = {i.name: start_if_available(i, optimizer, gradients) for i in implementations}
    available = {name: runner for name, runner in runners.items() if runner is not None}
    return measure(available, gradients, rounds=rounds, timer=timer, tick=tick)


def measure_groups(
    optimizer: str,
    gradients: Sequence[Tensor],
    groups: int,
    *,
    rounds: int,
    timer: Timer = _HOST_TIMER,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, dict[int, list[float]]]:
    """Time one param group and many, with default flags.

    Args:
        optimizer: the optimizer's name.
        gradients: the gradients. Each step gets fresh copies.
        groups: the larger number of param groups.
        rounds: the number of measured steps per implementation and number of groups.
        timer: the timer for the gradients' device.
        tick: called after each round, warm-up rounds included.

    Returns:
        The seconds of each step, by implementation and number of groups.
    """
    runners = {
        f"{implementation.name}/{count}": implementation.start(optimizer, gradients, count)
        for implementation in (TORCH, OURS)
        for count in (1, groups)
    }
    times = measure(runners, gradients, rounds=rounds, timer=timer, tick=tick)
    return {
        name: {count: [time.seconds for time in times[f"{name}/{count}"]] for count in (1, groups)}
        for name in (TORCH.name, OURS.name)
    }


def memory_needed(
    optimizer: str,
    elements: int,
    implementations: Sequence[Implementation] = IMPLEMENTATIONS,
    temporaries: int = 3,
) -> int:
    """Return about how many bytes :func:`measure_implementations` needs for float32 parameters.

    Args:
        optimizer: the optimizer's name.
        elements: the number of elements of all parameters together.
        implementations: the implementations.
        temporaries: further memory as a multiple of the parameters' size: for the original
            gradients, and for the temporaries of the slowest implementation.
    """
    count = sum(implementation.exists(optimizer) for implementation in implementations)
    return 4 * elements * (count * len(traffic(optimizer).varying.inputs) + temporaries)
