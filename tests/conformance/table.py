"""The dimensions of the conformance tests: optimizer, backend, dtype, format and layout.

The optimizers are those of ``stepforge.rules.ALL`` and the backends those of
``stepforge.backends.BACKENDS``. A new dtype, format or layout is one more line here.
"""

from __future__ import annotations

import contextlib
import inspect
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
from stepforge.rules import ALL


@dataclass(frozen=True)
class Twins:
    """A built-in optimizer and its twin in torch.optim.

    Attributes:
        ours: the class of this library.
        theirs: the class of torch.optim.
        flags: the options, all False by default, that choose between forms of the rule.
    """

    ours: type[stepforge.Optimizer]
    theirs: type[torch.optim.Optimizer]
    flags: tuple[str, ...]

    @classmethod
    def of(cls, ours: type[stepforge.Optimizer]) -> Twins:
        """Return an optimizer and its twin, with the flags that the twin's constructor has."""
        theirs = getattr(torch.optim, ours.__name__)
        accepted = inspect.signature(theirs).parameters
        return cls(ours, theirs, tuple(flag for flag in RULE_FLAGS if flag in accepted))


#: The flags that choose between forms of a rule.
RULE_FLAGS = ("amsgrad", "decoupled_weight_decay", "maximize")
OPTIMIZERS = {name: Twins.of(cls) for name, cls in ALL.items()}

#: The environment in which a backend serves every parameter.
BACKENDS = {
    name: {"STEPFORGE_BACKEND": name}
    for name in backends.BACKENDS
    # Compiled kernels of Triton serve no CPU, and these tests run on the CPU.
    # tests/backends/triton runs such cases on a GPU.
    if name != "triton" or is_interpreted()
}
#: The backends that take microseconds for a small step. Triton's interpreter takes milliseconds, so
#: only samples of the tests run it: here, in tests/backends/triton and among the examples.
FAST = [name for name in BACKENDS if name != "triton"]
#: The arguments by which a user chooses a backend, or none.
FLAGS: dict[str, dict[str, bool]] = {
    "default": {},
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
}

#: Formats of weights and states: the dtype of a parameter, and the options.
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


def variants(twins: Twins) -> dict[str, dict[str, Any]]:
    """Return the options of each form of a rule: each flag and weight decay, off and on."""
    found = {}
    for decay in (0.0, 0.1):
        for values in itertools.product((False, True), repeat=len(twins.flags)):
            flags = dict(zip(twins.flags, values, strict=True))
            words = [name for name, value in flags.items() if value] + ["decay"] * bool(decay)
            found["+".join(words) or "plain"] = flags | {"weight_decay": decay}
    return found


#: (name of an optimizer, options) for every form of every rule, by id.
VARIANTS = {
    f"{name}-{variant}": (name, options)
    for name, twins in OPTIMIZERS.items()
    for variant, options in variants(twins).items()
}


@contextlib.contextmanager
def forced(backend: str) -> Iterator[None]:
    """Make one backend serve every step, for the length of a ``with`` statement."""
    with mock.patch.dict(os.environ, STEPFORGE_BACKEND=backend):
        yield


# Layouts: the same values in other memory. Only a gradient may have one of the last three: their
# elements share memory, or are negated or conjugated on reading.


def contiguous(x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy, with lazy negation and conjugation resolved."""
    return x.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def unaligned(x: torch.Tensor) -> torch.Tensor:
    """Return a copy that starts one element past the beginning of its memory."""
    return x.new_full((x.numel() + 1,), 7)[1:].view(x.shape).copy_(x)


def with_gaps(x: torch.Tensor) -> torch.Tensor:
    """Return a slice of a larger tensor, with unused memory between all elements."""
    buffer = x.new_full((*(size + 1 for size in x.shape), 2), 7)
    return buffer[(*(slice(size) for size in x.shape), 0)].copy_(x)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """Return a copy whose first dimension has stride 1."""
    backwards = tuple(reversed(range(x.dim())))
    return contiguous(x.permute(backwards)).permute(backwards)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """Return a copy whose second dimension has stride 1."""
    return contiguous(x.movedim(1, -1)).movedim(-1, 1) if x.dim() > 1 else contiguous(x)


def expanded(x: torch.Tensor) -> torch.Tensor:
    """Return a view in which all elements share the memory of one value, the first."""
    return contiguous(x).flatten()[:1].sum().expand(x.shape)


def repeated_rows(x: torch.Tensor) -> torch.Tensor:
    """Return a view in which the elements along the last dimension share the memory of one."""
    return contiguous(x[..., :1]).expand(x.shape) if x.dim() and x.numel() else contiguous(x)


def lazily_negated(x: torch.Tensor) -> torch.Tensor:
    """Return a view that torch negates on reading, or conjugates if the dtype is complex."""
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
    """Return values from the standard normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(tuple(shape), dtype=wide, generator=generator).to(dtype)


def extreme(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return finite values of every magnitude from float32's smallest to its largest, and zeros."""
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
    """Return a new parameter with these values in a layout."""
    return torch.nn.Parameter(LAYOUTS[layout](values))


#: The gradients of one step, one per parameter, None for a parameter without one.
Gradients = Sequence["torch.Tensor | None"]


def run(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    steps: Sequence[Gradients],
) -> None:
    """Step with each of the gradients in turn."""
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
    """Return the :func:`outcome` of one contiguous parameter, stepped alone by the reference."""
    p = parameter(values)
    with forced("reference"):
        optimizer = cls([p], **options)
        run(optimizer, [p], [[None if g is None else contiguous(g)] for g in gradients])
    return outcome(optimizer, p)


def outcome(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a parameter, as ``p``, and its states by name."""
    return {"p": p.detach(), **optimizer.state.get(p, {})}


def assert_same_bits(
    got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: str = ""
) -> None:
    """Assert that names, shapes, dtypes and bits are equal. A NaN equals any other NaN.

    Args:
        got: the tensors to check.
        wanted: the oracle's tensors.
        where: the beginning of the message of a failure.
    """
    assert list(got) == list(wanted), where
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, (where, name)
        assert got[name].shape == tensor.shape, (where, name)
        got_bits, wanted_bits = bits(got[name]), bits(tensor)
        differing = (got_bits != wanted_bits).nonzero()
        assert not len(differing), (
            f"{where} {name}: {len(differing)} of {wanted_bits.numel()} elements differ, first at "
            f"{differing[0].tolist()}: {real(got[name])[tuple(differing[0])]} instead of "
            f"{real(tensor)[tuple(differing[0])]}"
        )


def bits(x: torch.Tensor) -> torch.Tensor:
    """Return the bit patterns of a tensor as integers, with one pattern for all NaNs."""
    x = contiguous(real(x))
    if not x.is_floating_point():
        return x
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.masked_fill(x.isnan(), math.nan).view(integer)


def real(x: torch.Tensor) -> torch.Tensor:
    """Return the real view of a complex tensor; any other tensor itself."""
    x = x.detach()
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
