"""The passes of a step, one after the other: reductions, what follows from them, then the step.

All launches make a pass before any makes the next, as a reduction may be over all parameters. On a
device nothing waits: its numbers stay there, as those that follow from them do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from stepforge.backends.grad_scale import GradScale
from stepforge.backends.reduction import Totals, combined
from stepforge.program import Graph
from stepforge.step.launch import BoundLaunch, Launch
from stepforge.step.signals import Deferred

__all__ = ["Rows", "reduced", "run"]


@dataclass(eq=False)
class Rows:
    """The reductions of a graph for the parameters of a step.

    Attributes:
        graph: a graph whose reductions they are.
        launches: the launches.
        parts: the reductions of each launch.
    """

    graph: Graph
    launches: list[Launch]
    parts: list[Totals]

    @classmethod
    def of(cls, graph: Graph, launches: list[Launch], parts: list[Totals]) -> Rows:
        """Return the reductions of whole parameters from those of what each process holds."""
        if any(launch.shard_groups for launch in launches):
            parts = [_whole(graph, *pair) for pair in zip(launches, parts)]
        return cls(graph, launches, parts)

    def of_all(self) -> list[Any]:
        """Return the reductions over all parameters: numbers, or tensors if a device has any."""
        (own, *others), (part, *_) = self.launches, self.parts
        if not others and own.is_in_order and not own.shard_groups:
            return list(part[-1].tolist() if isinstance(part, np.ndarray) else part[-1])
        return self.over(None)

    def over(self, members: np.ndarray[Any, Any] | None) -> list[Any]:
        """Return the reductions over some parameters, by their index; None for all."""
        ops = [node.op for node in self.graph.reductions]
        return _combined(ops, self.columns(members))

    def columns(self, members: np.ndarray[Any, Any] | None = None) -> list[Any]:
        """Return each reduction of some parameters, in the optimizer's order."""
        rows, indices = _in_order([part[:-1] for part in self.parts], self.launches)
        if members is not None:
            chosen: Any = np.flatnonzero(np.isin(indices, members))
            if isinstance(rows, torch.Tensor):
                chosen = torch.as_tensor(chosen).to(rows.device, non_blocking=True)
            rows = rows[chosen]
        return list(rows.T)

    @property
    def indices(self) -> np.ndarray[Any, Any]:
        """The indices of the parameters, in order."""
        return np.sort(np.concatenate([launch.indices for launch in self.launches]))


def run(
    launches: Iterable[BoundLaunch],
    groups: Sequence[Mapping[str, Any]],
    grad_scale: GradScale | None = None,
) -> Rows | None:
    """Run all launches of a step; Python's signal handlers wait until the last has run.

    Args:
        launches: the launches.
        groups: all param groups of the optimizer.
        grad_scale: the scale of the gradients.

    Returns:
        The reductions of what the step has stored; None if there are none.
    """
    with Deferred():
        found = list(launches)
        if any(launch.batch.spec.graph.before for launch in found):
            found = _after_passes(found, groups, grad_scale)
        totals = [launch.run(grad_scale) for launch in found]
    if not totals or totals[0] is None:
        return None
    graph = found[0].batch.spec.graph
    return Rows.of(graph, [own.launch for own in found], cast(list[Totals], totals))


def reduced(graph: Graph, launches: Sequence[BoundLaunch], grad_scale: GradScale | None) -> Rows:
    """Make a pass that takes no coefficients over the parameters of a step. Changes no tensor.

    Args:
        graph: the graph of the pass.
        launches: all launches of the step.
        grad_scale: the scale of the gradients.
    """
    parts = [launch.reduced(graph, grad_scale) for launch in launches]
    return Rows.of(graph, [launch.launch for launch in launches], parts)


def _after_passes(
    launches: Sequence[BoundLaunch],
    groups: Sequence[Mapping[str, Any]],
    grad_scale: GradScale | None,
) -> list[BoundLaunch]:
    """Return the launches with the values that follow from their passes. Changes no tensor."""
    if grad_scale is not None and grad_scale.on_host and grad_scale.found_inf:
        return list(launches)  # which are skipped
    reduced: list[list[Any]] = [[] for _ in launches]
    for number in range(max(len(launch.batch.spec.graph.before) for launch in launches)):
        pairs = [
            (launch, known)
            for launch, known in zip(launches, reduced)
            if number < len(launch.batch.spec.graph.before)
        ]
        _make_pass(number, pairs, groups, grad_scale)
    return [
        _with_values(launch, groups, known) if launch.batch.spec.graph.before else launch
        for launch, known in zip(launches, reduced)
    ]


