"""Where a benchmark runs, and all that differs from place to place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stepforge.cli.clock import Clock, EventClock, HostClock, clock_of
from stepforge.cli.measure import ARMS, GPU_ARMS, Arm
from stepforge.cli.scores import (
    FIRST_STEP_TARGET,
    GPU_TARGETS,
    GROUPS_TARGET,
    TARGETS,
    Targets,
)

__all__ = ["Place", "place_of"]


@dataclass(frozen=True)
class Place:
    """Where steps are measured.

    Attributes:
        device: where the parameters are.
        clock: what times a step.
        arms: what is compared.
        temporaries: how often an arm may hold the parameters' size beyond what it keeps.
        targets: what the arms are to reach.
        groups_target: how many times the time of one param group many groups may take, if stated.
        first_step_target: how many seconds longer than the second step the first may take, if
            stated.
    """

    device: torch.device
    clock: Clock
    arms: Sequence[Arm]
    temporaries: int
    targets: Targets
    groups_target: float | None = None
    first_step_target: float | None = None

    @property
    def queues(self) -> bool:
        """Whether a step only queues work, so that host and device each take a time for it."""
        return isinstance(self.clock, EventClock)


def place_of(device: torch.device) -> Place:
    """All that there is to know of a device; it must be the current one of its type."""
    if device.type == "cpu":
        return Place(
            device,
            HostClock(),
            ARMS,
            # The original gradients, and what torch.optim's slowest arm holds at once.
            temporaries=3,
            targets=TARGETS,
            groups_target=GROUPS_TARGET,
            first_step_target=FIRST_STEP_TARGET,
        )
    # The same, and the copy's surplus; on a GPU stepforge's foreach works on a whole batch at once.
    return Place(device, clock_of(device), GPU_ARMS, temporaries=16, targets=GPU_TARGETS)
