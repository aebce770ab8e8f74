"""Arrangements of a workload: its param groups, and the form of its tensors and steps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias, cast

import torch
from torch import Tensor

__all__ = ["COMPILED", "PLAIN", "SHARDED", "Arrangement", "Form", "Step"]

Step: TypeAlias = Callable[[], object]


def _tensor_itself(tensor: Tensor) -> Tensor:
    return tensor


def _gradient_itself(_: Tensor, gradient: Tensor) -> Tensor:
    return gradient


def _step_itself(step: Step) -> Step:
    return step


@dataclass(frozen=True)
class Arrangement:
    """An arrangement of parameters in groups, and of their steps; by default a plain one.

    Attributes:
        groups: the number of param groups, each with its own learning rate.
        tensor: makes a parameter of a plain tensor.
        gradient: makes the gradient of a parameter of a plain tensor.
        step: makes the timed step of an optimizer's ``step``.
    """

    groups: int = 1
    tensor: Callable[[Tensor], Tensor] = _tensor_itself
    gradient: Callable[[Tensor, Tensor], Tensor] = _gradient_itself
    step: Callable[[Step], Step] = _step_itself


@dataclass(frozen=True)
class Form:
    """A form of tensors and steps.

    Attributes:
        description: text for a title; empty for plain tensors and steps.
        arrangement: returns a context with the arrangement, which holds only within.
        why_not: returns why this machine lacks it, in a clause; empty if it does not.
        leaves_out: the names of implementations that are not measured in this form.
    """

    description: str
    arrangement: Callable[[], AbstractContextManager[Arrangement]]
    why_not: Callable[[], str]
    leaves_out: frozenset[str] = frozenset()

    def missing(self, device: torch.device) -> str:
        """Return why it cannot be measured on a device, in a clause; empty if it can."""
        if self.description and device.type != "cpu":
            return "it is measured on a CPU only"
        return self.why_not()


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


def _why_not_sharded() -> str:
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


def _why_not_compiled() -> str:
    compiler = os.environ.get("CXX", "g++")
    found = shutil.which(compiler) is not None
    return "" if found else f"torch.compile finds no C++ compiler: {compiler} is not on the PATH"


PLAIN = Form("", _plain, lambda: "")
#: Parameters of FSDP2.
SHARDED = Form("DTensors, Shard(0) on a mesh of one process", _sharded, _why_not_sharded)
COMPILED = Form(
    "torch.compile(step)",
    _compiled,
    _why_not_compiled,
    # It compiles as long as torch's default, to steps as fast.
    leaves_out=frozenset({"torch foreach"}),
)
