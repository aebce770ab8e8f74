"""``stepforge selftest``: a comparison of the bits that every backend stores on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from stepforge.backends import BACKENDS, FUSED, ParamSpec
from stepforge.backends.triton.inspection import GPU
from stepforge.cli import devices, machine
from stepforge.cli.options import OptimizerNames, current_device, optimizer_names
from stepforge.cli.output_files import file_option, write_json
from stepforge.cli.selftest.cases import Case, cases
from stepforge.cli.selftest.compare import Outcome, Result, digest, find_differences, outcomes
from stepforge.cli.selftest.gpu import gpu_of, kernels
from stepforge.cli.selftest.speed import Speed, speeds
from stepforge.cli.tables import new_table, print_whole
from stepforge.state.layout import dtypes_after_step, state_layout
from stepforge.step.params import kernel_spec

__all__ = ["HASHES", "selftest"]

#: The hashes in the package: for each case those of its steps.
HASHES = Path(__file__).with_name("hashes.json")
#: The default path of a report.
REPORT = Path("stepforge-selftest.json")

#: Triton's interpreter steps every fourth case, as all would take minutes. Dtypes come in turns of
#: five, so each is in some case.
_INTERPRETED = 4

_HASHES_NAME = "the hashes of the package"
_REFERENCE_NAME = "the reference on the CPU"


def selftest(
    device: Annotated[
        str, typer.Option(help="Device of the steps to check: cpu, cuda, cuda:1, xpu.")
    ] = "cpu",
    optimizer: OptimizerNames = None,
    report: Annotated[
        Path | None,
        file_option(
            f"File for all comparisons; if not given, {REPORT} in the current folder, written only "
            "on a GPU, and if something differs",
            "--report",
        ),
    ] = None,
    write_hashes: Annotated[
        bool,
        typer.Option(
            "--write-hashes",
            hidden=True,
            help="Write the package's hashes after a change of rules or cases.",
        ),
    ] = False,
) -> None:
    """Compare the bits that all backends store.

    All optimizers step fixed inputs on every backend. The bits are compared with those of the
    reference on this CPU, and the reference's with hashes in the package. Every optimizer steps
    every dtype; of all other options (formats, gradients of another dtype, flags) every pair occurs
    in some case. Every case has all memory layouts.

    On a GPU steps are timed, too, beside a copy within its memory, and the machine code of kernels
    is read. All is in one file, to attach to a report.

    The exit code is 0 if all bits are equal, otherwise 1.
    """
    tested = current_device(device)
    backends, unavailable = _usable(_backends(tested), tested)
    is_interpreted = "triton" in backends and tested == devices.CPU
    if write_hashes and (optimizer or is_interpreted or tested != devices.CPU):
        raise typer.BadParameter("it is for all cases, on a CPU.", param_hint="--write-hashes")
    names = optimizer_names(optimizer)
    chosen = [case for case in cases() if case.optimizer in names]
    console = Console(highlight=False)
    console.print(machine.as_line(machine.describe() | devices.describe(tested)), soft_wrap=True)
    if is_interpreted:
        chosen = chosen[::_INTERPRETED]
        console.print(f"Triton's interpreter is slow: it steps one case in {_INTERPRETED}.")
    results = _compare(console, chosen, backends, tested)
    print_whole(console, _table(results, names, backends, tested))
    for name, reason in unavailable.items():
        console.print(f"{name} was not tested: {reason}", soft_wrap=True, markup=False)
    differs = not all(result.agrees for result in results)
    console.print(_verdict(results, backends), soft_wrap=True, markup=False)
    if write_hashes:
        _write_hashes(console, results)
        return
    timed, problem = ([], "") if tested == devices.CPU else _speeds(console, tested)
    if differs or report is not None or tested != devices.CPU:
        content = _report(tested, results) | {
            "speed": [asdict(speed) for speed in timed],
            "speed_problem": problem,
            "kernels": _kernels(console, gpu_of(tested)),
        }
        write_json(report or REPORT, content, hint="; name another file with --report")
        console.print(f"Attach {report or REPORT} to a report.", soft_wrap=True, markup=False)
    if differs:
        raise typer.Exit(1)


# Backends. ----------------------------------------------------------------------------------------


def _backends(device: torch.device) -> tuple[str, ...]:
    """Return the backends that promise the bits of the reference on a CPU.

    On other devices only generated kernels promise them: the reference and foreach are torch's own
    arithmetic there.
    """
    promised = tuple(filter(None, (FUSED.get(device.type),)))
    if device.type == "cpu":
        promised = ("foreach", *promised)  # kernels last: they are compiled meanwhile
    forced = os.environ.get("STEPFORGE_BACKEND")
    if forced and forced not in BACKENDS:
        raise SystemExit(
            f"stepforge: STEPFORGE_BACKEND is {forced!r}; it must be one of {', '.join(BACKENDS)}"
        )
    if not promised:
        raise typer.BadParameter(
            f"there are no kernels for {device.type} devices, so torch's own arithmetic steps "
            "there, and no bits are promised.",
            param_hint="--device",
        )
    if forced and device.type != "cpu" and forced not in promised:
        raise SystemExit(
            f"stepforge: STEPFORGE_BACKEND is {forced!r}, but on {device} only the bits of "
            f"{', '.join(promised)} are promised: unset it"
        )
    # All backends are compared with the reference, so it is left out.
    return tuple(name for name in ([forced] if forced else promised) if name != "reference")


def _usable(backends: Sequence[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Return the backends that can step anything at all, and the reasons of the others.

    Raises:
        SystemExit: if none can.
    """
    checked = {name: _unsupported_reason(cases()[0], name, device) for name in backends}
    usable = [name for name, reason in checked.items() if reason is None]
    reasons = {name: reason for name, reason in checked.items() if reason is not None}
    if backends and not usable:
        details = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise SystemExit(f"stepforge: nothing can be tested on {device}: {details}")
    return usable, reasons


