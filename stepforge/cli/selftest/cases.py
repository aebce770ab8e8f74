"""The cases of the self-test: which options meet, and the numbers that each case steps.

No random generator and no function of the C library makes an input: bit patterns come from an
integer hash, so they are the same on every machine and under every version of torch.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

import stepforge
from stepforge.formats import param_seed, step_seed
from stepforge.rules import ALL
from stepforge.state.layout import HALF_DTYPES

__all__ = ["FACTORS", "GROUPS", "STEPS", "Case", "Member", "cases", "fits", "values"]

#: RAdam's form changes at its sixth step.
STEPS = 6

#: Choices of a case. The first of each is the default.
FACTORS: Mapping[str, tuple[Any, ...]] = {
    "optimizer": tuple(ALL),
    "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64),
    "gradient": (None, torch.float32, torch.bfloat16),
    "state_format": (None, "float32", "bfloat16", "int8"),
    "weights": (None, 24, 32, "at random"),
    "weight_decay": (None, 0.1),
    "maximize": (False, True),
    "decoupled_weight_decay": (False, True),
    "amsgrad": (False, True),
}

_Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """An optimizer with its options, and the dtypes that it steps.

    Attributes:
        optimizer: its name.
        dtype: the dtype of the parameters.
        gradient: the dtype of the gradients.
        options: the options that are not the default.
    """

    optimizer: str
    dtype: torch.dtype
    gradient: torch.dtype
    options: Mapping[str, Any]

    @classmethod
    def of(cls, row: _Row) -> Case:
        """The case of a choice for each of :data:`FACTORS`."""
        rest = dict(row)
        optimizer, dtype = rest.pop("optimizer"), rest.pop("dtype")
        gradient = rest.pop("gradient") or dtype
        weights = rest.pop("weights")
        if weights == "at random":
            rest |= {"stochastic_rounding": True, "rounding_seed": 7}
        elif weights:
            rest |= {"master_weight_bits": weights}
        return cls(optimizer, dtype, gradient, {key: x for key, x in rest.items() if x})

    @property
    def name(self) -> str:
        """Name in tables and files."""
        words = [self.optimizer, str(self.dtype), f"gradients {self.gradient}"]
        words += [f"{key}={value}" for key, value in self.options.items()]
        return ", ".join(words).replace("torch.", "")

    def members(self) -> list[Member]:
        """Its parameters."""
        return [member for _, members in self._groups() for member in members]

    def build(self, params: Iterable[Tensor], **options: Any) -> stepforge.Optimizer:
        """The optimizer of tensors for its members.

        Args:
            params: a tensor for each member.
            options: more of the constructor's.
        """
        rest = iter(params)
        groups = [
            {"params": list(itertools.islice(rest, len(members))), **of_group}
            for of_group, members in self._groups()
        ]
        make = getattr(stepforge, self.optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of options that a dtype has no use for
            optimizer: stepforge.Optimizer = make(groups, **self.options, **options)
        return optimizer

    def _groups(self) -> list[tuple[dict[str, Any], tuple[Member, ...]]]:
        known = _arguments(self.optimizer)
        threads = self.optimizer == "Adagrad" and self.dtype == torch.float32
        return [
            ({key: x for key, x in options.items() if key in known}, members)
            for options, members in (*GROUPS, *([LARGE] if threads else []))
        ]


@functools.cache
def _arguments(optimizer: str) -> frozenset[str]:
    return frozenset(inspect.signature(getattr(stepforge, optimizer)).parameters)


def fits(row: _Row) -> bool:
    """True if these choices, of all factors or of some, can stand together."""
    dtype, gradient, optimizer = row.get("dtype"), row.get("gradient"), row.get("optimizer")
    if dtype and row.get("weights") and dtype not in HALF_DTYPES:
        return False
    if dtype and gradient and (dtype == gradient or dtype.is_complex):
        return False
    flags = ("decoupled_weight_decay", "amsgrad")
    return optimizer is None or all(x in _arguments(optimizer) for x in flags if row.get(x))


@functools.cache
def cases() -> tuple[Case, ...]:
    """All cases: every optimizer in every dtype, and every two choices that fit in some case.

    All combinations would be thousands, each with a kernel to compile. A fault shows with one
    choice or with two that meet, seldom only with three.
    """
    plain = [
        {name: choices[0] for name, choices in FACTORS.items()}
        | {"optimizer": optimizer, "dtype": dtype}
        for optimizer, dtype in itertools.product(FACTORS["optimizer"], FACTORS["dtype"])
    ]
    missing = dict.fromkeys(
        pair
        for (a, xs), (b, ys) in itertools.combinations(FACTORS.items(), 2)
        for pair in itertools.product([(a, x) for x in xs], [(b, y) for y in ys])
        if fits(dict(pair))
    )
    rows: list[_Row] = []
    for row in itertools.chain(plain, _fill(missing)):
        rows.append(row)
        for pair in itertools.combinations(row.items(), 2):
            missing.pop(pair, None)
    return tuple(map(Case.of, rows))


def _fill(missing: Mapping[Any, None]) -> Iterator[_Row]:
    """Rows for the pairs that are missing, each with as many more of them as a greedy choice has.

    Args:
        missing: the pairs; those of a row are to be taken away before the next is asked for.
    """
    while missing:
        row = dict(next(iter(missing)))
        for name, choices in FACTORS.items():
            if name not in row:
                possible = [x for x in choices if fits(row | {name: x})]
                row[name] = max(possible, key=lambda x: _gain(row | {name: x}, missing))
        yield {name: row[name] for name in FACTORS}


def _gain(row: _Row, missing: Mapping[Any, None]) -> int:
    items = [(name, row[name]) for name in FACTORS if name in row]
    return sum(pair in missing for pair in itertools.combinations(items, 2))


# Parameters: the same values in other memory.


def _contiguous(x: Tensor) -> Tensor:
    return x.clone()


def _unaligned(x: Tensor) -> Tensor:
    """One element past the beginning of its memory."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def _with_gaps(x: Tensor) -> Tensor:
    """Every other element of memory."""
    return x.new_empty((*x.shape, 2))[..., 0].copy_(x)


