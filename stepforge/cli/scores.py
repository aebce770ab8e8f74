"""What the times of a benchmark say: ratios between arms, and which of them are to be reached."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from stepforge.cli.clock import Lap
from stepforge.cli.measure import ARMS, LIMIT, OURS, TORCH
from stepforge.rules import ALL

__all__ = [
    "FIRST_STEP_TARGET",
    "GPU_TARGETS",
    "GROUPS_TARGET",
    "TARGETS",
    "Ratios",
    "Result",
    "Targets",
]


@dataclass(frozen=True)
class Ratios:
    """How fast an arm is, as ratios of median times; higher is better, None is unknown.

    Attributes:
        of_limit: the share of the limit's speed that it reaches.
        against_best: how many times as fast as the fastest arm of torch.optim.
        against_default: how many times as fast as torch.optim with default flags.
    """

    of_limit: float | None
    against_best: float | None
    against_default: float | None

    def reached(self, target: Ratios) -> dict[str, bool | None]:
        """Whether each ratio is at least the target's; None if there is none to compare."""
        return {
            name: None if value is None or wanted is None else value >= wanted
            for (name, value), wanted in zip(vars(self).items(), vars(target).values())
        }


#: What is to be reached, by workload and optimizer; of whole workloads only.
Targets: TypeAlias = Mapping[tuple[str, str], Ratios]


@dataclass(frozen=True)
class Result:
    """The times of all arms of one optimizer on one workload.

    Attributes:
        workload: its name.
        optimizer: its name.
        seconds: the time of each step, by the arm's name.
        targets: what is to be reached where it was measured.
        laps: what the seconds are of, by the arm's name, if it was kept.

    Example:
        >>> times = {"limit": [3.0], "torch": [8.0], "torch foreach": [6.0], "stepforge": [4.0]}
        >>> Result("large", "Adam", times).ratios("stepforge")
        Ratios(of_limit=0.75, against_best=1.5, against_default=2.0)
    """

    workload: str
    optimizer: str
    seconds: Mapping[str, Sequence[float]]
    targets: Targets = field(default_factory=lambda: TARGETS)
    laps: Mapping[str, Sequence[Lap]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, workload: str, optimizer: str, laps: Mapping[str, Sequence[Lap]], targets: Targets
    ) -> Result:
        """The result of what the steps of each arm took."""
        seconds = {arm: [lap.seconds for lap in run] for arm, run in laps.items()}
        return cls(workload, optimizer, seconds, targets, laps)

    def median(self, arm: str) -> float | None:
        """The median time of a step of an arm in seconds; None if it was not measured."""
        return statistics.median(self.seconds[arm]) if self.seconds.get(arm) else None

    def median_on_device(self, arm: str) -> float | None:
        """The median time that a device needed for a step of an arm; None if none was timed."""
        times = [lap.device for lap in self.laps.get(arm, ()) if lap.device is not None]
        return statistics.median(times) if times else None

    def spread(self, arm: str) -> float | None:
        """The distance between the quartiles of an arm's times over their median."""
        times = self.seconds.get(arm, ())
        if len(times) < 2:
            return None
        first, median, third = statistics.quantiles(times, n=4, method="inclusive")
        return (third - first) / median

    def ratios(self, arm: str) -> Ratios:
        """How fast an arm is."""
        time = self.median(arm)
        return Ratios(
            of_limit=_ratio(self.median(LIMIT.name), time),
            against_best=_ratio(self._best_of_torch(), time),
            against_default=_ratio(self.median(TORCH.name), time),
        )

    def _best_of_torch(self) -> float | None:
        of_torch = (self.median(arm.name) for arm in ARMS if arm.library is torch.optim)
        return min((time for time in of_torch if time is not None), default=None)

    @property
    def target(self) -> Ratios | None:
        """What :data:`~stepforge.cli.measure.OURS` is to reach; None where nothing is stated."""
        return self.targets.get((self.workload, self.optimizer))

    @property
    def reached(self) -> dict[str, bool | None]:
        """Whether it does, ratio by ratio."""
        return self.ratios(OURS.name).reached(self.target) if self.target else {}


def _ratio(other: float | None, time: float | None) -> float | None:
    return None if other is None or time is None else other / time


# Where torch has one kernel for all tensors, memory bounds both and parity is all there is to have.
_WITH_FUSED = ("Adagrad", "Adam", "AdamW")

#: What is to be reached on a CPU, by workload and optimizer; of whole workloads only.
TARGETS: Targets = {
    (workload, optimizer): Ratios(
        of_limit,
        fused if optimizer in _WITH_FUSED else foreach,
        adagrad if optimizer == "Adagrad" else default,
    )
    for workload, of_limit, fused, foreach, default, adagrad in (
        ("large", 0.88, 1.0, 4.0, 4.0, 4.0),
        ("model", 0.80, 1.0, 3.0, 2.5, 2.5),
        ("small", None, 8.0, 8.0, 20.0, 12.0),
    )
    for optimizer in ALL
}
#: How many times the time of one param group many groups may take on a CPU.
GROUPS_TARGET = 1.3
#: How much longer than the second step the first may take on a CPU, in seconds.
FIRST_STEP_TARGET = 0.2

_GPU_LARGE = {
    # Memory bounds both, as on a CPU.
    "AdamW": Ratios(0.85, 1.0, None),
    # torch.optim's best makes a pass over memory for each operation.
    **dict.fromkeys(("Adagrad", "NAdam", "RAdam"), Ratios(None, 3.0, None)),
}
#: What is to be reached on a GPU, by workload and optimizer.
GPU_TARGETS: Targets = {
    **{("large", optimizer): ratios for optimizer, ratios in _GPU_LARGE.items()},
    **{("small", optimizer): Ratios(None, 2.0, None) for optimizer in ALL},
}
