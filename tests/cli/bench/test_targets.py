"""Ratios and targets.

The oracle of a ratio is a quotient of times by hand, that of a target the results' page.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from stepforge.cli import devices
from stepforge.cli.bench.device_settings import settings_for
from stepforge.cli.bench.implementations import IMPLEMENTATIONS
from stepforge.cli.bench.results import Result
from stepforge.cli.bench.targets import GPU_TARGETS, TARGETS, Ratios
from stepforge.cli.bench.workloads import DEFAULT_WORKLOADS
from stepforge.cli.timing.timers import StepTime
from stepforge.rules import ALL

SECONDS = {
    "limit": [3.0, 2.0, 100.0],
    "torch": [24.0, 24.0, 23.0],
    "torch foreach": [12.0, 1.0, 13.0],
    "torch fused": [6.0, 6.0, 7.0],
    "stepforge": [4.0, 5.0, 4.0],
}
PAGE = Path(__file__).parents[3] / "benchmarks" / "results" / "README.md"


def test_ratios_are_of_medians():
    result = Result("large", "Adam", SECONDS)
    assert result.median("limit") == 3
    assert result.ratios("stepforge") == Ratios(0.75, 1.5, 6.0)
    assert result.ratios("torch fused") == Ratios(0.5, 1.0, 4.0)
    assert result.ratios("torch") == Ratios(0.125, 0.25, 1.0)
    assert result.spread("torch foreach") == pytest.approx((12.5 - 6.5) / 12)


def test_ratios_are_of_the_longer_times():
    times = {
        "limit": [StepTime(0.5, 3.0)],
        "torch": [StepTime(6.0, 5.0)],
        "torch fused": [StepTime(5.0, 2.0)],
        "stepforge": [StepTime(1.0, 4.0)],
    }
    result = Result.of("large", "AdamW", times, GPU_TARGETS)
    assert result.ratios("stepforge") == Ratios(0.75, 1.25, 1.5)
    assert result.median_on_device("torch fused") == 2.0
    assert result.median_on_device("missing") is None
    assert result.reached("stepforge") == {
        "of_limit": False,
        "against_best": True,
        "against_default": None,
        "of_plain": None,
    }


def test_ratios_to_what_was_not_measured_are_unknown():
    result = Result("large", "Adam", {"stepforge": [4.0]})
    assert result.ratios("stepforge") == Ratios(None, None, None)
    assert result.median("torch") is None
    assert result.spread("stepforge") is None
    assert set(result.reached("stepforge").values()) == {None}


def test_ratios_to_the_plain_step():
    seconds = {"stepforge": [4.0], "stepforge plainly": [3.0], "torch": [6.0]}
    result = Result("sharded", "RAdam", seconds)
    assert result.ratios("stepforge") == Ratios(None, 1.5, 1.5, 0.75)
    assert result.reached("stepforge") == {
        "of_limit": None,
        "against_best": False,
        "against_default": False,
        "of_plain": True,
    }


def test_reached_is_judged_ratio_by_ratio():
    assert Ratios(0.88, 0.99, 5.0).reached(Ratios(0.88, 1.0, None)) == {
        "of_limit": True,
        "against_best": False,
        "against_default": None,
        "of_plain": None,
    }
    # Ratios of the times: 0.75 of the limit (0.88), 1.5 of the best (1), 6 of the default (4).
    adam = Result("large", "Adam", SECONDS).reached("stepforge")
    assert list(adam.values()) == [False, True, True, None]
    # The same times against NAdam's targets, which are 4 times the best and 4 times the default.
    nadam = Result("large", "NAdam", SECONDS).reached("stepforge")
    assert list(nadam.values()) == [False, False, True, None]
    assert Result("large", "Adam", SECONDS).reached("torch fused") == {}
    assert Result("mine", "Adam", SECONDS).reached("stepforge") == {}


def test_targets_of_every_workload_and_optimizer():
    named = {workload for workload, _, _ in TARGETS}
    ours = {(workload, name, "stepforge") for workload in named for name in ALL}
    foreach = {key for key in TARGETS if key[2] == "stepforge foreach"}
    assert set(TARGETS) == ours | foreach
    assert {key[:2] for key in foreach} == {(w, name) for w in ("large", "small") for name in ALL}
    assert {TARGETS[key] for key in foreach} == {Ratios(None, None, 1.0)}
    assert TARGETS["large", "RAdam", "stepforge"] == Ratios(0.88, 4.0, 4.0)
    assert TARGETS["small", "Adagrad", "stepforge"] == Ratios(None, 4.5, 7.0)
    assert TARGETS["tiny", "NAdam", "stepforge"] == Ratios(None, 5.0, 5.0)


@pytest.mark.parametrize("workload", dict.fromkeys(workload for workload, _, _ in TARGETS))
def test_targets_are_those_of_the_results_page(workload):
    row = " | ".join([workload, *(cell(workload, name) for name in vars(Ratios(0, 0, 0)))])
    assert f"\n| {row} |\n" in PAGE.read_text(encoding="utf-8")


def cell(workload: str, ratio: str) -> str:
    """Return the page's words for a workload's targets: the optimizers by target."""
    optimizers: dict[str, list[str]] = {}
    for name in ALL:
        target = getattr(TARGETS[workload, name, "stepforge"], ratio)
        optimizers.setdefault("-" if target is None else f"{target:.2g}", []).append(name)
    if len(optimizers) == 1:
        return next(iter(optimizers))
    return "; ".join(f"{', '.join(names)} {target}" for target, names in optimizers.items())


def test_gpu_targets():
    """Oracle: the targets in the docs and on the results' page."""
    assert GPU_TARGETS["large", "AdamW", "stepforge"] == Ratios(0.85, 1.0, None)
    for name in ("Adagrad", "NAdam", "RAdam"):
        assert GPU_TARGETS["large", name, "stepforge"] == Ratios(None, 3.0, None)
    for name in ALL:
        assert GPU_TARGETS["small", name, "stepforge"] == Ratios(None, 2.0, None)
    assert set(GPU_TARGETS) < set(TARGETS)


def test_settings_of_a_cpu():
    settings = settings_for(devices.CPU)
    assert settings.implementations == IMPLEMENTATIONS
    assert settings.targets == TARGETS
    assert not settings.is_asynchronous
    assert settings.first_step_target == 0.2
    assert settings.default_workloads == DEFAULT_WORKLOADS == ("large", "model", "small")
