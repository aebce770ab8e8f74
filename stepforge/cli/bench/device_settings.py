"""Settings of the benchmark that depend on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stepforge.cli.bench.implementations import (
    GPU_IMPLEMENTATIONS,
    IMPLEMENTATIONS,
    PLAINLY,
    Implementation,
)
from stepforge.cli.bench.targets import FIRST_STEP_TARGET, GPU_TARGETS, TARGETS, Targets
from stepforge.cli.bench.workloads import DEFAULT_WORKLOADS, GPU_WORKLOADS, Workload
from stepforge.cli.timing.timers import EventTimer, HostTimer, Timer, timer_for

__all__ = ["DeviceSettings", "settings_for"]


@dataclass(frozen=True)
class DeviceSettings:
    """The settings of the benchmark for one device.

    Attributes:
        device: the device of the parameters.
        timer: the timer of a step.
        implementations: the implementations to compare.
        temporaries: the temporary memory of an implementation, as a multiple of the parameters'
            size.
        targets: the target ratios.
        first_step_target: the largest difference between the first and the second step in seconds,
            if stated.
        default_workloads: the names of the workloads of a run that names none.
    """

    device: torch.device
    timer: Timer
    implementations: Sequence[Implementation]
    temporaries: int
    targets: Targets
    first_step_target: float | None = None
    default_workloads: Sequence[str] = DEFAULT_WORKLOADS

    @property
    def is_asynchronous(self) -> bool:
        """True if a step only queues work, so that host and device each need time for it."""
        return isinstance(self.timer, EventTimer)

    def implementations_for(self, workload: Workload) -> list[Implementation]:
        """Return the implementations to compare on a workload."""
        plainly = [PLAINLY] if workload.is_arranged else []
        left_out = workload.form.leaves_out
        return [i for i in (*self.implementations, *plainly) if i.name not in left_out]


def settings_for(device: torch.device) -> DeviceSettings:
    """Return the settings for a device, which must be the current one of its type."""
    if device.type == "cpu":
        return DeviceSettings(
            device,
            HostTimer(),
            IMPLEMENTATIONS,
            # The original gradients, and the temporaries of torch.optim's slowest implementation.
            temporaries=3,
            targets=TARGETS,
            first_step_target=FIRST_STEP_TARGET,
        )
    # The same, and the surplus of the limit's copy; on a GPU stepforge's foreach works on a whole
    # batch at once.
    return DeviceSettings(
        device,
        timer_for(device),
        GPU_IMPLEMENTATIONS,
        temporaries=16,
        targets=GPU_TARGETS,
        default_workloads=GPU_WORKLOADS,
    )
