"""The metrics of a training run as arrays: one row per line, one column per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

__all__ = ["LAYER_METRICS", "METRICS", "Array", "Mask", "Run"]

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.floating[Any]]]"
Mask: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"

#: The numbers of a line that the report reads.
METRICS = (
    "loss",
    "grad_norm",
    "clip_factor",
    "nonfinite",
    "update_norm",
    "param_norm",
    "update_ratio",
    "lost",
    "skipped",
)
#: The numbers of each layer that it reads.
LAYER_METRICS = (
    "grad_norm",
    "nonfinite",
    "update_norm",
    "param_norm",
    "update_ratio",
    "lost",
    "lr",
)


@dataclass(frozen=True)
class Run:
    """A training run. In arrays, NaN is a number that is missing, and infinity one that overflowed.

    Attributes:
        name: the name of the file.
        steps: the steps, ascending, ``[lines]``.
        lr: the learning rates, ``[lines, groups]``.
        metrics: any of :data:`METRICS`, ``[lines]``; those that no line has are left out.
        layers: the names of the layers; a layer is one parameter.
        by_layer: any of :data:`LAYER_METRICS`, ``[lines, layers]``.
        is_stochastic: True if weights are rounded at random.
        resumed: the steps that followed a later or equal step in the file. The earlier lines of
            such steps are left out.
        remarks: sentences about the file, such as on lines that cannot be read.
    """

    name: str
    steps: np.ndarray[Any, np.dtype[np.int64]]
    lr: Array
    metrics: Mapping[str, Array] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    by_layer: Mapping[str, Array] = field(default_factory=dict)
    is_stochastic: bool = False
    resumed: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.steps)