def _transposed(x: Tensor) -> Tensor:
    """The first dimension is the one whose neighbours are neighbours in memory."""
    return x.t().contiguous().t()


def _expanded(x: Tensor) -> Tensor:
    """The first column for all columns, in the memory of one."""
    return x[:, :1].contiguous().expand(x.shape)


_Layout: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Member:
    """A parameter of a case, and its gradients.

    Attributes:
        shape: the shape of both.
        layout: how the parameter lies in memory.
        of_gradient: how its gradients do.
        wide: True for numbers of every magnitude, infinities and NaN; False for ordinary ones.
    """

    shape: tuple[int, ...]
    layout: _Layout = _contiguous
    of_gradient: _Layout = _contiguous
    wide: bool = False

    def parameter(self, seed: int, dtype: torch.dtype, device: torch.device) -> torch.nn.Parameter:
        """The parameter, which takes gradients of any dtype."""
        x = values(self.shape, dtype, seed, wide=self.wide).to(device)
        p = torch.nn.Parameter(self.layout(x))
        p.grad_dtype = None
        return p

    def gradient(self, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A gradient of it."""
        return self.of_gradient(values(self.shape, dtype, seed, wide=self.wide).to(device))


_Group: TypeAlias = tuple[Mapping[str, Any], tuple[Member, ...]]

#: The param groups of every case: options, of which an optimizer gets those it takes, and members.
#: Both betas of the second are below one half, where a moving average has another form. States of 8
#: bits are for matrices of 4,096 elements or more.
GROUPS: tuple[_Group, ...] = (
    (
        {},
        (
            Member((33, 130)),
            Member((7, 5), _transposed, _with_gaps),
            Member(()),
            Member((0, 3)),
            Member((257,), wide=True),
        ),
    ),
    (
        {"lr": 0.3, "betas": (0.25, 0.375), "eps": 0.0, "lr_decay": 0.5, "momentum_decay": 0.5},
        (
            Member((65, 66), _transposed, _contiguous),
            Member((9, 31), _unaligned, _transposed),
            Member((5, 64), _with_gaps, _expanded),
        ),
    ),
    (
        {"lr": 1e30, "betas": (0.0, 0.0), "eps": 1e-30, "initial_accumulator_value": 0.1},
        (Member((17, 257), wide=True), Member((65,), _contiguous, _unaligned)),
    ),
)
#: A group of some cases only, as it takes long: enough elements for several threads of a kernel.
LARGE: _Group = ({"lr": 0.01}, (Member((300, 257)),))


# Values.

#: Of a wide tensor, one element of so many is none of the usual numbers.
_RARE = 101


@functools.cache  # one for all cases and backends
def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int, *, wide: bool) -> Tensor:
    """Numbers of a dtype that follow from a seed, bit by bit.

    Args:
        shape: the shape.
        dtype: the dtype, complex ones included.
        seed: from 0 up and below 2**32.
        wide: True for every exponent that the dtype has, subnormal numbers, zeros, infinities and
            NaN among them; False for sizes from 2**-12 to 2**4.

    Returns:
        The same tensor for the same arguments: not to be written to.

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
    words = exponent << fraction_bits | fraction
    if wide:
        special = np.array([0, 1, infinity - 1, infinity, infinity | infinity >> 1])
        words = np.where(second % _RARE == 0, special[third % len(special)], words)
    words |= np.where(second >> 31 == 1, np.int64(-(2**63)) if info.bits == 64 else sign, 0)
    integers = words.astype(f"i{info.bits // 8}", casting="unsafe")
    return torch.from_numpy(integers).view(dtype).reshape(tuple(shape))
