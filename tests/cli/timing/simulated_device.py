"""A simulated asynchronous device. Its time is counted, not measured."""

from __future__ import annotations

#: Seconds that the lead of a timer occupies the device.
LEAD = 1.0


class SimulatedDevice:
    """A host that works and queues, and a device that does the queued work; in counted seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.busy_until = 0.0
        self.log: list[str] = []
        log, device = self.log, self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                log.append("event")
                self.at = max(device.now, device.busy_until)

            def elapsed_time(self, later: Event) -> float:
                assert device.now >= later.at  # otherwise it has not happened yet
                return 1e3 * (later.at - self.at)

        self.Event = Event

    def synchronize(self) -> None:
        self.log.append("wait")
        self.now = max(self.now, self.busy_until)

    def queue(self, seconds: float) -> None:
        self.busy_until = max(self.now, self.busy_until) + seconds

    def lead(self) -> None:
        self.log.append("lead")
        self.queue(LEAD)

    def work(self, host: float, on_device: float) -> None:
        self.log.append("step")
        self.now += host
        self.queue(on_device)
