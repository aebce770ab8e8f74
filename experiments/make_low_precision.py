"""Measures what low precision costs, and puts tables and pictures into docs/low-precision.md.

    python experiments/make_low_precision.py         # three minutes
    python experiments/make_low_precision.py --anew  # trains everything again: twenty minutes more

Training, by far the longest, is kept in experiments/low_precision/results.json; runs that are
missing there are trained. Everything else is measured. All of it is deterministic.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from low_precision import errors, memory, page, pictures, stall, tracking, training
from low_precision.page import PAGE
from low_precision.tracking import Track
from low_precision.training import DIGITS, LANGUAGE, RESULTS, SMALL_RATE, Outcome

#: How much is measured: blocks that are stored once; steps and elements of averages; steps of
#: weights that begin at 1.
BLOCKS, STEPS, ELEMENTS, STALL_STEPS = 1000, 3000, 2048, 100


def tracks(unsigned: bool, steps: int, elements: int) -> dict[str, Sequence[Track]]:
    """What becomes of a moment of each stream of gradients, by the name of the stream."""
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
    """All that the page is given, by the name of its place.

    Args:
        first: what became of first moments, of :func:`tracks`.
        second: what became of second moments.
        outcomes: how training went.
        blocks: how many blocks to store once.
        stall_steps: how many steps to take with weights that begin at 1.
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
    """Trains what is missing, measures the rest, and writes the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--anew", action="store_true", help="train everything again")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    given = parser.parse_args(arguments)
    start = time.perf_counter()
    torch.set_num_threads(1)
    if given.anew:
        RESULTS.unlink(missing_ok=True)
    outcomes = training.train_missing(
        given.processes, report=lambda line: print(line, file=sys.stderr)
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
