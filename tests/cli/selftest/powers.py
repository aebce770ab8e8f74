"""Replace the powers of uniform values."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stepforge import ops


def patch_powers(monkeypatch: pytest.MonkeyPatch, power: Callable[[float, float], float]) -> None:
    """Make uniform values take powers from a function."""
    monkeypatch.setattr(ops, "_number_power", power)
    monkeypatch.setattr(ops, "_array_power", ops._each(power))
