"""The rows of a step: every parameter that has a gradient, checked before anything changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from stepforge.backends import Choice, choose
from stepforge.declare import Rule, is_off
from stepforge.entries import Kept, Slot, completed, kept
from stepforge.expr import Graph
from stepforge.sharding import is_plain, is_sharded, local, placed_as


class Member(NamedTuple):
    """A parameter with its gradient, the options of its param group, and what state it has.

    Its number is that among all parameters of the optimizer.
    """

    number: int
    p: torch.Tensor
    g: torch.Tensor
    group: Mapping[str, Any]
    entry: dict[str, Any]


@dataclass
class Row:
    """One parameter with what a step needs of it.

    Attributes:
        number: of the parameter among all of the optimizer.
        p: the parameter.
        g: its gradient, coalesced if sparse.
        group: the options of its param group.
        graph: what is to be computed under these options.
        kept: what its entry of ``optimizer.state`` holds.
        choice: the backend that serves it.
        state: its states: its entry of ``optimizer.state`` if that is complete, else a copy with
            what was missing.
    """

    number: int
    p: torch.Tensor
    g: torch.Tensor
    group: Mapping[str, Any]
    graph: Graph
    kept: Kept
    choice: Choice
    state: dict[str, Any]


def stepping(
    groups: Iterable[Mapping[str, Any]], state: Mapping[Any, dict[str, Any]]
) -> Iterator[Member]:
    """The parameters that have a gradient, group by group, each once."""
    first = 0
    for group in groups:
        for number, p in enumerate(_distinct(group["params"]), first):
            if p.grad is not None:
                yield Member(number, p, p.grad, group, state.get(p, {}))
        first += len(group["params"])


def checked_rows(rule: Rule, members: Iterable[Member], *, refuses_sparse: str | None) -> list[Row]:
    """The rows of a step. Changes nothing.

    Args:
        rule: the optimizer's rule.
        members: what is to be stepped, the members of a group one after the other.
        refuses_sparse: what to say of a sparse gradient; None if the rule takes them.

    Raises:
        RuntimeError: a gradient is sparse and may not be, a gradient or a state has another shape
            or device than its parameter, or no backend can do what was asked for.
        ValueError: an option that was set by hand has none of the values it may have.
        TypeError: a parameter is neither real nor complex floating point.
    """
    rows: list[Row] = []
    for _, of_one_group in itertools.groupby(members, key=lambda member: id(member.group)):
        alike = list(of_one_group)
        _check_choices(rule, alike[0].group)
        graph = rule.graph(alike[0].group)
        choices: dict[Any, Choice] = {}
        shapes: dict[Any, Kept] = {}
        for number, p, g, group, entry in alike:
            alike_in_shape = p.dtype, p.shape, getattr(p, "placements", None)
            what = shapes.get(alike_in_shape) or kept(rule, group, p)
            shapes[alike_in_shape] = what
            _check_gradient(p, g)
            _check_memory(p, "parameter", p)
            _check_entry(p, what, entry)
            if g.is_sparse:
                g = _coalesced(g, group, refuses_sparse, what)
            if is_sharded(p) or is_sharded(g):
                g = placed_as(p, g)
            if g._is_zerotensor():  # autograd's zeros that are nowhere in memory
                g = g.clone()
            # All that a choice depends on: parameters alike in it are asked about once.
            kind = (p.dtype, g.dtype, p.device, g.layout, type(p), type(g), what.storage.key)
            if kind not in choices:
                _check_dtypes(p, g)
                choices[kind] = choose(p, g, group, graph, what.storage)
            state = completed(what, p, group, entry)
            if group["differentiable"] and state["step"].requires_grad:
                raise RuntimeError(
                    "`requires_grad` is not supported for `step` in differentiable mode"
                )
            rows.append(Row(number, p, g, group, graph, what, choices[kind], state))
    return rows


def keep_new_states(rows: Iterable[Row], state: MutableMapping[Any, dict[str, Any]]) -> None:
    """Enters what was missing into ``optimizer.state``."""
    for row in rows:
        entry = state.get(row.p)
        if entry is None:
            state[row.p] = row.state
        elif entry is not row.state:
            for key in entry.keys() - row.state.keys():
                del entry[key]
            entry.update(row.state)
            row.state = entry


def _distinct(params: list[torch.Tensor]) -> list[torch.Tensor]:
    """The parameters of a group, each once."""
    return params if len(set(map(id, params))) == len(params) else list(dict.fromkeys(params))


def _coalesced(
    g: torch.Tensor, group: Mapping[str, Any], refuses_sparse: str | None, what: Kept
) -> torch.Tensor:
    if refuses_sparse:
        raise RuntimeError(refuses_sparse)
    for format_ in what.storage.formats.values():
        raise RuntimeError(f"a format ({format_.name}) is not compatible with sparse gradients")
    if not is_off(group.get("weight_decay", 0)):
        raise RuntimeError("weight_decay option is not compatible with sparse gradients")
    return g.coalesce()


def _check_entry(p: torch.Tensor, what: Kept, entry: Any) -> None:
    """Raises if a state is nothing that can be computed with, as when it was set by hand."""
    if not isinstance(entry, dict):
        raise TypeError(
            f"optimizer.state of a parameter of shape {tuple(p.shape)} is {entry!r}; it must be a "
            "dict: delete optimizer.state[p] to begin anew"
        )
    for key in filter(entry.__contains__, what.keys):
        found = entry[key]
        if not isinstance(found, torch.Tensor):
            kind = repr(found)
        elif found.layout != torch.strided:
            kind = f"a tensor of layout {found.layout}"
        elif key in what.scalars and (found.numel() != 1 or _kind(found.dtype) != "real"):
            kind = f"a tensor of shape {tuple(found.shape)} and {found.dtype}"
        else:
            continue
        wanted = "a tensor of one number" if key in what.scalars else "a dense tensor"
        raise TypeError(
            f"a parameter of shape {tuple(p.shape)} has a state {key} that is {kind}; it must be "
            f"{wanted}: delete optimizer.state[p] to begin anew"
        )
    for slot in what.slots:
        if slot.key in entry:
            _check_state(p, slot, entry[slot.key])


def _check_state(p: torch.Tensor, slot: Slot, found: torch.Tensor) -> None:
    """Raises if a state is not as large as its parameter, or elsewhere, or of another kind."""
    if found.shape != slot.shape or _kind(found.dtype) != _kind(slot.part.dtype):
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} and {p.dtype} has a state {slot.key} of shape "
            f"{tuple(found.shape)} and {found.dtype}, which must be of shape {slot.shape} and "
            f"{slot.part.dtype}: delete optimizer.state[p] to begin anew"
        )
    _check_memory(p, f"state {slot.key}", found)
    if found.device != p.device:
        raise RuntimeError(
            f"a parameter on {p.device} has a state {slot.key} on {found.device}: move it there, "
            "or delete optimizer.state[p] to begin anew"
        )
    if not (is_sharded(p) or is_sharded(found)):
        return
    if local(found).shape != slot.part.shape(local(p).shape):
        raise RuntimeError(
            f"a parameter of which {tuple(local(p).shape)} is here has a state {slot.key} of which "
            f"{tuple(local(found).shape)} is: shard it as the parameter is, or delete "
            "optimizer.state[p] to begin anew"
        )


def _check_memory(p: torch.Tensor, what: str, written: torch.Tensor) -> None:
    """Raises if torch would not write to a tensor, before any other is written to."""
    if not is_plain(written) or written.layout != torch.strided:
        return
    if torch._debug_has_internal_overlap(written) == 1:
        why_not = f"has strides {written.stride()}, by which elements share memory"
    elif written.is_inference() and not torch.is_inference_mode_enabled():
        why_not = "is an inference tensor, which only inference mode writes to"
    else:
        return
    raise RuntimeError(f"a {what} of shape {tuple(p.shape)} {why_not}: clone it")


def _kind(dtype: torch.dtype) -> str:
    """Kinds of numbers of which one cannot stand for another."""
    if dtype.is_complex:
        return "complex"
    is_real = dtype.is_floating_point and dtype.itemsize > 1  # torch computes with no float8
    return "real" if is_real else str(dtype)


def _check_choices(rule: Rule, group: Mapping[str, Any]) -> None:
    """Raises if an option that has a list of values has another, set by hand."""
    for name, declared in rule.hyperparameters.items():
        if declared.choices is not None:
            declared.checked(group[name])


def _check_dtypes(p: torch.Tensor, g: torch.Tensor) -> None:
    if not (p.is_floating_point() or p.is_complex()):
        raise TypeError(
            f"a parameter of dtype {p.dtype} has a gradient; only floating point and complex "
            "parameters can be optimized"
        )
    if g.is_complex() != p.is_complex():
        raise TypeError(f"a parameter of dtype {p.dtype} has a gradient of {g.dtype}")


def _check_gradient(p: torch.Tensor, g: torch.Tensor) -> None:
    if g.device != p.device:
        raise RuntimeError(f"a parameter on {p.device} has a gradient on {g.device}")
    if g.shape != p.shape:
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} has a gradient of {tuple(g.shape)}"
        )
