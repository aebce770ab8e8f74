"""Loading a state dict: all of it is checked before anything changes.

Values are converted while they are checked, so that making the changes cannot fail. Nothing in an
optimizer ever aliases the state dict it was loaded from.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepforge.checkpoint.check_state import examine_parameter
from stepforge.checkpoint.match import (
    Match,
    adopted_names,
    check_sizes,
    distinctly_named,
    group_source,
    match_by_name,
    match_by_order,
    saved_groups_of,
)
from stepforge.checkpoint.result import Loading, LoadResult
from stepforge.checkpoint.save import Lent
from stepforge.hyperparameter import EXECUTION_FLAGS, Hyperparameter
from stepforge.rule import Rule

__all__ = ["apply", "complete_options", "examine"]


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
    saved_groups = saved_groups_of(state_dict)
    by_name = distinctly_named(groups) and distinctly_named(saved_groups)
    if not by_name and strict:
        check_sizes(groups, saved_groups)
    match = match_by_name if by_name else match_by_order
    matches = list(match(groups, saved_groups))
    loading = Loading()
    for index, group in enumerate(groups):
        members = [m for m in matches if m.group == index]
        source = group_source(index, members, saved_groups, by_name, strict)
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
        loading.names.append(None if by_name else adopted_names(group, source, saved_groups))
        renewed = {**group, **options}
        for member in members:
            own, loan = state.get(member.p) or {}, lent.get(member.p)
            examine_parameter(rule, renewed, member, state_dict["state"], loading, own, loan)
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


def _examine_leftovers(
    matches: Sequence[Match],
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
    """Give a group from an older pickle the options that it lacks."""
    for name, declared in hyperparameters.items():
        if name not in group or not declared.init:
            group[name] = declared.default
