"""Shared by the tests of the benchmark."""

from __future__ import annotations

import types

import pytest
import torch

from stepforge.cli import devices
from stepforge.cli.bench import timing
from tests.cli.bench.simulated_device import SimulatedDevice


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch):
    """Restore the number of threads, which the command sets; force no backend."""
    monkeypatch.delenv("STEPFORGE_BACKEND", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    """A simulated device, whose counted seconds replace the host's clock."""
    device = SimulatedDevice()
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: device.now))
    return device


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU, made the current one."""
    found = devices.find(str(devices.accelerators()[0]))
    devices.make_current(found)
    return found
