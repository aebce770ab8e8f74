"""Workloads of the benchmark: parameter shapes, and how they are stepped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from stepforge.cli.bench.arrangements import (
    CAPTURED,
    CLIPPED,
    COMPILED,
    FUSED,
    MEASURED,
    PLAIN,
    SHARDED,
    Arrangement,
    Form,
)
from stepforge.cli.dtypes import dtype_name

__all__ = [
    "DEFAULT_WORKLOADS",
    "GPU_WORKLOADS",
    "PARAM_SIZE",
    "WORKLOADS",
    "Shape",
    "Workload",
    "read_shapes",
]

Shape: TypeAlias = tuple[int, ...]

#: The standard deviation of parameters, which are random.
PARAM_SIZE = 0.01


@dataclass(frozen=True)
class Workload:
    """Parameters of one optimizer, and how they are stepped.

    Attributes:
        name: one word.
        shapes: the shape of each parameter.
        groups: the number of param groups.
        form: the form of tensors and steps.
        threads: the number of threads; None for torch's.
        steps: the consecutive steps of a round, each on fresh gradients. The caches are warm after
            the first, and the median step counts.
        dtype: the dtype of parameters and gradients.
        gradient_size: the standard deviation of gradients, which are random.
    """

    name: str
    shapes: tuple[Shape, ...]
    groups: int = 1
    form: Form = PLAIN
    threads: int | None = None
    steps: int = 1
    dtype: torch.dtype = torch.float32
    gradient_size: float = PARAM_SIZE

    @property
    def elements(self) -> int:
        """The number of elements of all parameters."""
        return sum(map(math.prod, self.shapes))

    @property
    def is_plain(self) -> bool:
        """True if it is nothing but shapes."""
        return self == Workload(self.name, self.shapes)

    @property
    def is_arranged(self) -> bool:
        """True if it has many groups, or other than plain tensors and steps."""
        return self.groups > 1 or self.form is not PLAIN

    def __str__(self) -> str:
        parts = [
            f"{_count(len(self.shapes), 'tensor')}, {self.elements:,} elements",
            f"in {self.groups:,} param groups" if self.groups > 1 else "",
            dtype_name(self.dtype) if self.dtype != torch.float32 else "",
            f"gradients of size {self.gradient_size:g}" if self.gradient_size != PARAM_SIZE else "",
            self.form.description,
            f"on {_count(self.threads, 'thread')}" if self.threads else "",
        ]
        return f"{self.name}: {', '.join(filter(None, parts))}"

    def scaled(self, factor: float) -> Workload:
        """Return as many tensors, with first dimensions multiplied by a factor, but at least 1.

        Example:
            >>> Workload("two", ((10, 3), (2,))).scaled(0.2).shapes
            ((2, 3), (1,))
        """
        shapes = tuple(
            (max(1, round(shape[0] * factor)), *shape[1:]) if shape else () for shape in self.shapes
        )
        return replace(self, name=f"{self.name} x {factor:g}", shapes=shapes)

    def split(self, groups: int) -> Workload:
        """Return the same tensors in another number of param groups.

        Example:
            >>> print(Workload("two", ((10, 3), (2,))).split(2))
            two in groups: 2 tensors, 32 elements, in 2 param groups
        """
        return replace(self, name=f"{self.name} in groups", groups=groups)

    @contextmanager
    def arranged(self) -> Iterator[Arrangement]:
        """Arrange parameters and steps for the length of a ``with`` statement.

        Within, torch has the workload's number of threads.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            with self.form.arrangement() as arrangement:
                yield replace(arrangement, groups=self.groups)
        finally:
            torch.set_num_threads(before)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _layer(width: int) -> tuple[Shape, ...]:
    """Return the 12 tensors of a layer of a GPT-2."""
    return (
        (width,),  # layer norm before attention: weight, bias
        (width,),
        (width, 3 * width),  # queries, keys and values
        (3 * width,),
        (width, width),  # attention's output
        (width,),
        (width,),  # layer norm before the MLP
        (width,),
        (width, 4 * width),
        (4 * width,),
        (4 * width, width),
        (width,),
    )


