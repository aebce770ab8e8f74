"""Kernels are made once, and again after a failure. Oracle: a count of the attempts."""

from __future__ import annotations

import os
import signal
import threading
from types import SimpleNamespace

import pytest

from stepforge.backends import cache


class World:
    """A function that can fail, with everything that it depends on.

    Attributes:
        broken: the reason why it fails; "" if it succeeds.
        settings: the circumstances that it depends on.
        now: the time.
        takes: the duration of a call.
        calls: the argument of each call.
    """

    def __init__(self) -> None:
        self.broken, self.settings, self.now, self.takes = "", 0, 1000.0, 0.0
        self.calls: list[object] = []

    def make(self, name: str) -> object | str:
        self.calls.append(name)
        self.now += self.takes
        return self.broken or SimpleNamespace(name=name)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(cache, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def test_a_success_is_kept_for_ever(world: World) -> None:
    get = cache.made_once(lambda: world.settings)(world.make)
    first = get("a")
    world.now, world.settings, world.broken = 1e9, 1, "broken"
    assert get("a") is first
    assert get("b") == "broken"
    assert world.calls == ["a", "b"]


def test_a_failure_stands_while_nothing_changes(world: World) -> None:
    get = cache.made_once(lambda: world.settings)(world.make)
    world.broken = "no compiler"
    assert {get("a") for _ in range(1000)} == {"no compiler"}
    assert world.calls == ["a"]


def test_other_circumstances_are_tried_at_once(world: World) -> None:
    get = cache.made_once(lambda: world.settings)(world.make)
    world.broken = "no compiler"
    get("a")
    world.settings, world.broken = 1, "it fails otherwise"
    assert get("a") == "it fails otherwise"
    assert get("a") == "it fails otherwise"
    assert world.calls == ["a"] * 2
    world.settings, world.broken = 2, ""
    assert not isinstance(get("a"), str)
    assert world.calls == ["a"] * 3


@pytest.mark.parametrize(("takes", "stands"), [(0.0, 60.0), (0.5, 60.0), (120.0, 12000.0)])
def test_a_failure_is_tried_again_after_a_while(world: World, takes: float, stands: float) -> None:
    """After a minute, or later, so that at most a hundredth of the time is spent on it."""
    get = cache.made_once(lambda: world.settings)(world.make)
    world.broken, world.takes = "disk full", takes
    get("a")
    world.now += stands - 1
    assert get("a") == "disk full"
    assert len(world.calls) == 1
    world.broken = ""
    world.now += 2
    assert not isinstance(get("a"), str)
    assert len(world.calls) == 2


def test_an_interrupted_attempt_is_not_a_failure(world: World) -> None:
    attempts = []

    @cache.made_once(lambda: 0)
    def get(name: str) -> object | str:
        attempts.append(name)
        if len(attempts) == 1:
            raise KeyboardInterrupt
        return len(attempts)

    with pytest.raises(KeyboardInterrupt):
        get("a")
    assert get("a") == 2


def test_a_nested_call_gets_a_result_too(world: World) -> None:
    """As in a signal handler that steps during a compilation."""
    depth = []

    @cache.made_once(lambda: 0)
    def get(name: str) -> object | str:
        depth.append(name)
        return get(name) if len(depth) == 1 else SimpleNamespace()

    assert get("a") is get("a")
    assert len(depth) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_makes_its_own_while_a_thread_of_its_parent_does(world: World) -> None:
    started, go_on = threading.Event(), threading.Event()

    @cache.made_once(lambda: 0)
    def get(name: str) -> object | str:
        if name == "slow":
            started.set()
            assert go_on.wait(30)
        return SimpleNamespace()

    thread = threading.Thread(target=get, args=("slow",))
    thread.start()
    assert started.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for the thread, which it does not have
        get("quick")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    go_on.set()
    thread.join(30)
    assert status == 0
