"""``stepforge bench``: how fast a step is, beside torch.optim and what memory allows."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import stepforge
from stepforge.cli import device as devices
from stepforge.cli.bounds import bytes_per_element
from stepforge.cli.clock import Lap
from stepforge.cli.machine import describe
from stepforge.cli.measure import (
    LIMIT,
    OURS,
    TORCH,
    WARM_UPS,
    make_gradients,
    measure_arms,
    measure_groups,
    memory_needed,
)
from stepforge.cli.output import file_option, write
from stepforge.cli.place import Place, place_of
from stepforge.cli.probe import PROCESSES, ProbeError, extra_memory, time_first_step
from stepforge.cli.scores import Result
from stepforge.cli.stored import FULL, INT8_TARGET, has_codes, measure_stored
from stepforge.cli.tables import print_whole
from stepforge.cli.workloads import WORKLOADS, Workload, read_shapes
from stepforge.rules import ALL

__all__ = ["bench"]

#: The names that the options take.
OptimizerName = StrEnum("OptimizerName", [(name, name) for name in ALL])  # type: ignore[misc]
WorkloadName = StrEnum("WorkloadName", [(name, name) for name in WORKLOADS])  # type: ignore[misc]

#: How many param groups ``--all`` compares with one.
_MANY_GROUPS = 500
#: Memory is counted in pages, and some of them late; a small parameter does not stand out.
_IMPRECISION = 2**21

#: On a machine with nothing else to do, quartiles are a few percent of the median apart.
_WIDE_SPREAD = 0.3

_Tick = Callable[[], None]


def bench(
    workload: Annotated[
        list[WorkloadName] | None,
        typer.Option(help="Repeat it for several; all if neither it nor --shapes is given."),
    ] = None,
    optimizer: Annotated[
        list[OptimizerName] | None,
        typer.Option(case_sensitive=False, help="Repeat it for several; all if not given."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where the parameters are: cpu, cuda, cuda:1, xpu.")
    ] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="How many steps of each arm to time.")] = 7,
    threads: Annotated[
        int | None, typer.Option(min=1, help="How many threads; torch's choice if not given.")
    ] = None,
    shapes: Annotated[
        Path | None,
        typer.Option(help="A JSON file of shapes to step: [[512, 64], [64]], or lists by name."),
    ] = None,
    scale: Annotated[
        float, typer.Option(help="Multiply the first dimension of all tensors.")
    ] = 1.0,
    groups: Annotated[
        int | None,
        typer.Option(min=2, help="Compare one param group with so many, instead of the arms."),
    ] = None,
    formats: Annotated[
        bool,
        typer.Option(
            "--formats",
            help="Compare ways to store weights and states with float32, instead of the arms.",
        ),
    ] = False,
    first_step: Annotated[
        bool,
        typer.Option(
            "--first-step", help="Time the first step of a fresh process, instead of the arms."
        ),
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure peak memory, instead of the arms' times.")
    ] = False,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help=f"The arms, {_MANY_GROUPS} groups, formats, the first step and memory: minutes.",
        ),
    ] = False,
    json_: Annotated[
        Path | None,
        file_option("Where to write all that was measured", "--json"),
    ] = None,
) -> None:
    """Times step() beside torch.optim and the limit that memory sets.

    All arms take turns, every step gets fresh gradients, and only step() is timed; on a GPU it
    counts as what the host or the GPU needs for it, whichever is longer. Absolute times change
    from machine to machine and from minute to minute; the ratios of one run tell more.
    """
    place = _place(device)
    chosen = _workloads(workload, shapes, scale)
    names = [str(name) for name in dict.fromkeys(optimizer or OptimizerName)]
    if threads is not None:
        torch.set_num_threads(threads)
    groups = _MANY_GROUPS if everything and groups is None else groups
    split = [w for w in chosen if groups is not None and len(w.shapes) >= groups]
    if groups is not None and not split and not everything:
        raise typer.BadParameter(
            f"no workload has {groups} tensors to split.", param_hint="--groups"
        )
    coded = [w for w in chosen if (formats or everything) and has_codes(w)]
    if formats and not coded and not everything:
        raise typer.BadParameter(
            "no workload has a parameter that is large enough for them.", param_hint="--formats"
        )
    steps = everything or not (groups or formats or first_step or memory)
    if steps or split or coded:
        _check_memory(chosen if steps else split + coded, names, place)

    console = Console(highlight=False)
    machine = describe() | {"numpy": np.__version__} | devices.describe(place.device)
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), soft_wrap=True)
    load = [_load()]
    report: dict[str, Any] = {
        "machine": machine,
        "device": str(place.device),
        "settings": {
            "rounds": rounds,
            "warm_ups": WARM_UPS,
            "threads": torch.get_num_threads(),
            "scale": scale,
        },
        "workloads": [
            {"name": w.name, "tensors": len(w.shapes), "elements": w.elements} for w in chosen
        ],
    }
    screen, failed = _Screen(console, names), ""
    if steps:
        report["steps"] = list(_steps(screen, place, chosen, names, rounds))
    if split and groups is not None:
        report["groups"] = list(_groups(screen, place, split, names, rounds, groups))
    if coded:
        report["formats"] = list(_formats(screen, place, coded, names, rounds))
    try:
        if first_step or everything:
            report["first_step"] = list(_first_steps(screen, place, chosen, names))
        if memory or everything:
            report["memory"] = list(_memory(screen, place, chosen, names))
    except ProbeError as error:
        failed = f"stepforge: {error}"
    load.append(_load())
    report["load"] = load
    console.print(
        f"\nMedians of {rounds} rounds after {WARM_UPS}. "
        f"Load of the machine: {load[0]:.1f} before, {load[1]:.1f} after.",
        soft_wrap=True,
    )
    if json_ is not None:
        write(json_, json.dumps(report, indent=1) + "\n")
        console.print(f"All times: [bold]{escape(str(json_))}[/]", soft_wrap=True)
    if failed:
        raise SystemExit(failed)


# What is asked for. -------------------------------------------------------------------------------


def _place(text: str) -> Place:
    try:
        device = devices.find(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None
    devices.use(device)
    return place_of(device)


def _workloads(names: Iterable[str] | None, shapes: Path | None, scale: float) -> list[Workload]:
    if not 0 < scale <= 1000:
        raise typer.BadParameter(
            f"{scale:g} is no factor; it must be above 0 and at most 1000.", param_hint="--scale"
        )
    wanted = names or ([] if shapes else WORKLOADS)
    chosen = [WORKLOADS[name] for name in dict.fromkeys(wanted)]
    if shapes is not None:
        try:
            own = read_shapes(shapes)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--shapes") from None
        taken = {w.name for w in own} & WORKLOADS.keys()
        if taken:
            raise typer.BadParameter(
                f"{taken.pop()} is the name of a workload of this program; rename it.",
                param_hint="--shapes",
            )
        chosen += own
    return chosen if scale == 1 else [workload.scaled(scale) for workload in chosen]


def _check_memory(workloads: Sequence[Workload], names: Sequence[str], place: Place) -> None:
    available = devices.free_memory(place.device)
    largest = max(workloads, key=lambda workload: workload.elements)
    needed = max(
        memory_needed(name, largest.elements, place.arms, place.temporaries) for name in names
    )
    if available is not None and needed > available:
        raise typer.BadParameter(
            f"{largest.name} needs about {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are "
            f"free{' on the GPU' if place.queues else ''}; a smaller one will do.",
            param_hint="--scale",
        )


class _Screen:
    """Tables, and a bar that is drawn between rounds: a thread that draws would be timed too."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console = console
        self._width = max(map(len, names))

    def show(self, title: str, table: Table) -> None:
        self.console.print(f"\n[bold]{escape(title)}[/]", soft_wrap=True)
        print_whole(self.console, table)

    @contextmanager
    def over(self, what: str, names: Sequence[str], each: int) -> Iterator[Callable[[str], _Tick]]:
        """A bar for some optimizers; gives a function that starts one and returns its tick."""
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            auto_refresh=False,
            transient=True,
            disable=not self.console.is_terminal,
        )
        with progress:
            task = progress.add_task(what, total=each * len(names))

            def start(name: str) -> _Tick:
                description = f"{what} {name:<{self._width}}"
                progress.update(task, description=description, refresh=True)
                return lambda: progress.update(task, advance=1, refresh=True)

            yield start


