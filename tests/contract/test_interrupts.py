"""Ctrl-C leaves each parameter, its states and its step count after the same step.

Oracle: an equal optimizer that is never interrupted. Each parameter must have the bits that it has
there after as many steps as its own ``step`` counts.
"""

from __future__ import annotations

import gc
import opcode
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch

import stepforge
from stepforge.step.signals import Deferred

RUNS = 100
SHAPES = [(64, 64), (3, 5), (7,), ()]
BFLOAT16 = {"dtype": torch.bfloat16}
#: A class with its options. ``dtype`` is the dtype of the parameters.
SETTINGS: dict[str, tuple[type[stepforge.Optimizer], dict[str, Any]]] = {
    "float32": (stepforge.AdamW, {}),
    "scalar state": (stepforge.NAdam, {}),
    "fused": (stepforge.NAdam, {"fused": True}),
    "int8": (stepforge.NAdam, {"state_format": "int8"}),
    "24 bits": (stepforge.AdamW, {"master_weight_bits": 24, **BFLOAT16}),
    "stochastic rounding": (stepforge.RAdam, {"stochastic_rounding": True, **BFLOAT16}),
    "foreach": (stepforge.NAdam, {"foreach": True}),
    "foreach, int8": (stepforge.AdamW, {"foreach": True, "state_format": "int8"}),
    "reference": (stepforge.NAdam, {"foreach": False}),
    "reference, 32 bits": (
        stepforge.Adagrad,
        {"foreach": False, "master_weight_bits": 32, **BFLOAT16},
    ),
}


class InterruptError(Exception):
    """An error that the signal handler raises."""


@pytest.fixture(autouse=True)
def raising_handler() -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> None:
        raise InterruptError

    before = signal.signal(signal.SIGALRM, handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def built(setting: str) -> stepforge.Optimizer:
    """Return an optimizer of two groups, with gradients."""
    cls, options = SETTINGS[setting]
    dtype = options.get("dtype", torch.float32)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    params = [torch.nn.Parameter(x) for x in values]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    given = {name: value for name, value in options.items() if name != "dtype"}
    return cls([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}], **given)


def tensors_of(optimizer: stepforge.Optimizer) -> list[tuple[int, dict[str, torch.Tensor]]]:
    """Return each parameter's step count, and copies of all tensors that a step changes."""
    results = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            copies = {key: x.clone() for key, x in optimizer.state[p].items()}
            count = int(copies["step"]) if "step" in copies else 0
            results.append((count, {"p": p.detach().clone(), **copies}))
    return results


def uninterrupted(setting: str, steps: int) -> list[list[dict[str, torch.Tensor]]]:
    """Return the tensors of each parameter after each step of an uninterrupted run."""
    optimizer = built(setting)
    history = []
    for step in range(steps + 1):
        if step:
            optimizer.step()
        history.append([tensors for _, tensors in tensors_of(optimizer)])
    return history


def assert_consistent(
    optimizer: stepforge.Optimizer, history: list[list[dict[str, torch.Tensor]]]
) -> None:
    """Assert that each parameter has the tensors of the uninterrupted run after its step count."""
    assert torch.is_grad_enabled(), "autograd was left off"
    assert gc.isenabled(), "garbage collection was left off"
    for index, (count, tensors) in enumerate(tensors_of(optimizer)):
        expected = history[count][index]
        for key, tensor in tensors.items():
            # An interrupted first step may leave new states that the oracle does not have yet.
            if key in expected:
                assert torch.equal(tensor, expected[key]), f"{key} is not that of step {count}"


#: The instructions before which Python handles signals: the start of a function, and a loop.
BEFORE = {"RESUME", "JUMP_BACKWARD"}
#: The instructions after which Python handles signals: calls.
AFTER = {"CALL", "CALL_FUNCTION_EX", "CALL_KW"}


def interrupt_at(point: int, optimizer: stepforge.Optimizer) -> int:
    """Step, and raise a signal at one of the points where Python handles signals in the library.

    Points within expressions are left out: they change nothing, and are the majority.

    Args:
        point: the number of the point, from 1; 0 for no signal.
        optimizer: the optimizer.

    Returns:
        The number of points up to the interruption.
    """
    seen = 0
    previous: dict[FrameType, str] = {}

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal seen
        name = frame.f_globals.get("__name__", "")
        if name.split(".")[0] != "stepforge" or name in ("stepforge.expr", "stepforge.ops"):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            name = opcode.opname[frame.f_code.co_code[frame.f_lasti]]
            if name in BEFORE or previous.get(frame) in AFTER:
                seen += 1
                if seen == point:
                    signal.raise_signal(signal.SIGALRM)
            previous[frame] = name
        return trace

    before = sys.gettrace()
    # Python 3.12 traces opcodes only if some frame asks for them before settrace.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)
    try:
        optimizer.step()
    finally:
        sys.settrace(before)
    return seen


