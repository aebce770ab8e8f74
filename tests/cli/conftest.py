"""Shared by the tests of commands."""

from __future__ import annotations

import types

import pytest
import torch

from stepforge.cli import devices
from stepforge.cli.timing import timers
from tests.cli.timing.simulated_device import SimulatedDevice


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    """A simulated device, whose counted seconds replace the host's clock."""
    device = SimulatedDevice()
    monkeypatch.setattr(timers, "time", types.SimpleNamespace(perf_counter=lambda: device.now))
    return device


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU, made the current one."""
    found = devices.find(str(devices.accelerators()[0]))
    devices.make_current(found)
    return found
