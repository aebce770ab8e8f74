"""``stepforge selftest``: compares the bits that every backend stores on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from stepforge.backends import BACKENDS, FUSED, ParamSpec
from stepforge.cli import device as devices
from stepforge.cli.doctor import facts
from stepforge.cli.machine import describe
from stepforge.cli.selftest.cases import Case, cases
from stepforge.cli.selftest.compare import Outcome, Result, differing, digest, outcomes
from stepforge.rules import ALL
from stepforge.state.layout import dtypes_after_step, state_layout
from stepforge.step.params import kernel_spec

__all__ = ["HASHES", "selftest"]

#: The names that ``--optimizer`` takes.
OptimizerName = StrEnum("OptimizerName", [(name, name) for name in ALL])  # type: ignore[misc]

#: The hashes that the package carries: for each case those of its steps.
HASHES = Path(__file__).with_name("hashes.json")
#: Where a report goes if nobody says.
REPORT = Path("stepforge-selftest.json")

#: Which share of the cases Triton's interpreter steps: all would take minutes. Dtypes come in turns
#: of five, so each is in some case.
_INTERPRETED = 4

_CARRIED = "the hashes of the package"
_REFERENCE = "the reference on the CPU"


def selftest(
    device: Annotated[
        str, typer.Option(help="Where the steps to be checked run: cpu, cuda, cuda:1, xpu.")
    ] = "cpu",
    optimizer: Annotated[
        list[OptimizerName] | None,
        typer.Option(case_sensitive=False, help="Repeat it for several; all if not given."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Where to write all that was compared; if not given, and only if something "
            f"differs, {REPORT} in the current folder.",
        ),
    ] = None,
    write_hashes: Annotated[
        bool,
        typer.Option(
            "--write-hashes",
            hidden=True,
            help="Write the hashes that the package carries, once rules or cases have changed.",
        ),
    ] = False,
) -> None:
    """Compares the bits that all backends store.

    All optimizers step fixed numbers by every backend. The bits are compared with those of the
    reference on this CPU, and these with hashes that the package carries. Every optimizer steps
    every dtype; of all other options (formats, gradients of another dtype, flags) every two meet in
    some case. Layouts are in every case.

    The exit code is 0 if all bits are equal, otherwise 1.
    """
    place = _device(device)
    used, refused = _usable(_backends(place), place)
    if report is not None and not report.absolute().parent.is_dir():
        raise typer.BadParameter(f"{report.parent} is no folder.", param_hint="--report")
    is_interpreted = "triton" in used and place == devices.CPU
    if write_hashes and (optimizer or is_interpreted or place != devices.CPU):
        raise typer.BadParameter("it is for all cases, on a CPU.", param_hint="--write-hashes")
    names = [str(name) for name in dict.fromkeys(optimizer or OptimizerName)]
    chosen = [case for case in cases() if case.optimizer in names]
    console = Console(highlight=False)
    machine = describe() | devices.describe(place)
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), soft_wrap=True)
    if is_interpreted:
        chosen = chosen[::_INTERPRETED]
        console.print(f"Triton's interpreter is slow: it steps one case in {_INTERPRETED}.")
    results = _compare(console, chosen, used, place)
    console.print(_table(results, names, used, place))
    for name, why in refused.items():
        console.print(f"{name} was not tested: {why}", soft_wrap=True, markup=False)
    differ = [result for result in results if not result.agrees]
    console.print(_verdict(results, used), soft_wrap=True, markup=False)
    if write_hashes:
        _write_hashes(console, results)
        return
    if differ or report is not None:
        _write_report(console, report or REPORT, place, results)
    if differ:
        raise typer.Exit(1)


# Options. -----------------------------------------------------------------------------------------


def _device(text: str) -> torch.device:
    try:
        device = devices.find(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None
    devices.use(device)
    return device


def _backends(device: torch.device) -> tuple[str, ...]:
    """The backends to compare on a device: those that promise the bits of the reference on a CPU.

    Elsewhere only generated kernels do: the reference and foreach are torch's own arithmetic there.
    """
    promised = tuple(filter(None, (FUSED.get(device.type),)))
    if device.type == "cpu":
        promised = ("foreach", *promised)  # kernels last: they are compiled meanwhile
    asked = os.environ.get("STEPFORGE_BACKEND")
    if asked and asked not in BACKENDS:
        raise SystemExit(
            f"stepforge: STEPFORGE_BACKEND is {asked!r}; it must be one of {', '.join(BACKENDS)}"
        )
    if not promised:
        raise typer.BadParameter(
            f"there are no kernels for {device.type} devices, so torch's own arithmetic steps "
            "there, and no bits are promised.",
            param_hint="--device",
        )
    if asked and device.type != "cpu" and asked not in promised:
        raise SystemExit(
            f"stepforge: STEPFORGE_BACKEND is {asked!r}, but on {device} only the bits of "
            f"{', '.join(promised)} are promised: unset it"
        )
    # The reference is what all are compared with.
    return tuple(name for name in ([asked] if asked else promised) if name != "reference")


def _usable(backends: Sequence[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The backends that can step anything at all, and why others cannot.

    Raises:
        SystemExit: none can.
    """
    reasons = {name: _refusal(cases()[0], name, device) for name in backends}
    usable = [name for name, why in reasons.items() if why is None]
    refused = {name: why for name, why in reasons.items() if why is not None}
    if backends and not usable:
        said = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise SystemExit(f"stepforge: nothing can be tested on {device}: {said}")
    return usable, refused


