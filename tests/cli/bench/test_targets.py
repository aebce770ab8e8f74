"""Ratios and targets. The oracle of a ratio is a quotient of times by hand."""

from __future__ import annotations

import pytest

from stepforge.cli import devices
from stepforge.cli.bench.device_settings import settings_for
from stepforge.cli.bench.implementations import IMPLEMENTATIONS
from stepforge.cli.bench.results import Result
from stepforge.cli.bench.targets import GPU_TARGETS, TARGETS, Ratios
from stepforge.cli.bench.timing import StepTime
from stepforge.cli.bench.workloads import WORKLOADS
from stepforge.rules import ALL

SECONDS = {
    "limit": [3.0, 2.0, 100.0],
    "torch": [24.0, 24.0, 23.0],
    "torch foreach": [12.0, 1.0, 13.0],
    "torch fused": [6.0, 6.0, 7.0],
    "stepforge": [4.0, 5.0, 4.0],
}


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
    assert result.reached == {
        "of_limit": False,
        "against_best": True,
        "against_default": None,
    }


def test_ratios_to_what_was_not_measured_are_unknown():
    result = Result("large", "Adam", {"stepforge": [4.0]})
    assert result.ratios("stepforge") == Ratios(None, None, None)
    assert result.median("torch") is None
    assert result.spread("stepforge") is None
    assert set(result.reached.values()) == {None}


def test_reached_is_judged_ratio_by_ratio():
    assert Ratios(0.88, 0.99, 5.0).reached(Ratios(0.88, 1.0, None)) == {
        "of_limit": True,
        "against_best": False,
        "against_default": None,
    }
    # Ratios of the times: 0.75 of the limit (0.88), 1.5 of the best (1), 6 of the default (4).
    assert list(Result("large", "Adam", SECONDS).reached.values()) == [False, True, True]
    # The same times against NAdam's targets, which are 4 times the best and 4 times the default.
    assert list(Result("large", "NAdam", SECONDS).reached.values()) == [False, False, True]
    assert Result("mine", "Adam", SECONDS).reached == {}


def test_targets_of_every_workload_and_optimizer():
    assert set(TARGETS) == {(workload, name) for workload in WORKLOADS for name in ALL}
    assert TARGETS["large", "RAdam"] == Ratios(0.88, 4.0, 4.0)
    assert TARGETS["model", "AdamW"] == Ratios(0.80, 1.0, 2.5)
    assert TARGETS["small", "Adagrad"] == Ratios(None, 8.0, 12.0)
    assert TARGETS["small", "Adam"] == Ratios(None, 8.0, 20.0)


def test_gpu_targets():
    """Oracle: the targets in the docs and on the results' page."""
    assert GPU_TARGETS["large", "AdamW"] == Ratios(0.85, 1.0, None)
    for name in ("Adagrad", "NAdam", "RAdam"):
        assert GPU_TARGETS["large", name] == Ratios(None, 3.0, None)
    for name in ALL:
        assert GPU_TARGETS["small", name] == Ratios(None, 2.0, None)
    assert set(GPU_TARGETS) < set(TARGETS)


def test_settings_of_a_cpu():
    settings = settings_for(devices.CPU)
    assert settings.implementations == IMPLEMENTATIONS
    assert settings.targets == TARGETS
    assert not settings.is_asynchronous
    assert (settings.groups_target, settings.first_step_target) == (1.3, 0.2)
