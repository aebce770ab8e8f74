"""The speed of kept steps, for a report: beside a copy of as many bytes, and on the host."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import stepforge
from stepforge.accounting import account
from stepforge.cli.kernels import STORAGES
from stepforge.cli.timing.copies import Copy
from stepforge.cli.timing.timers import StepTime, Timer, timer_for
from stepforge.cli.timing.turns import Runner, measure

__all__ = ["SHAPES", "TIMED_STORAGES", "Speed", "speed_of", "speeds"]

#: The names of the storages that are timed.
TIMED_STORAGES = ("float32", "bfloat16", "int8", "24 bits, int8")
#: Two sets of tensors with 32 Mi elements each: one matrix, which no cache holds, and as many
#: tensors as a transformer has, for the host's time.
SHAPES: tuple[Sequence[tuple[int, ...]], ...] = (((8192, 4096),), 128 * ((512, 512),))

_ROUNDS = 7


@dataclass(frozen=True)
class Speed:
    """Medians of AdamW's kept steps on fresh gradients.

    Attributes:
        storage: the storage of weights and states.
        tensors: the number of tensors.
        bytes_moved: the bytes that a step reads and writes.
        share_of_copy: the time of a copy that moves as many bytes within the device's memory, over
            the time of the step. Both are times of the GPU; on a CPU they are the host's.
        host_ms: milliseconds until ``step()`` returned.
        gpu_ms: milliseconds of the GPU's work; None on a CPU.
        copy_ms: the same of the copy; the host's on a CPU.
    """

    storage: str
    tensors: int
    bytes_moved: int
    share_of_copy: float
    host_ms: float
    gpu_ms: float | None
    copy_ms: float


def speeds(
    device: torch.device,
    shapes: Sequence[Sequence[tuple[int, ...]]] = SHAPES,
    storages: Sequence[str] = TIMED_STORAGES,
) -> Iterator[Speed]:
    """Time the steps of each storage on each set of tensors.

    Args:
        device: the device, which must be the current one of its type.
        shapes: the shapes of each set.
        storages: names of :data:`stepforge.cli.kernels.STORAGES`.
    """
    timer = timer_for(device)
    for storage in storages:
        for own in shapes:
            yield speed_of(storage, own, device, timer)


def speed_of(
    storage: str, shapes: Sequence[tuple[int, ...]], device: torch.device, timer: Timer
) -> Speed:
    """Time the steps of one storage on one set of tensors.

    Args:
        storage: a name of :data:`stepforge.cli.kernels.STORAGES`.
        shapes: the shapes of the tensors.
        device: their device.
        timer: the timer of steps there.
    """
    dtype, options = STORAGES[storage]
    gradients = [torch.randn(shape, device=device).mul_(0.01).to(dtype) for shape in shapes]
    step = _Step([gradient.clone() for gradient in gradients], options)
    moved = step.bytes_moved()
    runners: dict[str, Runner] = {"copy": Copy(moved, device), "step": step}
    times = measure(runners, gradients, rounds=_ROUNDS, timer=timer)
    copied, stepped = (_median(times[name], _work) for name in ("copy", "step"))
    return Speed(
        storage,
        len(shapes),
        moved,
        share_of_copy=copied / stepped,
        host_ms=1e3 * _median(times["step"], lambda time: time.host),
        gpu_ms=None if times["step"][0].device is None else 1e3 * stepped,
        copy_ms=1e3 * copied,
    )


class _Step:
    """A step of AdamW.

    Args:
        params: its parameters.
        options: its options.
    """

    def __init__(self, params: list[Tensor], options: dict[str, Any]) -> None:
        self._params = params
        self._optimizer = stepforge.AdamW(params, **options)

    def bytes_moved(self) -> int:
        """Return the bytes that a step reads and writes."""
        rule, (group,) = self._optimizer.rule, self._optimizer.param_groups
        return sum(account(rule, group, p).moved for p in self._params)

    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Give every parameter a fresh copy of its gradient."""
        for p, gradient in zip(self._params, gradients):
            p.grad = gradient.clone()

    def step(self) -> object:
        """Step all parameters."""
        return self._optimizer.step()


def _work(time: StepTime) -> float:
    return time.host if time.device is None else time.device


def _median(times: Sequence[StepTime], part: Callable[[StepTime], float]) -> float:
    return statistics.median(map(part, times))
