"""Timers of a step.

The device is simulated, so the oracle of every time is a sum by hand. The last test needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from stepforge.cli import devices
from stepforge.cli.timing.timers import EventTimer, HostTimer, StepTime, timer_for
from tests.cli.timing.simulated_device import LEAD, SimulatedDevice


def time_of(simulated: SimulatedDevice, step: Callable[[], object]) -> StepTime:
    return EventTimer(simulated, simulated.lead).time(step)


def test_the_timer_of_a_cpu_takes_the_hosts_time(simulated):
    time = HostTimer().time(lambda: simulated.work(0.5, 9.0))
    assert time == StepTime(host=0.5, device=None)
    assert time.seconds == 0.5


@pytest.mark.parametrize(
    ("host", "on_device", "seconds"),
    [
        (0.25, 0.5, 0.5),  # bound by the device, with the host running ahead
        (0.5, 0.25, 0.5),  # bound by the host, though it returns before the device begins
        (0.75, 0.0, 0.75),  # nothing for the device to do
    ],
)
def test_a_step_costs_the_longer_of_host_and_device(simulated, host, on_device, seconds):
    time = time_of(simulated, lambda: simulated.work(host, on_device))
    assert time == StepTime(host, on_device)
    assert time.seconds == seconds


def test_a_step_that_outlasts_the_work_ahead_never_looks_faster(simulated):
    """The device waits for the host between its two pieces of work: 1.5 + 0.5 - 1 seconds."""

    def step() -> None:
        simulated.work(0.0, 0.125)
        simulated.work(1.5, 0.5)

    time = time_of(simulated, step)
    assert time == StepTime(host=1.5, device=1.0)
    assert time.seconds == 1.5


def test_a_step_that_waits_for_the_device_pays_for_it(simulated):
    def step() -> None:
        simulated.work(0.25, 0.5)
        simulated.synchronize()

    assert time_of(simulated, step) == StepTime(host=LEAD + 0.5, device=0.5)


def test_what_fed_the_step_is_not_counted(simulated):
    simulated.queue(100.0)
    assert time_of(simulated, lambda: simulated.work(0.25, 0.5)) == StepTime(0.25, 0.5)
    assert simulated.log == ["wait", "lead", "event", "step", "event", "wait"]


@pytest.mark.gpu
@pytest.mark.skipif(not devices.accelerators(), reason="needs a GPU")
def test_events_see_what_the_host_does_not(gpu):
    """Forty copies take the device longer than one, and the host next to nothing for either."""
    source = torch.zeros(2**26, device=gpu)
    target = torch.empty_like(source)

    def copies(count: int) -> None:
        for _ in range(count):
            target.copy_(source)

    timer = timer_for(gpu)
    timer.time(lambda: copies(1))
    one, forty = (timer.time(lambda n=n: copies(n)).device for n in (1, 40))
    assert 10 < forty / one < 160  # 40, with room for clocks that change
