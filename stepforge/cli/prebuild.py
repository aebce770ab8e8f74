"""``stepforge prebuild``: the kernels of all built-in optimizers, compiled ahead."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stepforge.backends import trust
from stepforge.backends.native import build, prebuilt
from stepforge.cli import variants
from stepforge.cli.output import folder_option

__all__ = ["PLAIN", "prebuild"]

#: What the instruction set is called that every processor of a kind has; the library's "".
PLAIN = "plain"
_ALL_SETS = [*(build.LEVELS if build.on_x86() else ()), PLAIN]
#: The names that ``--isa`` takes.
InstructionSet = StrEnum("InstructionSet", [(name, name) for name in _ALL_SETS])  # type: ignore[misc]


def prebuild(
    output: Annotated[
        Path | None,
        folder_option("Where to put them, if not into the package"),
    ] = None,
    isa: Annotated[
        list[InstructionSet] | None,
        typer.Option(
            help="Repeat it for several instruction sets; if not given: "
            f"{', '.join(level or PLAIN for level in prebuilt.instruction_sets())}."
        ),
    ] = None,
) -> None:
    """Compiles the kernels of all built-in optimizers ahead.

    Stepping then needs no compiler. The kernels serve every choice of flags, with parameters,
    gradients and states all of one dtype; other mixtures are left to the compiler, or to torch
    operations. Beside the package, they are used if STEPFORGE_PREBUILT names their folder.
    """
    folder = (output or prebuilt.FOLDER).absolute()
    levels = _levels(isa)
    try:
        command = build.compiler()
        build.compiler_version(command)  # that it runs at all
    except build.BuildError as error:
        raise SystemExit(f"stepforge: {error}") from None
    console = Console(highlight=False)
    began = time.perf_counter()
    try:
        trust.make_folder(folder, 0o755)
        kernels, failures = _compile_all(console, folder, levels, command)
        if not failures:
            for level in levels:
                prebuilt.prune(folder, level, keep=kernels)
    except OSError as error:
        why = f"{folder} cannot be written to ({error.strerror})"
        if output is None:
            raise SystemExit(f"stepforge: {why}: name a folder of yours with --output") from None
        raise typer.BadParameter(f"{why}.", param_hint="--output") from None
    size = sum(kernel.stat().st_size for kernel in kernels) / 1e6
    names = ", ".join(level or PLAIN for level in levels)
    said = [f"{len(kernels)} kernels for {names}: {size:.1f} MB in {folder}"]
    said[0] += f", in {time.perf_counter() - began:.1f} s"
    if kernels and not _is_used(folder):
        said.append(f"To use them: STEPFORGE_PREBUILT={folder}")
    said += [f"{count} could not be compiled: {why}" for why, count in failures.most_common(3)]
    for line in said:
        console.print(escape(line), soft_wrap=True)
    if failures:
        raise typer.Exit(1)


def _levels(isa: Iterable[InstructionSet] | None) -> Sequence[str]:
    """The library's names of what ``--isa`` asks for."""
    if not isa:
        return prebuilt.instruction_sets()
    return ["" if level == PLAIN else str(level) for level in dict.fromkeys(isa)]


def _compile_all(
    console: Console, folder: Path, levels: Sequence[str], command: tuple[str, ...]
) -> tuple[set[Path], Counter[str]]:
    """Compiles all sources for some instruction sets, on all cores.

    Returns:
        The kernels, and how often which failure was met.

    Raises:
        OSError: the folder cannot be written to.
    """
    work = [(source, level) for level in levels for source in variants.sources()]
    kernels: set[Path] = set()
    failures: Counter[str] = Counter()
    progress = Progress(
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("kernels"),
        TimeElapsedColumn(),
        console=console,
    )
    # A thread does nothing but wait for its compiler.
    with progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        task = progress.add_task("", total=len(work))
        begun = [
            pool.submit(prebuilt.compile_ahead, folder, source, level, command)
            for source, level in work
        ]
        try:
            for future in as_completed(begun):
                try:
                    kernels.add(future.result())
                except build.BuildError as error:
                    failures[str(error)] += 1
                progress.advance(task)
        except BaseException:  # the folder cannot be written to, or Ctrl-C
            pool.shutdown(cancel_futures=True)
            raise
    return kernels, failures


def _is_used(folder: Path) -> bool:
    try:
        used = prebuilt.folder()
    except build.BuildError:
        return False
    return used is not None and used.resolve() == folder.resolve()
