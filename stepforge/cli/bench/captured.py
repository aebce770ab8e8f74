"""Steps that a GPU captures in a graph and then replays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

__all__ = ["CapturedStep", "Step", "why_no_graphs"]

Step: TypeAlias = Callable[[], object]

#: The classes of graphs, by the type of a device.
_GRAPHS = {"cuda": "CUDAGraph", "xpu": "XPUGraph"}
#: The steps before a capture, as in PyTorch's notes on CUDA graphs. They allocate states and
#: compile kernels, which no capture can do.
_WARM_UPS = 3


def why_no_graphs(device: torch.device) -> str:
    """Return why torch captures no graphs on a device, in a clause; empty if it does.

    Example:
        >>> why_no_graphs(torch.device("cpu"))
        'a CPU has no graphs to replay'
    """
    if device.type == "cpu":
        return "a CPU has no graphs to replay"
    graph = _GRAPHS.get(device.type)
    if graph is None or not hasattr(torch.get_device_module(device), graph):
        return f"torch {torch.__version__} captures no graphs on {device.type}"
    return ""


class CapturedStep:
    """A step that is captured at its first call, and replayed by this call and all others.

    The first call steps a few times before the capture, on a stream of its own, as PyTorch's notes
    on CUDA graphs demand. All of these steps read the same gradients. A graph holds addresses: the
    gradients of later calls must be written to the memory of the first.

    Args:
        step: the step, which must queue work only, and must not wait for it.
        gpu: ``torch.cuda`` or ``torch.xpu``.
        graph: the class of its graphs.
    """

    def __init__(self, step: Step, gpu: Any, graph: Callable[[], Any]) -> None:
        self._step = step
        self._gpu = gpu
        self._new_graph = graph
        self._graph: Any = None

    @classmethod
    def on_current_device(cls, step: Step) -> CapturedStep:
        """Return a step that the current accelerator captures."""
        gpu: Any = torch.get_device_module()
        return cls(step, gpu, getattr(gpu, _GRAPHS[gpu.__name__.removeprefix("torch.")]))

    def __call__(self) -> None:
        """Replay the step, captured before."""
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()

    def _captured(self) -> Any:
        gpu = self._gpu
        before, aside = gpu.current_stream(), gpu.Stream()
        aside.wait_stream(before)
        with gpu.stream(aside):
            for _ in range(_WARM_UPS):
                self._step()
        before.wait_stream(aside)
        graph = self._new_graph()
        with gpu.graph(graph):
            self._step()
        return graph