# One question each: measure, print a table, and give what is to be kept. --------------------------


def _steps(
    screen: _Screen,
    place: Place,
    workloads: Sequence[Workload],
    names: Sequence[str],
    rounds: int,
) -> Iterator[dict[str, Any]]:
    for workload in workloads:
        results = []
        gradients = make_gradients(workload.shapes, place.device)
        with screen.over(workload.name, names, WARM_UPS + rounds) as start:
            for name in names:
                laps = measure_arms(
                    name,
                    gradients,
                    rounds=rounds,
                    arms=place.arms,
                    clock=place.clock,
                    tick=start(name),
                )
                results.append(Result.of(workload.name, name, laps, place.targets))
        screen.show(f"{workload}: step()", _steps_table(results, place))
        if any(LIMIT.name not in result.seconds for result in results):
            screen.console.print(
                "Without the limit, for want of a kernel: `stepforge doctor` says why."
            )
        shaken = [result.optimizer for result in results if _is_shaken(result)]
        if shaken:
            screen.console.print(
                f"The times of {', '.join(shaken)} spread widely: something else used the machine, "
                "measure again.",
                soft_wrap=True,
            )
        if place.queues:
            speeds = [x for r in results for x in _copied(r, workload.elements).values()]
            fastest = _number(max(speeds, default=0.0), 1e-9)
            screen.console.print(f"The limit's fastest copy moved {fastest} GB/s.")
        for result in results:
            yield _kept(result, place) | _copied(result, workload.elements)
    for arm in place.arms:
        screen.console.print(f"  [bold]{arm.name:<20}[/]{arm.what}")
    if place.queues:
        screen.console.print(
            "ms is what the host or the GPU needs, whichever is longer; in training they overlap. "
            "Where it is more than GPU ms, the host needs longer.",
            soft_wrap=True,
        )


