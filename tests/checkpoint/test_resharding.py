"""Any distributed checkpoint loads into any optimizer: 7 formats in 5 layouts, from each to each.

The oracle is what was saved, whole: the numbers of its codes and the bits of its weights by their
definition, written out in float64. Where the format is the same, it is the same bits.
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
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Results]:
    """What each process has found wrong: by target, then by source."""
    folder: Path = run_ranks(
        "tests.checkpoint.resharding_ranks",
        tuple(LAYOUTS),
        lambda: tmp_path_factory.mktemp("resharding"),
    )
    return {
        (rank, count): torch.load(folder / f"{rank}-of-{count}.pt", weights_only=True)
        for rank, count in RANKS
    }


def test_the_layouts_and_formats_are_all_there(found: Any) -> None:
    sources = {f"{layout}-{name}" for layout, name in ALL}
    assert len(sources) == 35
    for (_, count), results in found.items():
        assert set(results) == set(itertools.product(LAYOUTS[count], FORMATS))
        assert all(set(by_source) == sources for by_source in results.values())


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("layout", [x for group in LAYOUTS.values() for x in group])
def test_every_checkpoint_loads_within_the_rounding_of_the_format(
    layout: str, target: str, found: Any
) -> None:
    wrong = {
        (rank, source): problems
        for (rank, count), results in found.items()
        if layout in LAYOUTS[count]
        for source, problems in results[layout, target].items()
        if problems
    }
    assert wrong == {}
