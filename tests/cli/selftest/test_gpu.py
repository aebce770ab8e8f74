"""The part of a selftest's report that is about a GPU, as far as a machine without one can tell.

Oracle: the storages that are asked for.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from stepforge.backends.triton.inspection import GPUS
from stepforge.cli.selftest.gpu import gpu_of, kernels
from tests.backends.triton.kernels import compiled_in_new_process
from tests.cli.selftest.test_command import report, run

CPU = torch.device("cpu")


def test_a_device_without_machine_code_has_no_kernels() -> None:
    assert gpu_of(CPU) is None
    assert gpu_of(torch.device("xpu")) is None


def print_kernels() -> None:
    print(json.dumps(list(kernels(GPUS["sm_90"], ["float32", "int8"]))))


def test_every_path_of_a_kernel_is_in_the_report(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    found = compiled_in_new_process(print_kernels, tmp_path, timeout_s=120)
    assert [each["storage"] for each in found] == ["float32"] * 3 + ["int8"] * 3
    assert len({(each["storage"], each["path"]) for each in found}) == 6
    assert all(0 < each["registers"] < 256 for each in found)
    assert all(math.isfinite(each["instructions_per_element"]) for each in found)


def test_a_report_on_a_cpu_has_neither_kernels_nor_speeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _ = run("--optimizer", "Adagrad", "--report", "here.json")
    assert code == 0
    assert report("here.json")["kernels"] == report("here.json")["speed"] == []
