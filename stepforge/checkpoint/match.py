"""Matching of saved parameters and groups with those of an optimizer, by name or by order."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "Match",
    "adopted_names",
    "check_sizes",
    "distinctly_named",
    "group_source",
    "match_by_name",
    "match_by_order",
    "saved_groups_of",
]


@dataclass(frozen=True)
class Match:
    """A parameter, and its place in the state dict."""

    group: int
    p: torch.Tensor
    label: str
    saved_group: int | None
    saved_id: Any


def saved_groups_of(state_dict: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the param groups of a state dict.

    Raises:
        ValueError: it is not the state dict of an optimizer.
    """
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


def distinctly_named(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if every parameter has a name, and all names differ."""
    if not all("param_names" in group for group in groups):
        return False
    names = [name for group in groups for name in group["param_names"]]
    return len(names) == len(set(names))


def adopted_names(
    group: Mapping[str, Any],
    source: Mapping[str, Any] | None,
    saved_groups: Sequence[Mapping[str, Any]],
) -> list[str] | None:
    """Return the saved names, if they are complete and fit the parameters of the group."""
    if source is None or not all("param_names" in saved for saved in saved_groups):
        return None
    names = list(source["param_names"])
    return names if len(names) == len(group["params"]) else None


def check_sizes(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]
) -> None:
    """Raise if groups differ in number or size."""
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


def match_by_order(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]
) -> Iterator[Match]:
    """Yield each parameter, with the saved one at its place."""
    number = 0
    for index, group in enumerate(groups):
        names = group.get("param_names")
        saved = saved_groups[index]["params"] if index < len(saved_groups) else []
        for position, p in enumerate(group["params"]):
            label = names[position] if names else str(number)
            number += 1
            if position < len(saved):
                yield Match(index, p, label, index, saved[position])
            else:
                yield Match(index, p, label, None, None)


def match_by_name(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]
) -> Iterator[Match]:
    """Yield each parameter, with the saved one of its name."""
    saved = {
        name: (index, saved_id)
        for index, group in enumerate(saved_groups)
        for name, saved_id in zip(group["param_names"], group["params"], strict=True)
    }
    for index, group in enumerate(groups):
        for name, p in zip(group["param_names"], group["params"], strict=True):
            yield Match(index, p, name, *saved.get(name, (None, None)))


def group_source(
    index: int,
    members: Sequence[Match],
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
