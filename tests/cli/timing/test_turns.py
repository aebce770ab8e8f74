"""Turns of several steps. Oracles: the order of calls, and medians by hand."""

from __future__ import annotations

from stepforge.cli.timing.timers import EventTimer, StepTime
from stepforge.cli.timing.turns import measure


class Recorder:
    def __init__(self, name: str, log: list[tuple[str, str]]) -> None:
        self.name, self.log = name, log

    def set_gradients(self, gradients):
        self.log.append(("set_gradients", self.name))

    def step(self):
        self.log.append(("step", self.name))


def test_runners_take_turns_and_warm_ups_do_not_count():
    log: list[tuple[str, str]] = []
    ticks = []
    times = measure(
        {name: Recorder(name, log) for name in "abc"},
        [],
        rounds=3,
        warm_ups=2,
        tick=lambda: ticks.append(len(log)),
    )
    assert {name: len(steps) for name, steps in times.items()} == dict.fromkeys("abc", 3)
    assert [call for call, _ in log] == 15 * ["set_gradients", "step"]
    assert [name for _, name in log[::2]] == [name for _, name in log[1::2]]
    assert ticks == [6, 12, 18, 24, 30]
    rounds = [tuple(name for _, name in log[i : i + 6 : 2]) for i in range(0, 30, 6)]
    assert all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) > 1


def test_the_median_of_consecutive_steps_counts():
    """Oracle: medians by hand. Each step has fresh gradients, and only it is timed."""
    log: list[tuple[str, str]] = []

    class CountingTimer:
        def __init__(self) -> None:
            self.seconds = iter((9.0, 9.0, 9.0, 1.0, 3.0, 2.0, 5.0, 4.0, 6.0))

        def time(self, step):
            assert log[-1][0] == "set_gradients"
            step()
            return StepTime(next(self.seconds))

    times = measure(
        {"a": Recorder("a", log)}, [], rounds=2, warm_ups=1, steps=3, timer=CountingTimer()
    )
    assert times == {"a": [StepTime(2.0), StepTime(5.0)]}
    assert log == 9 * [("set_gradients", "a"), ("step", "a")]


def test_all_runners_are_timed_by_the_timer(simulated):
    class Runner:
        def __init__(self, host: float, on_device: float) -> None:
            self.times = host, on_device

        def set_gradients(self, gradients):
            simulated.queue(3.0)

        def step(self):
            simulated.work(*self.times)

    runners = {"a": Runner(0.25, 0.5), "b": Runner(0.5, 0.25)}
    times = measure(runners, [], rounds=3, timer=EventTimer(simulated, simulated.lead))
    assert times == {"a": 3 * [StepTime(0.25, 0.5)], "b": 3 * [StepTime(0.5, 0.25)]}
