"""How a step is timed: on a CPU by a clock, on a GPU by the GPU's events as well."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

__all__ = ["Clock", "EventClock", "HostClock", "Lap", "clock_of"]

#: What a GPU has to copy before a step, in bytes, and how often: more than a cache holds, and from
#: one millisecond on the fastest memory to thirty on a slow one, which few hosts need for a step.
_LEAD_SIZE, _LEAD_COPIES = 2**26, 64


@dataclass(frozen=True)
class Lap:
    """What one step took.

    Attributes:
        host: seconds until ``step()`` returned.
        device: seconds that the device needed for what ``step()`` queued; None on a CPU.
    """

    host: float
    device: float | None = None

    @property
    def seconds(self) -> float:
        """What the step adds to a training loop: the longer of the two, as they overlap.

        Example:
            >>> Lap(host=0.5).seconds, Lap(host=0.5, device=2.0).seconds
            (0.5, 2.0)
        """
        return max(self.host, self.device or 0.0)


class Clock(Protocol):
    """A way to time a step."""

    def time(self, step: Callable[[], object]) -> Lap:
        """Runs a step and says what it took."""


class HostClock:
    """For a step that has been computed when it returns."""

    def time(self, step: Callable[[], object]) -> Lap:
        """Runs a step; what it took is the time until it returned."""
        begin = time.perf_counter()
        step()
        return Lap(time.perf_counter() - begin)


class Events(Protocol):
    """The part of ``torch.cuda`` or ``torch.xpu`` that times what the current device does."""

    #: Called as ``Event(enable_timing=True)``; gives what has ``record`` and ``elapsed_time``.
    Event: Callable[..., Any]

    def synchronize(self) -> None:
        """Waits until the device has done all that was queued."""


class EventClock:
    """For a step that only queues work, which a device does later.

    In a training loop the host runs ahead: while it queues the step, the device is still busy with
    the backward pass. So a step costs what the host needs to queue it or what the device needs to
    do it, whichever is longer, and neither figure alone would be honest: the time until ``step()``
    returns leaves out the memory traffic, and the device's time leaves out Python. The same is set
    up here. The device gets work that takes a moment, then an event, the step and another event.
    The host's time is that of ``step()``; the device's is what lies between the events, without the
    gaps in which it would have waited for the host. If that work is done before the host is, there
    are gaps again: such a step may seem slower than it is in a loop, but never faster.

    What fed the step has finished before, so that the queue has room. The work ahead also takes the
    caches, so that no arm finds in them what another has left. A step that waits for the device
    waits for that work too, as it would for the backward pass.

    Args:
        events: what times the device.
        lead: queues work that takes the device a moment.
    """

    def __init__(self, events: Events, lead: Callable[[], object]) -> None:
        self._events = events
        self._lead = lead

    def time(self, step: Callable[[], object]) -> Lap:
        """Runs a step and waits until the device has done it."""
        first, last = (self._events.Event(enable_timing=True) for _ in range(2))
        self._events.synchronize()
        self._lead()
        first.record()
        begin = time.perf_counter()
        step()
        host = time.perf_counter() - begin
        last.record()
        self._events.synchronize()
        return Lap(host, first.elapsed_time(last) / 1e3)  # it tells milliseconds


def clock_of(device: torch.device) -> Clock:
    """The clock for steps on a device, which must be the current one of its type."""
    if device.type == "cpu":
        return HostClock()
    return EventClock(torch.get_device_module(device), _Copies(device))


class _Copies:
    """Queues copies within the memory of a device."""

    def __init__(self, device: torch.device) -> None:
        self._source = torch.zeros(_LEAD_SIZE, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)

    def __call__(self) -> None:
        for _ in range(_LEAD_COPIES):
            self._target.copy_(self._source)
