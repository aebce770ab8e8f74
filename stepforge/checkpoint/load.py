"""Loading a state dict: all of it is checked before anything changes.

Values are converted while they are checked, so that making the changes cannot fail. Nothing in an
optimizer ever aliases the state dict it was loaded from.
"""

from __future__ import annotations

import copy
import itertools
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stepforge.checkpoint.result import LoadResult
from stepforge.checkpoint.save import Lent
from stepforge.formats import Part
from stepforge.hyperparameter import EXECUTION_FLAGS, Hyperparameter
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

__all__ = ["Loading", "apply", "complete_options", "examine", "unpickled"]


@dataclass
class Loading:
    """The changes that loading a state dict will make, fully checked.

    Attributes:
        state: the new state of each parameter that gets one; None removes what it has.
        extra: the keys of ``state`` that are no parameters, with their values.
        groups: for each param group, the options to change.
        in_place: for each param group, the new values of options that are tensors.
        names: for each param group, the parameters' names to adopt, or None.
        result: the keys that do not fit.
        reasons: for some of those keys, the reason.
    """

    state: dict[torch.Tensor, dict[str, Any] | None] = field(default_factory=dict)
    extra: dict[Any, Any] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    in_place: list[dict[str, torch.Tensor]] = field(default_factory=list)
    names: list[list[str] | None] = field(default_factory=list)
    result: LoadResult = field(default_factory=lambda: LoadResult([], [], []))
    reasons: dict[str, str] = field(default_factory=dict)


def examine(
    rule: Rule,
    groups: Sequence[Mapping[str, Any]],
    state_dict: Mapping[str, Any],
    *,
    strict: bool,
    foreign: frozenset[str],
    state: Mapping[Any, Any],
    lent: Mapping[Any, Lent],
) -> Loading:
    """Check a state dict against an optimizer's groups, and return the changes to make.

    Values are converted here, so that :func:`apply` cannot fail.

    Args:
        rule: the optimizer's rule.
        groups: its param groups.
        state_dict: the state dict; not changed, and nothing in the result aliases it.
        strict: True if a missing, unexpected or mismatched key is an error.
        foreign: hyperparameters that only other optimizers have.
        state: the optimizer's state, which the state dict may alias.
        lent: the tensors that its last state dict shares, from
            :func:`~stepforge.checkpoint.save.lent`.

    Raises:
        ValueError: the state dict has another structure, a value out of its range or, if
            ``strict``, anything that does not fit.
        TypeError: a value in it is of the wrong kind.
    """
    saved_groups = _saved_groups(state_dict)
    by_name = _distinctly_named(groups) and _distinctly_named(saved_groups)
    if not by_name and strict:
        _check_sizes(groups, saved_groups)
    match = _match_by_name if by_name else _match_by_order
    matches = list(match(groups, saved_groups))
    loading = Loading()
    for index, group in enumerate(groups):
        members = [m for m in matches if m.group == index]
        source = _group_source(index, members, saved_groups, by_name, strict)
        options = _new_options(rule, index, group, source, foreign, loading.result)
        tensors = [n for n in rule.hyperparameters if isinstance(group.get(n), torch.Tensor)]
        loading.in_place.append(
            {
                name: _as_written(f"param_groups[{index}].{name}", options.pop(name), group[name])
                for name in tensors
                if name in options
            }
        )
        loading.groups.append(options)
        loading.names.append(None if by_name else _adopted_names(group, source, saved_groups))
        renewed = {**group, **options}
        for member in members:
            own, loan = state.get(member.p) or {}, lent.get(member.p)
            _examine_parameter(rule, renewed, member, state_dict["state"], loading, own, loan)
    _examine_leftovers(matches, saved_groups, state_dict["state"], loading)
    if strict and any(loading.result):
        raise ValueError(_complaint(loading.result, loading.reasons))
    return loading


def apply(
    loading: Loading, groups: Sequence[dict[str, Any]], state: dict[Any, Any], *, strict: bool
) -> None:
    """Make the changes that :func:`examine` has found. Nothing in here can fail."""
    changes = zip(groups, loading.groups, loading.in_place, loading.names, strict=True)
    for group, options, in_place, names in changes:
        for name, value in in_place.items():
            # The user's tensor, which a scheduler or a captured graph may share.
            with torch.no_grad(), torch.inference_mode(group[name].is_inference()):
                group[name].copy_(value)
        group.update(options)
        if names is not None:
            group["param_names"] = names
    if strict:
        state.clear()
    for p, entry in loading.state.items():
        if entry is None:
            state.pop(p, None)
        else:
            state[p] = entry
    state.update(loading.extra)


