"""Garbage collection during a step. Oracle: the collector's own callbacks and switches."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import stepforge
from stepforge.step.garbage import uncollected


@pytest.fixture
def collections() -> Iterator[list[Any]]:
    """Let every new object start a collection, and list the collections."""
    started: list[Any] = []

    def note(phase: str, info: dict[str, int]) -> None:
        started.append((phase, info))

    threshold = gc.get_threshold()
    gc.callbacks.append(note)
    gc.set_threshold(1)
    yield started
    gc.set_threshold(*threshold)
    gc.callbacks.remove(note)


def collected(started: list[Any]) -> int:
    """Make objects that refer to others; return the number of collections meanwhile."""
    before = len(started)
    kept = [[object()] for _ in range(100)]
    assert len(kept) == 100
    return len(started) - before


def test_no_garbage_is_collected_meanwhile(collections: list[Any]) -> None:
    assert collected(collections) > 0
    assert uncollected(collected)(collections) == 0
    assert collected(collections) > 0


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("sparse", [True, False], ids=["error", "step"])
def test_a_step_leaves_the_collector_as_it_was(enabled: bool, sparse: bool) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2).to_sparse() if sparse else torch.ones(2)
    optimizer = stepforge.Adam([p])
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        if sparse:
            with pytest.raises(RuntimeError, match="sparse"):
                optimizer.step()
        else:
            optimizer.step()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


def test_a_plan_is_built_without_collections(
    collections: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepforge.step import stepper

    during: list[int] = []
    enter_new_states = stepper.enter_new_states

    def spy(*args: Any) -> None:
        during.append(collected(collections))
        enter_new_states(*args)

    monkeypatch.setattr(stepper, "enter_new_states", spy)
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    stepforge.Adam([p]).step()
    assert during == [0]
