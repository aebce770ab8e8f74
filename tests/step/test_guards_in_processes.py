"""Kept plans in threads, forked children and copies, with both kinds of guards.

Oracle: the same steps in one thread of one process, bit for bit.
"""

from __future__ import annotations

import copy
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch

import stepforge
from tests.step.mutations import built, params_of, set_gradients
from tests.twins import assert_identical

STEPS = 20


@pytest.fixture(autouse=True, params=["python", "cpp"])
def guards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("STEPFORGE_GUARDS", request.param)
    return str(request.param)


def step(optimizer: stepforge.Optimizer, steps: range) -> list[torch.Tensor]:
    """Step an optimizer; return its parameters and states."""
    for number in steps:
        set_gradients(optimizer, number)
        optimizer.step()
    return results(optimizer)


def results(optimizer: stepforge.Optimizer) -> list[torch.Tensor]:
    states = [x for p in params_of(optimizer) for x in optimizer.state[p].values()]
    return [p.detach().clone() for p in params_of(optimizer)] + [x.clone() for x in states]


def test_two_optimizers_in_two_threads() -> None:
    """The kernel releases the GIL, so that their steps overlap."""
    wanted = step(built(stepforge.AdamW, "native"), range(STEPS))
    optimizers = [built(stepforge.AdamW, "native") for _ in range(2)]
    failures: list[BaseException] = []
    start = threading.Barrier(2)

    def work(optimizer: stepforge.Optimizer) -> None:
        try:
            start.wait()
            step(optimizer, range(STEPS))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(optimizer,)) for optimizer in optimizers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for optimizer in optimizers:
        assert_identical(results(optimizer), wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_steps_on_with_the_plan(tmp_path: Path) -> None:
    optimizer = built(stepforge.AdamW, "native")
    step(optimizer, range(5))
    plan = optimizer._stepper.plans.latest
    child = os.fork()
    if child == 0:
        try:
            torch.save(step(optimizer, range(5, 10)), tmp_path / "child.pt")
            os._exit(0 if optimizer._stepper.plans.latest is plan else 2)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    wanted = step(optimizer, range(5, 10))
    assert_identical(torch.load(tmp_path / "child.pt", weights_only=True), wanted)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_a_plan_of_its_own(copied: object) -> None:
    assert callable(copied)
    optimizer = built(stepforge.AdamW, "native")
    step(optimizer, range(5))
    other = copied(optimizer)
    wanted = step(optimizer, range(5, 10))
    before = results(optimizer)
    assert_identical(step(other, range(5, 10)), wanted)
    assert_identical(results(optimizer), before)
    assert other._stepper.plans.latest is not optimizer._stepper.plans.latest
