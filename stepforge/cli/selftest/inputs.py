"""Inputs of the selftest: parameters and gradients in all memory layouts, and their values.

No random generator and no function of the C library makes an input: bit patterns come from an
integer hash, so they are the same on every machine and under every version of torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from stepforge.formats import param_seed, step_seed

__all__ = ["GROUPS", "LARGE_GROUP", "CaseParam", "Group", "values"]


# Memory layouts of the same values. ---------------------------------------------------------------


def _contiguous(x: Tensor) -> Tensor:
    return x.clone()


def _unaligned(x: Tensor) -> Tensor:
    """Return a copy that begins one element after its memory does."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def _with_gaps(x: Tensor) -> Tensor:
    """Return a copy in every other element of memory."""
    return x.new_empty((*x.shape, 2))[..., 0].copy_(x)


def _transposed(x: Tensor) -> Tensor:
    """Return a copy whose first dimension has stride 1."""
    return x.t().contiguous().t()


def _expanded(x: Tensor) -> Tensor:
    """Return the first column expanded to all columns."""
    return x[:, :1].contiguous().expand(x.shape)


_Layout: TypeAlias = Callable[[Tensor], Tensor]


# Parameters. --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaseParam:
    """A parameter of a case, with its gradients.

    Attributes:
        shape: the shape of both.
        layout: the memory layout of the parameter.
        gradient_layout: the memory layout of its gradients.
        wide: True for values of every magnitude, infinities and NaN; False for ordinary ones.
    """

    shape: tuple[int, ...]
    layout: _Layout = _contiguous
    gradient_layout: _Layout = _contiguous
    wide: bool = False

    def make(self, seed: int, dtype: torch.dtype, device: torch.device) -> torch.nn.Parameter:
        """Return the parameter. It accepts gradients of any dtype."""
        x = values(self.shape, dtype, seed, wide=self.wide).to(device)
        p = torch.nn.Parameter(self.layout(x))
        p.grad_dtype = None
        return p

    def make_gradient(self, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a gradient of the parameter."""
        return self.gradient_layout(values(self.shape, dtype, seed, wide=self.wide).to(device))


#: The options of a param group, and its parameters. An optimizer gets the options that it takes.
Group: TypeAlias = tuple[Mapping[str, Any], tuple[CaseParam, ...]]

#: The param groups of every case. Both betas of the second are below one half, where a moving
#: average has another form. Only matrices of 4,096 elements or more have int8 states.
GROUPS: tuple[Group, ...] = (
    (
        {},
        (
            CaseParam((33, 130)),
            CaseParam((7, 5), _transposed, _with_gaps),
            CaseParam(()),
            CaseParam((0, 3)),
            CaseParam((257,), wide=True),
        ),
    ),
    (
        {"lr": 0.3, "betas": (0.25, 0.375), "eps": 0.0, "lr_decay": 0.5, "momentum_decay": 0.5},
        (
            CaseParam((65, 66), _transposed, _contiguous),
            CaseParam((9, 31), _unaligned, _transposed),
            CaseParam((5, 64), _with_gaps, _expanded),
        ),
    ),
    (
        {"lr": 1e30, "betas": (0.0, 0.0), "eps": 1e-30, "initial_accumulator_value": 0.1},
        (CaseParam((17, 257), wide=True), CaseParam((65,), _contiguous, _unaligned)),
    ),
)
#: A slow group for some cases only, with enough elements for several threads of a kernel.
LARGE_GROUP: Group = ({"lr": 0.01}, (CaseParam((300, 257)),))


# Values. ------------------------------------------------------------------------------------------

#: One element of a wide tensor in this many is a zero, a subnormal number, an infinity, a NaN or
#: the largest number.
_SPECIAL_EVERY = 101


@functools.cache  # one for all cases and backends
def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int, *, wide: bool) -> Tensor:
    """Return values that a seed determines bit by bit.

    Args:
        shape: the shape.
        dtype: the dtype, real or complex.
        seed: from 0 to 2**32 - 1.
        wide: True for all exponents of the dtype, with subnormal numbers, zeros, infinities and
            NaN; False for magnitudes from 2**-12 to 2**4.

    Returns:
        The same tensor object for the same arguments. It must not be modified.

    Example:
        >>> values((3,), torch.bfloat16, 1, wide=False).tolist()
        [-0.01019287109375, -0.027099609375, 0.000469207763671875]
    """
    if dtype.is_complex:
        return torch.view_as_complex(values((*shape, 2), dtype.to_real(), seed, wide=wide))
    info = torch.finfo(dtype)
    fraction_bits = round(-math.log2(info.eps))
    sign, infinity = 1 << (info.bits - 1), (1 << (info.bits - 1)) - (1 << fraction_bits)
    first = param_seed(seed, np.arange(math.prod(shape), dtype=np.int64))
    second, third = step_seed(first, 1), step_seed(first, 2)
    exponents = infinity >> fraction_bits
    exponent = first % exponents if wide else exponents // 2 - 12 + first % 16
    fraction = (second << 20 ^ third) & ((1 << fraction_bits) - 1)
    patterns = exponent << fraction_bits | fraction
    if wide:
        special = np.array([0, 1, infinity - 1, infinity, infinity | infinity >> 1])
        patterns = np.where(second % _SPECIAL_EVERY == 0, special[third % len(special)], patterns)
    patterns |= np.where(second >> 31 == 1, np.int64(-(2**63)) if info.bits == 64 else sign, 0)
    integers = patterns.astype(f"i{info.bits // 8}", casting="unsafe")
    return torch.from_numpy(integers).view(dtype).reshape(tuple(shape))
