"""Shared by the tests of the selftest."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Force no backend, and write reports to an empty folder."""
    monkeypatch.delenv("STEPFORGE_BACKEND", raising=False)
    monkeypatch.chdir(tmp_path)
