"""The table that drives the conformance tests: optimizer x backend x dtype x format x layout.

A new optimizer, backend, dtype, format or layout is one more entry here; a backend of the library
joins by itself.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

import stepforge
from stepforge import backends
from stepforge.backends.triton.kernel import is_interpreted


@dataclass(frozen=True)
class Entry:
    """An optimizer of this library.

    Attributes:
        ours: its class.
        theirs: its twin in torch.optim.
        flags: the options, all False by default, that choose between forms of its rule.
    """

    ours: type[stepforge.Optimizer]
    theirs: type[torch.optim.Optimizer]
    flags: tuple[str, ...]


OPTIMIZERS = {
    "Adagrad": Entry(stepforge.Adagrad, torch.optim.Adagrad, ("maximize",)),
    "Adam": Entry(
        stepforge.Adam, torch.optim.Adam, ("amsgrad", "decoupled_weight_decay", "maximize")
    ),
    "AdamW": Entry(stepforge.AdamW, torch.optim.AdamW, ("amsgrad", "maximize")),
    "NAdam": Entry(stepforge.NAdam, torch.optim.NAdam, ("decoupled_weight_decay", "maximize")),
    "RAdam": Entry(stepforge.RAdam, torch.optim.RAdam, ("decoupled_weight_decay", "maximize")),
}

#: The environment in which a backend serves every parameter.
BACKENDS = {
    name: {"STEPFORGE_BACKEND": name}
    for name in backends.BACKENDS
    # Its compiled kernels serve no CPU, where this table is; tests/backends/triton takes it to
    # their device.
    if name != "triton" or is_interpreted()
}
#: Those that take microseconds for a small step. Triton's interpreter takes milliseconds, so Triton
#: is in samples of the tests only, here, in tests/backends/triton and among the examples.
FAST = [name for name in BACKENDS if name != "triton"]
#: What a user may write to choose a backend, beside writing nothing.
FLAGS: dict[str, dict[str, bool]] = {
    "default": {},
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
}

#: How weights and states are stored: the dtype of a parameter, and the options.
FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32, int8 states": (torch.float32, {"state_format": "int8"}),
    "float32, bfloat16 states": (torch.float32, {"state_format": "bfloat16"}),
    "float64, int8 states": (torch.float64, {"state_format": "int8"}),
    "float64, float32 states": (torch.float64, {"state_format": "float32"}),
    "bfloat16, float32 states": (torch.bfloat16, {"state_format": "float32"}),
    "bfloat16, 24 bits": (torch.bfloat16, {"master_weight_bits": 24}),
    "bfloat16, 32 bits, float32 states": (
        torch.bfloat16,
        {"master_weight_bits": 32, "state_format": "float32"},
    ),
    "bfloat16, 24 bits, int8 states": (
        torch.bfloat16,
        {"master_weight_bits": 24, "state_format": "int8"},
    ),
    "bfloat16 at random, int8 states": (
        torch.bfloat16,
        {"stochastic_rounding": True, "state_format": "int8"},
    ),
    "float16, 24 bits, bfloat16 states": (
        torch.float16,
        {"master_weight_bits": 24, "state_format": "bfloat16"},
    ),
    "float16, 32 bits, int8 states": (
        torch.float16,
        {"master_weight_bits": 32, "state_format": "int8"},
    ),
    "float16 at random": (torch.float16, {"stochastic_rounding": True, "rounding_seed": 7}),
}

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "complex64": torch.complex64,
}


def variants(entry: Entry) -> dict[str, dict[str, Any]]:
    """The options of every form of the rule: each flag off and on, weight decay off and on."""
    found = {}
    for decay in (0.0, 0.1):
        for values in itertools.product((False, True), repeat=len(entry.flags)):
            flags = dict(zip(entry.flags, values, strict=True))
            words = [name for name, value in flags.items() if value] + ["decay"] * bool(decay)
            found["+".join(words) or "plain"] = flags | {"weight_decay": decay}
    return found


#: (name of an optimizer, options) for every form of every rule, by id.
VARIANTS = {
    f"{name}-{variant}": (name, options)
    for name, entry in OPTIMIZERS.items()
    for variant, options in variants(entry).items()
}


@contextlib.contextmanager
def forced(backend: str) -> Iterator[None]:
    """Has that backend serve every step inside."""
    with mock.patch.dict(os.environ, STEPFORGE_BACKEND=backend):
        yield


# Layouts: the same values in other memory. Only a gradient may have one of the later three, whose
# elements share memory or are not what memory holds.


def contiguous(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy, with nothing left to be negated or conjugated."""
    return x.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def unaligned(x: torch.Tensor) -> torch.Tensor:
    """One element past the beginning of its memory."""
    return x.new_full((x.numel() + 1,), 7)[1:].view(x.shape).copy_(x)