@dataclass(frozen=True)
class _Match:
    """A parameter, and its place in the state dict."""

    group: int
    p: torch.Tensor
    label: str
    saved_group: int | None
    saved_id: Any


def _saved_groups(state_dict: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        shown = list(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(
            f"an optimizer's state dict has 'state' and 'param_groups', but this one is {shown}"
        )
    groups = state_dict["param_groups"]
    if not isinstance(groups, (list, tuple)):
        raise ValueError(f"'param_groups' of the state dict is {groups!r}, not a list")
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(f"param_groups[{index}] of the state dict has no list of 'params'")
        if not isinstance(group.get("param_names", []), (list, tuple)):
            raise ValueError(
                f"param_groups[{index}] of the state dict has param_names "
                f"{reprlib.repr(group['param_names'])}, which must be a list"
            )
        if len(group.get("param_names", group["params"])) != len(group["params"]):
            raise ValueError(
                f"param_groups[{index}] of the state dict has {len(group['params'])} parameters "
                f"but {len(group['param_names'])} names"
            )
    if not isinstance(state_dict["state"], Mapping):
        raise ValueError("'state' of the state dict is not a dict")
    return list(groups)


def _distinctly_named(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if every parameter has a name, and all names differ."""
    if not all("param_names" in group for group in groups):
        return False
    names = [name for group in groups for name in group["param_names"]]
    return len(names) == len(set(names))


def _adopted_names(
    group: Mapping[str, Any],
    source: Mapping[str, Any] | None,
    saved_groups: Sequence[Mapping[str, Any]],
) -> list[str] | None:
    """Return the saved names, if they are complete and fit the parameters of the group."""
    if source is None or not all("param_names" in saved for saved in saved_groups):
        return None
    names = list(source["param_names"])
    return names if len(names) == len(group["params"]) else None


def _check_sizes(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]
) -> None:
    if len(groups) != len(saved_groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved_groups)}, but the optimizer has {len(groups)}"
        )
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of "
                f"optimizer's group: param_groups[{index}] has {len(saved['params'])} parameters, "
                f"but the optimizer's has {len(group['params'])}"
            )


def _match_by_order(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]
) -> Iterator[_Match]:
    number = 0
    for index, group in enumerate(groups):
        names = group.get("param_names")
        saved = saved_groups[index]["params"] if index < len(saved_groups) else []
        for position, p in enumerate(group["params"]):
            label = names[position] if names else str(number)
            number += 1
            if position < len(saved):
                yield _Match(index, p, label, index, saved[position])
            else:
                yield _Match(index, p, label, None, None)


def _match_by_name(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]
) -> Iterator[_Match]:
    saved = {
        name: (index, saved_id)
        for index, group in enumerate(saved_groups)
        for name, saved_id in zip(group["param_names"], group["params"], strict=True)
    }
    for index, group in enumerate(groups):
        for name, p in zip(group["param_names"], group["params"], strict=True):
            yield _Match(index, p, name, *saved.get(name, (None, None)))


def _group_source(
    index: int,
    members: Sequence[_Match],
    saved_groups: Sequence[Mapping[str, Any]],
    by_name: bool,
    strict: bool,
) -> Mapping[str, Any] | None:
    """Return the saved group for the options of a group; None to keep its own."""
    if not by_name or not members:
        return saved_groups[index] if index < len(saved_groups) else None
    sources = sorted({m.saved_group for m in members if m.saved_group is not None})
    if len(sources) > 1 and strict:
        raise ValueError(
            f"the parameters of param_groups[{index}] are in the groups {sources} of the state "
            "dict, which may have different options: group them alike, or pass strict=False to "
            "keep the options of this optimizer"
        )
    return saved_groups[sources[0]] if len(sources) == 1 else None


def _new_options(
    rule: Rule,
    index: int,
    group: Mapping[str, Any],
    source: Mapping[str, Any] | None,
    foreign: frozenset[str],
    result: LoadResult,
) -> dict[str, Any]:
    if source is None:
        return {}
    options: dict[str, Any] = {}
    for name, declared in rule.hyperparameters.items():
        if name in EXECUTION_FLAGS or not declared.init:
            continue
        if name in source:
            options[name] = declared.checked(copy.deepcopy(source[name]))
            if _is_without_value(declared, options[name], group.get(name)):
                raise ValueError(
                    f"param_groups[{index}].{name} of the state dict is on the device meta, where "
                    "tensors have no values"
                )
        elif not declared.optional_in_checkpoint:
            result.missing_keys.append(f"param_groups[{index}].{name}")
    for state in rule.states.values():
        # A flag that adds a state is on if either has it on: a missing state begins at zero.
        if state.when in options:
            options[state.when] = options[state.when] or group[state.when]
    own = {*rule.hyperparameters, "params", "param_names"}
    for name in source:
        if name in foreign:
            result.unexpected_keys.append(f"param_groups[{index}].{name}")
        elif name not in own:
            options[name] = copy.deepcopy(source[name])
    return options


def _is_without_value(declared: Hyperparameter, value: Any, own: Any) -> bool:
    """Return True if an option is on the meta device, and the optimizer's own is not."""
    return not getattr(own, "is_meta", False) and any(
        isinstance(x, torch.Tensor) and x.is_meta for _, x in declared.components(value)
    )


def _as_written(name: str, value: Any, own: torch.Tensor) -> torch.Tensor:
    """Round an option to the dtype of the user's tensor that it will be written to.

    Raises:
        ValueError: it would be another number there.
    """
    if own.is_meta:
        return torch.empty_like(own)
    number = float(value)
    written = torch.tensor(number, dtype=torch.float64).to(own.dtype)
    found = float(written)
    if found != number and not (own.is_floating_point() and math.isfinite(found)):
        raise ValueError(
            f"{name} of the state dict is {number}, which would be {found} in the optimizer's "
            f"tensor of {own.dtype}: give it a tensor of torch.float32, or a number"
        )
    return written.reshape(own.shape).to(own.device)


def _examine_parameter(
    rule: Rule,
    group: Mapping[str, Any],
    member: _Match,
    saved: Mapping[Any, Any],
    loading: Loading,
    own: Mapping[str, Any],
    loan: Lent | None,
) -> None:
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
    for column, _, _ in layout.columns():
        found |= (
            _low_bits_found(member.p, entry, unwritten, problems)
            if column == "p"
            else _state_found(layout.states[column], member.p, entry, unwritten, problems)
        )
    known = {*found, *layout.scalars, *_of_any_format(rule, entry)}
    unexpected = [f"{member.label}.{key}" for key in entry if key not in known]
    loading.result.unexpected_keys.extend(unexpected)
    # Half a state is worse than none: a large step count with empty moments explodes.
    if not problems.count:
        found |= converted(layout, member.p, found)
        loading.state[member.p] = {key: found[key] for key in layout.keys if key in found}


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


def _examine_leftovers(
    matches: Sequence[_Match],
    saved_groups: Sequence[Mapping[str, Any]],
    saved: Mapping[Any, Any],
    loading: Loading,
) -> None:
    used = {m.saved_id for m in matches if m.saved_group is not None}
    for group in saved_groups:
        names = group.get("param_names", group["params"])
        for name, saved_id in zip(names, group["params"], strict=True):
            if saved_id not in used:
                loading.result.unexpected_keys.append(str(name))
    in_groups = {saved_id for group in saved_groups for saved_id in group["params"]}
    for key, value in saved.items():
        if key in in_groups:
            continue
        if isinstance(key, int):
            loading.result.unexpected_keys.append(str(key))
        else:
            loading.extra[key] = copy.deepcopy(value)


def _complaint(result: LoadResult, reasons: Mapping[str, str]) -> str:
    parts = []
    for label, keys in zip(("missing", "unexpected", "of another shape or kind"), result):
        if keys:
            named = [f"{key} ({reasons[key]})" if key in reasons else key for key in keys[:5]]
            shown = ", ".join(named) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            parts.append(f"{label}: {shown}")
    return (
        f"the state dict does not fit this optimizer ({'; '.join(parts)}); nothing was loaded, "
        "pass strict=False to load what fits"
    )


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


def complete_options(hyperparameters: Mapping[str, Hyperparameter], group: dict[str, Any]) -> None:
    """Give a group from an older pickle the options that it lacks."""
    for name, declared in hyperparameters.items():
        if name not in group or not declared.init:
            group[name] = declared.default
