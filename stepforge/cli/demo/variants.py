"""The variants of an optimizer that the demo compares."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

import stepforge
from stepforge.cli.demo.side_by_side import Variant

__all__ = ["OURS", "TWIN", "VARIANTS"]


def _of(module: ModuleType, **flags: Any) -> Callable[..., torch.optim.Optimizer]:
    def make(name: str, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, getattr(module, name)(params, lr=lr, **flags))

    return make


def _fastest_of_torch(name: str, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """Make an optimizer of torch.optim with ``fused=True`` if it has it, else ``foreach=True``."""
    fused = "fused" in inspect.signature(getattr(torch.optim, name)).parameters
    return _of(torch.optim, **{"fused" if fused else "foreach": True})(name, params, lr)


OURS = Variant("ours", "stepforge, default flags", _of(stepforge))
TWIN = Variant("twin", "torch.optim, default flags", _of(torch.optim), timing_label="default flags")
#: The variants to compare. Tables and charts follow this tuple.
VARIANTS = (
    OURS,
    TWIN,
    Variant(
        "nudged",
        "the twin, started from weights one float32 unit up",
        _of(torch.optim),
        nudged=True,
    ),
    Variant(
        "fastest",
        "torch.optim, fused=True, else foreach=True; only timed",
        _fastest_of_torch,
        timing_label="fastest way",
        only_timed=True,
    ),
)