def _model(width: int, tokens: int, positions: int) -> tuple[Shape, ...]:
    """Return the 148 tensors of a GPT-2 with 12 layers."""
    return (
        (tokens, width),  # token embedding
        (positions, width),  # position embedding
        *12 * _layer(width),
        (width,),  # last layer norm
        (width,),
    )


_LARGE = ((3125, 16_000),)
_SMALL = 1000 * ((1000,),)
_TINY = 8 * ((64, 32),)
#: The workloads by name.
WORKLOADS = {
    workload.name: workload
    for workload in (
        # Bound by memory.
        Workload("large", _LARGE),
        Workload("model", _model(512, tokens=12_992, positions=1024)),
        # Bound by overhead.
        Workload("small", _SMALL),
        # A network of reinforcement learning.
        Workload("tiny", _TINY, threads=1, steps=100),
        Workload("groups", _SMALL, groups=250),
        Workload("sharded", 12 * _layer(64), form=SHARDED),
        Workload("compiled", _model(32, tokens=256, positions=64), form=COMPILED, steps=10),
        # Bound by memory, unless a GPU's kernels or its arithmetic are slower here.
        Workload("bfloat16", _LARGE, dtype=torch.bfloat16),
        # Rows of 576 elements, which is no multiple of 128.
        Workload("convolution", ((86_800, 64, 3, 3),)),
        Workload("zeros", _LARGE, gradient_size=0.0),
        # Second moments of 1e-43: the smallest normal number is 1e-38.
        Workload("denormals", _LARGE, gradient_size=1e-20),
        Workload("fused", _SMALL, form=FUSED),
        Workload("captured", _SMALL, form=CAPTURED),
        Workload("clipped", _SMALL, form=CLIPPED),
        Workload("clipped-large", _LARGE, form=CLIPPED),
        Workload("metrics", _SMALL, form=MEASURED),
        Workload("metrics-large", _LARGE, form=MEASURED),
        Workload("metrics-tiny", _TINY, threads=1, steps=100, form=MEASURED),
    )
}
#: The workloads of a run that names none: one bound by memory, a real model, and one bound by
#: overhead.
DEFAULT_WORKLOADS = ("large", "model", "small")
#: The same on a GPU, with whatever takes another path there.
GPU_WORKLOADS = (
    *DEFAULT_WORKLOADS,
    *("bfloat16", "convolution", "zeros", "denormals", "fused", "captured"),
    *("clipped", "clipped-large", "metrics", "metrics-large"),
)


def read_shapes(path: Path) -> list[Workload]:
    """Return the workloads of a JSON file.

    Args:
        path: one workload, as a list of shapes (``[[512, 64], [64]]``) or an object of shapes by
            parameter name; or several, as an object of lists of shapes by workload name.

    Raises:
        ValueError: if it is none of these. The message is one sentence.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # invalid JSON or UTF-8
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if isinstance(content, dict) and content:
        if all(_is_shape(value) for value in content.values()):
            return [_workload(path, path.stem, list(content.values()))]
        return [_workload(path, name, shapes) for name, shapes in content.items()]
    return [_workload(path, path.stem, content)]


def _workload(path: Path, name: str, shapes: Any) -> Workload:
    if not isinstance(shapes, list) or not shapes:
        raise ValueError(
            f"{path}: {name} is {_excerpt(shapes)}; it must be a list of shapes such as "
            "[[512, 64], [64]]."
        )
    for shape in shapes:
        if not _is_shape(shape):
            raise ValueError(
                f"{path}: {name} has the shape {_excerpt(shape)}; a shape is a list of whole "
                "numbers from 1 up."
            )
    return Workload(name, tuple(map(tuple, shapes)))


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size > 0 for size in value)


def _excerpt(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
