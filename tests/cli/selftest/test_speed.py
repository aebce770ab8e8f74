"""Speeds in a selftest's report, as far as a machine without a GPU can tell.

Oracles: times and bytes by hand; nothing is said about how fast a step is here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from stepforge.cli import devices, make_app
from stepforge.cli.kernels import STORAGES
from stepforge.cli.selftest import command, speed
from stepforge.cli.selftest.speed import SHAPES, TIMED_STORAGES, Speed, speed_of, speeds
from stepforge.cli.timing.timers import StepTime

FEW = (((64, 128),), 3 * ((64, 64),))


class ScriptedTimer:
    """Run steps, and say what each took: a copy moves bytes, and only a step has gradients."""

    def __init__(self, copy: StepTime, step: StepTime) -> None:
        self.copy, self.step = copy, step

    def time(self, step: Callable[[], object]) -> StepTime:
        step()
        is_copy = isinstance(step.__self__, speed.Copy)  # type: ignore[attr-defined]
        return self.copy if is_copy else self.step


@pytest.mark.parametrize(
    ("copy", "step", "share", "gpu_ms"),
    [
        # On a GPU the host's times do not count: it runs ahead.
        (StepTime(9.0, 0.003), StepTime(0.001, 0.004), 0.75, 4.0),
        (StepTime(0.003), StepTime(0.001), 3.0, None),
    ],
)
def test_the_share_is_that_of_a_copys_time(copy, step, share, gpu_ms) -> None:
    found = speed_of("float32", FEW[0], devices.CPU, ScriptedTimer(copy, step))
    assert found.share_of_copy == pytest.approx(share)
    assert found.host_ms == pytest.approx(1.0)
    assert found.gpu_ms == (None if gpu_ms is None else pytest.approx(gpu_ms))
    assert found.copy_ms == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("storage", "per_element"),
    [
        # p, g, m and v are read, and p, m and v are written.
        ("float32", 7 * 4),
        ("bfloat16", 7 * 2),
        # Both moments in a byte each, and a scale of float32 for each 128 elements.
        ("int8", 3 * 4 + 4 * (1 + 4 / 128)),
        ("24 bits, int8", 3 * 2 + 2 * 1 + 4 * (1 + 4 / 128)),
    ],
)
def test_a_copy_moves_the_bytes_of_the_step(storage: str, per_element: float) -> None:
    copies: list[int] = []

    class Noting(ScriptedTimer):
        def time(self, step: Callable[[], object]) -> StepTime:
            own: Any = step.__self__  # type: ignore[attr-defined]
            if isinstance(own, speed.Copy):
                copies.append(own.source.nbytes + own.target.nbytes)
            return super().time(step)

    timer = Noting(StepTime(1.0), StepTime(1.0))
    found = speed_of(storage, FEW[0], devices.CPU, timer)
    assert found.bytes_moved == per_element * 64 * 128
    assert set(copies) == {found.bytes_moved}


def test_every_storage_is_timed_with_one_tensor_and_with_many() -> None:
    found = list(speeds(devices.CPU, FEW))
    assert [(each.storage, each.tensors) for each in found] == [
        (storage, count) for storage in TIMED_STORAGES for count in (1, 3)
    ]
    assert all(each.share_of_copy > 0 and each.host_ms > 0 for each in found)
    assert {each.gpu_ms for each in found} == {None}
    assert set(TIMED_STORAGES) < set(STORAGES)
    assert [len(shapes) for shapes in SHAPES] == [1, 128]
    assert {sum(torch.Size(shape).numel() for shape in shapes) for shapes in SHAPES} == {2**25}


ONE = Speed("float32", 1, 2**20, 0.875, 0.125, 0.25, 0.21875)


@pytest.fixture
def gpu_without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the CPU for a GPU whose machine code cannot be read; compare no case."""
    there = torch.device("xpu:0")
    monkeypatch.setattr(command, "current_device", lambda _: there)
    monkeypatch.setattr(command, "_usable", lambda *_: ([], {}))
    monkeypatch.setattr(command, "_backends", lambda _: ())
    monkeypatch.setattr(command, "cases", lambda: ())
    monkeypatch.setattr(devices, "describe", lambda _: {"GPU": "none"})
    return


def selftest() -> tuple[int, str, dict[str, Any]]:
    result = CliRunner().invoke(make_app(), ["selftest", "--device", "xpu"])
    return result.exit_code, result.output, json.loads(Path(command.REPORT).read_text())


@pytest.mark.usefixtures("gpu_without_kernels")
def test_speeds_are_in_the_report_and_in_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "speeds", lambda _: iter([ONE]))
    code, output, report = selftest()
    assert code == 0, output
    assert report["speed"] == [asdict(ONE)]
    assert report["speed_problem"] == ""
    assert report["kernels"] == []
    assert "float32 1 0.125 0.25 88%" in " ".join(output.split())
    assert output.endswith("Attach stepforge-selftest.json to a report.\n")


@pytest.mark.usefixtures("gpu_without_kernels")
def test_a_step_that_fails_loses_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the speeds before the failure, and the comparisons."""

    def failing(_: torch.device) -> Iterator[Speed]:
        yield ONE
        raise RuntimeError("out of memory")

    monkeypatch.setattr(command, "speeds", failing)
    code, output, report = selftest()
    assert code == 0, output
    assert report["speed"] == [asdict(ONE)]
    assert report["speed_problem"] == "RuntimeError: out of memory"
    assert "Steps could not be timed: RuntimeError: out of memory" in output
    assert report["results"] == []
