"""The error of a moment that is stored after every step, over thousands of steps.

An average of squares moves by a thousandth of its distance from the new square, far less than the
step between two codes. The effect of a format on that shows only over many steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from experiments.low_precision.candidates import Candidate, candidates
from experiments.low_precision.errors import BETA1, BETA2, SEED
from stepforge.formats import BLOCK, param_seed, random_uint32, step_seed


@dataclass(frozen=True)
class Stream:
    """Gradients over a run. Each element has a size of its own, which changes.

    Attributes:
        name: its name in tables.
        meaning: its description on the page.
        spread: the standard deviation of the logarithms of the sizes.
        decades: the powers of ten over which sizes are also spread evenly.
        drift: the standard deviation of the change of the logarithms over the run.
        fall: the powers of ten by which all sizes shrink over the run.
        is_heavy: True to multiply each single gradient by a log-normal factor too.
    """

    name: str
    meaning: str
    spread: float = 0.0
    decades: float = 0.0
    drift: float = 0.0
    fall: float = 0.0
    is_heavy: bool = False


#: The fraction of a run after which sizes stay constant.
SETTLED = 0.6

STREAMS = (
    Stream("steady", "Gaussian, all of one size"),
    Stream("fading", "Gaussian, all shrinking tenfold, as training converges", fall=1),
    Stream(
        "drifting",
        "Gaussian; sizes are log-normal (one standard deviation is a factor of e), and each "
        "changes by a log-normal factor (of e^1.5)",
        spread=1,
        drift=1.5,
    ),
    Stream(
        "heavy",
        "as drifting, with sizes further apart (e^2), and each gradient log-normal by itself",
        spread=2,
        drift=1.5,
        is_heavy=True,
    ),
    Stream(
        "extreme",
        "as drifting, with sizes log-uniform over six powers of ten",
        decades=6,
        drift=1.5,
    ),
)


def gradients(stream: Stream, steps: int, elements: int, seed: int) -> Iterator[Tensor]:
    """Yield the gradients of every step, float64 of shape (elements,)."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(elements, generator=generator, dtype=torch.float64)

    below = torch.rand(elements, generator=generator, dtype=torch.float64)
    first = stream.spread * normal() - stream.decades * math.log(10) * below
    last = first + stream.drift * normal() - stream.fall * math.log(10)
    for step in range(steps):
        progress = min(1.0, step / (SETTLED * steps))
        size = torch.lerp(first, last, progress)
        yield (size + normal() if stream.is_heavy else size).exp() * normal()


@dataclass
class Track:
    """A moment that is stored after every step.

    Attributes:
        candidate: the way to store it.
        read: the values as last read back.
        errors: pairs of a step and the root mean square error after it.
        biases: pairs of a step and the mean error after it, with its sign.
    """

    candidate: Candidate
    read: Tensor
    errors: list[tuple[int, float]] = field(default_factory=list)
    biases: list[tuple[int, float]] = field(default_factory=list)

    @property
    def error(self) -> float:
        """The mean of the errors."""
        return sum(error for _, error in self.errors) / len(self.errors)


#: Errors are taken every 50 steps from step 300 on, when gradients dominate the average.
EVERY, FROM = 50, 300


def measure(
    stream: Stream,
    steps: int,
    elements: int,
    *,
    unsigned: bool,
    only: Sequence[Candidate] | None = None,
    seed: int = SEED,
) -> list[Track]:
    """Average a stream of gradients, stored by every candidate.

    Args:
        stream: the gradients.
        steps: how many steps.
        elements: the size of the moment, a multiple of 128.
        unsigned: True for the average of squares, with the error log(v' / v) / 2; False for the
            average of gradients, with the error (m' - m) over the root of v.
        only: the candidates to measure; None for all.
        seed: the seed of the gradients and of random rounding.

    Returns:
        The track of each candidate.
    """
    m, v = torch.zeros(2, elements, dtype=torch.float64)
    rate = 1 - (BETA2 if unsigned else BETA1)
    measured = candidates(unsigned) if only is None else only
    tracks = [Track(each, torch.zeros(elements, dtype=torch.float64)) for each in measured]
    for step, g in enumerate(gradients(stream, steps, elements, seed), 1):
        m, v = m + (g - m) * (1 - BETA1), v + (g * g - v) * (1 - BETA2)
        new = g * g if unsigned else g
        random_bits = random_uint32(
            g.view(-1, BLOCK).shape, 0, step_seed(param_seed(seed, 0), step), torch.device("cpu")
        )
        for track in tracks:
            moved = track.read + (new - track.read) * rate
            track.read = track.candidate.store(moved.view(-1, BLOCK), random_bits).view(-1)
        if step >= FROM and step % EVERY == 0:
            for track in tracks:
                wrong = (track.read / v).log() / 2 if unsigned else (track.read - m) / v.sqrt()
                track.errors.append((step, wrong.square().mean().sqrt().item()))
                track.biases.append((step, wrong.mean().item()))
    return tracks
