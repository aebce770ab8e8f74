"""Every kernel that the built-in optimizers can ask for, as their declarations tell."""

from __future__ import annotations

import stepforge
from stepforge.backends.batch import arithmetic
from stepforge.backends.memory import columns_of
from stepforge.backends.native.source import c_source
from stepforge.backends.native.storage import NUMBERS
from stepforge.cli.measure import OPTIMIZERS

__all__ = ["sources"]


def sources() -> list[str]:
    """The C of every form of every built-in optimizer, each once.

    Parameters, gradients and states are all of one dtype, which is each that can be stored.
    """
    rules = (getattr(stepforge, name)._rule for name in OPTIMIZERS)
    graphs = [graph for rule in rules for graph in rule.graphs()]
    found = (
        c_source(graph, dict.fromkeys(columns_of(graph), dtype), arithmetic(dtype))
        for graph in graphs
        for dtype in NUMBERS
    )
    return list(dict.fromkeys(found))
