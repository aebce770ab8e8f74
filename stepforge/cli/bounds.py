"""What no step can be faster than: parts of every step, which are timed as steps are."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

import stepforge
from stepforge.accounting import account
from stepforge.backends.native import Kernel
from stepforge.backends.spec import KernelSpec
from stepforge.expr import Trace
from stepforge.program import Graph

__all__ = ["Access", "Copy", "Limit", "Stepper", "bytes_per_element", "traffic"]


class Stepper(Protocol):
    """Parameters, and something that steps them."""

    def feed(self, gradients: Sequence[Tensor]) -> None:
        """Gives every parameter a fresh copy of its gradient; not timed."""

    def step(self) -> object:
        """Steps; timed."""


class Limit:
    """The memory traffic of an optimizer, through the driver and the threads of its kernel.

    Only the C call counts as the step: the tables that it is given are laid out before.
    """

    def __init__(self, optimizer: str, params: list[Tensor]) -> None:
        graph = traffic(optimizer)
        columns = {*graph.varying.inputs, *graph.results}
        self.kernel = Kernel(KernelSpec.of(graph, dict.fromkeys(columns, torch.float32)))
        self.tensors = {
            column: params if column == "p" else [torch.zeros_like(p) for p in params]
            for column in self.kernel.args.tensors
        }
        sizes = [p.numel() for p in params]
        self.starts = np.cumsum([0, *sizes], dtype=np.int64)
        self.numbers = np.empty((len(params), 0), dtype=np.float32)

    def feed(self, gradients: Sequence[Tensor]) -> None:
        """Copies the gradients and writes all addresses into the kernel's table."""
        self.tensors["g"] = [gradient.clone() for gradient in gradients]
        columns = [[t.data_ptr() for t in self.tensors[name]] for name in self.kernel.args.tensors]
        self.pointers = np.array(columns, dtype=np.uint64).T.copy()

    def step(self) -> None:
        """Calls the kernel."""
        self.kernel(self.starts, self.pointers, self.numbers)


class Access:
    """What no step written in Python can leave out, however fast its kernel.

    Each gradient has to be asked for and each tensor for its address, as both may have changed; and
    autograd has to be told which tensors were written.
    """

    def __init__(self, optimizer: str, params: list[Tensor]) -> None:
        states = len(set(traffic(optimizer).varying.inputs) - {"p", "g"})
        self.params = params
        self.kept = [*params, *(torch.zeros_like(p) for _ in range(states) for p in params)]

    def feed(self, gradients: Sequence[Tensor]) -> None:
        """Gives every parameter a fresh copy of its gradient."""
        for p, gradient in zip(self.params, gradients):
            p.grad = gradient.clone()

    def step(self) -> None:
        """Asks for gradients and addresses, and counts versions."""
        gradients = map(operator.attrgetter("grad"), self.params)
        list(map(Tensor.data_ptr, itertools.chain(self.kept, gradients)))
        torch.autograd.graph.increment_version(self.kept)


class Copy:
    """The memory traffic of an optimizer as one copy within the memory of a device.

    A copy of n bytes reads n and writes n, so half of what a step reads and writes is copied.
    """

    def __init__(self, optimizer: str, params: list[Tensor]) -> None:
        moved = bytes_per_element(optimizer) * sum(p.numel() for p in params)
        self.source = torch.zeros(moved // 2, dtype=torch.uint8, device=params[0].device)
        self.target = torch.empty_like(self.source)

    def feed(self, gradients: Sequence[Tensor]) -> None:
        """What is copied stays the same."""

    def step(self) -> None:
        """Copies."""
        self.target.copy_(self.source)


def bytes_per_element(optimizer: str) -> int:
    """What a step of a float32 parameter reads and writes for each of its elements, in bytes.

    Args:
        optimizer: the optimizer's name.

    Example:
        >>> bytes_per_element("Adam"), bytes_per_element("Adagrad")
        (28, 20)
    """
    p = torch.zeros(1)
    made = getattr(stepforge, optimizer)([p])
    return account(made.rule, made.param_groups[0], p).moved


def traffic(optimizer: str) -> Graph:
    """A rule that reads and writes what the optimizer's does: everything written gets g added.

    Args:
        optimizer: the optimizer's name.
    """
    made = getattr(stepforge, optimizer)([torch.zeros(1)])
    rule = made.rule.graph(made.param_groups[0])
    trace = Trace()
    read = {name: trace.input(name, varying=True) for name in rule.varying.inputs}
    return Graph.of({name: read[name] + read["g"] for name in rule.results})
