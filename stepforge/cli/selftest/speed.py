"""The speed of steps on a GPU, and what their kernels are compiled to, for a report."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import stepforge
from stepforge.backends.triton.inspection import GPU, inspect_kernel, paths
from stepforge.backends.triton.variant import Variant, target_of, units
from stepforge.cli.bench.device_settings import settings_for
from stepforge.cli.bench.implementations import OURS, Implementation, start_if_available
from stepforge.cli.bench.measure import make_gradients, measure
from stepforge.cli.bench.workloads import DEFAULT_WORKLOADS, WORKLOADS, Workload
from stepforge.cli.kernels import STORAGES, spec_of_storage

__all__ = ["Speed", "gpu_of", "kernels", "speeds"]

_OPTIMIZER = "AdamW"
_WORKLOADS = tuple(WORKLOADS[name] for name in DEFAULT_WORKLOADS)
_ROUNDS = 5
#: The ways to step that are timed beside the limit of memory.
_WAYS = (
    OURS,
    Implementation("stepforge fused", "stepforge, fused=True", stepforge, {"fused": True}),
    Implementation(
        "stepforge capturable", "stepforge, capturable=True", stepforge, {"capturable": True}
    ),
)


@dataclass(frozen=True)
class Speed:
    """The median time of a kept step.

    Attributes:
        workload: the name of its tensors.
        way: the name of the way to step.
        host_s: seconds until ``step()`` returned.
        device_s: seconds of the device's work; None on a CPU.
        of_limit: the speed as a share of that of the limit, which is one copy on a GPU; None if the
            limit is not known.
    """

    workload: str
    way: str
    host_s: float
    device_s: float | None
    of_limit: float | None


def speeds(
    device: torch.device,
    workloads: Sequence[Workload] = _WORKLOADS,
    tick: Callable[[], object] = lambda: None,
) -> Iterator[Speed]:
    """Time AdamW's steps, and yield the time of each way to step each workload.

    Args:
        device: the device, which must be the current one of its type.
        workloads: the tensors.
        tick: called after each round.
    """
    settings = settings_for(device)
    limits = [i for i in settings.implementations if i.name == "limit"]
    for workload in workloads:
        gradients = make_gradients(workload.shapes, device)
        started = {i.name: start_if_available(i, _OPTIMIZER, gradients) for i in (*limits, *_WAYS)}
        times = measure(
            {name: runner for name, runner in started.items() if runner is not None},
            gradients,
            rounds=_ROUNDS,
            timer=settings.timer,
            tick=tick,
        )
        seconds = {n: statistics.median(t.seconds for t in own) for n, own in times.items()}
        for name, own in times.items():
            on_device = [time.device for time in own if time.device is not None]
            yield Speed(
                workload.name,
                name,
                statistics.median(time.host for time in own),
                statistics.median(on_device) if on_device else None,
                seconds["limit"] / seconds[name] if "limit" in seconds else None,
            )


def gpu_of(device: torch.device) -> GPU | None:
    """Return a device as a GPU to compile for; None if its machine code cannot be read."""
    if device.type != "cuda":
        return None
    found = importlib.import_module("triton.runtime").driver.active.get_current_target()
    return GPU(found.backend, found.arch, target_of(device))


def kernels(
    gpu: GPU, storages: Sequence[str] = tuple(STORAGES), tick: Callable[[], object] = lambda: None
) -> Iterator[dict[str, Any]]:
    """Compile AdamW's kernels for a GPU, and yield what each path has become.

    Args:
        gpu: the GPU.
        storages: the storages of weights and states.
        tick: called after each storage.
    """
    for storage in storages:
        spec = spec_of_storage(_OPTIMIZER, storage)
        for unit in units(spec):
            variant = Variant(unit=unit, target=gpu.target)
            for path in paths(spec, variant):
                found = inspect_kernel(spec, variant, gpu, path)
                yield {"storage": storage, "path": path} | asdict(found)
        tick()
