"""The passes of a step, one after the other: reductions, what follows from them, then the step.

All launches make a pass before any makes the next, as a reduction may be over all parameters. On a
device nothing waits: its numbers stay there, as those that follow from them do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from stepforge.backends.grad_scale import GradScale
from stepforge.backends.reduction import Totals, combined
from stepforge.program import Graph
from stepforge.step.launch import BoundLaunch, Launch
from stepforge.step.signals import Deferred

__all__ = ["of_all", "run"]


def run(
    launches: Iterable[BoundLaunch],
    groups: Sequence[Mapping[str, Any]],
    grad_scale: GradScale | None = None,
) -> None:
    """Run all launches of a step; Python's signal handlers wait until the last has run.

    Args:
        launches: the launches.
        groups: all param groups of the optimizer.
        grad_scale: the scale of the gradients.
    """
    with Deferred():
        found = list(launches)
        if any(launch.batch.spec.graph.before for launch in found):
            found = _after_passes(found, groups, grad_scale)
        for launch in found:
            launch.run(grad_scale)


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
    of_step = _combined(ops, together, [launch.launch for launch, _ in launches]) if ops else []
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


def of_all(
    graph: Graph, launches: Sequence[BoundLaunch], grad_scale: GradScale | None
) -> list[Any]:
    """Return reductions over all parameters: numbers, or tensors if a device has any.

    Args:
        graph: the graph of a pass that takes no coefficients.
        launches: all launches of a step.
        grad_scale: the scale of the gradients.
    """
    parts = [launch.reduced(graph, grad_scale) for launch in launches]
    own = [launch.launch for launch in launches]
    if len(own) == 1 and own[0].is_in_order and not own[0].shard_groups:
        return list(parts[0][-1].tolist() if isinstance(parts[0], np.ndarray) else parts[0][-1])
    rows = [_whole(graph, launch, part)[:-1] for launch, part in zip(own, parts)]
    return _combined([node.op for node in graph.reductions], rows, own)


def _combined(ops: Sequence[str], parts: Sequence[Totals], launches: Sequence[Launch]) -> list[Any]:
    """Return the reductions over the parameters of several launches, in the optimizer's order."""
    order = np.argsort(np.concatenate([launch.indices for launch in launches]))
    if all(isinstance(part, np.ndarray) for part in parts):
        rows = np.concatenate(parts)[order]
        return [float(combined(op, column)) for op, column in zip(ops, rows.T)]
    device = next(x.device for x in parts if isinstance(x, torch.Tensor))
    on_device = torch.cat([torch.as_tensor(part).to(device) for part in parts])
    if (order != np.arange(len(order))).any():
        on_device = on_device[torch.as_tensor(order).to(device)]
    return [combined(op, column) for op, column in zip(ops, on_device.unbind(1))]


def _whole(graph: Graph, launch: Launch, totals: Totals) -> Totals:
    """Return the reductions of whole parameters from those of their local parts."""
    if not launch.shard_groups:
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
