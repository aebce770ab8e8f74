"""The result of loading a state dict with ``strict=False``."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["LoadResult"]


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
