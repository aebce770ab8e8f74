"""The error of a moment that is stored after every step, over thousands of steps.

An average of squares moves by a thousandth of its distance from the new square, which is far less
than the step between two codes. What the format makes of that is seen only over many steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from low_precision.candidates import Candidate, candidates
from low_precision.errors import BETA1, BETA2, SEED
from stepforge.formats import BLOCK, param_seed, random_uint32, step_seed


@dataclass(frozen=True)
class Stream:
    """Gradients over a run, of an element each of a size of its own that changes.

    Attributes:
        name: for tables.
        meaning: for people.
        spread: the standard deviation of the logarithms of the sizes.
        decades: over how many powers of ten they are spread evenly beside that.
        drift: the standard deviation of what is added to the logarithms over the run.
        fall: how many powers of ten all sizes lose over the run.
        is_heavy: whether each gradient has another size still, log-normal.
    """

    name: str
    meaning: str
    spread: float = 0.0
    decades: float = 0.0
    drift: float = 0.0
    fall: float = 0.0
    is_heavy: bool = False


#: The part of a run after which sizes change no more.
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
        "as drifting, with sizes evenly over six powers of ten",
        decades=6,
        drift=1.5,
    ),
)


def gradients(stream: Stream, steps: int, elements: int, seed: int) -> Iterator[Tensor]:
    """The gradients of every step, float64 of shape (elements,)."""
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
        candidate: how.
        read: what was read back last.
        errors: pairs of a step and the root of the mean squared error after it.
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


#: Errors are taken every so many steps, from the one on which the average is made of gradients.
EVERY, FROM = 50, 300


def measure(
    stream: Stream,
    steps: int,
    elements: int,
    *,
    unsigned: bool,
    chosen: Sequence[Candidate] | None = None,
    seed: int = SEED,
) -> list[Track]:
    """Averages a stream of gradients, stored in every way that there is.

    Args:
        stream: the gradients.
        steps: how many.
        elements: of the moment; a multiple of 128.
        unsigned: True for the average of squares, whose error is log(v' / v) / 2; False for that of
            gradients, whose error is (m' - m) over the root of v.
        chosen: the ways to store it; None for all.
        seed: of the gradients and of random rounding.

    Returns:
        What became of each.
    """
    m, v = torch.zeros(2, elements, dtype=torch.float64)
    rate = 1 - (BETA2 if unsigned else BETA1)
    ways = candidates(unsigned) if chosen is None else chosen
    tracks = [Track(candidate, torch.zeros(elements, dtype=torch.float64)) for candidate in ways]
    for step, g in enumerate(gradients(stream, steps, elements, seed), 1):
        m, v = m + (g - m) * (1 - BETA1), v + (g * g - v) * (1 - BETA2)
        new = g * g if unsigned else g
        words = random_uint32(
            g.view(-1, BLOCK).shape, 0, step_seed(param_seed(seed, 0), step), torch.device("cpu")
        )
        for track in tracks:
            moved = track.read + (new - track.read) * rate
            track.read = track.candidate.store(moved.view(-1, BLOCK), words).view(-1)
        if step >= FROM and step % EVERY == 0:
            for track in tracks:
                wrong = (track.read / v).log() / 2 if unsigned else (track.read - m) / v.sqrt()
                track.errors.append((step, wrong.square().mean().sqrt().item()))
                track.biases.append((step, wrong.mean().item()))
    return tracks
