"""Arrangements of a workload: its param groups, and the form of its tensors and steps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor

from stepforge.cli.bench.captured import CapturedStep, Step, why_no_graphs

__all__ = [
    "CAPTURED",
    "CLIPPED",
    "COMPILED",
    "FUSED",
    "MEASURED",
    "PLAIN",
    "SHARDED",
    "Arrangement",
    "Form",
]

_CPU_ONLY = "it is measured on a CPU only"


def _tensor_itself(tensor: Tensor) -> Tensor:
    return tensor


def _gradient_itself(_: Tensor, gradient: Tensor) -> Tensor:
    return gradient


def _step_itself(step: Step) -> Step:
    return step


def _step_alone(step: Step, _: list[Tensor]) -> Step:
    return step


@dataclass(frozen=True)
class Arrangement:
    """An arrangement of parameters in groups, and of their steps; by default a plain one.

    Attributes:
        groups: the number of param groups, each with its own learning rate.
        tensor: makes a parameter of a plain tensor.
        gradient: makes the gradient of a parameter of a plain tensor.
        step: makes the timed step of an optimizer's ``step``.
        options: arguments of the optimizer's constructor, beside the implementation's own.
        own_options: arguments of stepforge's constructors alone.
        around: adds to the step of torch.optim, which gets its parameters too, what stepforge does
            with those.
    """

    groups: int = 1
    tensor: Callable[[Tensor], Tensor] = _tensor_itself
    gradient: Callable[[Tensor, Tensor], Tensor] = _gradient_itself
    step: Callable[[Step], Step] = _step_itself
    options: Mapping[str, bool] = field(default_factory=dict)
    own_options: Mapping[str, Any] = field(default_factory=dict)
    around: Callable[[Step, list[Tensor]], Step] = _step_alone


@dataclass(frozen=True)
class Form:
    """A form of tensors and steps.

    Attributes:
        description: text for a title; empty for plain tensors and steps.
        arrangement: returns a context with the arrangement, which holds only within.
        missing: returns why it cannot be measured on a device, in a clause; empty if it can.
        leaves_out: the names of implementations that are not measured in this form.
    """

    description: str
    arrangement: Callable[[], AbstractContextManager[Arrangement]]
    missing: Callable[[torch.device], str]
    leaves_out: frozenset[str] = frozenset()


def _never_missing(_: torch.device) -> str:
    return ""


@contextmanager
def _plain() -> Iterator[Arrangement]:
    yield Arrangement()


@contextmanager
def _sharded() -> Iterator[Arrangement]:
    """Form a process group of this process alone, with the mesh of all DTensors."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    def gradient_of(param: Tensor, local: Tensor) -> Tensor:
        gradient = torch.empty_like(param)  # its spec is always the same object, as in FSDP2
        cast(DTensor, gradient).to_local().copy_(local)
        return gradient

    with TemporaryDirectory() as folder:
        store = Path(folder, "store").as_uri()
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            yield Arrangement(
                tensor=lambda local: DTensor.from_local(local, mesh, [Shard(0)], run_check=False),
                gradient=gradient_of,
            )
        finally:
            dist.destroy_process_group()


def _sharded_missing(device: torch.device) -> str:
    if device.type != "cpu":
        return _CPU_ONLY
    if not torch.distributed.is_available():
        return "this torch has no torch.distributed"
    return "" if torch.distributed.is_gloo_available() else "this torch has no gloo"


@contextmanager
def _compiled() -> Iterator[Arrangement]:
    """Compile steps, and forget them at the end."""
    # torch counts the compilations of a function, and gives up silently after a few. All
    # implementations of an optimizer share functions.
    torch.compiler.reset()
    try:
        yield Arrangement(step=torch.compile)
    finally:
        torch.compiler.reset()


def _compiled_missing(device: torch.device) -> str:
    if device.type != "cpu":
        return _CPU_ONLY
    compiler = os.environ.get("CXX", "g++")
    found = shutil.which(compiler) is not None
    return "" if found else f"torch.compile finds no C++ compiler: {compiler} is not on the PATH"


@contextmanager
def _fused() -> Iterator[Arrangement]:
    yield Arrangement(options={"fused": True})


@contextmanager
def _captured() -> Iterator[Arrangement]:
    yield Arrangement(
        gradient=_in_place, step=CapturedStep.on_current_device, options={"capturable": True}
    )


def _in_place(param: Tensor, gradient: Tensor) -> Tensor:
    """Copy a gradient into the one before it, whose address a graph holds."""
    return gradient if param.grad is None else param.grad.copy_(gradient)


@contextmanager
def _clipped() -> Iterator[Arrangement]:
    yield Arrangement(own_options={"max_grad_norm": 1.0}, around=_after_clipping)


def _after_clipping(step: Step, params: list[Tensor]) -> Step:
    """Return a step that clips the gradients before, as a training loop does."""

    def clip_and_step() -> object:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        return step()

    return clip_and_step


@contextmanager
def _measured() -> Iterator[Arrangement]:
    yield Arrangement(own_options={"telemetry": True}, around=_before_norms)


def _before_norms(step: Step, params: list[Tensor]) -> Step:
    """Return a step and the norms of gradients and parameters, as a training loop logs them."""

    def step_and_measure() -> object:
        step()
        gradients = [p.grad for p in params if p.grad is not None]
        return [torch.stack(torch._foreach_norm(x)).norm() for x in (gradients, params)]

    return step_and_measure


PLAIN = Form("", _plain, _never_missing)
#: Parameters of FSDP2.
SHARDED = Form("DTensors, Shard(0) on a mesh of one process", _sharded, _sharded_missing)
COMPILED = Form(
    "torch.compile(step)",
    _compiled,
    _compiled_missing,
    # It compiles as long as torch's default, to steps as fast.
    leaves_out=frozenset({"torch foreach"}),
)
#: Steps with ``max_grad_norm``; for torch.optim ``clip_grad_norm_`` and a step.
CLIPPED = Form("gradients clipped by their norm", _clipped, _never_missing)
#: Steps with ``telemetry``; for torch.optim two of its metrics, after a step.
MEASURED = Form(
    "with metrics",
    _measured,
    _never_missing,
    # They reduce whole tensors by torch's operations in float64, which takes seconds.
    leaves_out=frozenset({"stepforge foreach", "stepforge reference"}),
)
#: torch.optim has no other implementation of these options than its fused one.
FUSED = Form(
    "fused=True",
    _fused,
    _never_missing,
    leaves_out=frozenset({"torch", "torch foreach", "stepforge foreach", "stepforge reference"}),
)
#: Steps with ``capturable=True``, captured once and replayed.
CAPTURED = Form(
    "a replayed graph",
    _captured,
    why_no_graphs,
    # A replay runs no Python, and on a GPU torch's default is foreach.
    leaves_out=frozenset({"access", "torch foreach", "stepforge foreach", "stepforge reference"}),
)
