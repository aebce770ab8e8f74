"""``stepforge bench``: step times beside torch.optim and the limit of memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.markup import escape

from stepforge import extension
from stepforge.cli import devices, machine
from stepforge.cli.bench import sections
from stepforge.cli.bench.device_settings import DeviceSettings, settings_for
from stepforge.cli.bench.formats import has_int8_states
from stepforge.cli.bench.fresh_process import ProcessError
from stepforge.cli.bench.measure import memory_needed
from stepforge.cli.bench.workloads import (
    DEFAULT_WORKLOADS,
    GPU_WORKLOADS,
    WORKLOADS,
    Workload,
    read_shapes,
)
from stepforge.cli.dtypes import dtype_name
from stepforge.cli.options import OptimizerNames, current_device, optimizer_names
from stepforge.cli.output_files import file_option, write_json
from stepforge.cli.timing.turns import WARM_UPS

__all__ = ["bench"]

#: The values of ``--workload``.
WorkloadName = StrEnum("WorkloadName", [(name, name) for name in WORKLOADS])  # type: ignore[misc]
_ON_A_GPU = [name for name in GPU_WORKLOADS if name not in DEFAULT_WORKLOADS]


def bench(
    workload: Annotated[
        list[WorkloadName] | None,
        typer.Option(
            help=f"Repeat it for several; {', '.join(DEFAULT_WORKLOADS)} if neither it nor "
            f"--shapes is given, on a GPU {', '.join(_ON_A_GPU)} too, and all with --all."
        ),
    ] = None,
    optimizer: OptimizerNames = None,
    device: Annotated[
        str, typer.Option(help="Device of the parameters: cpu, cuda, cuda:1, xpu.")
    ] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to time.")] = 7,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of threads; torch's choice if not given.")
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
        typer.Option(
            min=2,
            help="Split the tensors into this many param groups, and compare with one.",
        ),
    ] = None,
    formats: Annotated[
        bool,
        typer.Option(
            "--formats",
            help="Compare storage formats of weights and states with float32, instead of the "
            "implementations.",
        ),
    ] = False,
    first_step: Annotated[
        bool,
        typer.Option(
            "--first-step",
            help="Time the first step of a fresh process, instead of the implementations.",
        ),
    ] = False,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory", help="Measure peak memory, instead of the implementations' times."
        ),
    ] = False,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Implementations on all workloads, formats, the first step and memory: many "
            "minutes.",
        ),
    ] = False,
    json_: Annotated[
        Path | None,
        file_option("File for all results", "--json"),
    ] = None,
) -> None:
    """Time step() beside torch.optim and the limit of memory.

    All implementations take turns, every step gets fresh gradients, and only step() is timed. On a
    GPU a step counts as the time of the host or the GPU, whichever is longer. Absolute times vary
    between machines and from minute to minute; the ratios of one run tell more.
    """
    settings = settings_for(current_device(device))
    defaults = WORKLOADS if everything else settings.default_workloads
    chosen = _workloads(workload, shapes, scale, defaults)
    names = optimizer_names(optimizer)
    if threads is not None:
        torch.set_num_threads(threads)
    # The other sections step nothing but shapes.
    plain = [w for w in chosen if w.is_plain]
    with_int8 = [w for w in plain if (formats or everything) and has_int8_states(w)]
    if groups is not None:
        chosen = [w.split(groups) for w in chosen if len(w.shapes) >= groups]
    for option, is_given, candidates, lacking in (
        ("--groups", groups is not None, chosen, f"{groups} tensors to split"),
        ("--formats", formats, with_int8, "a parameter that is large enough for them"),
        ("--first-step", first_step, plain, "plain steps"),
        ("--memory", memory, plain, "plain steps"),
    ):
        if is_given and not candidates and not everything:
            raise typer.BadParameter(f"no workload has {lacking}.", param_hint=option)
    skipped = {w.name: why for w in chosen if (why := w.form.missing(settings.device))}
    stepped = [w for w in chosen if w.name not in skipped]
    steps = everything or groups is not None or not (formats or first_step or memory)
    if stepped if steps else with_int8:
        _check_memory(stepped if steps else with_int8, names, settings)

    console = Console(highlight=False)
    # Now, else a step in the middle would begin to use it.
    guards = extension.described(extension.build_into_cache())
    description = (
        machine.describe()
        | {"numpy": np.__version__, "guards": guards}
        | devices.describe(settings.device)
    )
    console.print(machine.as_line(description), soft_wrap=True)
    load = [_load()]
    report: dict[str, Any] = {
        "machine": description,
        "device": str(settings.device),
        "settings": {
            "rounds": rounds,
            "warm_ups": WARM_UPS,
            "threads": torch.get_num_threads(),
            "scale": scale,
        },
        "workloads": [
            {
                "name": w.name,
                "tensors": len(w.shapes),
                "elements": w.elements,
                "groups": w.groups,
                "form": w.form.description,
                "threads": w.threads or torch.get_num_threads(),
                "steps": w.steps,
                "dtype": dtype_name(w.dtype),
                "gradient_size": w.gradient_size,
                "skipped": skipped.get(w.name),
            }
            for w in chosen
        ],
    }
    screen, error_message = sections.Screen(console, names), ""
    if steps:
        report["steps"] = list(sections.steps(screen, settings, stepped, names, rounds))
        for name, why in skipped.items():
            console.print(f"\n[bold]{escape(name)}[/] is skipped: {escape(why)}.", soft_wrap=True)
    if with_int8:
        report["formats"] = list(sections.formats(screen, settings, with_int8, names, rounds))
    try:
        if first_step or everything:
            report["first_step"] = list(sections.first_steps(screen, settings, plain, names))
        if memory or everything:
            report["memory"] = list(sections.memory(screen, settings, plain, names))
    except ProcessError as error:
        error_message = f"stepforge: {error}"
    load.append(_load())
    report["load"] = load
    console.print(
        f"\nMedians of {rounds} rounds after {WARM_UPS}. "
        f"Load of the machine: {load[0]:.1f} before, {load[1]:.1f} after.",
        soft_wrap=True,
    )
    if json_ is not None:
        write_json(json_, report)
        console.print(f"All times: [bold]{escape(str(json_))}[/]", soft_wrap=True)
    if error_message:
        raise SystemExit(error_message)


def _workloads(
    names: Iterable[str] | None, shapes: Path | None, scale: float, defaults: Iterable[str]
) -> list[Workload]:
    if not 0 < scale <= 1000:
        raise typer.BadParameter(
            f"{scale:g} is no factor; it must be above 0 and at most 1000.", param_hint="--scale"
        )
    selected = names or ([] if shapes else defaults)
    chosen = [WORKLOADS[name] for name in dict.fromkeys(selected)]
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


def _check_memory(
    workloads: Sequence[Workload], names: Sequence[str], settings: DeviceSettings
) -> None:
    available = devices.free_memory(settings.device)
    largest = max(workloads, key=lambda workload: workload.elements)
    needed = max(
        memory_needed(name, largest.elements, settings.implementations, settings.temporaries)
        for name in names
    )
    if available is not None and needed > available:
        raise typer.BadParameter(
            f"{largest.name} needs about {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are "
            f"free{' on the GPU' if settings.is_asynchronous else ''}; a smaller one will do.",
            param_hint="--scale",
        )


def _load() -> float:
    """Return the system's load average of the last minute; 0 if it is unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
