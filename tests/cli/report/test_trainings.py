"""Findings of trainings with stepforge's own optimizer. Oracle: the faults put into them."""

from __future__ import annotations

import pytest

from stepforge.cli.report.findings import find
from stepforge.cli.report.read import read_lines
from tests.cli.report.trainings import Trouble, train


def found(text: str) -> list[str]:
    """Return what is said of the lines of a training."""
    run = read_lines(text.splitlines(), name="run.jsonl")
    return [f"{finding.severity}, {finding.kind}: {finding.sentence}" for finding in find(run)]


@pytest.mark.parametrize(
    "options",
    [{}, {"every": 10, "lr": 1e-5}, {"warm_up": 0, "lr": 1e-2, "steps": 150}],
    ids=str,
)
def test_nothing_is_found_in_a_healthy_training(options: dict[str, float]) -> None:
    """Trainings end with a learning rate of 0, and biases begin with 0."""
    assert found(train(**options)) == []


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (Trouble(clip=1e-3), "warning, clipped at every step: "),
        (Trouble(is_detached=True), "stalled layer: net.4.weight hardly moves: an update of 0"),
    ],
    ids=["clipped", "detached"],
)
def test_a_trouble_is_found_and_nothing_else(trouble: Trouble, said: str) -> None:
    (sentence,) = found(train(trouble, steps=100))
    assert said in sentence


def test_more_bits_thaw_what_rounding_froze() -> None:
    """The advice of the report, followed."""
    (frozen,) = found(train(Trouble(frozen=True), steps=100))
    assert "net.4.weight is frozen by rounding" in frozen
    assert found(train(Trouble(frozen=True, bits=24), steps=100)) == []
