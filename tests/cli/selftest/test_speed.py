"""The part of a selftest's report that is about a GPU, as far as a machine without one can tell.

Oracles: the arms and storages that are asked for; the limit of memory.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stepforge.backends.triton.inspection import GPUS
from stepforge.cli.bench.workloads import Workload
from stepforge.cli.selftest import command
from stepforge.cli.selftest.speed import Speed, gpu_of, kernels, speeds
from tests.backends.graphs import in_new_process
from tests.cli.compilers import needs_compiler
from tests.cli.selftest.test_command import report, run

CPU = torch.device("cpu")


def test_every_way_to_step_is_timed_beside_the_limit() -> None:
    needs_compiler()
    workloads = [Workload("a", ((64, 64),)), Workload("b", ((7,), (3, 5)))]
    ticks: list[None] = []
    found = list(speeds(CPU, workloads, tick=lambda: ticks.append(None)))
    ways = ["limit", "stepforge", "stepforge fused", "stepforge capturable"]
    assert [(each.workload, each.way) for each in found] == [(w, x) for w in "ab" for x in ways]
    assert ticks
    for each in found:
        assert each.host_s > 0
        assert each.device_s is None
        limit = next(x for x in found if (x.workload, x.way) == (each.workload, "limit"))
        assert each.of_limit == pytest.approx(limit.host_s / each.host_s)


def test_the_speeds_are_a_table() -> None:
    rows = [
        vars(Speed("large", "limit", 2e-5, 1e-3, 1.0)),
        vars(Speed("large", "stepforge", 1.5e-4, 0.00125, 0.8)),
        vars(Speed("small", "stepforge", 1.5e-4, None, None)),
    ]
    columns = [list(column.cells) for column in command._speed_table(rows).columns]
    assert columns == [
        ["large", "large", "small"],
        ["limit", "stepforge", "stepforge"],
        ["0.02", "0.15", "0.15"],
        ["1", "1.25", ""],
        ["1.00", "0.80", ""],
    ]


def test_a_device_without_machine_code_has_no_kernels() -> None:
    assert gpu_of(CPU) is None
    assert gpu_of(torch.device("xpu")) is None


def print_kernels(folder: str) -> None:
    print(json.dumps(list(kernels(GPUS["sm_90"], ["float32", "int8"]))))


def test_every_path_of_a_kernel_is_in_the_report(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    folder = str(tmp_path)
    printed = in_new_process(
        print_kernels,
        folder,
        timeout_s=120,
        TRITON_INTERPRET="0",
        TRITON_CACHE_DIR=folder,
        STEPFORGE_CACHE=f"{folder}/kernels",
    )
    found: list[dict[str, Any]] = json.loads(printed)
    assert [each["storage"] for each in found] == ["float32"] * 3 + ["int8"] * 3
    assert len({(each["storage"], each["path"]) for each in found}) == 6
    assert all(0 < each["registers"] < 256 for each in found)
    assert all(math.isfinite(each["instructions_per_element"]) for each in found)


def test_a_report_on_a_cpu_has_bits_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _ = run("--optimizer", "Adagrad", "--report", "here.json")
    assert code == 0
    assert list(report("here.json")) == ["machine", "device", "results"]
