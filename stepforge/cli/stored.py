"""How much faster a step is where weights or states are stored in fewer bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import stepforge
from stepforge.cli.clock import Clock, HostClock
from stepforge.cli.measure import Stepped, measure
from stepforge.cli.workloads import Workload
from stepforge.state.layout import state_layout

__all__ = ["FULL", "INT8_TARGET", "STORED", "Stored", "has_codes", "measure_stored"]


@dataclass(frozen=True)
class Stored:
    """A way to store weights and states.

    Attributes:
        name: what tables and files call it.
        dtype: the dtype of weights and gradients.
        options: the optimizer's.
    """

    name: str
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)


FULL = Stored("float32")
_INT8 = Stored("int8 states", torch.float32, {"state_format": "int8"})
#: Everything is made from this tuple: a way more is a line more.
STORED = (
    FULL,
    _INT8,
    Stored("bfloat16 states", torch.float32, {"state_format": "bfloat16"}),
    Stored(
        "bfloat16, 24 bits, int8 states",
        torch.bfloat16,
        {"master_weight_bits": 24, "state_format": "int8"},
    ),
    Stored(
        "bfloat16 at random, int8 states",
        torch.bfloat16,
        {"stochastic_rounding": True, "state_format": "int8"},
    ),
    Stored("bfloat16", torch.bfloat16),
)
#: What a step with states of 8 bits may take at most of one with float32, where memory bounds both.
INT8_TARGET = {("large", _INT8.name): 0.75}


def has_codes(workload: Workload) -> bool:
    """Whether any parameter is large enough for states of 8 bits."""
    optimizer = stepforge.Adam([torch.empty(1)])
    group = optimizer.param_groups[0] | dict(_INT8.options)
    shaped = (torch.empty(shape, device="meta") for shape in workload.shapes)
    return any(state_layout(optimizer.rule, group, p).formats for p in shaped)


def measure_stored(
    optimizer: str,
    gradients: Sequence[Tensor],
    *,
    rounds: int,
    clock: Clock | None = None,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Times every way to store, in turn.

    Args:
        optimizer: the optimizer's name.
        gradients: what each step gets fresh copies of, in the dtype of its weights.
        rounds: how many steps of each way count.
        clock: what times a step where the gradients are; the host's if None.
        tick: called after each round, also those of the warm-up.

    Returns:
        The seconds of each step, by the name of the way.
    """
    make = getattr(stepforge, optimizer)
    steppers = {}
    for way in STORED:
        params = [gradient.to(way.dtype, copy=True) for gradient in gradients]
        steppers[way.name] = Stepped(params, make(params, **way.options))
    laps = measure(steppers, gradients, rounds=rounds, clock=clock or HostClock(), tick=tick)
    return {name: [lap.seconds for lap in run] for name, run in laps.items()}
