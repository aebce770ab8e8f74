"""Parameters and gradients that share memory, for the tests of both generated backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

import stepforge
from tests.conformance.table import normal, outcome, run

View = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sharing:
    """Parameters that are views of one memory, and their gradients.

    Attributes:
        parameters: the views of the parameters.
        gradients: the views of the gradients; None for gradients with memory of their own.
    """

    parameters: Sequence[View]
    gradients: Sequence[View] | None = None

    def train(self, size: int) -> dict[str, torch.Tensor]:
        """Step views of a memory of ``size`` elements, and return it with all results."""
        memory = normal((size,), torch.float32, 0)
        parameters = [torch.nn.Parameter(view(memory)) for view in self.parameters]
        gradients: list[torch.Tensor | None]
        if self.gradients is None:
            gradients = [normal(p.shape, p.dtype, 1 + k) for k, p in enumerate(parameters)]
        else:
            gradients = [view(memory) for view in self.gradients]
        optimizer = stepforge.Adam(parameters, lr=0.1, weight_decay=0.1)
        run(optimizer, parameters, [gradients] * 3)
        return {"memory": memory} | numbered([outcome(optimizer, p) for p in parameters])


def from_(begin: int) -> View:
    """Return a view of all but 200 elements, from a position on."""
    return lambda memory: memory[begin : len(memory) - 200 + begin]


def half(index: int) -> View:
    return lambda memory: memory.view(2, -1)[index]


def few(memory: torch.Tensor) -> torch.Tensor:
    return memory[500:517]


def every_other(memory: torch.Tensor) -> torch.Tensor:
    return memory[::2]


def square(memory: torch.Tensor) -> torch.Tensor:
    return memory[:900].view(30, 30)


def transposed_square(memory: torch.Tensor) -> torch.Tensor:
    return square(memory).t()


SHARING = {
    "a gradient that is the parameter": Sharing([from_(0)], [from_(0)]),
    **{
        f"a gradient {shift} elements after the parameter": Sharing(
            [from_(100)], [from_(100 + shift)]
        )
        for shift in (-64, -16, -3, -1, 1, 3, 16, 64)
    },
    "a gradient that is the parameter transposed": Sharing([square], [transposed_square]),
    "gradients that are each other's parameter": Sharing([half(0), half(1)], [half(1), half(0)]),
    "one gradient for two parameters": Sharing([half(0), half(0)], [half(1), half(1)]),
    "parameters side by side": Sharing([half(0), half(1)]),
    "two parameters that are one": Sharing([from_(0), from_(0)]),
    "two parameters that overlap": Sharing([from_(0), from_(77)]),
    "two parameters that overlap the other way": Sharing([from_(77), from_(0)]),
    "a parameter in another": Sharing([from_(0), few]),
    "a parameter around another": Sharing([few, from_(0)]),
    "a parameter with gaps over one without": Sharing([every_other, from_(0)]),
    "a parameter without gaps over one with": Sharing([from_(0), every_other]),
    "two parameters with gaps": Sharing([every_other, every_other]),
    "a square and its transpose": Sharing([square, transposed_square]),
}


def numbered(outcomes: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Merge the outcomes of several parameters; names start with the parameter's index."""
    return {f"{k} {name}": x for k, found in enumerate(outcomes) for name, x in found.items()}
