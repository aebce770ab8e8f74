"""Hyperparameters: their types, ranges and checks."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

#: The options that choose how a step runs and how its states are stored. No rule sees them, and
#: loading a checkpoint does not change them.
EXECUTION_FLAGS = (
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "state_format",
    "master_weight_bits",
    "stochastic_rounding",
    "rounding_seed",
)


# Names that torch.optim's error messages use instead of the argument's name.
_LABELS = {"lr": "learning rate", "eps": "epsilon value"}


@dataclass(frozen=True)
class Interval:
    """The values that a hyperparameter may take: ``low <= value < high``, never NaN.

    Attributes:
        low: the smallest allowed value.
        high: the bound above; infinity allows every number from ``low`` up.
        zero_is_off: True if a value of exactly 0 switches the term off, so that it leaves no
            trace in the graph.
    """

    low: float = 0.0
    high: float = math.inf
    zero_is_off: bool = False

    def __contains__(self, value: object) -> bool:
        return bool(self.low <= value) and (self.high == math.inf or bool(value < self.high))  # type: ignore[operator]

    def __str__(self) -> str:
        return f">= {self.low:g}" + ("" if self.high == math.inf else f" and < {self.high:.10g}")


@dataclass(frozen=True)
class Hyperparameter:
    """One hyperparameter, as declared by an annotated name in a class body.

    Attributes:
        name: the constructor's argument and the param group's key.
        default: its default.
        annotation: its type, for the constructor's signature.
        interval: its range, or None for a flag.
        length: the number of components of a tuple, or None for a plain value.
        tensors: True if a one-element tensor may stand for a number.
        optional: True if a flag may also be None.
        choices: the values it may have beside None; None if it is a flag or a number.
        keyword_only: True if the constructor takes it by keyword only.
        init: False if the constructor does not take it and the default always holds.
        optional_in_checkpoint: True if checkpoints may lack it: older ones do.
    """

    name: str
    default: Any
    annotation: Any
    interval: Interval | None = None
    length: int | None = None
    tensors: bool = False
    optional: bool = False
    choices: tuple[Any, ...] | None = None
    keyword_only: bool = False
    init: bool = True
    optional_in_checkpoint: bool = False

    @property
    def static(self) -> bool:
        """True if a rule may branch on it: flags are Python values while a rule is traced."""
        return self.interval is None

    @property
    def zero_is_off(self) -> bool:
        """True if a value of exactly 0 leaves no trace in the graph."""
        return self.interval is not None and self.interval.zero_is_off

    def checked(self, value: Any) -> Any:
        """Return a value in the form that a param group keeps.

        Raises:
            ValueError: it is NaN or outside the range, or a tensor or tuple of another size.
            TypeError: it is of another kind.
        """
        if self.choices is not None:
            return self._checked_choice(value)
        if self.interval is None:
            return self._checked_flag(value)
        if self.length is None:
            return self._checked_number(value, self.name, _LABELS.get(self.name))
        if isinstance(value, (str, torch.Tensor)) or not hasattr(value, "__len__"):
            raise TypeError(
                f"{self.name} must be a tuple of {self.length} numbers {self.interval}, "
                f"but got {value!r}"
            )
        if len(value) != self.length:
            raise ValueError(
                f"{self.name} must have {self.length} components, but got {tuple(value)!r}"
            )
        singular = self.name.removesuffix("s")
        return tuple(
            _without_dimensions(
                self._checked_number(
                    component, f"{self.name}[{index}]", f"{singular} parameter at index {index}"
                )
            )
            for index, component in enumerate(value)
        )

    def components(self, value: Any) -> Iterator[tuple[str, Any]]:
        """Yield the numbers of a value, each with the name of its symbol."""
        if self.length is None:
            yield self.name, value
        else:
            yield from ((f"{self.name}[{index}]", x) for index, x in enumerate(value))

    def _checked_flag(self, value: Any) -> Any:
        if isinstance(value, bool) or (value is None and self.optional):
            return value
        if isinstance(value, numbers.Integral) and int(value) in (0, 1):
            return bool(value)
        allowed = "True, False or None" if self.optional else "True or False"
        raise TypeError(f"Invalid {self.name} value: {value!r}; it must be {allowed}")

    def _checked_choice(self, value: Any) -> Any:
        assert self.choices is not None
        for choice in (None, *self.choices):
            if type(value) is type(choice) and value == choice:
                return choice
        allowed = ", ".join(map(repr, (None, *self.choices)))
        raise ValueError(f"Invalid {self.name} value: {value!r}; it must be one of {allowed}")

    def _checked_number(self, value: Any, name: str, label: str | None) -> Any:
        assert self.interval is not None
        if isinstance(value, torch.Tensor):
            if not self.tensors:
                raise TypeError(f"{name} must be a number {self.interval}, but got a tensor")
            if value.is_complex():
                raise TypeError(f"{name} must be a number {self.interval}, but got {value!r}")
            if value.numel() != 1:
                raise ValueError(
                    f"Tensor {name} must be 1-element, but has {value.numel()} elements"
                )
            if value.is_meta:
                return value
        elif isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number {self.interval}, but got {value!r}")
        elif not _fits_a_float(value):
            raise ValueError(
                f"Invalid {label or f'{name} value'}: it is larger than any float; it must be a "
                f"number {self.interval}"
            )
        if self.annotation is int and not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be a whole number {self.interval}, but got {value!r}")
        if value not in self.interval:
            shown = value.item() if isinstance(value, torch.Tensor) else value
            raise ValueError(
                f"Invalid {label or f'{name} value'}: {shown}; it must be a number {self.interval}"
            )
        return int(value) if self.annotation is int else value


def _fits_a_float(value: Any) -> bool:
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _without_dimensions(value: Any) -> Any:
    return value.reshape(()) if isinstance(value, torch.Tensor) else value


def is_off(value: Any) -> bool:
    """Return True if a value is exactly 0; a tensor never is, since it can change."""
    return not isinstance(value, torch.Tensor) and value == 0
