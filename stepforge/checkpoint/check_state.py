"""Checks of one parameter's saved state."""

from __future__ import annotations

import itertools
import operator
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stepforge.checkpoint.match import Match
from stepforge.checkpoint.result import Loading
from stepforge.checkpoint.save import Lent
from stepforge.formats import Part
from stepforge.ops import scalar_dtype
from stepforge.rule import Rule, State
from stepforge.state.layout import (
    LOW_BITS,
    StateLayout,
    block_format_of,
    block_formats,
    format_keys,
    state_layout,
)
from stepforge.state.sharding import local, place_like
from stepforge.state.values import block_problem, converted, copied_in_own_format, scalar_state

__all__ = ["examine_parameter", "unpickled"]


def examine_parameter(
    rule: Rule,
    group: Mapping[str, Any],
    member: Match,
    saved: Mapping[Any, Any],
    loading: Loading,
    own: Mapping[str, Any],
    loan: Lent | None,
) -> None:
    """Check the saved state of a parameter, and enter the new state into a loading.

    Args:
        rule: the optimizer's rule.
        group: the options that the parameter's group will have.
        member: the parameter, and its place in the state dict.
        saved: the states in the state dict.
        loading: the changes to make.
        own: the parameter's state in the optimizer.
        loan: the tensors that the optimizer's last state dict shares; None if it shares none.
    """
    if member.saved_group is None:
        loading.result.missing_keys.append(member.label)
        return
    entry = saved.get(member.saved_id, {})
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"the state of parameter {member.label} is not a dict, but {reprlib.repr(entry)}"
        )
    if not entry:  # it had not been stepped yet
        loading.state[member.p] = None
        return
    layout = state_layout(rule, group, member.p)
    entry = _without_own_form(layout, entry, own)
    unwritten = loan.unwritten(entry) if loan else frozenset()
    found: dict[str, Any] = {}
    problems = _Problems(member.label, loading)
    for key in layout.scalars:
        if key not in entry:
            problems.missing(key)
        elif not problems.mismatched(key, _number_problem(key, entry[key], member.p)):
            found[key] = scalar_state(entry[key], member.p, group)
            if key == "step" and found[key].itemsize < 4:  # it would stick at 256, or 2048
                found[key] = found[key].to(scalar_dtype())
    for column, _, _ in layout.columns:
        found |= (
            _low_bits_found(member.p, entry, unwritten, problems)
            if column == "p"
            else _state_found(layout.states[column], member.p, entry, unwritten, problems)
        )
    if unused := [key for key in entry if key not in found and key not in layout.scalars]:
        known = _of_any_format(rule, entry)
        unexpected = [f"{member.label}.{key}" for key in unused if key not in known]
        loading.result.unexpected_keys.extend(unexpected)
    # Half a state is worse than none: a large step count with empty moments explodes.
    if not problems.count:
        found |= converted(layout, member.p, found)
        loading.state[member.p] = {key: found[key] for key in layout.keys if key in found}


