"""Any distributed checkpoint loads into any optimizer: 7 formats in 5 layouts, from each to each.

Oracle: the whole tensors that were saved, decoded in float64 by the definition of their formats
(``tests/decoding.py``). If the format is the same, the bits must be equal.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.resharding_ranks import ALL, FORMATS, LAYOUTS
from tests.process_groups import run_ranks

RANKS = [(rank, count) for count in LAYOUTS for rank in range(count)]
Results = dict[tuple[str, str], dict[str, list[str]]]


@pytest.fixture(scope="module")
def problems_by_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Results]:
    """Run all processes; return the problems that each found, by target, then by source."""
    folder: Path = run_ranks(
        "tests.checkpoint.resharding_ranks",
        tuple(LAYOUTS),
        lambda: tmp_path_factory.mktemp("resharding"),
    )
    return {
        (rank, count): torch.load(folder / f"{rank}-of-{count}.pt", weights_only=True)
        for rank, count in RANKS
    }


def test_every_layout_and_format_was_compared(problems_by_rank: Any) -> None:
    sources = {f"{layout}-{name}" for layout, name in ALL}
    assert len(sources) == 35
    for (_, count), results in problems_by_rank.items():
        assert set(results) == set(itertools.product(LAYOUTS[count], FORMATS))
        assert all(set(by_source) == sources for by_source in results.values())


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("layout", [x for group in LAYOUTS.values() for x in group])
def test_every_checkpoint_loads_within_the_rounding_of_the_format(
    layout: str, target: str, problems_by_rank: Any
) -> None:
    wrong = {
        (rank, source): problems
        for (rank, count), results in problems_by_rank.items()
        if layout in LAYOUTS[count]
        for source, problems in results[layout, target].items()
        if problems
    }
    assert wrong == {}
