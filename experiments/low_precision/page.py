"""The generated parts of docs/low-precision.md.

The text marks each part's place by ``<!-- name -->`` and ``<!-- end of name -->``.
"""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.low_precision.candidates import Candidate
from experiments.low_precision.errors import KINDS, Errors
from experiments.low_precision.tracking import STREAMS, Track
from experiments.low_precision.training import (
    FLOAT32,
    Digits,
    LanguageModel,
    Outcome,
    Precision,
)

PAGE = Path(__file__).parents[2] / "docs" / "low-precision.md"

Outcomes = Mapping[Any, Outcome]
Experiment = LanguageModel | Digits


def filled(text: str, tables: Mapping[str, str]) -> str:
    """Return a text with its generated parts replaced.

    Args:
        text: the text, with a place for each part.
        tables: the parts, by name.

    Raises:
        ValueError: a part has no place, or a place no part.
    """
    places = re.findall(r"<!-- end of (.*?) -->", text)
    if sorted(places) != sorted(tables):
        raise ValueError(f"the text has places for {sorted(places)}, not for {sorted(tables)}")
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are figures."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def _marked(candidate: Candidate) -> str:
    return f"**{candidate.name}**" if candidate.chosen else candidate.name


def round_trip(found: Iterable[tuple[Candidate, Sequence[Errors]]]) -> str:
    """Return the table of errors of storing once."""

    def cell(e: Errors) -> str:
        return f"{e.median:.3f} / {e.high:.3f} / {_short(e.largest)} / {e.lost:.1%}"

    rows = [[_marked(candidate), *map(cell, errors)] for candidate, errors in found]
    return table(["", *(kind.name for kind in KINDS)], rows)


def _short(x: float) -> str:
    return f"{x:.3f}" if x < 10 else f"{x:.0f}"


def tracking(tracks: Mapping[str, Sequence[Track]]) -> str:
    """Return the table of errors of storing after every step."""
    rows = [
        [_marked(by_stream[0].candidate), *(f"{track.error:.3f}" for track in by_stream)]
        for by_stream in zip(*tracks.values(), strict=True)
    ]
    return table(["", *tracks], rows)


def kinds() -> str:
    """Return the list of distributions in :func:`round_trip`."""
    return "\n".join(f"- **{kind.name}**: {kind.meaning}" for kind in KINDS)


def streams() -> str:
    """Return the list of gradient streams in :func:`tracking`."""
    return "\n".join(
        textwrap.fill(f"- **{s.name}**: {s.meaning}", 100, subsequent_indent="  ") for s in STREAMS
    )


def machine(of: Mapping[str, str]) -> str:
    """Return the line that describes the machine."""
    return ", ".join(f"{name} {value}" for name, value in of.items()) + "."


def memory(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return the table of bytes per element, by precision and optimizer."""
    optimizers = list(next(iter(found.values())))
    rows = []
    for precision, by_optimizer in found.items():
        adamw = by_optimizer["AdamW"]
        parts = [f"{adamw[name]:g}" for name in ("weight", "gradient")]
        states = [f"{by_optimizer[o]['state']:.2f}" for o in optimizers]
        rows.append([precision, *parts, *states, f"**{adamw['total']:.2f}**"])
    return table(["", "weight", "gradient", *optimizers, "all, AdamW"], rows)


def stalled(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return the table of weights that began at 1."""
    optimizers = list(next(iter(found.values())))
    rows = [
        [precision, *(f"{means[o]:.4f}" for o in optimizers)] for precision, means in found.items()
    ]
    return table(["", *optimizers], rows)


# Training. ----------------------------------------------------------------------------------------


def finals(
    outcomes: Outcomes, experiment: Experiment, optimizer: str, precision: Precision
) -> list[float]:
    """Return the final value of each seed's run."""
    return [
        outcomes[experiment.name, optimizer, precision.name, seed].final
        for seed in experiment.seeds
    ]


def spread(outcomes: Outcomes, experiment: Experiment, optimizer: str) -> float:
    """Return the spread of float32 over seeds: the largest final value minus the smallest."""
    values = finals(outcomes, experiment, optimizer, FLOAT32)
    return max(values) - min(values)


def differences(
    outcomes: Outcomes, experiment: Experiment, optimizer: str, precision: Precision
) -> list[float]:
    """Return a precision's final values minus those of float32 with the same seed."""
    pairs = zip(
        finals(outcomes, experiment, optimizer, precision),
        finals(outcomes, experiment, optimizer, FLOAT32),
        strict=True,
    )
    return [ours - reference for ours, reference in pairs]


def training(outcomes: Outcomes, experiment: Experiment, digits: int) -> str:
    """Return the table of final values: float32, its spread, and differences of the others."""
    optimizers = experiment.optimizers
    means = [statistics.mean(finals(outcomes, experiment, o, FLOAT32)) for o in optimizers]
    spreads = [spread(outcomes, experiment, o) for o in optimizers]
    rows = [
        ["float32, mean", *(f"{x:.{digits}f}" for x in means)],
        ["float32, spread over seeds", *(f"{x:.{digits}f}" for x in spreads)],
    ]
    for precision in experiment.precisions[1:]:
        found = [differences(outcomes, experiment, o, precision) for o in optimizers]
        rows.append(
            [precision.name]
            + [f"{statistics.mean(d):+.{digits}f} ({max(map(abs, d)):.{digits}f})" for d in found]
        )
    return table(["", *optimizers], rows)


def verdict(outcomes: Outcomes, experiment: Experiment) -> str:
    """Return the list of differences in spreads of float32, one line per precision."""
    lines = []
    for precision in experiment.precisions[1:]:
        ratios = {
            o: abs(statistics.mean(differences(outcomes, experiment, o, precision)))
            / spread(outcomes, experiment, o)
            for o in experiment.optimizers
        }
        worst = max(ratios, key=ratios.__getitem__)
        within = sum(ratio <= 1 for ratio in ratios.values())
        lines.append(
            f"- {precision.name}: within the spread for {within} of {len(ratios)}; at most "
            f"{ratios[worst]:.2f} of it ({worst})"
        )
    return "\n".join(lines)


def small_rate(outcomes: Outcomes, experiment: LanguageModel) -> str:
    """Return the table of final losses with a small learning rate, by seed."""
    (optimizer,) = experiment.optimizers
    rows = [
        [precision.name, *(f"{x:.4f}" for x in finals(outcomes, experiment, optimizer, precision))]
        for precision in experiment.precisions
    ]
    return table(["", *(f"seed {seed}" for seed in experiment.seeds)], rows)