def _is_shaken(result: Result) -> bool:
    return any((result.spread(arm) or 0) > _WIDE_SPREAD for arm in result.seconds)


def _kept(result: Result, place: Place) -> dict[str, Any]:
    made = getattr(stepforge, result.optimizer)(
        [torch.zeros(1, device=place.device, requires_grad=True)]
    )
    return {
        "workload": result.workload,
        "optimizer": result.optimizer,
        "backend": stepforge.explain(made).served[0].backend,
        "bytes_per_element": bytes_per_element(result.optimizer),
        "arms": {
            arm: {
                "seconds": list(seconds),
                "median": result.median(arm),
                "spread": result.spread(arm),
                **(_parts(result.laps[arm]) if place.queues else {}),
                **dataclasses.asdict(result.ratios(arm)),
            }
            for arm, seconds in result.seconds.items()
        },
        "target": dataclasses.asdict(result.target) if result.target else None,
        "reached": result.reached,
    }


def _copied(result: Result, elements: int) -> dict[str, float]:
    """How many bytes the limit reads and writes in a second of a GPU; nothing on a CPU."""
    seconds = result.median_on_device(LIMIT.name)
    moved = bytes_per_element(result.optimizer) * elements
    return {"limit_bytes_per_second": moved / seconds} if seconds else {}


def _parts(laps: Sequence[Lap]) -> dict[str, list[float | None]]:
    return {
        "host_seconds": [lap.host for lap in laps],
        "device_seconds": [lap.device for lap in laps],
    }


#: The columns of ratios, and what they show.
_RATIOS = {
    "of the\nlimit": "of_limit",
    "x torch's\nbest": "against_best",
    "x torch's\ndefault": "against_default",
}


def _steps_table(results: Iterable[Result], place: Place) -> Table:
    # On a GPU torch.optim's default is its foreach, so the time of the GPU can have that room.
    shown = {k: v for k, v in _RATIOS.items() if not (place.queues and v == "against_default")}
    on_device = ["GPU ms"] if place.queues else []
    table = _table(["optimizer", "arm"], ["ms", *on_device, "spread", *shown])
    for result in results:
        optimizer = result.optimizer
        for arm in place.arms:
            if arm.name not in result.seconds:
                continue
            ratios = vars(result.ratios(arm.name))
            marks = result.reached if arm == OURS else {}
            table.add_row(
                optimizer,
                Text(arm.name, style="bold" if arm == OURS else ""),
                _number(result.median(arm.name), 1e3),
                *(_number(result.median_on_device(arm.name), 1e3) for _ in on_device),
                _percent(result.spread(arm.name)),
                *(_marked(ratios[name], marks.get(name)) for name in shown.values()),
            )
            optimizer = ""
            if arm == OURS and result.target:
                wanted = vars(result.target)
                table.add_row(
                    "",
                    Text("  to reach", style="dim"),
                    *("" for _ in ("ms", *on_device, "spread")),
                    *(_marked(wanted[name], None) for name in shown.values()),
                )
        table.add_section()
    return table


def _groups(
    screen: _Screen,
    place: Place,
    workloads: Sequence[Workload],
    names: Sequence[str],
    rounds: int,
    groups: int,
) -> Iterator[dict[str, Any]]:
    target = place.groups_target
    for workload in workloads:
        table = _table(
            ["optimizer", "arm"],
            ["ms, one", f"ms, {groups}", "ratio", "at most"],
        )
        gradients = make_gradients(workload.shapes, place.device)
        with screen.over(f"{workload.name}, groups", names, WARM_UPS + rounds) as start:
            for name in names:
                times = measure_groups(
                    name, gradients, groups, rounds=rounds, clock=place.clock, tick=start(name)
                )
                kept: dict[str, Any] = {"workload": workload.name, "optimizer": name, "arms": {}}
                for arm in (TORCH, OURS):
                    one, many = (statistics.median(times[arm.name][n]) for n in (1, groups))
                    limit = target if arm == OURS else None
                    table.add_row(
                        "" if arm == OURS else name,
                        arm.name,
                        _number(one, 1e3),
                        _number(many, 1e3),
                        _marked(many / one, _at_most(many / one, limit)),
                        _number(limit),
                    )
                    kept["arms"][arm.name] = {"seconds": times[arm.name], "ratio": many / one}
                yield kept
        screen.show(f"{workload}: one param group or {groups}", table)


