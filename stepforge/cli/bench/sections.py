"""Sections of the benchmark's report: each measures, prints a table and yields JSON entries.

The implementations are called "arms" in JSON, and storage formats "ways".
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import stepforge
from stepforge.cli.bench.cells import at_most, marked, number, peak_megabytes, percent
from stepforge.cli.bench.device_settings import DeviceSettings
from stepforge.cli.bench.formats import FLOAT32, INT8_TARGET, measure_formats
from stepforge.cli.bench.fresh_process import PROCESSES, extra_memory, time_first_step
from stepforge.cli.bench.implementations import LIMIT, OURS, PLAINLY, Implementation
from stepforge.cli.bench.lower_bounds import bytes_per_element
from stepforge.cli.bench.measure import make_gradients, measure_implementations
from stepforge.cli.bench.results import Result
from stepforge.cli.bench.targets import Ratios
from stepforge.cli.bench.workloads import Workload
from stepforge.cli.tables import new_table, print_whole
from stepforge.cli.timing.timers import StepTime
from stepforge.cli.timing.turns import WARM_UPS

__all__ = ["Screen", "first_steps", "formats", "memory", "steps"]

#: The spread above which a result is doubtful. On an idle machine the quartiles are a few percent
#: of the median apart.
_WIDE_SPREAD = 0.3

#: The columns of ratios, and their attributes in :class:`Ratios`.
_RATIOS = {
    "of the\nlimit": "of_limit",
    "x torch's\nbest": "against_best",
    "x torch's\ndefault": "against_default",
    "of\nplain": "of_plain",
}


class Screen:
    """Tables and a progress bar on a console.

    The bar is drawn between rounds: a thread that draws would be timed too.
    """

    def __init__(self, console: Console, optimizers: Sequence[str]) -> None:
        self.console = console
        self._width = max(map(len, optimizers))

    def show(self, title: str, table: Table) -> None:
        """Print a table under its title."""
        self.console.print(f"\n[bold]{escape(title)}[/]", soft_wrap=True)
        print_whole(self.console, table)

    @contextmanager
    def progress(
        self, task: str, optimizers: Sequence[str], ticks: int
    ) -> Iterator[Callable[[str], Callable[[], None]]]:
        """Show a progress bar over some optimizers.

        Args:
            task: its description.
            optimizers: the optimizers' names.
            ticks: the ticks of each optimizer.

        Yields:
            A function that takes the name of the next optimizer and returns its tick function.
        """
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            auto_refresh=False,
            transient=True,
            disable=not self.console.is_terminal,
        )
        with bar:
            bar_task = bar.add_task(task, total=ticks * len(optimizers))

            def start(optimizer: str) -> Callable[[], None]:
                description = f"{task} {optimizer:<{self._width}}"
                bar.update(bar_task, description=description, refresh=True)
                return lambda: bar.update(bar_task, advance=1, refresh=True)

            yield start


# Steps. -------------------------------------------------------------------------------------------


def steps(
    screen: Screen,
    settings: DeviceSettings,
    workloads: Sequence[Workload],
    optimizers: Sequence[str],
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """Time every implementation of every optimizer on every workload."""
    legend: dict[str, str] = {}
    for workload in workloads:
        results = []
        implementations = settings.implementations_for(workload)
        legend |= {i.name: i.description for i in implementations}
        with screen.progress(workload.name, optimizers, WARM_UPS + rounds) as start:
            for optimizer in optimizers:
                times = measure_implementations(
                    optimizer, workload, settings, rounds=rounds, tick=start(optimizer)
                )
                results.append(Result.of(workload.name, optimizer, times, settings.targets))
        screen.show(f"{workload}: step()", _steps_table(results, settings, implementations))
        if any(LIMIT.name not in result.seconds for result in results):
            screen.console.print(
                "Without the limit, for want of a kernel: `stepforge doctor` says why."
            )
        doubtful = [result.optimizer for result in results if _is_doubtful(result)]
        if doubtful:
            screen.console.print(
                f"The times of {', '.join(doubtful)} spread widely: something else used the "
                "machine, measure again.",
                soft_wrap=True,
            )
        if settings.is_asynchronous:
            speeds = [x for r in results for x in _copy_speed(r, workload).values()]
            fastest = number(max(speeds, default=0.0), 1e-9)
            screen.console.print(f"The limit's fastest copy moved {fastest} GB/s.")
        for result in results:
            yield _steps_entry(result, workload, settings) | _copy_speed(result, workload)
    for name, description in legend.items():
        screen.console.print(f"  [bold]{name:<20}[/]{description}", soft_wrap=True)
    if settings.is_asynchronous:
        screen.console.print(
            "ms is the time of the host or the GPU, whichever is longer; in training they overlap. "
            "If it exceeds GPU ms, the host takes longer.",
            soft_wrap=True,
        )


def _is_doubtful(result: Result) -> bool:
    return any((result.spread(name) or 0) > _WIDE_SPREAD for name in result.seconds)


def _steps_entry(result: Result, workload: Workload, settings: DeviceSettings) -> dict[str, Any]:
    p = torch.zeros(1, dtype=workload.dtype, device=settings.device, requires_grad=True)
    optimizer = getattr(stepforge, result.optimizer)([p])
    return {
        "workload": result.workload,
        "optimizer": result.optimizer,
        "backend": stepforge.explain(optimizer).served[0].backend,
        "bytes_per_element": bytes_per_element(result.optimizer, workload.dtype),
        "arms": {
            name: {
                "seconds": list(seconds),
                "median": result.median(name),
                "spread": result.spread(name),
                **(_parts(result.times[name]) if settings.is_asynchronous else {}),
                **dataclasses.asdict(result.ratios(name)),
                "target": _as_dict(result.target(name)),
                "reached": result.reached(name),
            }
            for name, seconds in result.seconds.items()
        },
    }


def _as_dict(target: Ratios | None) -> dict[str, float | None] | None:
    return dataclasses.asdict(target) if target else None


def _copy_speed(result: Result, workload: Workload) -> dict[str, float]:
    """Return the bytes per second that the limit reads and writes on a GPU; empty on a CPU."""
    seconds = result.median_on_device(LIMIT.name)
    moved = bytes_per_element(result.optimizer, workload.dtype) * workload.elements
    return {"limit_bytes_per_second": moved / seconds} if seconds else {}


def _parts(times: Sequence[StepTime]) -> dict[str, list[float | None]]:
    return {
        "host_seconds": [time.host for time in times],
        "device_seconds": [time.device for time in times],
    }


def _steps_table(
    results: Sequence[Result], settings: DeviceSettings, implementations: Iterable[Implementation]
) -> Table:
    measured = {name for result in results for name in result.seconds}
    # On a GPU torch.optim's default is its foreach, so GPU ms can take the place of that column.
    ratio_columns = {
        heading: ratio
        for heading, ratio in _RATIOS.items()
        if not (settings.is_asynchronous and ratio == "against_default")
        and (ratio != "of_plain" or PLAINLY.name in measured)
    }
    on_device = ["GPU ms"] if settings.is_asynchronous else []
    table = _table(["optimizer", "implementation"], ["ms", *on_device, "spread", *ratio_columns])
    for result in results:
        optimizer = result.optimizer
        for implementation in implementations:
            name = implementation.name
            if name not in result.seconds:
                continue
            ratios, reached = vars(result.ratios(name)), result.reached(name)
            table.add_row(
                optimizer,
                Text(name, style="bold" if implementation == OURS else ""),
                number(result.median(name), 1e3),
                *(number(result.median_on_device(name), 1e3) for _ in on_device),
                percent(result.spread(name)),
                *(marked(ratios[ratio], reached.get(ratio)) for ratio in ratio_columns.values()),
            )
            optimizer = ""
            target = result.target(name)
            if target:
                table.add_row(
                    "",
                    Text("  to reach", style="dim"),
                    *("" for _ in ("ms", *on_device, "spread")),
                    *(marked(getattr(target, ratio), None) for ratio in ratio_columns.values()),
                )
        table.add_section()
    return table


# Storage formats. ---------------------------------------------------------------------------------


def formats(
    screen: Screen,
    settings: DeviceSettings,
    workloads: Sequence[Workload],
    optimizers: Sequence[str],
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """Time every storage format of weights and states."""
    for workload in workloads:
        table = _table(["optimizer", "weights and states"], ["ms", "of float32", "at most"])
        gradients = make_gradients(workload.shapes, settings.device)
        with screen.progress(f"{workload.name}, formats", optimizers, WARM_UPS + rounds) as start:
            for optimizer in optimizers:
                times = measure_formats(
                    optimizer,
                    gradients,
                    rounds=rounds,
                    timer=settings.timer,
                    tick=start(optimizer),
                )
                float32 = statistics.median(times[FLOAT32.name])
                ways: dict[str, Any] = {}
                for name, seconds in times.items():
                    ratio = statistics.median(seconds) / float32
                    target = INT8_TARGET.get((workload.name, name))
                    table.add_row(
                        optimizer if name == FLOAT32.name else "",
                        name,
                        number(statistics.median(seconds), 1e3),
                        *at_most(ratio, target),
                    )
                    ways[name] = {"seconds": seconds, "ratio": ratio}
                table.add_section()
                yield {"workload": workload.name, "optimizer": optimizer, "ways": ways}
        screen.show(f"{workload}: step() by storage format", table)


# Fresh processes. ---------------------------------------------------------------------------------


def first_steps(
    screen: Screen,
    settings: DeviceSettings,
    workloads: Sequence[Workload],
    optimizers: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """Time the first step of a fresh process."""
    table = _table(["workload", "optimizer"], ["ms", "at most"])
    target = settings.first_step_target
    for workload in workloads:
        with screen.progress(f"{workload.name}, first step", optimizers, 1 + PROCESSES) as start:
            for optimizer in optimizers:
                seconds = time_first_step(optimizer, workload, start(optimizer), settings.device)
                table.add_row(
                    workload.name,
                    optimizer,
                    *at_most(seconds, target, 1e3),
                )
                yield {"workload": workload.name, "optimizer": optimizer, "seconds": seconds}
    screen.show("the first step of a fresh process minus the second", table)


def memory(
    screen: Screen,
    settings: DeviceSettings,
    workloads: Sequence[Workload],
    optimizers: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """Measure the peak memory of a step."""
    implementations = [i for i in settings.implementations if i.bound is None]
    for workload in workloads:
        largest = 4 * max(map(math.prod, workload.shapes))
        table = _table(["optimizer"], [i.name.replace(" ", "\n") for i in implementations])
        with screen.progress(f"{workload.name}, memory", optimizers, 1) as start:
            for optimizer in optimizers:
                tick = start(optimizer)
                peaks = extra_memory(optimizer, workload, settings.device)
                table.add_row(
                    optimizer,
                    *(peak_megabytes(peaks.get(i.name), largest) for i in implementations),
                )
                yield {
                    "workload": workload.name,
                    "optimizer": optimizer,
                    "largest_parameter": largest,
                    "extra_bytes": peaks,
                }
                tick()
        screen.show(
            f"{workload}: memory that a step adds at its peak, MB "
            f"(the largest parameter has {largest / 1e6:,.1f})",
            table,
        )


def _table(labels: Iterable[str], numbers: Iterable[str]) -> Table:
    return new_table(labels, numbers, is_dense=True)
