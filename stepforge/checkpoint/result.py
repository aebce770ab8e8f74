"""The result of loading a state dict with ``strict=False``."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["LoadResult"]


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
