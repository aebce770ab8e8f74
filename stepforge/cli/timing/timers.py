"""Timers of a step: the host's clock on a CPU, and the device's events on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from stepforge.cli.timing.copies import Copy

__all__ = ["EventTimer", "HostTimer", "StepTime", "Timer", "timer_for"]

#: The bytes and the count of the copies that occupy a GPU before a step. The bytes exceed a cache.
#: All copies take from one millisecond on the fastest memory to thirty on a slow one, and few hosts
#: need that long for a step.
_LEAD_BYTES, _LEAD_COPIES = 2**26, 64


@dataclass(frozen=True)
class StepTime:
    """The time of one step.

    Attributes:
        host: seconds until ``step()`` returned.
        device: seconds of the work on the device that ``step()`` queued; None on a CPU.
    """

    host: float
    device: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds that the step adds to a training loop: the longer time, as the two overlap.

        Example:
            >>> StepTime(host=0.5).seconds, StepTime(host=0.5, device=2.0).seconds
            (0.5, 2.0)
        """
        return max(self.host, self.device or 0.0)


class Timer(Protocol):
    """A way to time a step."""

    def time(self, step: Callable[[], object]) -> StepTime:
        """Run a step and return its time."""


class HostTimer:
    """A timer for synchronous steps, whose work is done on return."""

    def time(self, step: Callable[[], object]) -> StepTime:
        """Run a step and return the time until it returned."""
        begin = time.perf_counter()
        step()
        return StepTime(time.perf_counter() - begin)


class Events(Protocol):
    """The part of ``torch.cuda`` or ``torch.xpu`` that times work on the current device."""

    #: Called as ``Event(enable_timing=True)``. An event has ``record`` and ``elapsed_time``.
    Event: Callable[..., Any]

    def synchronize(self) -> None:
        """Wait until the device has done all queued work."""


class EventTimer:
    """A timer for asynchronous steps, which only queue work for a device.

    In a training loop the host runs ahead: while it queues the step, the device is still busy with
    the backward pass. So a step costs either the host's time to queue it or the device's time to
    run it, whichever is longer. Neither alone would be honest: the time until ``step()`` returns
    leaves out the memory traffic, and the device's time leaves out Python.

    The timer recreates this situation. It queues a lead, which is work that occupies the device for
    a moment, then an event, the step and another event. The host's time is that of ``step()``. The
    device's time is the time between the events, without gaps in which it would have waited for the
    host. If the lead ends before the host is done, there are gaps again: such a step may seem
    slower than it is in a loop, but never faster.

    The timer first waits for all earlier work, so that the queue has room. The lead also flushes
    the caches, so that no implementation finds data there that another has left. A step that
    synchronizes with the device waits for the lead too, as it would for the backward pass.

    Args:
        events: the module that times the device.
        lead: a function that queues work for a moment.
    """

    def __init__(self, events: Events, lead: Callable[[], object]) -> None:
        self._events = events
        self._lead = lead

    def time(self, step: Callable[[], object]) -> StepTime:
        """Run a step, wait until the device has done it, and return its time."""
        first, last = (self._events.Event(enable_timing=True) for _ in range(2))
        self._events.synchronize()
        self._lead()
        first.record()
        begin = time.perf_counter()
        step()
        host = time.perf_counter() - begin
        last.record()
        self._events.synchronize()
        return StepTime(host, first.elapsed_time(last) / 1e3)  # from milliseconds


def timer_for(device: torch.device) -> Timer:
    """Return the timer for steps on a device, which must be the current one of its type."""
    if device.type == "cpu":
        return HostTimer()
    copy = Copy(2 * _LEAD_BYTES, device)

    def lead() -> None:
        for _ in range(_LEAD_COPIES):
            copy.step()

    return EventTimer(torch.get_device_module(device), lead)
