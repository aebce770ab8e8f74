"""``stepforge doctor``: what a step would run on this machine, and why nothing faster."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import stepforge
from stepforge.backends import FUSED
from stepforge.backends.native import build, prebuilt
from stepforge.cli import device as devices
from stepforge.cli import variants
from stepforge.cli.machine import describe
from stepforge.cli.prebuild import PLAIN
from stepforge.cli.tables import print_whole
from stepforge.rules import ALL

__all__ = ["doctor", "facts"]

#: The dtypes of the parameters that are asked about.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)
#: The environment variables that change what runs.
_VARIABLES = (
    "STEPFORGE_BACKEND",
    "STEPFORGE_ISA",
    "STEPFORGE_PREBUILT",
    "STEPFORGE_CACHE",
    "CC",
    "TRITON_INTERPRET",
)

_Kind: TypeAlias = "tuple[str, torch.dtype]"


@dataclass(frozen=True)
class Served:
    """What one kind of parameter gets.

    Attributes:
        backend: the name of the backend; "" if none is allowed to serve it, "-" if the device has
            no such numbers.
        why: why it is not the compiled kernel of the device; "" if it is, or if there is none.
    """

    backend: str
    why: str = ""


def doctor() -> None:
    """Says what step() would run here, and why nothing faster.

    It tells of the CPU, and of a GPU if there is one. The exit code is 0 if compiled kernels serve
    all optimizers wherever there are such kernels, otherwise 1.
    """
    console = Console(highlight=False)
    for name, value in facts().items():
        console.print(f"[bold]{name:<18}[/]{escape(value)}", soft_wrap=True)
    console.print(f"[bold]{'bits':<18}[/]stepforge selftest compares those of all backends here")
    # Devices of one type are served alike.
    reports = [_report(console, device) for device in (devices.CPU, *devices.accelerators()[:1])]
    if not all(reports):
        raise typer.Exit(1)


def _report(console: Console, device: torch.device) -> bool:
    """Prints what runs on a device; gives whether nothing faster could be had there."""
    kinds = [(name, dtype) for name in ALL for dtype in _DTYPES]
    served = {kind: _served(*kind, device) for kind in kinds}
    console.print()
    print_whole(console, _table(served, device))
    for why, which in _reasons(served, device).items():
        console.print(f"[bold]{which}[/]: {escape(why)}", soft_wrap=True)
    return not any(answer.why for answer in served.values())


def facts() -> dict[str, str]:
    """This machine, and what there is to compile for it, for people to read."""
    machine = describe()
    return {
        "stepforge": machine["stepforge"],
        "torch": machine["torch"],
        "numpy": np.__version__,
        "system": f"{machine['system']}, Python {machine['Python']}",
        "CPU": machine["CPU"],
        "instruction set": _or_why_not(lambda: build.instruction_set() or "the plain one"),
        "compiler": _or_why_not(_compiler),
        "prebuilt kernels": _or_why_not(_prebuilt),
        "kernel cache": _or_why_not(_cache),
        "threads": _threads(),
        "accelerators": _accelerators(),
        "triton": devices.triton_version(),
        "environment": _environment(),
    }


def _or_why_not(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except build.BuildError as error:
        return f"none: {error}"


def _compiler() -> str:
    command = build.compiler()
    return f"{' '.join(command)}: {build.compiler_version(command)}"


def _prebuilt() -> str:
    folder = prebuilt.folder()
    if folder is None:
        return "none: STEPFORGE_PREBUILT is empty"
    wanted = variants.sources()
    counts, size = [], 0
    for isa in (*build.LEVELS, ""):
        files = list(prebuilt.shelf(folder, isa).glob("*.so"))
        if files:
            # Those of another version, or altered, are not used.
            usable = sum(any(prebuilt.find(folder, source, isa)) for source in wanted)
            counts.append(f"{usable} of {len(wanted)} for {isa or PLAIN}")
            size += sum(path.stat().st_size for path in files)
    return f"{folder}: {', '.join(counts)}; {size / 1e6:.1f} MB" if counts else f"none in {folder}"


def _cache() -> str:
    folder = build.cache_folder()
    sizes = [path.stat().st_size for path in folder.glob("*.so")]
    plural = "" if len(sizes) == 1 else "s"
    kept = f"{folder}: {len(sizes)} kernel{plural}, {sum(sizes) / 1e6:.1f} MB"
    return kept if os.access(folder, os.W_OK) else f"{kept}; it cannot be written to"


def _threads() -> str:
    if build.thread_pool() is None:
        pool = "torch's OpenMP pool was not found, so kernels use one"
    else:
        pool = "torch's OpenMP pool was found"
    return f"{torch.get_num_threads()}; {pool}"


def _accelerators() -> str:
    told = (devices.describe(device) for device in devices.accelerators())
    return "; ".join(f"{facts['GPU']}, {facts['platform']}" for facts in told) or "none"


def _environment() -> str:
    known = {name: os.environ.get(name) for name in _VARIABLES}
    settings = [f"{name}={value}" for name, value in known.items() if value is not None]
    return ", ".join(settings) or f"none of {', '.join(_VARIABLES)} is set"


def _served(name: str, dtype: torch.dtype, device: torch.device) -> Served:
    try:
        p = torch.zeros(1, dtype=dtype, device=device, requires_grad=True)
    except (RuntimeError, TypeError):
        return Served("-")
    try:
        optimizer = getattr(stepforge, name)([p])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the one that there is no kernel: we say so ourselves
            served = stepforge.explain(optimizer).served[0]
    except (RuntimeError, ValueError) as error:  # STEPFORGE_BACKEND asks for what cannot be had
        return Served("", str(error))
    fastest = _fastest(device)
    if served.backend == fastest:
        return Served(served.backend)
    # Nothing was passed over if nothing faster was asked.
    asked = f"STEPFORGE_BACKEND asks for {served.backend}"
    return Served(served.backend, dict(served.reasons).get(fastest, asked))


def _fastest(device: torch.device) -> str:
    """The backend with a compiled kernel for a device, or the best where there is none."""
    return FUSED.get(device.type, "foreach")


def _table(served: Mapping[_Kind, Served], device: torch.device) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(f"would run on {device.type}")
    for dtype in _DTYPES:
        table.add_column(_bare(dtype))
    for name in ALL:
        table.add_row(name, *(served[name, dtype].backend or "an error" for dtype in _DTYPES))
    return table


def _reasons(served: Mapping[_Kind, Served], device: torch.device) -> dict[str, str]:
    """For each reason, what is not served for it."""
    kinds: dict[str, list[_Kind]] = {}
    for kind, answer in served.items():
        if answer.why:
            kinds.setdefault(answer.why, []).append(kind)
    fastest = _fastest(device)
    return {why: f"no {fastest} for {_summary(which)}" for why, which in kinds.items()}


def _summary(kinds: list[_Kind]) -> str:
    names = list(dict.fromkeys(name for name, _ in kinds))
    dtypes = list(dict.fromkeys(_bare(dtype) for _, dtype in kinds))
    if len(kinds) == len(ALL) * len(_DTYPES):
        return "any of them"
    if len(kinds) == len(names) * len(dtypes):
        return f"{', '.join(names)} in {', '.join(dtypes)}"
    return ", ".join(f"{name} in {_bare(dtype)}" for name, dtype in kinds)


def _bare(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
