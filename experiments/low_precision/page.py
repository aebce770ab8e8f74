"""The tables of docs/low-precision.md, and how they are put into its text.

The text has a place for each table, between ``<!-- name -->`` and ``<!-- end of name -->``.
"""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from low_precision.candidates import Candidate
from low_precision.errors import KINDS, Errors
from low_precision.tracking import STREAMS, Track
from low_precision.training import (
    FLOAT32,
    Arm,
    Digits,
    LanguageModel,
    Outcome,
)

PAGE = Path(__file__).parents[2] / "docs" / "low-precision.md"

Outcomes = Mapping[Any, Outcome]
Experiment = LanguageModel | Digits


def filled(text: str, tables: Mapping[str, str]) -> str:
    """A text with its tables made new.

    Args:
        text: a text with a place for each table.
        tables: what belongs there.

    Raises:
        ValueError: a table has no place, or a place no table.
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
    """A table of Markdown; the first column is text and the others are numbers."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def _marked(candidate: Candidate) -> str:
    return f"**{candidate.name}**" if candidate.chosen else candidate.name


def round_trip(found: Iterable[tuple[Candidate, Sequence[Errors]]]) -> str:
    """Errors of storing once."""

    def cell(e: Errors) -> str:
        return f"{e.median:.3f} / {e.high:.3f} / {_short(e.largest)} / {e.lost:.1%}"

    rows = [[_marked(candidate), *map(cell, errors)] for candidate, errors in found]
    return table(["", *(kind.name for kind in KINDS)], rows)


def _short(x: float) -> str:
    return f"{x:.3f}" if x < 10 else f"{x:.0f}"


def tracking(tracks: Mapping[str, Sequence[Track]]) -> str:
    """Errors of storing after every step."""
    rows = [
        [_marked(of_one[0].candidate), *(f"{track.error:.3f}" for track in of_one)]
        for of_one in zip(*tracks.values(), strict=True)
    ]
    return table(["", *tracks], rows)


def kinds() -> str:
    """What the blocks of the first table hold."""
    return "\n".join(f"- **{kind.name}**: {kind.meaning}" for kind in KINDS)


def streams() -> str:
    """What the runs of the second table average."""
    return "\n".join(
        textwrap.fill(f"- **{s.name}**: {s.meaning}", 100, subsequent_indent="  ") for s in STREAMS
    )


def machine(of: Mapping[str, str]) -> str:
    """On what all of it was measured."""
    return ", ".join(f"{name} {value}" for name, value in of.items()) + "."


def memory(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Bytes an element, by arm and optimizer."""
    optimizers = list(next(iter(found.values())))
    rows = []
    for arm, by_optimizer in found.items():
        adamw = by_optimizer["AdamW"]
        parts = [f"{adamw[name]:g}" for name in ("weight", "gradient")]
        states = [f"{by_optimizer[o]['state']:.2f}" for o in optimizers]
        rows.append([arm, *parts, *states, f"**{adamw['total']:.2f}**"])
    return table(["", "weight", "gradient", *optimizers, "all, AdamW"], rows)


def stalled(found: Mapping[str, Mapping[str, float]]) -> str:
    """Where weights are that began at 1."""
    optimizers = list(next(iter(found.values())))
    rows = [[arm, *(f"{means[o]:.4f}" for o in optimizers)] for arm, means in found.items()]
    return table(["", *optimizers], rows)


# Training. ----------------------------------------------------------------------------------------


def finals(outcomes: Outcomes, experiment: Experiment, optimizer: str, arm: Arm) -> list[float]:
    """What was measured at the end of the run of each seed."""
    return [outcomes[experiment.name, optimizer, arm.name, seed].final for seed in experiment.seeds]


def spread(outcomes: Outcomes, experiment: Experiment, optimizer: str) -> float:
    """By how much float32 differs between seeds: the largest final value less the smallest."""
    values = finals(outcomes, experiment, optimizer, FLOAT32)
    return max(values) - min(values)


def differences(
    outcomes: Outcomes, experiment: Experiment, optimizer: str, arm: Arm
) -> list[float]:
    """An arm's final values less those of float32 with the same seed."""
    pairs = zip(
        finals(outcomes, experiment, optimizer, arm),
        finals(outcomes, experiment, optimizer, FLOAT32),
        strict=True,
    )
    return [ours - reference for ours, reference in pairs]


def training(outcomes: Outcomes, experiment: Experiment, digits: int) -> str:
    """Final values: float32 and its spread, then every other arm's difference from it."""
    optimizers = experiment.optimizers
    means = [statistics.mean(finals(outcomes, experiment, o, FLOAT32)) for o in optimizers]
    spreads = [spread(outcomes, experiment, o) for o in optimizers]
    rows = [
        ["float32, mean", *(f"{x:.{digits}f}" for x in means)],
        ["float32, spread over seeds", *(f"{x:.{digits}f}" for x in spreads)],
    ]
    for arm in experiment.arms[1:]:
        found = [differences(outcomes, experiment, o, arm) for o in optimizers]
        rows.append(
            [arm.name]
            + [f"{statistics.mean(d):+.{digits}f} ({max(map(abs, d)):.{digits}f})" for d in found]
        )
    return table(["", *optimizers], rows)


def verdict(outcomes: Outcomes, experiment: Experiment) -> str:
    """Which arms are within the spread of float32, and by how much."""
    lines = []
    for arm in experiment.arms[1:]:
        ratios = {
            o: abs(statistics.mean(differences(outcomes, experiment, o, arm)))
            / spread(outcomes, experiment, o)
            for o in experiment.optimizers
        }
        worst = max(ratios, key=ratios.__getitem__)
        within = sum(ratio <= 1 for ratio in ratios.values())
        lines.append(
            f"- {arm.name}: within the spread for {within} of {len(ratios)}; at most "
            f"{ratios[worst]:.2f} of it ({worst})"
        )
    return "\n".join(lines)


def small_rate(outcomes: Outcomes, experiment: LanguageModel) -> str:
    """Final losses with a small learning rate, by seed."""
    (optimizer,) = experiment.optimizers
    rows = [
        [arm.name, *(f"{x:.4f}" for x in finals(outcomes, experiment, optimizer, arm))]
        for arm in experiment.arms
    ]
    return table(["", *(f"seed {seed}" for seed in experiment.seeds)], rows)
