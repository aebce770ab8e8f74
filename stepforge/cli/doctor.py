"""``stepforge doctor``: the backend of a step on this machine, and why nothing faster runs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import stepforge
from stepforge.backends import FUSED
from stepforge.cli import devices, machine
from stepforge.cli.dtypes import DTYPES, dtype_name
from stepforge.cli.tables import new_table, print_whole
from stepforge.rules import ALL

__all__ = ["doctor"]

#: An optimizer's name and the dtype of a parameter.
_Kind: TypeAlias = "tuple[str, torch.dtype]"


@dataclass(frozen=True)
class Diagnosis:
    """The backend that serves one kind of parameter.

    Attributes:
        backend: the name of the backend; "" if none is allowed to serve it, "-" if the device does
            not have the dtype.
        reason: why it is not the device's compiled kernel; "" if it is, or if there is none.
    """

    backend: str
    reason: str = ""


def doctor() -> None:
    """Show what step() would run here, and why nothing faster.

    The report covers the CPU, and a GPU if there is one. The exit code is 0 if compiled kernels
    serve all optimizers on every device that has such kernels, otherwise 1.
    """
    console = Console(highlight=False)
    for name, value in machine.describe_in_detail().items():
        console.print(f"[bold]{name:<18}[/]{escape(value)}", soft_wrap=True)
    console.print(f"[bold]{'bits':<18}[/]stepforge selftest compares those of all backends here")
    # Devices of one type are served alike.
    reports = [_report(console, device) for device in (devices.CPU, *devices.accelerators()[:1])]
    if not all(reports):
        raise typer.Exit(1)


def _report(console: Console, device: torch.device) -> bool:
    """Print the backends on a device. Return True if nothing faster is available there."""
    diagnoses = {(name, dtype): _diagnose(name, dtype, device) for name in ALL for dtype in DTYPES}
    console.print()
    print_whole(console, _table(diagnoses, device))
    for reason, kinds in _reasons(diagnoses, device).items():
        console.print(f"[bold]{kinds}[/]: {escape(reason)}", soft_wrap=True)
    return not any(diagnosis.reason for diagnosis in diagnoses.values())


def _diagnose(name: str, dtype: torch.dtype, device: torch.device) -> Diagnosis:
    try:
        p = torch.zeros(1, dtype=dtype, device=device, requires_grad=True)
    except (RuntimeError, TypeError):
        return Diagnosis("-")
    try:
        optimizer = getattr(stepforge, name)([p])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report itself says that a kernel is missing
            served = stepforge.explain(optimizer).served[0]
    except (RuntimeError, ValueError) as error:  # STEPFORGE_BACKEND names an impossible backend
        return Diagnosis("", str(error))
    fastest = _fastest(device)
    if served.backend == fastest:
        return Diagnosis(served.backend)
    # Without a reason the fastest backend was never tried.
    forced = f"STEPFORGE_BACKEND asks for {served.backend}"
    return Diagnosis(served.backend, dict(served.reasons).get(fastest, forced))


def _fastest(device: torch.device) -> str:
    """Return the backend with compiled kernels for a device, or the best one without kernels."""
    return FUSED.get(device.type, "foreach")


def _table(diagnoses: Mapping[_Kind, Diagnosis], device: torch.device) -> Table:
    table = new_table([f"would run on {device.type}", *map(dtype_name, DTYPES)])
    for name in ALL:
        table.add_row(name, *(diagnoses[name, dtype].backend or "an error" for dtype in DTYPES))
    return table


def _reasons(diagnoses: Mapping[_Kind, Diagnosis], device: torch.device) -> dict[str, str]:
    """Return a summary of the kinds without compiled kernels, by reason."""
    kinds: dict[str, list[_Kind]] = {}
    for kind, diagnosis in diagnoses.items():
        if diagnosis.reason:
            kinds.setdefault(diagnosis.reason, []).append(kind)
    fastest = _fastest(device)
    return {reason: f"no {fastest} for {_summary(which)}" for reason, which in kinds.items()}


def _summary(kinds: list[_Kind]) -> str:
    names = list(dict.fromkeys(name for name, _ in kinds))
    dtypes = list(dict.fromkeys(dtype_name(dtype) for _, dtype in kinds))
    if len(kinds) == len(ALL) * len(DTYPES):
        return "any of them"
    if len(kinds) == len(names) * len(dtypes):
        return f"{', '.join(names)} in {', '.join(dtypes)}"
    return ", ".join(f"{name} in {dtype_name(dtype)}" for name, dtype in kinds)
