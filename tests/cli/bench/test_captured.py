"""Steps that are captured and replayed.

A simulated graph keeps the calls that it captures, and repeats them at a replay. So most tests see
the order of steps, streams, capture and replays, and where gradients are. Only the last one, on a
GPU, sees what a graph captures.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import stepforge
from stepforge.cli import devices
from stepforge.cli.bench.arrangements import CAPTURED, PLAIN
from stepforge.cli.bench.captured import CapturedStep, why_no_graphs
from stepforge.cli.bench.implementations import OURS, PLAINLY, TORCH, Implementation
from stepforge.cli.bench.measure import make_gradients

SHAPES = [(6, 4), (4,)]


class SimulatedGraph:
    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.calls: list[Callable[[], object]] = []

    def replay(self) -> None:
        self.log.append("replay")
        for call in self.calls:
            call()


class SimulatedGpu:
    """The part of ``torch.cuda`` that captures."""

    __name__ = "torch.cuda"

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = "main"
        self.recording: SimulatedGraph | None = None
        self.CUDAGraph = lambda: SimulatedGraph(self.log)

    def Stream(self) -> Any:  # noqa: N802
        return self._stream("aside")

    def current_stream(self) -> Any:
        return self._stream(self.current)

    def _stream(self, name: str) -> Any:
        def wait(other: Any) -> None:
            self.log.append(f"{name} waits for {other.name}")

        return types.SimpleNamespace(name=name, wait_stream=wait)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    @contextmanager
    def graph(self, graph: SimulatedGraph) -> Iterator[None]:
        self.log.append("capture")
        self.recording = graph
        yield
        self.recording = None

    def call(self, work: Callable[[], object]) -> None:
        """Do work that a step queues; a graph in the making only notes it."""
        self.log.append(f"step on {self.current}")
        if self.recording is None:
            work()
        else:
            self.recording.calls.append(work)


@pytest.fixture
def gpu_simulated(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    found = SimulatedGpu()
    monkeypatch.setattr(torch, "get_device_module", lambda: found)
    return found


def test_a_step_is_captured_once_after_warm_ups_on_a_stream_of_their_own(gpu_simulated):
    """Oracle: the order in PyTorch's notes on CUDA graphs."""
    done: list[None] = []
    step = CapturedStep.on_current_device(lambda: gpu_simulated.call(lambda: done.append(None)))
    assert gpu_simulated.log == []
    step()
    assert gpu_simulated.log == [
        "aside waits for main",
        *3 * ["step on aside"],
        "main waits for aside",
        "capture",
        "step on main",
        "replay",
    ]
    assert len(done) == 4  # a capture steps nothing
    gpu_simulated.log.clear()
    step()
    step()
    assert gpu_simulated.log == ["replay", "replay"]
    assert len(done) == 6


def capturable(gpu: SimulatedGpu) -> Implementation:
    """Return our Adam, whose work the simulated graph sees."""

    def adam(params: list[torch.Tensor], capturable: bool = False) -> stepforge.Optimizer:
        optimizer = stepforge.Adam(params, capturable=capturable)
        step = optimizer.step
        optimizer.step = lambda: gpu.call(step)  # type: ignore[method-assign]
        return optimizer

    return Implementation("x", "", types.SimpleNamespace(Adam=adam))


def test_replays_read_the_gradients_that_were_set_last(gpu_simulated):
    """Oracle: stepforge.Adam, stepped by hand: four times with the gradients of the first call."""
    initial = make_gradients(SHAPES)
    rounds = [[g * factor for g in initial] for factor in (1.0, -3.0, 0.5)]
    with CAPTURED.arrangement() as arrangement:
        runner: Any = capturable(gpu_simulated).start("Adam", initial, arrangement)
    assert runner.optimizer.param_groups[0]["capturable"]
    places = set()
    for gradients in rounds:
        runner.set_gradients(gradients)
        places.add(tuple(p.grad.data_ptr() for p in runner.params))
        runner.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(runner.params, gradients))
    assert len(places) == 1
    params = [p.clone() for p in initial]
    by_hand = stepforge.Adam(params, capturable=True)
    for gradients in (*3 * [rounds[0]], *rounds):
        for p, gradient in zip(params, gradients):
            p.grad = gradient.clone()
        by_hand.step()
    assert all(torch.equal(p, expected) for p, expected in zip(runner.params, params))


def test_the_plain_step_beside_it_is_not_captured(gpu_simulated):
    gradients = make_gradients(SHAPES)
    with CAPTURED.arrangement() as arrangement:
        runner: Any = PLAINLY.start("Adam", gradients, arrangement)
    runner.set_gradients(gradients)
    runner.step()
    assert gpu_simulated.log == []
    assert not runner.optimizer.param_groups[0]["capturable"]


def test_torch_captures_what_it_has_capturable():
    """Oracle: the arguments in PyTorch's documentation. Adagrad has none."""
    with CAPTURED.arrangement() as arrangement:
        assert TORCH.exists("RAdam", arrangement)
        assert not TORCH.exists("Adagrad", arrangement)
        assert OURS.exists("Adagrad", arrangement)
    with PLAIN.arrangement() as arrangement:
        assert TORCH.exists("Adagrad", arrangement)


def test_devices_without_graphs(monkeypatch):
    assert CAPTURED.missing(torch.device("cpu")) == "a CPU has no graphs to replay"
    assert why_no_graphs(torch.device("cuda:0")) == ""
    mps = why_no_graphs(torch.device("mps"))
    assert mps == f"torch {torch.__version__} captures no graphs on mps"
    monkeypatch.setattr(torch, "get_device_module", lambda _: types.SimpleNamespace())
    assert "captures no graphs on xpu" in why_no_graphs(torch.device("xpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not devices.accelerators(), reason="needs a GPU")
@pytest.mark.parametrize("implementation", [OURS, TORCH], ids=lambda i: i.name)
def test_a_replayed_graph_steps_as_the_optimizer_does(implementation, gpu):
    if why := why_no_graphs(gpu):
        pytest.skip(why)
    gradients = make_gradients(SHAPES, gpu)
    with CAPTURED.arrangement() as arrangement:
        captured: Any = implementation.start("AdamW", gradients, arrangement)
    plain: Any = implementation.start("AdamW", gradients)
    for factor in (1.0, -2.0):
        for runner, count in ((captured, 1), (plain, 4 if factor == 1 else 1)):
            for _ in range(count):
                runner.set_gradients([g * factor for g in gradients])
                runner.step()
    for p, expected in zip(captured.params, plain.params):
        torch.testing.assert_close(p, expected)
