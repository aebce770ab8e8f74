"""Every kernel that the built-in optimizers can ask for, as their declarations tell."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import stepforge
from stepforge.backends.batch import arithmetic
from stepforge.backends.memory import columns_of
from stepforge.backends.native.source import c_source
from stepforge.backends.native.storage import NUMBERS
from stepforge.cli.measure import OPTIMIZERS
from stepforge.declare import Rule
from stepforge.expr import Graph
from stepforge.formats import Format, codes, joined, tensor_name

__all__ = ["sources"]


def sources() -> list[str]:
    """The C of every form of every built-in optimizer, each once.

    Parameters, gradients and states are all of one dtype, which is each that can be stored; or
    states have 8 bits, and parameters are in float32, or in bfloat16 with 24 bits.
    """
    rules = (getattr(stepforge, name)._rule for name in OPTIMIZERS)
    forms = [(rule, graph) for rule in rules for graph in rule.graphs()]
    plain = (
        c_source(graph, dict.fromkeys(columns_of(graph), dtype), arithmetic(dtype))
        for _, graph in forms
        for dtype in NUMBERS
    )
    coded = (
        _coded(rule, graph, dtype, of_weights)
        for rule, graph in forms
        for dtype, of_weights in (
            (torch.float32, {}),
            (torch.bfloat16, {"p": joined(torch.bfloat16, 24)}),
        )
    )
    return list(dict.fromkeys([*plain, *coded]))


def _coded(rule: Rule, graph: Graph, dtype: torch.dtype, of_weights: Mapping[str, Format]) -> str:
    """The C of a form with states of 8 bits."""
    states = {letter: s for letter, s in rule.states.items() if not s.scalar}
    formats = {letter: codes(s.unsigned) for letter, s in states.items()} | dict(of_weights)
    dtypes = {"p": dtype, "g": dtype}
    for column, format_ in formats.items():
        dtypes |= {tensor_name(column, part): part.dtype for part in format_.parts}
    return c_source(graph, dtypes, arithmetic(dtype), formats)