def assert_interrupted(
    optimizer: stepforge.Optimizer,
    point: int,
    before: int,
    history: list[list[dict[str, torch.Tensor]]],
) -> bool:
    """Interrupt a step; return True if the step was complete before the signal was handled."""
    with pytest.raises(InterruptError):
        interrupt_at(point, optimizer)
    assert_consistent(optimizer, history)
    (count,) = {count for count, _ in tensors_of(optimizer)}  # the same for all parameters
    return count > before


@pytest.mark.parametrize("setting", ["fused", "int8", "24 bits", "reference"])
def test_a_first_step_interrupted_anywhere_is_done_whole_or_not_at_all(setting: str) -> None:
    history = uninterrupted(setting, 1)
    points = interrupt_at(0, built(setting))
    done = [
        assert_interrupted(built(setting), 1 + run * (points - 1) // (RUNS - 1), 0, history)
        for run in range(RUNS)
    ]
    assert done == sorted(done)  # complete from one point on, neither the first nor the last
    assert len(set(done)) == 2


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_later_step_interrupted_anywhere_is_done_whole_or_not_at_all(setting: str) -> None:
    history = uninterrupted(setting, RUNS + 3)
    optimizer = built(setting)
    optimizer.step()
    points = interrupt_at(0, optimizer)
    count, done = 2, []
    for run in range(RUNS):
        done.append(
            assert_interrupted(optimizer, 1 + run * (points - 1) // (RUNS - 1), count, history)
        )
        count += done[-1]
    assert done == sorted(done)
    assert len(set(done)) == 2


@pytest.mark.parametrize("setting", ["scalar state", "24 bits", "foreach"])
def test_a_hundred_runs_interrupted_by_a_timer(setting: str) -> None:
    generator = random.Random(0)
    limit = 400  # steps that take longer than the timer waits
    history = uninterrupted(setting, limit)
    interrupted = 0
    for _ in range(RUNS):
        optimizer = built(setting)
        optimizer.step()
        try:
            signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-5, 3e-3))
            for _ in range(limit - 1):
                optimizer.step()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except InterruptError:
            interrupted += 1
        assert_consistent(optimizer, history)
    assert interrupted > RUNS / 2


def run_deferred(*actions: Callable[[], Any]) -> None:
    """Run actions while signals are deferred."""
    with Deferred():
        for action in actions:
            action()


def raise_alarm() -> None:
    signal.raise_signal(signal.SIGALRM)


def test_signals_are_handled_at_the_end_and_handlers_are_restored() -> None:
    seen: list[str] = []
    signals = signal.SIGUSR1, signal.SIGALRM, signal.SIGINT
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append("handled"))
    try:
        handlers = list(map(signal.getsignal, signals))
        actions = (
            lambda: signal.raise_signal(signal.SIGUSR1),
            raise_alarm,
            lambda: seen.append("done"),
        )
        with pytest.raises(InterruptError):
            run_deferred(*actions)
        assert seen == ["done", "handled"]
        assert handlers == list(map(signal.getsignal, signals))
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_error_within_comes_with_the_signal() -> None:
    def fail() -> None:
        raise ValueError("of the step")

    with pytest.raises(InterruptError) as caught:
        run_deferred(raise_alarm, fail)
    assert isinstance(caught.value.__context__, ValueError)


def test_another_thread_leaves_handlers_alone() -> None:
    found = []

    def look() -> None:
        with Deferred():
            found.append(signal.getsignal(signal.SIGALRM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGALRM)]


_FORKS = """
import os, signal, threading
from stepforge.step.signals import Deferred

def fork():
    child = os.fork()
    if child == 0:
        try:
            seen = []
            signal.signal(signal.SIGUSR1, lambda number, frame: seen.append("handled"))
            with Deferred():
                signal.raise_signal(signal.SIGUSR1)
                seen.append("done")
            os._exit(0 if seen == ["done", "handled"] else 2)
        finally:
            os._exit(1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

codes = []
thread = threading.Thread(target=fork)
thread.start()
thread.join()
assert codes == [0], codes
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_thread_that_forks_is_the_main_thread_of_its_child() -> None:
    """Oracle: Python, which runs handlers in the main thread, and lets no other one set them.

    In a process of its own, where no other library has threads that a child would lack.
    """
    done = subprocess.run([sys.executable, "-c", _FORKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
