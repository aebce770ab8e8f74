"""The parameters of an optimizer as ``torch.compile`` has seen them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stepforge.rule import Rule
from stepforge.state.layout import state_layout

__all__ = ["TracedParams"]


@dataclass
class TracedParams:
    """The parameters of an optimizer as the compiler has seen them.

    Attributes:
        params: the parameters of all groups, in order.
        groups: the index of the group of each.
        keys: the keys of the state of each.
    """

    params: list[torch.Tensor]
    groups: list[int]
    keys: list[tuple[str, ...]]

    @classmethod
    def of(cls, rule: Rule, groups: Sequence[Mapping[str, Any]]) -> TracedParams:
        """Record the parameters of some param groups."""
        params = [p for group in groups for p in group["params"]]
        indices = [index for index, group in enumerate(groups) for _ in group["params"]]
        keys = [state_layout(rule, groups[i], p).keys for p, i in zip(params, indices)]
        return cls(params, indices, keys)

    def match(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Return True if the groups have the same parameters."""
        present = [(p, index) for index, group in enumerate(groups) for p in group["params"]]
        return len(present) == len(self.params) and all(
            p is known and index == group
            for (p, index), known, group in zip(present, self.params, self.groups)
        )
