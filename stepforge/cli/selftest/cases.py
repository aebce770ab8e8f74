"""Cases of the selftest: combinations of optimizer, dtypes and options."""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

import stepforge
from stepforge.cli.dtypes import DTYPES
from stepforge.cli.selftest.inputs import GROUPS, LARGE_GROUP, CaseParam
from stepforge.rules import ALL
from stepforge.state.layout import HALF_DTYPES

__all__ = ["FACTORS", "STEPS", "Case", "cases", "fits"]

#: The steps of a case. RAdam's form changes at its sixth step.
STEPS = 6

#: The choices of a case. The first of each is the default.
FACTORS: Mapping[str, tuple[Any, ...]] = {
    "optimizer": tuple(ALL),
    "dtype": DTYPES,
    "gradient": (None, torch.float32, torch.bfloat16),
    "state_format": (None, "float32", "bfloat16", "int8"),
    "weights": (None, 24, 32, "at random"),
    "weight_decay": (None, 0.1),
    "maximize": (False, True),
    "decoupled_weight_decay": (False, True),
    "amsgrad": (False, True),
}

#: A choice of each factor, or of some.
_Choices: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """An optimizer with its options and the dtypes of its parameters and gradients.

    Attributes:
        optimizer: the optimizer's name.
        dtype: the dtype of the parameters.
        gradient: the dtype of the gradients.
        options: the options that are not the default.
    """

    optimizer: str
    dtype: torch.dtype
    gradient: torch.dtype
    options: Mapping[str, Any]

    @classmethod
    def of(cls, choices: _Choices) -> Case:
        """Return the case of a choice for each of :data:`FACTORS`."""
        rest = dict(choices)
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
        """The name in tables and files."""
        words = [self.optimizer, str(self.dtype), f"gradients {self.gradient}"]
        words += [f"{key}={value}" for key, value in self.options.items()]
        return ", ".join(words).replace("torch.", "")

    def params(self) -> list[CaseParam]:
        """Return the parameters of all groups."""
        return [param for _, params in self._groups() for param in params]

    def build(self, params: Iterable[Tensor], **options: Any) -> stepforge.Optimizer:
        """Return the optimizer.

        Args:
            params: a tensor for each of :meth:`params`.
            options: further arguments of the constructor.
        """
        tensors = iter(params)
        groups = [
            {"params": list(itertools.islice(tensors, len(case_params))), **group_options}
            for group_options, case_params in self._groups()
        ]
        make = getattr(stepforge, self.optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # options without effect on a dtype
            optimizer: stepforge.Optimizer = make(groups, **self.options, **options)
        return optimizer

    def _groups(self) -> list[tuple[dict[str, Any], tuple[CaseParam, ...]]]:
        known = _arguments(self.optimizer)
        is_large = self.optimizer == "Adagrad" and self.dtype == torch.float32
        return [
            ({key: x for key, x in options.items() if key in known}, params)
            for options, params in (*GROUPS, *([LARGE_GROUP] if is_large else []))
        ]


@functools.cache
def _arguments(optimizer: str) -> frozenset[str]:
    return frozenset(inspect.signature(getattr(stepforge, optimizer)).parameters)


def fits(choices: _Choices) -> bool:
    """Return True if these choices, of all factors or of some, are compatible."""
    dtype, gradient = choices.get("dtype"), choices.get("gradient")
    optimizer = choices.get("optimizer")
    if dtype and choices.get("weights") and dtype not in HALF_DTYPES:
        return False
    if dtype and gradient and (dtype == gradient or dtype.is_complex):
        return False
    flags = ("decoupled_weight_decay", "amsgrad")
    return optimizer is None or all(x in _arguments(optimizer) for x in flags if choices.get(x))


@functools.cache
def cases() -> tuple[Case, ...]:
    """Return all cases: every optimizer in every dtype, and every compatible pair of choices.

    All combinations would be thousands, each with a kernel to compile. A fault shows with one
    choice or with a pair, seldom only with three.
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
    found: list[_Choices] = []
    for choices in itertools.chain(plain, _fill(missing)):
        found.append(choices)
        for pair in itertools.combinations(choices.items(), 2):
            missing.pop(pair, None)
    return tuple(map(Case.of, found))


def _fill(missing: Mapping[Any, None]) -> Iterator[_Choices]:
    """Yield choices for the missing pairs, each greedily with as many more missing pairs.

    Args:
        missing: the pairs. The caller removes those of a result before it takes the next.
    """
    while missing:
        choices = dict(next(iter(missing)))
        for name, options in FACTORS.items():
            if name not in choices:
                possible = [x for x in options if fits(choices | {name: x})]
                choices[name] = max(possible, key=lambda x: _gain(choices | {name: x}, missing))
        yield {name: choices[name] for name in FACTORS}


def _gain(choices: _Choices, missing: Mapping[Any, None]) -> int:
    items = [(name, choices[name]) for name in FACTORS if name in choices]
    return sum(pair in missing for pair in itertools.combinations(items, 2))
