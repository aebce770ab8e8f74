"""Workloads of the benchmark: lists of parameter shapes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["WORKLOADS", "Shape", "Workload", "read_shapes"]

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """Parameters of one optimizer.

    Attributes:
        name: one word.
        shapes: the shape of each parameter.
    """

    name: str
    shapes: tuple[Shape, ...]

    @property
    def elements(self) -> int:
        """The number of elements of all parameters."""
        return sum(map(math.prod, self.shapes))

    def __str__(self) -> str:
        plural = "" if len(self.shapes) == 1 else "s"
        return f"{self.name}: {len(self.shapes):,} tensor{plural}, {self.elements:,} elements"

    def scaled(self, factor: float) -> Workload:
        """Return as many tensors, with first dimensions multiplied by a factor, but at least 1.

        Example:
            >>> Workload("two", ((10, 3), (2,))).scaled(0.2)
            Workload(name='two x 0.2', shapes=((2, 3), (1,)))
        """
        return Workload(
            f"{self.name} x {factor:g}",
            tuple(
                (max(1, round(shape[0] * factor)), *shape[1:]) if shape else ()
                for shape in self.shapes
            ),
        )


_WIDTH = 512
_LAYER: tuple[Shape, ...] = (
    (_WIDTH,),  # layer norm before attention: weight, bias
    (_WIDTH,),
    (_WIDTH, 3 * _WIDTH),  # queries, keys and values
    (3 * _WIDTH,),
    (_WIDTH, _WIDTH),  # attention's output
    (_WIDTH,),
    (_WIDTH,),  # layer norm before the MLP
    (_WIDTH,),
    (_WIDTH, 4 * _WIDTH),
    (4 * _WIDTH,),
    (4 * _WIDTH, _WIDTH),
    (_WIDTH,),
)
#: The tensors of a GPT-2 with 12 layers of width 512: 148 tensors with 45 million elements.
_MODEL: tuple[Shape, ...] = (
    (12_992, _WIDTH),  # token embedding
    (1024, _WIDTH),  # position embedding
    *12 * _LAYER,
    (_WIDTH,),  # last layer norm
    (_WIDTH,),
)

#: The workloads by name: one bound by memory, a real model, and one bound by overhead.
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("large", ((3125, 16_000),)),
        Workload("model", _MODEL),
        Workload("small", 1000 * ((1000,),)),
    )
}


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