def with_gaps(x: torch.Tensor) -> torch.Tensor:
    """A slice of a larger tensor in every dimension, and every other element of the last."""
    buffer = x.new_full((*(size + 1 for size in x.shape), 2), 7)
    return buffer[(*(slice(size) for size in x.shape), 0)].copy_(x)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The first dimension is the one whose neighbours are neighbours in memory."""
    backwards = tuple(reversed(range(x.dim())))
    return contiguous(x.permute(backwards)).permute(backwards)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """The second dimension is the one whose neighbours are neighbours in memory."""
    return contiguous(x.movedim(1, -1)).movedim(-1, 1) if x.dim() > 1 else contiguous(x)


def expanded(x: torch.Tensor) -> torch.Tensor:
    """One value, that of the first element, for all elements."""
    return contiguous(x).flatten()[:1].sum().expand(x.shape)


def repeated_rows(x: torch.Tensor) -> torch.Tensor:
    """The last dimension shares the memory of its first element."""
    return contiguous(x[..., :1]).expand(x.shape) if x.dim() and x.numel() else contiguous(x)


def lazily_negated(x: torch.Tensor) -> torch.Tensor:
    """Memory holds the negative; torch negates (for complex numbers conjugates) on reading."""
    if x.is_complex():
        return contiguous(x.conj()).conj()
    return torch._neg_view(contiguous(-x))


Layout = Callable[[torch.Tensor], torch.Tensor]
LAYOUTS: dict[str, Layout] = {
    layout.__name__: layout
    for layout in (contiguous, unaligned, with_gaps, transposed, channels_last)
}
GRADIENT_LAYOUTS: dict[str, Layout] = LAYOUTS | {
    layout.__name__: layout for layout in (expanded, repeated_rows, lazily_negated)
}


def normal(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers from the standard normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(tuple(shape), dtype=wide, generator=generator).to(dtype)


def extreme(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Finite numbers of every magnitude from float32's smallest to its largest, and zeros."""
    if dtype.is_complex:
        parts = [extreme(shape, dtype.to_real(), 2 * seed + part) for part in (0, 1)]
        return torch.complex(*parts)
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-150, 128, tuple(shape), generator=generator)
    sign = torch.randint(-1, 2, tuple(shape), generator=generator)
    fraction = 1 + torch.rand(tuple(shape), dtype=torch.float64, generator=generator)
    largest = torch.finfo(dtype).max
    return (sign * fraction * 2.0**exponent).clamp(-largest, largest).to(dtype)


def parameter(values: torch.Tensor, layout: str = "contiguous") -> torch.nn.Parameter:
    """A new parameter of those values."""
    return torch.nn.Parameter(LAYOUTS[layout](values))


#: One step's gradients, one for each parameter; None where a parameter has none.
Gradients = Sequence["torch.Tensor | None"]


def run(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    steps: Sequence[Gradients],
) -> None:
    """Steps once for each row of gradients."""
    for gradients in steps:
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        optimizer.step()


def alone(
    cls: type[stepforge.Optimizer],
    options: Mapping[str, Any],
    values: torch.Tensor,
    gradients: Gradients,
) -> dict[str, torch.Tensor]:
    """What the reference makes of one contiguous parameter, as :func:`outcome` has it."""
    p = parameter(values)
    with forced("reference"):
        optimizer = cls([p], **options)
        run(optimizer, [p], [[None if g is None else contiguous(g)] for g in gradients])
    return outcome(optimizer, p)


def outcome(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter, as ``p``, and its states by name."""
    return {"p": p.detach(), **optimizer.state.get(p, {})}


def assert_same_bits(
    got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: str = ""
) -> None:
    """Fails unless names, shapes, dtypes and bits agree; any NaN is as good as any other."""
    assert list(got) == list(wanted), where
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, (where, name)
        assert got[name].shape == tensor.shape, (where, name)
        mine, theirs = bits(got[name]), bits(tensor)
        differing = (mine != theirs).nonzero()
        assert not len(differing), (
            f"{where} {name}: {len(differing)} of {theirs.numel()} elements differ, first at "
            f"{differing[0].tolist()}: {real(got[name])[tuple(differing[0])]} instead of "
            f"{real(tensor)[tuple(differing[0])]}"
        )


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a tensor as integers, with one pattern for all NaNs."""
    x = contiguous(real(x))
    if not x.is_floating_point():
        return x
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.masked_fill(x.isnan(), math.nan).view(integer)


def real(x: torch.Tensor) -> torch.Tensor:
    """The real view of a complex tensor; any other as it is."""
    x = x.detach()
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