def unpickled(
    rule: Rule, group: Mapping[str, Any], p: torch.Tensor, entry: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the state of a parameter from a pickle, whose scalar states may be numbers.

    Raises:
        ValueError: a state is neither a tensor nor a number that may stand for one.
    """
    scalars = ("step", *(s.key for s in rule.states.values() if s.scalar))
    parts = [s.key for s in rule.states.values() if not s.scalar]
    for key in (key for key in (*scalars, *parts) if key in entry):
        why: str | None = f"is {reprlib.repr(entry[key])}, which must be a tensor"
        if isinstance(entry[key], torch.Tensor):
            continue
        if key in scalars:
            why = _number_problem(key, entry[key], p)
        if why is not None:
            raise ValueError(f"the state {key} of a parameter of shape {tuple(p.shape)} {why}")
    made = {
        key: scalar_state(entry[key], p, group)
        for key in scalars
        if key in entry and not isinstance(entry[key], torch.Tensor)
    }
    return {**entry, **made}


@dataclass
class _Problems:
    """Counter of the keys of one parameter that do not fit; enters them into a loading."""

    label: str
    loading: Loading
    count: int = 0

    def missing(self, key: str, why: str | None = None) -> None:
        self.loading.result.missing_keys.append(self._entered(key, why))

    def mismatched(self, key: str, why: str | None) -> bool:
        """Enter the reason why a key does not fit; return False if it does fit."""
        if why is not None:
            self.loading.result.mismatched_keys.append(self._entered(key, why))
        return why is not None

    def _entered(self, key: str, why: str | None) -> str:
        self.count += 1
        label = f"{self.label}.{key}"
        if why is not None:
            self.loading.reasons[label] = why
        return label


_UNWRITTEN = "it was not read from the checkpoint that the step number is from"


def _low_bits_found(
    p: torch.Tensor, entry: Mapping[str, Any], unwritten: frozenset[str], problems: _Problems
) -> dict[str, torch.Tensor]:
    """Return copies of the low bits of a weight, 8 or 16."""
    keys = [key for key in LOW_BITS if key in entry]
    if len(keys) > 1:
        problems.mismatched(keys[0], f"there is {keys[1]} too: which of them is of the weight?")
        return {}
    for key in keys:
        part = Part("low", LOW_BITS[key], suffix=key)
        if problems.mismatched(key, _tensor_problem(entry[key], p, part)):
            continue
        if key in unwritten and local(entry[key]).any():  # without any the weight is as it is
            problems.missing(key, _UNWRITTEN)
            continue
        return {key: place_like(p, entry[key])}
    return {}


def _state_found(
    state: State,
    p: torch.Tensor,
    entry: Mapping[str, Any],
    unwritten: frozenset[str],
    problems: _Problems,
) -> dict[str, torch.Tensor]:
    """Return copies of the tensors of a state, in the format they were saved in."""
    codes = [format_keys(state, x)[0] for x in block_formats(state)]
    firsts = [key for key in (state.key, *codes) if key in entry]
    if len(firsts) > 1:
        problems.mismatched(firsts[0], f"there is {firsts[1]} too: which one counts?")
        return {}
    if not firsts:
        if state.when is None:
            problems.missing(state.key)
        return {}
    format_ = block_format_of(state, entry)
    parts = (Part("", p.dtype),) if format_ is None else format_.parts
    before = problems.count
    for part in parts:
        key = part.key(state.key)
        if key in unwritten:
            problems.missing(key, _UNWRITTEN)
        elif format_ is None or not part.of_block:
            problems.mismatched(key, _tensor_problem(entry[key], p, part))
        elif problems.count == before:
            why = block_problem(format_, entry[firsts[0]], entry.get(key), p)
            if why is not None and key not in entry:
                problems.missing(key, f"{state.key} {why}")
            else:
                why = f"{state.key} {why}" if why else _tensor_problem(entry[key], p, part)
                problems.mismatched(key, why)
    return {} if problems.count > before else copied_in_own_format(state, entry, p)


def _without_own_form(
    layout: StateLayout, entry: Mapping[str, Any], own: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Drop the optimizer's own tensors of a state that is also given in another format.

    ``set_optimizer_state_dict`` adds the state dict that it is given to the optimizer's own.
    """
    if not any(map(operator.is_, entry.values(), map(own.get, entry))):
        return entry
    unwanted: set[str] = set()
    for state in layout.states.values():
        forms = [{state.key}, *(set(format_keys(state, x)) for x in block_formats(state))]
        given = [form for form in forms if form & entry.keys()]
        are_own = [all(entry.get(key) is own.get(key) for key in form) for form in given]
        if any(are_own) and not all(are_own):
            unwanted.update(*itertools.compress(given, are_own))
    low = [key for key in LOW_BITS if key in entry]
    if len(low) > 1:
        unwanted |= {key for key in low if entry[key] is own.get(key)}
    return {key: x for key, x in entry.items() if key not in unwanted} if unwanted else entry


def _of_any_format(rule: Rule, entry: Mapping[str, Any]) -> set[str]:
    """Return the keys of a state that are right in some format: scales only beside codes."""
    known = set(LOW_BITS)
    for state in rule.states.values():
        known.add(state.key)
        for codes, *scales in (format_keys(state, x) for x in block_formats(state)):
            known |= {codes, *(scales if codes in entry else ())}
    return known


#: The dtypes of states with one element per element, as plain numbers.
_REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


_COMPLEX = (torch.complex128, torch.complex64)


#: The dtypes that a scalar state, such as the step count, may have been saved in.
_NUMBERS = (*_REAL, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _tensor_problem(x: Any, p: torch.Tensor, part: Part) -> str | None:
    """Say why an object cannot be a part of a state; None if it can."""
    shape = part.shape(p.shape) if p.dim() or not part.of_block else ()
    if not isinstance(x, torch.Tensor):
        return f"is {reprlib.repr(x)}, which must be a tensor of shape {shape}"
    if x.layout != torch.strided or x.is_nested:
        return f"is of layout {x.layout}, which must be torch.strided"
    if tuple(x.shape) != shape:
        return f"is of shape {tuple(x.shape)}, which must be {shape}"
    allowed = (part.dtype,) if part.suffix else _COMPLEX if p.is_complex() else _REAL
    if x.dtype not in allowed:
        return f"is of {x.dtype}, which must be {' or '.join(map(str, allowed))}"
    if x.is_meta and not p.is_meta:
        return "is on the device meta, where tensors have no values"
    if hasattr(x, "placements") and hasattr(p, "placements"):
        return _sharding_problem(x, p, part)
    return None


def _sharding_problem(x: Any, p: Any, part: Part) -> str | None:
    """Say how a DTensor is sharded differently than its parameter; None if it is not."""
    if (x.device_mesh, tuple(x.placements)) != (p.device_mesh, tuple(p.placements)):
        return (
            f"is sharded as {x.placements} on {x.device_mesh}, which must be {p.placements} on "
            f"{p.device_mesh}: stepforge.checkpoint.load_distributed reshards"
        )
    here, wanted = tuple(local(x).shape), part.shape(local(p).shape) if p.dim() else ()
    return None if here == wanted else f"has {here} here, which must be {wanted}"


def _number_problem(key: str, value: Any, p: torch.Tensor) -> str | None:
    """Say why an object cannot be a scalar state or step count; None if it can."""
    allowed = "a whole number from 0 up" if key == "step" else "a number"
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.numel() != 1 or value.dtype not in _NUMBERS:
            shown = f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
            return f"is {shown}, which must be {allowed}"
        if value.is_meta:
            return None if p.is_meta else "is on the device meta, where tensors have no values"
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"is {reprlib.repr(value)}, which must be {allowed}"
    try:
        number = float(value)
    except OverflowError:
        return f"is larger than any float, which must be {allowed}"
    if key == "step" and not (number >= 0 and number.is_integer()):
        return f"is {number}, which must be {allowed}"
    return None
