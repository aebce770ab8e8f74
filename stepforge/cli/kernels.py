"""The kernels of the built-in optimizers: their specs and generated sources."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from stepforge.backends.native.dtypes import STORABLE
from stepforge.backends.native.source import c_source
from stepforge.backends.spec import KernelSpec, arithmetic_of
from stepforge.backends.triton.reduction_source import combine_source, pass_source
from stepforge.backends.triton.source import triton_source
from stepforge.backends.triton.variant import AMPERE, Variant, units
from stepforge.formats import int8_blocks, split_weight, tensor_name
from stepforge.rules import ALL
from stepforge.state.layout import state_layout
from stepforge.step.control import gradient_passes

__all__ = [
    "PLAIN",
    "STORAGES",
    "c_sources",
    "isa_name",
    "pass_specs",
    "spec_of_storage",
    "specs",
    "triton_sources",
]

#: The name in options and messages of the instruction set that every processor of a kind has. The
#: library names it "".
PLAIN = "plain"

#: The dtype of parameters and the options of each storage.
STORAGES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float16": (torch.float16, {}),
    "float64": (torch.float64, {}),
    "bfloat16, float32 states": (torch.bfloat16, {"state_format": "float32"}),
    "bfloat16 states": (torch.float32, {"state_format": "bfloat16"}),
    "int8": (torch.float32, {"state_format": "int8"}),
    "24 bits": (torch.bfloat16, {"master_weight_bits": 24}),
    "24 bits, int8": (torch.bfloat16, {"master_weight_bits": 24, "state_format": "int8"}),
    "32 bits, float32 states": (
        torch.bfloat16,
        {"master_weight_bits": 32, "state_format": "float32"},
    ),
    "at random, int8": (torch.bfloat16, {"stochastic_rounding": True, "state_format": "int8"}),
}


def specs() -> Iterator[KernelSpec]:
    """Yield the kernels of every built-in optimizer under every choice of its flags.

    Parameters, gradients and states all have one dtype; or states are in int8, and parameters in
    float32, or in bfloat16 with 24 bits.
    """
    forms = [(cls.rule, graph) for cls in ALL.values() for graph in cls.rule.graphs()]
    for rule, graph in forms:
        for dtype in STORABLE:
            yield KernelSpec.of(graph, dict.fromkeys(("p", "g", *rule.states), dtype))
    for rule, graph in forms:
        states = {x: int8_blocks(s.unsigned) for x, s in rule.states.items() if not s.scalar}
        for dtype, weight_formats in (
            (torch.float32, {}),
            (torch.bfloat16, {"p": split_weight(torch.bfloat16, 24)}),
        ):
            formats = states | weight_formats
            dtypes = {"p": dtype, "g": dtype} | {
                tensor_name(column, part): part.dtype
                for column, format_ in formats.items()
                for part in format_.parts
            }
            yield KernelSpec.of(graph, dtypes, formats)


def pass_specs() -> Iterator[KernelSpec]:
    """Yield the passes over gradients of each dtype that any options of an optimizer take."""
    for graph in gradient_passes():
        for dtype in STORABLE:
            yield KernelSpec.of(graph, {"g": dtype}, arithmetic=arithmetic_of(dtype))


def spec_of_storage(optimizer: str, storage: str) -> KernelSpec:
    """Return the kernel that steps matrices by an optimizer's defaults, in one of STORAGES."""
    dtype, options = STORAGES[storage]
    p = torch.zeros(64, 128, dtype=dtype)
    instance = ALL[optimizer]([p], **options)
    group = instance.param_groups[0]
    layout = state_layout(instance.rule, group, p)
    graph = instance.rule.graph(group)
    return KernelSpec.of(graph, {"g": dtype, **layout.dtypes}, layout.formats)


def c_sources() -> list[str]:
    """Return the C source of each of :func:`specs` and :func:`pass_specs`, each once."""
    return list(dict.fromkeys(map(c_source, itertools.chain(specs(), pass_specs()))))


def triton_sources() -> list[str]:
    """Return the Triton sources of :func:`specs` and :func:`pass_specs`, each once.

    This needs no Triton.

    They are for dense tensors, and for tensors of two dimensions with any strides; on a GPU of
    NVIDIA.
    """
    sources = (
        triton_source(spec, variant)
        for spec in specs()
        for variant in (
            *(Variant(unit=unit, target=AMPERE) for unit in units(spec)),
            Variant(dims=2, target=AMPERE),
        )
    )
    passes = (pass_source(spec, AMPERE) for spec in pass_specs())
    rounds = (combine_source(tuple(x.op for x in graph.reductions)) for graph in gradient_passes())
    return list(dict.fromkeys([*sources, *passes, *rounds]))


def isa_name(isa: str) -> str:
    """Return the name of an instruction set in options and messages.

    Example:
        >>> isa_name("x86-64-v3"), isa_name("")
        ('x86-64-v3', 'plain')
    """
    return isa or PLAIN
