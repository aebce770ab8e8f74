"""Lower bounds on step time: parts of every step, timed as steps are."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import stepforge
from stepforge.accounting import account
from stepforge.backends.native import Kernel
from stepforge.backends.spec import KernelSpec
from stepforge.cli.timing.copies import Copy
from stepforge.expr import Trace
from stepforge.program import Graph

__all__ = ["Access", "Limit", "bytes_per_element", "copy_of_step", "traffic"]


class Limit:
    """The memory traffic of an optimizer, through the driver and the threads of its kernel.

    Only the C call counts as the step: the kernel's tables are laid out before. Whatever the dtype,
    as many bytes are moved in float32: to round would be arithmetic.
    """

    def __init__(self, optimizer: str, params: list[Tensor]) -> None:
        graph = traffic(optimizer)
        columns = {*graph.varying.inputs, *graph.results}
        self.kernel = Kernel(KernelSpec.of(graph, dict.fromkeys(columns, torch.float32)))
        params = _in_float32(params)
        self.tensors = {
            column: params if column == "p" else [torch.zeros_like(p) for p in params]
            for column in self.kernel.args.tensors
        }
        sizes = [p.numel() for p in params]
        self.starts = np.cumsum([0, *sizes], dtype=np.int64)
        self.scalars = np.empty((len(params), 0), dtype=np.float32)

    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Copy the gradients and write all addresses into the kernel's table."""
        self.tensors["g"] = _in_float32(gradients)
        columns = [[t.data_ptr() for t in self.tensors[name]] for name in self.kernel.args.tensors]
        self.pointers = np.array(columns, dtype=np.uint64).T.copy()

    def step(self) -> None:
        """Call the kernel."""
        self.kernel(self.starts, self.pointers, self.scalars)


def _in_float32(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the first elements of tensors in float32, in memory of their own, and of equal size.

    Elements have at most 4 bytes.
    """
    return [t.flatten()[: -(-t.nbytes // 4)].to(torch.float32, copy=True) for t in tensors]


class Access:
    """The Python work that no step can leave out, however fast its kernel.

    A step must read each gradient and each tensor's address, since both may have changed. And it
    must tell autograd which tensors it wrote.
    """

    def __init__(self, optimizer: str, params: list[Tensor]) -> None:
        states = len(set(traffic(optimizer).varying.inputs) - {"p", "g"})
        self.params = params
        self.written = [*params, *(torch.zeros_like(p) for _ in range(states) for p in params)]

    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Give every parameter a fresh copy of its gradient."""
        for p, gradient in zip(self.params, gradients):
            p.grad = gradient.clone()

    def step(self) -> None:
        """Read gradients and addresses, and increment versions."""
        gradients = map(operator.attrgetter("grad"), self.params)
        list(map(Tensor.data_ptr, itertools.chain(self.written, gradients)))
        torch.autograd.graph.increment_version(self.written)


def copy_of_step(optimizer: str, params: list[Tensor]) -> Copy:
    """Return the memory traffic of an optimizer as one copy within the memory of a device."""
    p = params[0]
    return Copy(bytes_per_element(optimizer, p.dtype) * sum(map(Tensor.numel, params)), p.device)


def bytes_per_element(optimizer: str, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes that a step reads and writes per element of a parameter.

    Args:
        optimizer: the optimizer's name.
        dtype: the parameter's dtype.

    Example:
        >>> bytes_per_element("Adam"), bytes_per_element("Adagrad")
        (28, 20)
        >>> bytes_per_element("Adam", torch.bfloat16)
        14
    """
    p = torch.zeros(1, dtype=dtype)
    instance = getattr(stepforge, optimizer)([p])
    return account(instance.rule, instance.param_groups[0], p).moved


def traffic(optimizer: str) -> Graph:
    """Return a rule with an optimizer's reads and writes, which adds g to everything it writes.

    Args:
        optimizer: the optimizer's name.
    """
    instance = getattr(stepforge, optimizer)([torch.zeros(1)])
    rule = instance.rule.graph(instance.param_groups[0])
    trace = Trace()
    read = {name: trace.input(name, varying=True) for name in rule.varying.inputs}
    return Graph.of({name: read[name] + read["g"] for name in rule.results})
