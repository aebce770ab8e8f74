"""Targets of the benchmark: ratios of step times that stepforge is to reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from stepforge.rules import ALL

__all__ = [
    "FIRST_STEP_TARGET",
    "GPU_TARGETS",
    "GROUPS_TARGET",
    "TARGETS",
    "Ratios",
    "Targets",
]


@dataclass(frozen=True)
class Ratios:
    """The speed of an implementation as ratios of median times; higher is better.

    A ratio is None if it is unknown. A target is None if none is stated.

    Attributes:
        of_limit: its share of the limit's speed.
        against_best: its speed relative to the fastest implementation of torch.optim.
        against_default: its speed relative to torch.optim with default flags.
    """

    of_limit: float | None
    against_best: float | None
    against_default: float | None

    def reached(self, target: Ratios) -> dict[str, bool | None]:
        """Return for each ratio True if it is at least the target's; None if either is None."""
        return {
            name: None if value is None or minimum is None else value >= minimum
            for (name, value), minimum in zip(vars(self).items(), vars(target).values())
        }


#: The target ratios by workload and optimizer, for whole workloads only.
Targets: TypeAlias = Mapping[tuple[str, str], Ratios]

# Against torch's kernel for all tensors the target is parity, as memory bounds both.
_WITH_FUSED = ("Adagrad", "Adam", "AdamW")

#: The target ratios on a CPU.
TARGETS: Targets = {
    (workload, optimizer): Ratios(
        of_limit,
        fused if optimizer in _WITH_FUSED else foreach,
        adagrad if optimizer == "Adagrad" else default,
    )
    for workload, of_limit, fused, foreach, default, adagrad in (
        ("large", 0.88, 1.0, 4.0, 4.0, 4.0),
        ("model", 0.80, 1.0, 3.0, 2.5, 2.5),
        ("small", None, 8.0, 8.0, 20.0, 12.0),
    )
    for optimizer in ALL
}
#: The largest ratio of the time of many param groups to the time of one, on a CPU.
GROUPS_TARGET = 1.3
#: The largest difference between the first and the second step on a CPU, in seconds.
FIRST_STEP_TARGET = 0.2

_GPU_LARGE = {
    # Memory bounds both, as on a CPU.
    "AdamW": Ratios(0.85, 1.0, None),
    # torch.optim's best makes a pass over memory for each operation.
    **dict.fromkeys(("Adagrad", "NAdam", "RAdam"), Ratios(None, 3.0, None)),
}
#: The target ratios on a GPU.
GPU_TARGETS: Targets = {
    **{("large", optimizer): ratios for optimizer, ratios in _GPU_LARGE.items()},
    **{("small", optimizer): Ratios(None, 2.0, None) for optimizer in ALL},
}