def _make_pass(
    number: int,
    launches: Sequence[tuple[BoundLaunch, list[Any]]],
    groups: Sequence[Mapping[str, Any]],
    grad_scale: GradScale | None,
) -> None:
    """Make a pass, and append its reductions to those that each launch has.

    Reductions over all parameters are matched by their order in the rule, as the flags of a param
    group may change the formula.
    """
    parts = []
    for launch, known in launches:
        graph, own = launch.batch.spec.graph.before[number], launch.launch
        uniform = replace(own.uniform, graph=graph)
        coefficients, _ = own.values(uniform, groups, launch.scalars, known)
        totals = launch.reduced(graph, grad_scale, coefficients)
        parts.append(_whole(graph, own, totals))
    nodes = [launch.batch.spec.graph.before[number].reductions for launch, _ in launches]
    over_all = [[n for n, node in enumerate(own) if node.value == "all"] for own in nodes]
    ops = [nodes[0][n].op for n in over_all[0]]
    together = [part[:-1, columns] for part, columns in zip(parts, over_all)]
    of_step: list[Any] = []
    if ops:
        rows, _ = _in_order(together, [launch.launch for launch, _ in launches])
        of_step = _combined(ops, rows.T)
    for (_, known), part, columns in zip(launches, parts, over_all):
        for n in range(part.shape[1]):
            column = part[:-1, n]
            if n in columns:
                found = of_step[columns.index(n)]
                column = found.expand(len(column)) if isinstance(found, torch.Tensor) else found
            known.append(column)


def _with_values(
    launch: BoundLaunch, groups: Sequence[Mapping[str, Any]], reduced: Sequence[Any]
) -> BoundLaunch:
    """Return a launch with the coefficients that follow from its passes."""
    own = launch.launch
    coefficients, scalar_values = own.values(own.uniform, groups, launch.scalars, reduced)
    batch = replace(launch.batch, coefficients=coefficients)
    return replace(launch, batch=batch, scalar_values=scalar_values)


def _combined(ops: Sequence[str], columns: Iterable[Any]) -> list[Any]:
    """Return reductions over parameters from those of each: numbers, or tensors on a device."""
    found = [combined(op, column) for op, column in zip(ops, columns)]
    return [x if isinstance(x, torch.Tensor) else float(x) for x in found]


def _in_order(
    parts: Sequence[Totals], launches: Sequence[Launch]
) -> tuple[Any, np.ndarray[Any, Any]]:
    """Return the rows of several launches in the optimizer's order, and their indices."""
    indices = np.concatenate([launch.indices for launch in launches])
    order = np.argsort(indices)
    is_ordered = bool((order == np.arange(len(order))).all())
    if all(isinstance(part, np.ndarray) for part in parts):
        rows = np.concatenate(parts)
        return (rows if is_ordered else rows[order]), indices[order]
    device = next(x.device for x in parts if isinstance(x, torch.Tensor))
    on_device = torch.cat([torch.as_tensor(part).to(device) for part in parts])
    if not is_ordered:
        on_device = on_device[torch.as_tensor(order).to(device)]
    return on_device, indices[order]


def _whole(graph: Graph, launch: Launch, totals: Totals) -> Totals:
    """Return the reductions of whole parameters from those of their local parts."""
    if not launch.shard_groups:  # the usual case
        return totals
    ops = [node.op for node in graph.reductions]
    rows = _over_ranks(ops, torch.as_tensor(totals), [*launch.shard_groups, ()])
    return rows.numpy() if isinstance(totals, np.ndarray) else rows


def _over_ranks(
    ops: Sequence[str], rows: torch.Tensor, groups: Sequence[tuple[Any, ...]]
) -> torch.Tensor:
    """Return the reductions of whole parameters from those of their local parts.

    All processes add them up in the same order, so all have the same bits. That takes a collective
    for each group of processes.

    Args:
        ops: the reductions.
        rows: parameters x reductions.
        groups: the process groups over which each parameter is cut.
    """
    rows = rows.clone()
    for cut in dict.fromkeys(filter(None, groups)):
        members = torch.tensor([n for n, each in enumerate(groups) if each == cut])
        members = members.to(rows.device)
        for group in cut:
            mine = rows[members].contiguous()
            gathered = [torch.empty_like(mine) for _ in range(group.size())]
            torch.distributed.all_gather(gathered, mine, group=group)
            columns = zip(ops, torch.stack(gathered).unbind(2))
            rows[members] = torch.stack([_of_ranks(op, column) for op, column in columns], dim=1)
    return rows


def _of_ranks(op: str, of_rank: torch.Tensor) -> torch.Tensor:
    """Return the reductions of parameters from those of each rank: ranks x parameters."""
    found = of_rank[0]
    for other in of_rank[1:]:
        found = torch.maximum(found, other) if op == "largest" else found + other
    return found