def _refusal(case: Case, backend: str, device: torch.device) -> str | None:
    """Why a backend cannot serve some parameter of a case; None if it serves all.

    The native backend compiles the kernels of the case on the way.
    """
    members = case.members()
    params = [member.parameter(0, case.dtype, device) for member in members]
    # Who asks for a kernel is told why there is none; who does not is warned.
    optimizer = case.build(params, fused=True)
    for group in optimizer.param_groups:
        graph = optimizer.rule.graph(group)
        for p in group["params"]:
            g = torch.empty_like(p, dtype=case.gradient)
            layout = state_layout(optimizer.rule, group, p)
            spec = kernel_spec(graph, layout, p, g, dtypes_after_step(layout, group, {}))
            why = BACKENDS[backend].unsupported_reason(ParamSpec(p, g, group, spec))
            if why is not None:
                return why
    return None


# Comparing. ---------------------------------------------------------------------------------------


def _compare(
    console: Console, chosen: Sequence[Case], backends: Sequence[str], device: torch.device
) -> list[Result]:
    """Steps every case by the reference and by each backend."""
    results = []
    progress = Progress(
        TextColumn("stepping"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    with progress, ThreadPoolExecutor(1) as pool:
        task = progress.add_task("", total=len(chosen) * (1 + len(backends)))
        if "native" in backends:
            # A compiler needs as long as all steps: it works while the other backends step.
            for case in chosen:
                pool.submit(_refusal, case, "native", device)
        try:
            for result in _results(chosen, backends, device):
                results.append(result)
                progress.advance(task)
        except BaseException:  # Ctrl-C among them
            pool.shutdown(cancel_futures=True)
            raise
    return results


def _results(
    chosen: Sequence[Case], backends: Sequence[str], device: torch.device
) -> Iterator[Result]:
    carried: Mapping[str, str] = json.loads(HASHES.read_text(encoding="utf-8"))
    of_reference: dict[str, list[Outcome]] = {}
    hashes: dict[str, tuple[str, ...]] = {}
    for case in chosen:
        steps = outcomes(case, "reference", devices.CPU)
        of_reference[case.name] = steps
        expected = tuple(carried.get(case.name, "").split())
        hashes[case.name] = tuple(map(digest, steps))
        yield Result(case, "reference", _CARRIED, expected, hashes[case.name])
    for backend in backends:
        for case in chosen:
            wanted, expected = of_reference[case.name], hashes[case.name]
            try:
                steps = outcomes(case, backend, device)
            except Exception as error:  # of whatever kind: a compiler's or a driver's, too
                yield Result(case, backend, _REFERENCE, expected, (), error=str(error))
                continue
            found, unlike = tuple(map(digest, steps)), tuple(differing(wanted, steps))
            yield Result(case, backend, _REFERENCE, expected, found, unlike)


# Telling. -----------------------------------------------------------------------------------------


def _table(
    results: Sequence[Result], names: Sequence[str], backends: Sequence[str], device: torch.device
) -> Table:
    """A row for each optimizer: in how many of its cases which bits are right."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("cases with the right bits")
    table.add_column("reference", justify="right")
    on_device = "" if device.type == "cpu" else f" on {device}"
    for backend in backends:
        table.add_column(f"{backend}{on_device}", justify="right")
    for name in names:
        cells = []
        for backend in ("reference", *backends):
            agree = [r.agrees for r in results if (r.case.optimizer, r.backend) == (name, backend)]
            cells.append(f"{sum(agree)} of {len(agree)}")
        table.add_row(name, *cells)
    return table


def _verdict(results: Sequence[Result], backends: Sequence[str]) -> str:
    """All that was found, in one line."""
    wrong = {
        backend: sum(not result.agrees for result in results if result.backend == backend)
        for backend in ("reference", *backends)
    }
    count = sum(result.backend == "reference" for result in results)
    names = " and ".join(backends)
    elsewhere = wrong.pop("reference")
    found = [
        f"{backend} does not store the reference's bits in {number} of {count} cases"
        for backend, number in wrong.items()
        if number
    ]
    if elsewhere:
        found.append(
            f"the reference does not store those that the package carries in {elsewhere} of {count}"
        )
    if found:
        return f"DIFFERENT: {'; '.join(found)}."
    if not backends:
        return f"Equal: the reference stores the bits that the package carries in {count} cases."
    store = "stores" if len(backends) == 1 else "store"
    return (
        f"Equal: in {count} cases {names} {store} the reference's bits, which are those that the "
        "package carries."
    )


def _write_report(
    console: Console, path: Path, device: torch.device, results: Sequence[Result]
) -> None:
    told = {
        "machine": facts(),
        "device": {"name": str(device)} | devices.describe(device),
        "results": [result.report() for result in results],
    }
    _write(path, told)
    console.print(f"Attach {path} to a report.", soft_wrap=True, markup=False)


def _write_hashes(console: Console, results: Sequence[Result]) -> None:
    """Carries what the reference has found, if all backends agree with it.

    Raises:
        SystemExit: one does not.
    """
    if not all(result.agrees for result in results if result.backend != "reference"):
        raise SystemExit("stepforge: backends differ, so no hashes are written")
    _write(HASHES, {r.case.name: " ".join(r.found) for r in results if r.backend == "reference"})
    console.print(f"The package carries them: {HASHES}", soft_wrap=True, markup=False)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise SystemExit(
            f"stepforge: {path} cannot be written ({error.strerror}): name another file with "
            "--report"
        ) from None
