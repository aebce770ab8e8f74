"""Measurements in a fresh process. Oracles: differences by hand, and an allocator by hand."""

from __future__ import annotations

import subprocess
import types

import pytest
import torch

from stepforge.cli.bench import fresh_process
from stepforge.cli.bench.workloads import WORKLOADS


def test_first_step_is_the_median_without_the_process_that_compiles(monkeypatch):
    results = iter([(9.0, 1.0), (0.5, 0.25), (0.75, 0.25), (3.0, 2.0)])
    monkeypatch.setattr(fresh_process, "_run", lambda *_: next(results))
    assert fresh_process.time_first_step("Adam", WORKLOADS["small"]) == 0.5


def test_a_process_that_fails_gets_one_sentence(monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", "Traceback ...\n  ...\nMemoryError: too large\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    sentence = "the process that measures the first step failed: MemoryError: too large"
    with pytest.raises(fresh_process.ProcessError, match=sentence):
        fresh_process.time_first_step("Adam", WORKLOADS["small"])


def test_the_peak_of_a_device_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda _: types.SimpleNamespace())
    sentence = "does not tell the peak of memory on cuda:0"
    with pytest.raises(fresh_process.ProcessError, match=sentence):
        fresh_process.extra_memory("Adam", WORKLOADS["small"], torch.device("cuda:0"))


def test_a_peak_is_what_a_step_adds(monkeypatch):
    memory = types.SimpleNamespace(now=100, peak=900)

    def step() -> None:
        memory.peak = max(memory.peak, memory.now + 30)

    module = types.SimpleNamespace(
        reset_peak_memory_stats=lambda _: setattr(memory, "peak", memory.now),
        memory_allocated=lambda _: memory.now,
        max_memory_allocated=lambda _: memory.peak,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    assert fresh_process._device_peak(step, torch.device("cuda:0")) == 30
