"""The step under ``torch.compile``: one custom operator, opaque to the compiler.

A compiler that traced the step would take its numbers for constants and its kernels for nothing it
knows. It sees the operator ``stepforge::step`` instead, which names the tensors that it reads and
writes and which does, when it is run, what a step does without compilation.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

from stepforge import plan
from stepforge.backends.batch import is_capturing
from stepforge.entries import kept
from stepforge.optimizer import Optimizer
from stepforge.rows import Member, Row, checked_rows, keep_new_states, stepping

__all__ = ["Traced", "make_ready", "step"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

# The compiler calls it when it traces, not in the steps that follow, and takes its result for a
# constant. It is a method, as torch 2.10 and 2.11 give a function so marked no optimizer.
torch.compiler.assume_constant_result(Optimizer._is_traceable)  # type: ignore[no-untyped-call]


def step(optimizer: Optimizer) -> None:
    """Steps an optimizer. This is what the compiler traces."""
    told = getattr(optimizer, "found_inf", None) is not None  # by a gradient scaler
    if not told and optimizer._is_traceable():
        cast(Traced, optimizer._traced).step(optimizer)
    else:
        _step_outside(optimizer)


class Traced:
    """What the compiler is shown of an optimizer.

    Attributes:
        number: under which the operator finds the optimizer.
        params: the parameters of all groups, in order.
        groups: for each of them the number of its group.
        keys: for each the names of its states.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.number = next(_numbers)
        _optimizers[self.number] = optimizer
        groups = optimizer.param_groups
        self.params = [p for group in groups for p in group["params"]]
        self.groups = [number for number, group in enumerate(groups) for _ in group["params"]]
        self.keys = [
            kept(optimizer._rule, groups[number], p).keys
            for p, number in zip(self.params, self.groups)
        ]

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer still has these parameters in these groups."""
        present = [
            (p, n) for n, group in enumerate(optimizer.param_groups) for p in group["params"]
        ]
        return len(present) == len(self.params) and all(
            p is known and number == group
            for (p, number), known, group in zip(present, self.params, self.groups)
        )

    def step(self, optimizer: Optimizer) -> None:
        """Steps every parameter that has a gradient."""
        # All gradients before any state: once the compiler has seen the keys of optimizer.state it
        # finds parameters there, and guards the identity of their gradients.
        indices = [index for index, p in enumerate(self.params) if p.grad is not None]
        params = [self.params[index] for index in indices]
        gradients = [p.grad for p in params]
        groups = [self.groups[index] for index in indices]
        entries = [optimizer.state[p] for p in params]
        states = [entry[key] for entry, index in zip(entries, indices) for key in self.keys[index]]
        if params:
            torch.ops.stepforge.step(params, gradients, states, self.number, groups, indices)


def _outside_of_graphs(function: _Function) -> _Function:
    """Marks what the compiler must not trace but run."""
    return cast(_Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


@_outside_of_graphs  # where a compiler has given up the step's frame, it tries those within
def make_ready(optimizer: Optimizer) -> bool:
    """Makes an optimizer ready to be traced; False if its step must run outside of the graph.

    The states have to exist when the compiler traces, and not to share memory: a compiler may not
    write to tensors that others alias.
    """
    try:
        members = stepping(optimizer.param_groups, optimizer.state)
        rows = checked_rows(optimizer._rule, members, refuses_sparse=optimizer._refuses_sparse())
    except (RuntimeError, TypeError, ValueError):
        return False  # the step outside of the graph says what is wrong
    if any(row.group["differentiable"] or not all(map(_is_plain, _tensors(row))) for row in rows):
        return False
    keep_new_states(rows, optimizer.state)
    for row in rows:
        for key, tensor in row.state.items():
            if isinstance(tensor, torch.Tensor) and tensor._base is not None:
                row.state[key] = tensor.clone()
    optimizer._traced = Traced(optimizer)
    return True


@_outside_of_graphs
def _step_outside(optimizer: Optimizer) -> None:
    optimizer._run()


def _tensors(row: Row) -> list[torch.Tensor]:
    return [row.p, row.g, *(x for x in row.state.values() if isinstance(x, torch.Tensor))]


def _is_plain(x: torch.Tensor) -> bool:
    return type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_sparse


_numbers = itertools.count()
_optimizers: weakref.WeakValueDictionary[int, Optimizer] = weakref.WeakValueDictionary()


@torch.library.custom_op("stepforge::step", mutates_args=("params", "states"))
def _step(
    params: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    optimizer: int,
    groups: Sequence[int],
    numbers: Sequence[int],
) -> None:
    """Steps parameters by their optimizer's rule.

    Args:
        params: the parameters.
        gradients: the gradient of each.
        states: the states of each in the order of :class:`~stepforge.entries.Kept`, one
            parameter's after the other's.
        optimizer: the number of their optimizer.
        groups: the number of the param group of each.
        numbers: the number of each among all parameters.
    """
    stepped = _optimizers[optimizer]
    if stepped._traced is None or not stepped._traced.holds(stepped):
        raise RuntimeError(
            "the parameters of a param group have changed since the step was compiled: "
            "call torch.compiler.reset()"
        )
    stepped._captured |= is_capturing()
    rest = iter(states)
    members = [
        Member(number, p, g, stepped.param_groups[group], {key: next(rest) for key in keys})
        for p, g, group, number, keys in zip(
            params, gradients, groups, numbers, map(stepped._traced.keys.__getitem__, numbers)
        )
    ]
    rows = checked_rows(stepped._rule, members, refuses_sparse=stepped._refuses_sparse())
    if any(row.state is not member.entry for row, member in zip(rows, members)):
        raise RuntimeError(
            "the options of a param group ask for other states than when the step was compiled: "
            "call torch.compiler.reset()"
        )
    with torch.no_grad():
        for launch in plan.launches(stepped._rule, rows):
            launch.run()


@_step.register_fake
def _(
    params: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    optimizer: int,
    groups: Sequence[int],
    numbers: Sequence[int],
) -> None:
    """What it returns: nothing. What it writes, its schema tells."""
