"""What the benchmark steps: lists of shapes."""

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
    """Parameters that are stepped together.

    Attributes:
        name: one word.
        shapes: the shape of each parameter.
    """

    name: str
    shapes: tuple[Shape, ...]

    @property
    def elements(self) -> int:
        """How many elements the parameters have together."""
        return sum(map(math.prod, self.shapes))

    def __str__(self) -> str:
        plural = "" if len(self.shapes) == 1 else "s"
        return f"{self.name}: {len(self.shapes):,} tensor{plural}, {self.elements:,} elements"

    def scaled(self, factor: float) -> Workload:
        """As many tensors, with their first dimensions multiplied by a factor, but at least 1.

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
    (_WIDTH,),  # norm before attention: weight, bias
    (_WIDTH,),
    (_WIDTH, 3 * _WIDTH),  # queries, keys and values
    (3 * _WIDTH,),
    (_WIDTH, _WIDTH),  # attention's output
    (_WIDTH,),
    (_WIDTH,),  # norm before the perceptron
    (_WIDTH,),
    (_WIDTH, 4 * _WIDTH),
    (4 * _WIDTH,),
    (4 * _WIDTH, _WIDTH),
    (_WIDTH,),
)
#: GPT-2's tensors, of 12 layers that are 512 wide: 148, with 45 million elements.
_MODEL: tuple[Shape, ...] = (
    (12_992, _WIDTH),  # tokens
    (1024, _WIDTH),  # positions
    *12 * _LAYER,
    (_WIDTH,),  # last norm
    (_WIDTH,),
)

#: The workloads by name: where memory is the limit, a real model, where overhead is the limit.
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("large", ((3125, 16_000),)),
        Workload("model", _MODEL),
        Workload("small", 1000 * ((1000,),)),
    )
}


def read_shapes(path: Path) -> list[Workload]:
    """The workloads that a JSON file describes.

    Args:
        path: a list of shapes (``[[512, 64], [64]]``) or an object of shapes by their parameter's
            name, which are one workload; or an object of such lists by their workload's name.

    Raises:
        ValueError: it is none of these. The message is one sentence.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if isinstance(content, dict) and content:
        if all(_is_shape(value) for value in content.values()):
            return [_workload(path, path.stem, list(content.values()))]
        return [_workload(path, name, shapes) for name, shapes in content.items()]
    return [_workload(path, path.stem, content)]


def _workload(path: Path, name: str, shapes: Any) -> Workload:
    if not isinstance(shapes, list) or not shapes:
        raise ValueError(
            f"{path}: {name} is {_shown(shapes)}; it must be a list of shapes such as "
            "[[512, 64], [64]]."
        )
    for shape in shapes:
        if not _is_shape(shape):
            raise ValueError(
                f"{path}: {name} has the shape {_shown(shape)}; a shape is a list of whole "
                "numbers from 1 up."
            )
    return Workload(name, tuple(map(tuple, shapes)))


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size > 0 for size in value)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
