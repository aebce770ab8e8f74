"""Measurement of implementations: they take turns on fresh gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepforge.cli.bench.device_settings import DeviceSettings
from stepforge.cli.bench.implementations import (
    IMPLEMENTATIONS,
    Implementation,
    start_if_available,
)
from stepforge.cli.bench.lower_bounds import traffic
from stepforge.cli.bench.workloads import PARAM_SIZE, Shape, Workload
from stepforge.cli.timing.timers import StepTime
from stepforge.cli.timing.turns import measure

__all__ = [
    "make_gradients",
    "measure_implementations",
    "memory_needed",
]


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