def _formats(
    screen: _Screen, place: Place, workloads: Sequence[Workload], names: Sequence[str], rounds: int
) -> Iterator[dict[str, Any]]:
    for workload in workloads:
        table = _table(["optimizer", "weights and states"], ["ms", "of float32", "at most"])
        gradients = make_gradients(workload.shapes, place.device)
        with screen.over(f"{workload.name}, formats", names, WARM_UPS + rounds) as start:
            for name in names:
                times = measure_stored(
                    name, gradients, rounds=rounds, clock=place.clock, tick=start(name)
                )
                full = statistics.median(times[FULL.name])
                kept: dict[str, Any] = {"workload": workload.name, "optimizer": name, "ways": {}}
                for way, seconds in times.items():
                    ratio = statistics.median(seconds) / full
                    limit = INT8_TARGET.get((workload.name, way))
                    table.add_row(
                        name if way == FULL.name else "",
                        way,
                        _number(statistics.median(seconds), 1e3),
                        _marked(ratio, _at_most(ratio, limit)),
                        _number(limit),
                    )
                    kept["ways"][way] = {"seconds": seconds, "ratio": ratio}
                table.add_section()
                yield kept
        screen.show(f"{workload}: step() by what is stored", table)


def _first_steps(
    screen: _Screen, place: Place, workloads: Sequence[Workload], names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    table = _table(["workload", "optimizer"], ["ms", "at most"])
    for workload in workloads:
        with screen.over(f"{workload.name}, first step", names, 1 + PROCESSES) as start:
            for name in names:
                seconds = time_first_step(name, workload, start(name), place.device)
                reached = _at_most(seconds, place.first_step_target)
                limit = _number(place.first_step_target, 1e3)
                table.add_row(workload.name, name, _marked(1e3 * seconds, reached), limit)
                yield {"workload": workload.name, "optimizer": name, "seconds": seconds}
    screen.show("the first step of a fresh process minus the second", table)


def _memory(
    screen: _Screen, place: Place, workloads: Sequence[Workload], names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    arms = [arm for arm in place.arms if arm.bound is None]
    for workload in workloads:
        largest = 4 * max(map(math.prod, workload.shapes))
        table = _table(
            ["optimizer"],
            [arm.name.replace(" ", "\n") for arm in arms],
        )
        with screen.over(f"{workload.name}, memory", names, 1) as start:
            for name in names:
                tick = start(name)
                peaks = extra_memory(name, workload, place.device)
                table.add_row(name, *(_peak(peaks.get(arm.name), largest) for arm in arms))
                yield {
                    "workload": workload.name,
                    "optimizer": name,
                    "largest_parameter": largest,
                    "extra_bytes": peaks,
                }
                tick()
        screen.show(
            f"{workload}: memory that a step adds at its peak, MB "
            f"(the largest parameter has {largest / 1e6:,.1f})",
            table,
        )


def _at_most(value: float, limit: float | None) -> bool | None:
    return None if limit is None else value <= limit


def _load() -> float:
    """How many processes wanted to run in the last minute; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


# Cells. -------------------------------------------------------------------------------------------


def _table(names: Iterable[str], numbers: Iterable[str]) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    for heading in names:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _number(value: float | None, factor: float = 1) -> str:
    """About three digits, never in scientific notation."""
    if value is None:
        return ""
    value *= factor
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _marked(value: float | None, reached: bool | None, shown: str = "") -> Text:
    """A number, with a mark if it was to reach something, and room for the mark if not."""
    mark = {
        True: Text(" \N{CHECK MARK}", style="green"),
        False: Text(" \N{BALLOT X}", style="red"),
        None: Text("  "),
    }[reached]
    number = format(value, shown) if shown and value is not None else _number(value)
    return Text.assemble(number, mark)


def _peak(extra: int | None, largest: int) -> Text:
    if extra is None:
        return Text()
    none_as_large = extra < largest - _IMPRECISION if largest > 2 * _IMPRECISION else None
    return _marked(extra / 1e6, none_as_large, ".1f")
