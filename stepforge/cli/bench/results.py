"""Results of the benchmark: medians, spreads and ratios of step times."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from stepforge.cli.bench.implementations import IMPLEMENTATIONS, LIMIT, PLAINLY, TORCH
from stepforge.cli.bench.targets import TARGETS, Ratios, Targets
from stepforge.cli.timing.timers import StepTime

__all__ = ["Result"]


@dataclass(frozen=True)
class Result:
    """The step times of all implementations of one optimizer on one workload.

    Attributes:
        workload: the workload's name.
        optimizer: the optimizer's name.
        seconds: the seconds of a step in each round, by implementation.
        targets: the targets for the device.
        times: the times of host and device behind the seconds, by implementation, if available.

    Example:
        >>> seconds = {"limit": [3.0], "torch": [8.0], "torch foreach": [6.0], "stepforge": [4.0]}
        >>> Result("large", "Adam", seconds).ratios("stepforge")
        Ratios(of_limit=0.75, against_best=1.5, against_default=2.0, of_plain=None)
    """

    workload: str
    optimizer: str
    seconds: Mapping[str, Sequence[float]]
    targets: Targets = field(default_factory=lambda: TARGETS)
    times: Mapping[str, Sequence[StepTime]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        workload: str,
        optimizer: str,
        times: Mapping[str, Sequence[StepTime]],
        targets: Targets,
    ) -> Result:
        """Return the result of the step times of each implementation."""
        seconds = {name: [time.seconds for time in steps] for name, steps in times.items()}
        return cls(workload, optimizer, seconds, targets, times)

    def median(self, name: str) -> float | None:
        """Return an implementation's median step time in seconds; None if it was not measured."""
        return statistics.median(self.seconds[name]) if self.seconds.get(name) else None

    def median_on_device(self, name: str) -> float | None:
        """Return an implementation's median time on the device; None if it was not measured."""
        times = [time.device for time in self.times.get(name, ()) if time.device is not None]
        return statistics.median(times) if times else None

    def spread(self, name: str) -> float | None:
        """Return the distance between the quartiles of an implementation's times over the median.

        It is None for fewer than two steps.
        """
        seconds = self.seconds.get(name, ())
        if len(seconds) < 2:
            return None
        first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
        return (third - first) / median

    def ratios(self, name: str) -> Ratios:
        """Return the speed of an implementation relative to the others."""
        seconds = self.median(name)
        return Ratios(
            of_limit=_ratio(self.median(LIMIT.name), seconds),
            against_best=_ratio(self._best_of_torch(), seconds),
            against_default=_ratio(self.median(TORCH.name), seconds),
            of_plain=_ratio(self.median(PLAINLY.name), seconds),
        )

    def _best_of_torch(self) -> float | None:
        medians = (self.median(i.name) for i in IMPLEMENTATIONS if i.library is torch.optim)
        return min((seconds for seconds in medians if seconds is not None), default=None)

    def target(self, name: str) -> Ratios | None:
        """Return the target of an implementation; None without one."""
        return self.targets.get((self.workload, self.optimizer, name))

    def reached(self, name: str) -> dict[str, bool | None]:
        """Return for each ratio True if it reaches its target; an empty dict without a target."""
        target = self.target(name)
        return self.ratios(name).reached(target) if target else {}


def _ratio(other: float | None, seconds: float | None) -> float | None:
    return None if other is None or seconds is None else other / seconds