def _unsupported_reason(case: Case, backend: str, device: torch.device) -> str | None:
    """Return why a backend cannot serve some parameter of a case; None if it serves all.

    The native backend compiles the kernels of the case on the way.
    """
    params = [param.make(0, case.dtype, device) for param in case.params()]
    # With fused=True a missing kernel is an error; without it, a warning.
    optimizer = case.build(params, fused=True)
    for group in optimizer.param_groups:
        graph = optimizer.rule.graph(group)
        for p in group["params"]:
            g = torch.empty_like(p, dtype=case.gradient)
            layout = state_layout(optimizer.rule, group, p)
            spec = kernel_spec(graph, layout, p, g, dtypes_after_step(layout, group, {}))
            reason = BACKENDS[backend].unsupported_reason(ParamSpec(p, g, group, spec))
            if reason is not None:
                return reason
    return None


# Comparisons. -------------------------------------------------------------------------------------


def _compare(
    console: Console, chosen: Sequence[Case], backends: Sequence[str], device: torch.device
) -> list[Result]:
    """Step every case on the reference and on each backend."""
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
            # Compiling takes as long as all steps, so it runs while the other backends step.
            for case in chosen:
                pool.submit(_unsupported_reason, case, "native", device)
        try:
            for result in _results(chosen, backends, device):
                results.append(result)
                progress.advance(task)
        except BaseException:  # Ctrl-C included
            pool.shutdown(cancel_futures=True)
            raise
    return results


def _results(
    chosen: Sequence[Case], backends: Sequence[str], device: torch.device
) -> Iterator[Result]:
    package_hashes: Mapping[str, str] = json.loads(HASHES.read_text(encoding="utf-8"))
    of_reference: dict[str, list[Outcome]] = {}
    hashes: dict[str, tuple[str, ...]] = {}
    for case in chosen:
        steps = outcomes(case, "reference", devices.CPU)
        of_reference[case.name] = steps
        expected = tuple(package_hashes.get(case.name, "").split())
        hashes[case.name] = tuple(map(digest, steps))
        yield Result(case, "reference", _HASHES_NAME, expected, hashes[case.name])
    for backend in backends:
        for case in chosen:
            reference, expected = of_reference[case.name], hashes[case.name]
            try:
                steps = outcomes(case, backend, device)
            except Exception as error:  # of any kind, such as a compiler's or a driver's
                yield Result(case, backend, _REFERENCE_NAME, expected, (), error=str(error))
                continue
            found = tuple(map(digest, steps))
            differing = tuple(find_differences(reference, steps))
            yield Result(case, backend, _REFERENCE_NAME, expected, found, differing)


