"""The result of loading a state dict: the changes to make, and the keys that do not fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

__all__ = ["LoadResult", "Loading"]


class LoadResult(NamedTuple):
    """The report of ``load_state_dict(..., strict=False)``, in the form of ``nn.Module``.

    Keys are ``"parameter.state"`` or ``"parameter"``, with the name of a parameter or its index in
    the order of the groups; or ``"param_groups[i].option"`` for an option of a group.

    Attributes:
        missing_keys: expected, but not in the state dict.
        unexpected_keys: in the state dict, but unknown here.
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
