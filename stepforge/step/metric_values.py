"""The values of metrics: of some parameters together, and of each one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stepforge.ops import VOCABULARY
from stepforge.program import SIZE, Graph, evaluate
from stepforge.step.passes import Rows

__all__ = ["Members", "of_each", "together"]


@dataclass(frozen=True)
class Members:
    """Parameters of an optimizer.

    Attributes:
        names: their names; the index of each if they have none.
        indices: their indices, in order.
        sizes: the number of elements of each.
    """

    names: list[Any]
    indices: np.ndarray[Any, Any]
    sizes: np.ndarray[Any, Any]

    @classmethod
    def by_group(cls, groups: Sequence[Mapping[str, Any]]) -> list[Members]:
        """Return the parameters of each param group."""
        found, begin = [], 0
        for group in groups:
            params = group["params"]
            indices = np.arange(begin, begin + len(params))
            names = list(group.get("param_names", indices.tolist()))
            found.append(cls(names, indices, np.array([p.numel() for p in params], np.int64)))
            begin += len(params)
        return found

    @classmethod
    def of(cls, groups: Sequence[Mapping[str, Any]]) -> Members:
        """Return all parameters."""
        parts = cls.by_group(groups)
        return cls(
            [name for part in parts for name in part.names],
            np.concatenate([np.empty(0, np.int64), *(part.indices for part in parts)]),
            np.concatenate([np.empty(0, np.int64), *(part.sizes for part in parts)]),
        )


def together(
    rows: Sequence[Rows], members: Members, order: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Return the metrics of parameters together, as float64 tensors without dimensions.

    Args:
        rows: the reductions of the last step.
        members: the parameters.
        order: the names of all metrics, in their order.
    """
    found: dict[str, torch.Tensor] = {}
    for each in rows:
        stepped = np.isin(members.indices, each.indices)
        if stepped.any():
            size = float(members.sizes[stepped].sum())
            found |= _computed(each.graph, each.over(members.indices[stepped]), size)
    return _sorted(found, order)


def of_each(
    rows: Sequence[Rows], members: Members, order: Sequence[str]
) -> dict[Any, dict[str, torch.Tensor]]:
    """Return the metrics of each parameter that was stepped, by its name.

    Args:
        rows: the reductions of the last step.
        members: the parameters.
        order: the names of all metrics, in their order.
    """
    found: dict[Any, dict[str, torch.Tensor]] = {}
    for each in rows:
        stepped = np.flatnonzero(np.isin(members.indices, each.indices))
        columns = each.columns(members.indices[stepped])
        computed = _computed(each.graph, columns, members.sizes[stepped])
        of_params = zip(*(values.expand(len(stepped)).unbind() for values in computed.values()))
        for at, values in zip(stepped.tolist(), of_params):
            found.setdefault(members.names[at], {}).update(zip(computed, values))
    return {name: _sorted(own, order) for name, own in found.items()}


def _sorted(found: Mapping[str, torch.Tensor], order: Sequence[str]) -> dict[str, torch.Tensor]:
    return {name: found[name] for name in order if name in found}


def _computed(graph: Graph, reductions: Sequence[Any], size: Any) -> dict[str, torch.Tensor]:
    """Return the metrics of a graph, given its reductions: numbers, or one per parameter."""
    assert graph.metric is not None
    given = list(map(_tensor, reductions))
    size = _tensor(size).to(given[0].device, non_blocking=True)
    values = evaluate(graph.metric, {SIZE: size}, given, VOCABULARY)
    return dict(zip(graph.metrics, values))


def _tensor(x: Any) -> torch.Tensor:
    return torch.as_tensor(x, dtype=torch.float64)
