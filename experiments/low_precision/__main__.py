"""Measure the cost of low precision, and write tables and pictures to docs/low-precision.md.

    python -m experiments.low_precision            # three minutes
    python -m experiments.low_precision --retrain  # twenty minutes more

Training takes by far the longest, so results.json keeps its results, and only runs that it lacks
are trained. All else is measured each time. Everything is deterministic.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from experiments.low_precision import errors, memory, page, pictures, stall, tracking, training
from experiments.low_precision.page import PAGE
from experiments.low_precision.tracking import Track
from experiments.low_precision.training import DIGITS, LANGUAGE, RESULTS, SMALL_RATE, Outcome

#: Sizes of the measurements: blocks stored once; steps and elements of averages; steps of weights
#: that start at 1.
BLOCKS, STEPS, ELEMENTS, STALL_STEPS = 1000, 3000, 2048, 100


def tracks(unsigned: bool, steps: int, elements: int) -> dict[str, Sequence[Track]]:
    """Return the tracks of a moment of each stream of gradients, by the name of the stream."""
    return {
        stream.name: tracking.measure(stream, steps, elements, unsigned=unsigned)
        for stream in tracking.STREAMS
    }


def tables(
    first: Mapping[str, Sequence[Track]],
    second: Mapping[str, Sequence[Track]],
    outcomes: Mapping[Any, Outcome],
    *,
    blocks: int,
    stall_steps: int,
) -> dict[str, str]:
    """Return all generated parts of the page, by name.

    Args:
        first: the tracks of first moments, as :func:`tracks` returns them.
        second: the tracks of second moments.
        outcomes: the results of training.
        blocks: how many blocks to store once.
        stall_steps: how many steps to take with weights that start at 1.
    """
    return {
        "memory": page.memory(memory.table()),
        "stalled": page.stalled(stall.measure(stall_steps)),
        "small learning rate": page.small_rate(outcomes, SMALL_RATE),
        "language model": page.training(outcomes, LANGUAGE, 4),
        "verdict": page.verdict(outcomes, LANGUAGE),
        "digits": page.training(outcomes, DIGITS, 4),
        "kinds": page.kinds(),
        "first moments, once": page.round_trip(errors.measure(False, blocks)),
        "second moments, once": page.round_trip(errors.measure(True, blocks)),
        "streams": page.streams(),
        "first moments, tracked": page.tracking(first),
        "second moments, tracked": page.tracking(second),
        "machine": page.machine(training.machine()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the missing runs, measure the rest, and write the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--retrain", action="store_true", help="train everything again")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    torch.set_num_threads(1)
    if options.retrain:
        RESULTS.unlink(missing_ok=True)
    outcomes = training.train_missing(
        options.processes, report=lambda line: print(line, file=sys.stderr)
    )
    first, second = (tracks(unsigned, STEPS, ELEMENTS) for unsigned in (False, True))
    made = tables(first, second, outcomes, blocks=BLOCKS, stall_steps=STALL_STEPS)
    PAGE.write_text(page.filled(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
    pictures.round_trip()
    pictures.tracking(second)
    pictures.training(outcomes, LANGUAGE)
    pictures.small_rate(outcomes, SMALL_RATE)
    print(f"wrote {PAGE} in {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
