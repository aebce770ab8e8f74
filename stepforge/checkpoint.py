"""Checkpoints: the state dict, and loading one without surprises.

The format is torch.optim's, so that either library continues what the other began. Loading checks
everything before it changes anything, and never aliases what it was given.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from stepforge.declare import EXECUTION_FLAGS, Hyperparameter, Rule, State
from stepforge.entries import converted, kept, mismatch, placed
from stepforge.ops import scalar_dtype
from stepforge.saving import full_precision_weights, pack, to_torch

__all__ = [
    "LoadResult",
    "Loading",
    "apply",
    "examine",
    "full_precision_weights",
    "pack",
    "to_torch",
]


class LoadResult(NamedTuple):
    """What ``load_state_dict(..., strict=False)`` did not load, as ``nn.Module`` reports it.

    Keys are ``"parameter.state"`` or ``"parameter"``, a parameter being given by its name, or by
    its number in the order of the groups; ``"param_groups[i].option"`` for a group's options.

    Attributes:
        missing_keys: expected, but not in the state dict.
        unexpected_keys: in the state dict, but of no use here.
        mismatched_keys: of another shape or kind than the parameter.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]
    mismatched_keys: list[str]

    def __repr__(self) -> str:
        if not any(self):
            return "<All keys matched successfully>"
        fields = ", ".join(f"{name}={keys!r}" for name, keys in self._asdict().items())
        return f"LoadResult({fields})"


@dataclass
class Loading:
    """What loading a state dict will do, once all of it has been checked.

    Attributes:
        state: the new state of each parameter that gets one; None removes what it has.
        extra: entries of the state that belong to no parameter.
        groups: for each param group, the options to change.
        in_place: for each param group, the options of those that are tensors to write into.
        names: for each param group, the parameters' names to adopt, or None.
        result: what does not fit.
        reasons: of what in that needs one, why it does not.
    """

    state: dict[torch.Tensor, dict[str, Any] | None] = field(default_factory=dict)
    extra: dict[Any, Any] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    in_place: list[frozenset[str]] = field(default_factory=list)
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
) -> Loading:
    """Checks a state dict against an optimizer's groups, and says what loading it will do.

    Args:
        rule: the optimizer's rule.
        groups: its param groups.
        state_dict: what is to be loaded. It is not changed, and nothing in the answer aliases it.
        strict: whether anything missing, unexpected or mismatched is an error.
        foreign: hyperparameters that only other optimizers have.

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
        loading.groups.append(options)
        tensors = [n for n in rule.hyperparameters if isinstance(group.get(n), torch.Tensor)]
        loading.in_place.append(frozenset(tensors) & options.keys())
        loading.names.append(None if by_name else _adopted_names(group, source, saved_groups))
        renewed = {**group, **options}
        for member in members:
            _examine_parameter(rule, renewed, member, state_dict["state"], loading)
    _examine_leftovers(matches, saved_groups, state_dict["state"], loading)
    if strict and any(loading.result):
        raise ValueError(_complaint(loading.result, loading.reasons))
    return loading


def apply(
    loading: Loading, groups: Sequence[dict[str, Any]], state: dict[Any, Any], *, strict: bool
) -> None:
    """Carries out what :func:`examine` found to be right."""
    changes = zip(groups, loading.groups, loading.in_place, loading.names, strict=True)
    for group, options, in_place, names in changes:
        for name, value in options.items():
            if name in in_place:
                # A tensor of the user's, which a scheduler or a captured graph may share.
                with torch.no_grad():
                    group[name].fill_(float(value))
            else:
                group[name] = value
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
    """A parameter, and where the state dict has it."""

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
        if len(group.get("param_names", group["params"])) != len(group["params"]):
            raise ValueError(
                f"param_groups[{index}] of the state dict has {len(group['params'])} parameters "
                f"but {len(group['param_names'])} names"
            )
    if not isinstance(state_dict["state"], Mapping):
        raise ValueError("'state' of the state dict is not a dict")
    return list(groups)


def _distinctly_named(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every parameter has a name and no two have the same."""
    if not all("param_names" in group for group in groups):
        return False
    names = [name for group in groups for name in group["param_names"]]
    return len(names) == len(set(names))