# A GPU. -------------------------------------------------------------------------------------------


def _speeds(console: Console, device: torch.device) -> tuple[list[Speed], str]:
    """Time steps and print their speeds; return them, and why some are missing.

    Returns:
        The speeds, and the error that ended the measurement, if any: the comparisons are to be
        reported all the same.
    """
    timed: list[Speed] = []
    problem = ""
    with console.status("timing steps"):
        try:
            timed.extend(speeds(device))
        except Exception as error:  # of any kind, such as a driver's
            problem = f"{type(error).__name__}: {error}"
    print_whole(console, _speed_table(timed))
    if problem:
        console.print(f"Steps could not be timed: {problem}", soft_wrap=True, markup=False)
    return timed, problem


def _speed_table(timed: Sequence[Speed]) -> Table:
    """Return a table of speeds."""
    table = new_table(
        ["a kept step of AdamW"], ["tensors", "host ms", "GPU ms", "of a copy's speed"]
    )
    for speed in timed:
        table.add_row(
            speed.storage,
            f"{speed.tensors}",
            f"{speed.host_ms:.3g}",
            "" if speed.gpu_ms is None else f"{speed.gpu_ms:.3g}",
            f"{speed.share_of_copy:.0%}",
        )
    return table


def _kernels(console: Console, gpu: GPU | None) -> list[dict[str, Any]]:
    """Return what kernels are compiled to; nothing where their machine code cannot be read."""
    if gpu is None:
        return []
    with console.status("reading kernels"):
        return list(kernels(gpu))


# Output. ------------------------------------------------------------------------------------------


def _table(
    results: Sequence[Result], names: Sequence[str], backends: Sequence[str], device: torch.device
) -> Table:
    """Return a table with the number of cases that agree, by optimizer and backend."""
    on_device = "" if device.type == "cpu" else f" on {device}"
    table = new_table(
        ["cases with the right bits"],
        ["reference", *(f"{backend}{on_device}" for backend in backends)],
    )
    for name in names:
        cells = []
        for backend in ("reference", *backends):
            agree = [r.agrees for r in results if (r.case.optimizer, r.backend) == (name, backend)]
            cells.append(f"{sum(agree)} of {len(agree)}")
        table.add_row(name, *cells)
    return table


def _verdict(results: Sequence[Result], backends: Sequence[str]) -> str:
    """Return a summary in one line."""
    differing = {
        backend: sum(not result.agrees for result in results if result.backend == backend)
        for backend in ("reference", *backends)
    }
    total = sum(result.backend == "reference" for result in results)
    names = " and ".join(backends)
    of_reference = differing.pop("reference")
    differences = [
        f"{backend} does not store the reference's bits in {count} of {total} cases"
        for backend, count in differing.items()
        if count
    ]
    if of_reference:
        differences.append(
            "the reference does not store those that the package carries in "
            f"{of_reference} of {total}"
        )
    if differences:
        return f"DIFFERENT: {'; '.join(differences)}."
    if not backends:
        return f"Equal: the reference stores the bits that the package carries in {total} cases."
    store = "stores" if len(backends) == 1 else "store"
    return (
        f"Equal: in {total} cases {names} {store} the reference's bits, which are those that the "
        "package carries."
    )


def _report(device: torch.device, results: Sequence[Result]) -> dict[str, Any]:
    """Return the machine, the device and the comparisons."""
    return {
        "machine": machine.describe_in_detail(),
        "device": {"name": str(device)} | devices.describe(device),
        "results": [result.report() for result in results],
    }


def _write_hashes(console: Console, results: Sequence[Result]) -> None:
    """Write the reference's hashes to the package, if all backends agree with it.

    Raises:
        SystemExit: if one does not.
    """
    if not all(result.agrees for result in results if result.backend != "reference"):
        raise SystemExit("stepforge: backends differ, so no hashes are written")
    hashes = {r.case.name: " ".join(r.found) for r in results if r.backend == "reference"}
    write_json(HASHES, hashes)
    console.print(f"The package carries them: {HASHES}", soft_wrap=True, markup=False)
