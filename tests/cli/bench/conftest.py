"""Shared by the tests of the benchmark."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch):
    """Restore the number of threads, which the command sets; force no backend."""
    monkeypatch.delenv("STEPFORGE_BACKEND", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