def _adopted_names(
    group: Mapping[str, Any],
    source: Mapping[str, Any] | None,
    saved_groups: Sequence[Mapping[str, Any]],
) -> list[str] | None:
    """The saved names, where they are complete and name just the parameters of the group."""
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
    """The saved group from which a group takes its options; None keeps those it has."""
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
        elif not declared.newer:
            result.missing_keys.append(f"param_groups[{index}].{name}")
    for state in rule.states.values():
        # A flag that adds a state is on if either has it on: the state begins where it is missing.
        if state.when in options:
            options[state.when] = options[state.when] or group[state.when]
    own = {*rule.hyperparameters, "params", "param_names"}
    for name in source:
        if name in foreign:
            result.unexpected_keys.append(f"param_groups[{index}].{name}")
        elif name not in own:
            options[name] = copy.deepcopy(source[name])
    return options


def _examine_parameter(
    rule: Rule, group: Mapping[str, Any], member: _Match, saved: Mapping[Any, Any], loading: Loading
) -> None:
    if member.saved_group is None:
        loading.result.missing_keys.append(member.label)
        return
    entry = saved.get(member.saved_id)
    if not entry:  # it had not been stepped yet
        loading.state[member.p] = None
        return
    if not isinstance(entry, Mapping):
        raise ValueError(f"the state of parameter {member.label} is not a dict")
    what = kept(rule, group, member.p)
    found: dict[str, Any] = {}
    problems = len(loading.result.missing_keys) + len(loading.result.mismatched_keys)
    for key in what.scalars:
        if key not in entry:
            loading.result.missing_keys.append(f"{member.label}.{key}")
        elif not _is_number(entry[key]):
            loading.result.mismatched_keys.append(f"{member.label}.{key}")
        else:
            found[key] = scalar_state(entry[key], member.p, group)
    for column, _, slots in what.columns():
        declared = what.states.get(column)  # None for what is kept of the parameter itself
        _examine_state(declared, slots[0].key, member, entry, found, loading)
    known = {*found, *what.scalars, *_of_any_format(rule, entry)}
    unexpected = [f"{member.label}.{key}" for key in entry if key not in known]
    loading.result.unexpected_keys.extend(unexpected)
    # Half a state is worse than none: a large step count with empty moments explodes.
    if problems == len(loading.result.missing_keys) + len(loading.result.mismatched_keys):
        found |= converted(what, member.p, found)
        loading.state[member.p] = {key: found[key] for key in what.keys if key in found}


def _examine_state(
    declared: State | None,
    key: str,
    member: _Match,
    entry: Mapping[str, Any],
    found: dict[str, Any],
    loading: Loading,
) -> None:
    """Copies a state into what was found, in the format in which it was saved."""
    label, scale = f"{member.label}.{key}", entry.get(f"{key}_scale")
    if key not in entry:
        if declared is not None and declared.when is None:
            loading.result.missing_keys.append(label)
        return
    if not _fits(entry[key], member.p):
        loading.result.mismatched_keys.append(label)
        return
    if declared is None and entry[key].dtype not in (torch.int8, torch.int16):
        loading.result.mismatched_keys.append(label)
        loading.reasons[label] = f"{key} is of {entry[key].dtype}, which must be int8 or int16"
        return
    in_codes = declared is not None and entry[key].dtype == torch.uint8
    problem = mismatch(entry[key], scale, member.p) if in_codes else None
    if problem:
        keys = loading.result.missing_keys if scale is None else loading.result.mismatched_keys
        keys.append(f"{label}_scale")
        loading.reasons[f"{label}_scale"] = f"{key} {problem}"
        return
    found[key] = placed(entry[key], member.p)
    if in_codes and scale is not None:
        found[f"{key}_scale"] = placed(scale, member.p)


def _of_any_format(rule: Rule, entry: Mapping[str, Any]) -> set[str]:
    """The keys of an entry that are right in some format: scales only beside codes."""
    states = rule.states.values()
    coded = [s.key for s in states if getattr(entry.get(s.key), "dtype", None) == torch.uint8]
    return {"low_bits", *(s.key for s in states), *(f"{key}_scale" for key in coded)}


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float))


def _fits(value: Any, p: torch.Tensor) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.shape == p.shape
        and value.is_complex() == p.is_complex()
    )


def scalar_state(value: Any, p: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
    """A scalar state, given as a number or a tensor, as an optimizer keeps it; a copy."""
    on_device = group["capturable"] or group["fused"]
    device = p.device if on_device else torch.device("cpu")
    if not isinstance(value, torch.Tensor):
        return torch.tensor(float(value), dtype=scalar_dtype(), device=device)
    return value.detach().reshape(()).to(device, copy=True)


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


def complete_options(hyperparameters: Mapping[str, Hyperparameter], group: dict[str, Any]) -> None:
    """Gives a group that was pickled by an older version the options it does not know."""
    for name, declared in hyperparameters.items():
        if name not in group or not declared.init:
            group[name] = declared.default
