"""Step times of storage formats, which store weights or states in fewer bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import stepforge
from stepforge.cli.bench.implementations import OptimizerRunner
from stepforge.cli.bench.workloads import Workload
from stepforge.cli.timing.timers import HostTimer, Timer
from stepforge.cli.timing.turns import measure
from stepforge.state.layout import state_layout

__all__ = [
    "FLOAT32",
    "INT8_TARGET",
    "STORAGE_FORMATS",
    "StorageFormat",
    "has_int8_states",
    "measure_formats",
]


@dataclass(frozen=True)
class StorageFormat:
    """A storage format of weights and states.

    Attributes:
        name: its name in tables and files.
        dtype: the dtype of weights and gradients.
        options: the optimizer's options.
    """

    name: str
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)


FLOAT32 = StorageFormat("float32")
_INT8 = StorageFormat("int8 states", torch.float32, {"state_format": "int8"})
#: The storage formats to compare. Tables and reports follow this tuple.
STORAGE_FORMATS = (
    FLOAT32,
    _INT8,
    StorageFormat("bfloat16 states", torch.float32, {"state_format": "bfloat16"}),
    StorageFormat(
        "bfloat16, 24 bits, int8 states",
        torch.bfloat16,
        {"master_weight_bits": 24, "state_format": "int8"},
    ),
    StorageFormat(
        "bfloat16 at random, int8 states",
        torch.bfloat16,
        {"stochastic_rounding": True, "state_format": "int8"},
    ),
    StorageFormat("bfloat16", torch.bfloat16),
)
#: The largest ratio of a step's time to that of a step in float32, by workload and storage format.
#: Memory bounds both.
INT8_TARGET = {("large", _INT8.name): 0.75}


def has_int8_states(workload: Workload) -> bool:
    """Return True if any parameter is large enough for int8 states."""
    optimizer = stepforge.Adam([torch.empty(1)])
    group = optimizer.param_groups[0] | dict(_INT8.options)
    params = (torch.empty(shape, device="meta") for shape in workload.shapes)
    return any(state_layout(optimizer.rule, group, p).formats for p in params)


def measure_formats(
    optimizer: str,
    gradients: Sequence[Tensor],
    *,
    rounds: int,
    timer: Timer | None = None,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time every storage format, in turn.

    Args:
        optimizer: the optimizer's name.
        gradients: the gradients. Each step gets fresh copies in the dtype of its weights.
        rounds: the number of measured steps per format.
        timer: the timer for the gradients' device; the host's if None.
        tick: called after each round, warm-up rounds included.

    Returns:
        The seconds of each step, by the format's name.
    """
    make = getattr(stepforge, optimizer)
    runners = {}
    for storage in STORAGE_FORMATS:
        params = [gradient.to(storage.dtype, copy=True) for gradient in gradients]
        runners[storage.name] = OptimizerRunner(params, make(params, **storage.options))
    times = measure(runners, gradients, rounds=rounds, timer=timer or HostTimer(), tick=tick)
    return {name: [time.seconds for time in steps] for name, steps in times.items()}
