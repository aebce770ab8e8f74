"""The error of storing a moment once and reading it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.low_precision.candidates import Candidate, candidates
from stepforge.formats import BLOCK, param_seed, random_uint32, step_seed

SEED = 20240229
#: The moments are averages of this many gradients.
STEPS = 10
BETA1, BETA2 = 0.9, 0.999


@dataclass(frozen=True)
class Kind:
    """A distribution of the gradients of a block.

    Attributes:
        name: its name in tables.
        meaning: its description on the page.
        scale: maps a generator and a shape to the scale of each element's gradients.
        draw: maps a generator and a shape to gradients of scale 1.
    """

    name: str
    meaning: str
    scale: Callable[[torch.Generator, tuple[int, int]], Tensor]
    draw: Callable[[torch.Generator, tuple[int, int]], Tensor]


def _normal(generator: torch.Generator, shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _equal(_: torch.Generator, shape: tuple[int, int]) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def _student(generator: torch.Generator, shape: tuple[int, int]) -> Tensor:
    # With 2 degrees of freedom: a normal divided by the root of an exponential.
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return _normal(generator, shape) / (-(1 - uniform).log()).sqrt()


def _decades(generator: torch.Generator, shape: tuple[int, int]) -> Tensor:
    return 10 ** (-6 * torch.rand(shape, generator=generator, dtype=torch.float64))


KINDS = (
    Kind("Gaussian", "all gradients of a block are of one size", _equal, _normal),
    Kind("heavy", "Student's t with 2 degrees of freedom, of infinite variance", _equal, _student),
    Kind("extreme", "sizes are log-uniform over six powers of ten", _decades, _normal),
)  # fmt: skip


@dataclass(frozen=True)
class Errors:
    """Errors of storing the moments of one kind once.

    Attributes:
        median: the median error.
        high: the 99th percentile.
        largest: the largest error.
        lost: the share of values other than zero that rounding makes zero, without the rule that
            forbids it.
    """

    median: float
    high: float
    largest: float
    lost: float

    @classmethod
    def of(cls, errors: Tensor, lost: Tensor) -> Errors:
        """Summarize the error of each value, and the mask of lost ones."""
        ordered = errors.flatten().sort().values
        median, high = (ordered[int(q * (len(ordered) - 1))].item() for q in (0.5, 0.99))
        return cls(median, high, ordered[-1].item(), lost.double().mean().item())


def measure(unsigned: bool, blocks: int) -> Iterator[tuple[Candidate, list[Errors]]]:
    """Store moments by every candidate.

    The moments are those after :data:`STEPS` steps, without bias. The error of a first moment is
    that of the update, |m' - m| over the root of v. The error of a second moment is
    |log(v' / v)| / 2, the logarithm of the factor by which the update is wrong.

    Args:
        unsigned: True for second moments.
        blocks: how many blocks of each kind.

    Yields:
        Each candidate with its errors for each of :data:`KINDS`.
    """
    shape = blocks, BLOCK
    drawn = []
    for index, kind in enumerate(KINDS):
        m, v = moments(kind, shape, SEED + index)
        random_bits = random_uint32(
            torch.Size(shape), 0, step_seed(param_seed(SEED, index), 1), torch.device("cpu")
        )
        drawn.append((m, v, random_bits))
    for candidate, may_be_zero in zip(
        candidates(unsigned), candidates(unsigned, never_zero=False), strict=True
    ):
        found = []
        for m, v, random_bits in drawn:
            x = v if unsigned else m
            read = candidate.store(x, random_bits)
            errors = (read / v).log().abs() / 2 if unsigned else (read - m).abs() / v.sqrt()
            found.append(Errors.of(errors, may_be_zero.store(x, random_bits) == 0))
        yield candidate, found


def moments(kind: Kind, shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Return the averages of gradients and of their squares, without bias."""
    generator = torch.Generator().manual_seed(seed)
    scale = kind.scale(generator, shape)
    m, v = torch.zeros(2, *shape, dtype=torch.float64)
    for _ in range(STEPS):
        g = scale * kind.draw(generator, shape)
        m, v = m + (g - m) * (1 - BETA1), v + (g * g - v) * (1 - BETA2)
    return m / (1 - BETA1**STEPS), v / (1 - BETA2**STEPS)
