"""Measurement of step times: runners take turns on fresh gradients; only ``step()`` is timed."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from stepforge.cli.bench.device_settings import DeviceSettings
from stepforge.cli.bench.implementations import (
    IMPLEMENTATIONS,
    Implementation,
    start_if_available,
)
from stepforge.cli.bench.lower_bounds import Runner, traffic
from stepforge.cli.bench.timing import HostTimer, StepTime, Timer
from stepforge.cli.bench.workloads import PARAM_SIZE, Shape, Workload

__all__ = [
    "WARM_UPS",
    "make_gradients",
    "measure",
    "measure_implementations",
    "memory_needed",
]

#: The rounds before the measured ones. They allocate state, compile kernels and fill caches.
WARM_UPS = 2

_HOST_TIMER = HostTimer()


def make_gradients(
    shapes: Sequence[Shape],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    size: float = PARAM_SIZE,
) -> list[Tensor]:
    """Return random tensors, the same in every call and on every device.

    Args:
        shapes: their shapes.
        device: their device.
        dtype: their dtype.
        size: their standard deviation.
    """
    generator = torch.Generator().manual_seed(0)
    # A product of 0 may be -0.
    on_cpu = (torch.randn(shape, generator=generator).mul_(size).add_(0.0) for shape in shapes)
    return [gradient.to(device, dtype) for gradient in on_cpu]


def measure(
    runners: Mapping[str, Runner],
    gradients: Sequence[Tensor],
    *,
    rounds: int,
    warm_ups: int = WARM_UPS,
    steps: int = 1,
    timer: Timer = _HOST_TIMER,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[StepTime]]:
    """Time the steps of several runners in turn.

    Args:
        runners: the runners, by name.
        gradients: the gradients. Each step gets fresh copies.
        rounds: the number of measured rounds.
        warm_ups: the number of rounds before them.
        steps: the consecutive steps per runner and round.
        timer: the timer for the gradients' device.
        tick: called after each round, warm-up rounds included.

    Returns:
        The median step of each measured round, by the runner's name.
    """
    times: dict[str, list[StepTime]] = {name: [] for name in runners}
    # The previous runner determines the content of the caches, so the order changes every round.
    shuffle = random.Random(0)
    with _no_garbage_collection():
        for index in range(warm_ups + rounds):
            for name in shuffle.sample(list(runners), len(runners)):
                time = _median_step(runners[name], gradients, steps, timer)
                if index >= warm_ups:
                    times[name].append(time)
            tick()
    return times


def _median_step(runner: Runner, gradients: Sequence[Tensor], steps: int, timer: Timer) -> StepTime:
    """Return the time of the median step; of the slower of two."""
    times: list[StepTime] = []
    for _ in range(steps):
        runner.set_gradients(gradients)
        times.append(timer.time(runner.step))
    return sorted(times, key=lambda time: time.seconds)[steps // 2]


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
    workload: Workload,
    settings: DeviceSettings,
    *,
    rounds: int,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[StepTime]]:
    """Time every implementation of an optimizer that this machine has.

    Args:
        optimizer: the optimizer's name.
        workload: the workload.
        settings: the settings for the device.
        rounds: the number of measured rounds.
        tick: called after each round, warm-up rounds included.
    """
    initial = gradients = make_gradients(workload.shapes, settings.device, workload.dtype)
    if workload.gradient_size != PARAM_SIZE:
        like = workload.shapes, settings.device, workload.dtype
        gradients = make_gradients(*like, workload.gradient_size)
    with workload.arranged() as arrangement:
        runners = {
            i.name: start_if_available(i, optimizer, gradients, arrangement, initial)
            for i in settings.implementations_for(workload)
        }
        return measure(
            {name: runner for name, runner in runners.items() if runner is not None},
            gradients,
            rounds=rounds,
            steps=workload.steps,
            timer=settings.timer,
            tick=tick,
        )


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
