"""Measurements that need a process of their own: what a first step costs, what memory a step needs.

``python -m stepforge.cli.probe`` reads a question from its standard input and prints the answer.
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

from stepforge.cli import device as devices
from stepforge.cli.bounds import Stepper
from stepforge.cli.measure import OURS, make_gradients, started
from stepforge.cli.place import Place, place_of
from stepforge.cli.workloads import Shape, Workload

__all__ = ["PROCESSES", "ProbeError", "extra_memory", "time_first_step"]

#: How many processes are asked for their first step, after one that fills the kernel cache.
PROCESSES = 3

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class ProbeError(Exception):
    """Why something cannot be measured, in one sentence."""


def time_first_step(
    optimizer: str,
    workload: Workload,
    tick: Callable[[], object] = lambda: None,
    device: torch.device = devices.CPU,
) -> float:
    """How much longer the first step of a fresh process takes than its second, in seconds.

    The median of several processes, which find their kernel in the cache.

    Args:
        optimizer: the name of an optimizer of stepforge.
        workload: what it steps.
        tick: called after each process.
        device: where the parameters are.
    """
    differences: list[float] = []
    for _ in range(1 + PROCESSES):
        first, second = _ask("first step", optimizer, workload.shapes, device)
        differences.append(first - second)
        tick()
    return statistics.median(differences[1:])


def extra_memory(
    optimizer: str, workload: Workload, device: torch.device = devices.CPU
) -> dict[str, int]:
    """How much memory the third step needs at its peak beyond what was there, in bytes.

    Args:
        optimizer: the optimizer's name.
        workload: what it steps.
        device: where the parameters are, whose memory it is.

    Returns:
        The bytes by the name of each arm that exists, without the bounds. On a CPU the system
        counts whole pages and counts some of them late: less than about a megabyte means nothing.
        On a GPU it is what torch has handed out.

    Raises:
        ProbeError: the system does not tell.
    """
    if device.type != "cpu":
        if not hasattr(torch.get_device_module(device), "max_memory_allocated"):
            raise ProbeError(f"torch does not tell the peak of memory on {device}")
    elif not _STATUS.exists() or not os.access(_CLEAR, os.W_OK):
        raise ProbeError("the peak of memory can be measured on Linux only")
    return dict(_ask("memory", optimizer, workload.shapes, device))


def _ask(
    question: str, optimizer: str, shapes: Sequence[Shape], device: torch.device = devices.CPU
) -> Any:
    asked = [question, optimizer, shapes, torch.get_num_threads(), str(device)]
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(asked),
        # Any large block goes back to the system as soon as it is freed, where the allocator
        # would keep it, and the next step's temporaries would not show.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"} if question == "memory" else None,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise ProbeError(f"the process that measures the {question} failed: {lines[-1]}")
    return json.loads(done.stdout)


def _answer(question: str, optimizer: str, shapes: Sequence[Shape], place: Place) -> object:
    gradients = make_gradients(shapes, place.device)
    if question == "first step":
        stepper = OURS.start(optimizer, gradients)
        return [_timed(stepper, gradients, place) for _ in range(2)]
    arms = (arm for arm in place.arms if arm.bound is None)
    steppers = ((arm.name, started(arm, optimizer, gradients)) for arm in arms)  # one at a time
    return {name: _peak(s, gradients, place.device) for name, s in steppers if s is not None}


def _timed(stepper: Stepper, gradients: Sequence[torch.Tensor], place: Place) -> float:
    stepper.feed(gradients)
    return place.clock.time(stepper.step).seconds


def _peak(stepper: Stepper, gradients: Sequence[torch.Tensor], device: torch.device) -> int:
    for _ in range(2):
        stepper.feed(gradients)
        stepper.step()
    stepper.feed(gradients)
    gc.collect()
    return _host_peak(stepper.step) if device.type == "cpu" else _device_peak(stepper.step, device)


def _host_peak(step: Callable[[], object]) -> int:
    _CLEAR.write_text("5")  # sets the peak to what is there now
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
        raise ProbeError(f"{_STATUS} does not tell {key}")
    return 1024 * int(found[1])


def _main() -> None:
    question, optimizer, shapes, threads, name = json.load(sys.stdin)
    torch.set_num_threads(threads)
    device = torch.device(name)
    devices.use(device)
    print(json.dumps(_answer(question, optimizer, shapes, place_of(device))))


if __name__ == "__main__":
    _main()
