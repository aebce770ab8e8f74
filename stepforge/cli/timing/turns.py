"""Turns of several steps: each gets fresh gradients, and only ``step()`` is timed."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from stepforge.cli.timing.timers import HostTimer, StepTime, Timer

__all__ = ["WARM_UPS", "Runner", "measure"]

#: The rounds before the measured ones. They allocate state, compile kernels and fill caches.
WARM_UPS = 2

_HOST_TIMER = HostTimer()


class Runner(Protocol):
    """Parameters with anything that steps them."""

    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Give every parameter a fresh copy of its gradient; not timed."""

    def step(self) -> object:
        """Step all parameters; timed."""


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
