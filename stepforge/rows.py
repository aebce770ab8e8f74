"""The rows of a step: every parameter that has a gradient, checked before anything changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from stepforge.backends import Choice, choose
from stepforge.declare import Rule, State, is_off
from stepforge.expr import Graph
from stepforge.ops import scalar_dtype


class Member(NamedTuple):
    """A parameter with its gradient, the options of its param group, and what state it has."""

    p: torch.Tensor
    g: torch.Tensor
    group: Mapping[str, Any]
    entry: dict[str, Any]


@dataclass
class Row:
    """One parameter with what a step needs of it.

    Attributes:
        p: the parameter.
        g: its gradient, coalesced if sparse.
        group: the options of its param group.
        graph: what is to be computed under these options.
        choice: the backend that serves it.
        state: its states: its entry of ``optimizer.state`` if that is complete, else a copy with
            what was missing.
    """

    p: torch.Tensor
    g: torch.Tensor
    group: Mapping[str, Any]
    graph: Graph
    choice: Choice
    state: dict[str, Any]


def stepping(
    groups: Iterable[Mapping[str, Any]], state: Mapping[Any, dict[str, Any]]
) -> Iterator[Member]:
    """The parameters that have a gradient, group by group, each once."""
    for group in groups:
        for p in _distinct(group["params"]):
            if p.grad is not None:
                yield Member(p, p.grad, group, state.get(p) or {})


def checked_rows(rule: Rule, members: Iterable[Member], *, refuses_sparse: str | None) -> list[Row]:
    """The rows of a step. Changes nothing.

    Args:
        rule: the optimizer's rule.
        members: what is to be stepped, the members of a group one after the other.
        refuses_sparse: what to say of a sparse gradient; None if the rule takes them.

    Raises:
        RuntimeError: a gradient is sparse and may not be, a gradient or a state has another shape
            or device than its parameter, or no backend can do what was asked for.
        TypeError: a parameter is neither real nor complex floating point.
    """
    rows: list[Row] = []
    for _, of_one_group in itertools.groupby(members, key=lambda member: id(member.group)):
        alike = list(of_one_group)
        graph, states = rule.graph(alike[0].group), _kept_states(rule, alike[0].group)
        choices: dict[Any, Choice] = {}
        for p, g, group, entry in alike:
            if g.is_sparse:
                g = _coalesced(g, group, refuses_sparse)
            # All that a choice depends on: parameters alike in it are asked about once.
            kind = (p.dtype, g.dtype, p.device, g.layout, type(p), type(g))
            if kind not in choices:
                _check_dtypes(p, g)
                choices[kind] = choose(p, g, group, graph)
            row = Row(p, g, group, graph, choices[kind], entry)
            _complete(row, states)
            _check_shapes(row, states)
            rows.append(row)
    return rows


def keep_new_states(rows: Iterable[Row], state: MutableMapping[Any, dict[str, Any]]) -> None:
    """Enters what was missing into ``optimizer.state``."""
    for row in rows:
        entry = state.get(row.p)
        if entry is None:
            state[row.p] = row.state
        elif entry is not row.state:
            entry.update(row.state)
            row.state = entry


def initial_state(rule: Rule, p: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter before its first step, ``step`` included."""
    states = _kept_states(rule, group)
    return {"step": _initial(None, p, group)} | {s.key: _initial(s, p, group) for s in states}


def kept_keys(rule: Rule, group: Mapping[str, Any]) -> list[str]:
    """The names of the states that a group's parameters have, the step number first."""
    return ["step", *(s.key for s in _kept_states(rule, group))]


def _kept_states(rule: Rule, group: Mapping[str, Any]) -> list[State]:
    """The states that a group's parameters have, numbers first as torch.optim orders them."""
    return sorted((s for s in rule.states.values() if s.on(group)), key=lambda s: not s.scalar)


def _initial(declared: State | None, p: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
    """The initial value of a state; of the step number for None."""
    if declared is None or declared.scalar:
        # A generated kernel or a captured graph keeps numbers on the device, in float32.
        dtype = torch.float32 if group["fused"] else scalar_dtype()
        value: Any = declared.init if declared else 0.0
        device = p.device if group["capturable"] or group["fused"] else torch.device("cpu")
        # torch.tensor, as torch.zeros has no known value under FakeTensorMode.
        return torch.tensor(value, dtype=dtype, device=device)
    value = group[declared.init] if isinstance(declared.init, str) else declared.init
    if p.is_complex():
        value = complex(value, value)  # real and imaginary parts are averaged each by itself
    return torch.full_like(p.detach(), value, memory_format=torch.preserve_format)


def _distinct(params: list[torch.Tensor]) -> list[torch.Tensor]:
    """The parameters of a group, each once."""
    return params if len(set(map(id, params))) == len(params) else list(dict.fromkeys(params))


def _coalesced(
    g: torch.Tensor, group: Mapping[str, Any], refuses_sparse: str | None
) -> torch.Tensor:
    if refuses_sparse:
        raise RuntimeError(refuses_sparse)
    if not is_off(group.get("weight_decay", 0)):
        raise RuntimeError("weight_decay option is not compatible with sparse gradients")
    return g.coalesce()


def _check_dtypes(p: torch.Tensor, g: torch.Tensor) -> None:
    if not (p.is_floating_point() or p.is_complex()):
        raise TypeError(
            f"a parameter of dtype {p.dtype} has a gradient; only floating point and complex "
            "parameters can be optimized"
        )
    if g.is_complex() != p.is_complex():
        raise TypeError(f"a parameter of dtype {p.dtype} has a gradient of {g.dtype}")


def _complete(row: Row, states: list[State]) -> None:
    missing = [s for s in states if s.key not in row.state]
    if missing or "step" not in row.state:
        new = {s.key: _initial(s, row.p, row.group) for s in missing}
        if "step" not in row.state:
            new = {"step": _initial(None, row.p, row.group)} | new
        row.state = row.state | new


def _check_shapes(row: Row, states: list[State]) -> None:
    if row.g.device != row.p.device:
        raise RuntimeError(f"a parameter on {row.p.device} has a gradient on {row.g.device}")
    if row.g.shape != row.p.shape:
        raise RuntimeError(
            f"a parameter of shape {tuple(row.p.shape)} has a gradient of {tuple(row.g.shape)}"
        )
    for s in states:
        kept = row.state[s.key]
        if not s.scalar and (kept.shape != row.p.shape or kept.is_complex() != row.p.is_complex()):
            raise RuntimeError(
                f"a parameter of shape {tuple(row.p.shape)} and {row.p.dtype} has a state "
                f"{s.key} of shape {tuple(kept.shape)} and {kept.dtype}: delete "
                "optimizer.state[p] to begin anew"
            )
        if not s.scalar and kept.device != row.p.device:
            raise RuntimeError(
                f"a parameter on {row.p.device} has a state {s.key} on {kept.device}: move it "
                "there, or delete optimizer.state[p] to begin anew"
            )
    if row.group["differentiable"] and row.state["step"].requires_grad:
        raise RuntimeError("`requires_grad` is not supported for `step` in differentiable mode")
