"""Measurements in a fresh process: the cost of a first step, and the peak memory of a step.

``python -m stepforge.cli.bench.fresh_process`` reads a request from stdin and prints the result.
"""

from __future__ import annotations

import gc
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from stepforge.cli import devices
from stepforge.cli.bench.device_settings import DeviceSettings, settings_for
from stepforge.cli.bench.implementations import OURS, start_if_available
from stepforge.cli.bench.measure import make_gradients
from stepforge.cli.bench.workloads import Shape, Workload
from stepforge.cli.timing.turns import Runner

__all__ = ["PROCESSES", "ProcessError", "extra_memory", "time_first_step"]

#: The number of processes whose first step is measured, after one that fills the kernel cache.
PROCESSES = 3

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class ProcessError(Exception):
    """The reason, in one sentence, why a measurement failed."""


def time_first_step(
    optimizer: str,
    workload: Workload,
    tick: Callable[[], object] = lambda: None,
    device: torch.device = devices.CPU,
) -> float:
    """Return the first step's time minus the second's in a fresh process, in seconds.

    It is the median of several processes, which find their kernel in the cache.

    Args:
        optimizer: the name of an optimizer of stepforge.
        workload: the workload.
        tick: called after each process.
        device: the device of the parameters.
    """
    differences: list[float] = []
    for _ in range(1 + PROCESSES):
        first, second = _run("first step", optimizer, workload.shapes, device)
        differences.append(first - second)
        tick()
    return statistics.median(differences[1:])


def extra_memory(
    optimizer: str, workload: Workload, device: torch.device = devices.CPU
) -> dict[str, int]:
    """Return the peak memory of the third step beyond the memory before it, in bytes.

    Args:
        optimizer: the optimizer's name.
        workload: the workload.
        device: the device of the parameters, whose memory is measured.

    Returns:
        The bytes by implementation, without lower bounds. On a CPU the system counts whole pages
        and counts some of them late, so less than about a megabyte means nothing. On a GPU it is
        the memory that torch has allocated.

    Raises:
        ProcessError: if the system does not report peak memory.
    """
    if device.type != "cpu":
        if not hasattr(torch.get_device_module(device), "max_memory_allocated"):
            raise ProcessError(f"torch does not tell the peak of memory on {device}")
    elif not _STATUS.exists() or not os.access(_CLEAR, os.W_OK):
        raise ProcessError("the peak of memory can be measured on Linux only")
    return dict(_run("memory", optimizer, workload.shapes, device))


def _run(
    measurement: str, optimizer: str, shapes: Sequence[Shape], device: torch.device = devices.CPU
) -> Any:
    """Run a measurement in a fresh process and return its result."""
    request = [measurement, optimizer, shapes, torch.get_num_threads(), str(device)]
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(request),
        # Return any large block to the system when it is freed. Otherwise the allocator would keep
        # it, and the next step's temporaries would not show.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"} if measurement == "memory" else None,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise ProcessError(f"the process that measures the {measurement} failed: {lines[-1]}")
    return json.loads(done.stdout)


# In the fresh process. ----------------------------------------------------------------------------


def _main() -> None:
    measurement, optimizer, shapes, threads, name = json.load(sys.stdin)
    torch.set_num_threads(threads)
    device = torch.device(name)
    devices.make_current(device)
    print(json.dumps(_measure(measurement, optimizer, shapes, settings_for(device))))


def _measure(
    measurement: str, optimizer: str, shapes: Sequence[Shape], settings: DeviceSettings
) -> object:
    gradients = make_gradients(shapes, settings.device)
    if measurement == "first step":
        runner = OURS.start(optimizer, gradients)
        return [_timed(runner, gradients, settings) for _ in range(2)]
    optimizers = (i for i in settings.implementations if i.bound is None)
    # Started one at a time.
    runners = ((i.name, start_if_available(i, optimizer, gradients)) for i in optimizers)
    return {name: _peak(r, gradients, settings.device) for name, r in runners if r is not None}


def _timed(runner: Runner, gradients: Sequence[torch.Tensor], settings: DeviceSettings) -> float:
    runner.set_gradients(gradients)
    return settings.timer.time(runner.step).seconds


def _peak(runner: Runner, gradients: Sequence[torch.Tensor], device: torch.device) -> int:
    for _ in range(2):
        runner.set_gradients(gradients)
        runner.step()
    runner.set_gradients(gradients)
    gc.collect()
    return _host_peak(runner.step) if device.type == "cpu" else _device_peak(runner.step, device)


def _host_peak(step: Callable[[], object]) -> int:
    _CLEAR.write_text("5")  # resets the peak to the current memory
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


def _device_peak(step: Callable[[], object], device: torch.device) -> int:
    memory: Any = torch.get_device_module(device)
    memory.reset_peak_memory_stats(device)
    before = memory.memory_allocated(device)
    step()
    return int(memory.max_memory_allocated(device) - before)


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise ProcessError(f"{_STATUS} does not tell {key}")
    return 1024 * int(found[1])


if __name__ == "__main__":
    _main()
