"""``stepforge prebuild``: kernels and guards, compiled ahead of time."""

from __future__ import annotations

import hashlib
import os
import re
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

from stepforge import extension
from stepforge.backends import disk_cache, trust
from stepforge.backends.native import compiler, prebuilt
from stepforge.cli import kernels
from stepforge.cli.kernels import PLAIN, isa_name
from stepforge.cli.output_files import folder_option
from stepforge.extension import compiler as cpp_compiler
from stepforge.extension import target

__all__ = ["prebuild"]

#: The values of ``--isa``.
InstructionSet = StrEnum(  # type: ignore[misc]
    "InstructionSet",
    [(name, name) for name in (*(compiler.LEVELS if compiler.on_x86() else ()), PLAIN)],
)

#: The names of files that ``--sources`` writes.
_SOURCE_NAME = re.compile(r"[0-9a-f]{32}\.(c|py)")


def prebuild(
    output: Annotated[
        Path | None,
        folder_option("Folder for the kernels, instead of the package"),
    ] = None,
    isa: Annotated[
        list[InstructionSet] | None,
        typer.Option(
            help="Repeat it for several instruction sets; if not given: "
            f"{', '.join(map(isa_name, prebuilt.instruction_sets()))}."
        ),
    ] = None,
    sources: Annotated[
        Path | None,
        folder_option(
            "Compile nothing and write the generated C and Triton sources to this folder"
        ),
    ] = None,
) -> None:
    """Compile kernels and guards ahead, for all built-in optimizers.

    Stepping then needs no compiler. The kernels serve every choice of flags, with parameters,
    gradients and states all of one dtype; other mixtures are left to the compiler, or to torch
    operations. The guards are for this torch and this Python; without a C++ compiler they are left
    out, and steps use those in Python. Outside the package, kernels and guards are used if
    STEPFORGE_PREBUILT names their folder. The exit code is 1 if a compiler fails.
    """
    console = Console(highlight=False)
    if sources is None:
        _prebuild(console, output, _levels(isa))
    elif output is None and not isa:
        _write_sources(console, sources.absolute())
    else:
        raise typer.BadParameter(
            "it compiles nothing, so it excludes --output and --isa.", param_hint="--sources"
        )


# Kernels. -----------------------------------------------------------------------------------------


def _prebuild(console: Console, output: Path | None, levels: Sequence[str]) -> None:
    folder = (output or prebuilt.FOLDER).absolute()
    try:
        command = compiler.compiler()
        compiler.compiler_version(command)  # check that it runs at all
    except disk_cache.BuildError as error:
        raise SystemExit(f"stepforge: {error}") from None
    began = time.perf_counter()
    try:
        trust.make_folder(folder, 0o755)
        paths, failures = _compile_all(console, folder, levels, command)
        if not failures:
            for level in levels:
                prebuilt.prune(folder, level, keep=paths)
        took = time.perf_counter() - began
        guards, failed = _build_guards(console, folder)
    except OSError as error:
        if output is None:
            raise SystemExit(
                f"stepforge: {_not_writable(folder, error)}: name a folder of yours with --output"
            ) from None
        raise typer.BadParameter(
            f"{_not_writable(folder, error)}.", param_hint="--output"
        ) from None
    size = sum(path.stat().st_size for path in paths) / 1e6
    names = ", ".join(map(isa_name, levels))
    lines = [
        f"{len(paths)} kernels for {names}: {size:.1f} MB in {folder}, in {took:.1f} s",
        guards,
    ]
    if paths and not _is_used(folder):
        lines.append(f"To use them: STEPFORGE_PREBUILT={folder}")
    lines += [f"{count} could not be compiled: {why}" for why, count in failures.most_common(3)]
    for line in lines:
        console.print(escape(line), soft_wrap=True)
    if failures or failed:
        raise typer.Exit(1)


def _levels(isa: Iterable[InstructionSet] | None) -> Sequence[str]:
    """Return the library's names of the instruction sets that ``--isa`` names."""
    if not isa:
        return prebuilt.instruction_sets()
    return ["" if level == PLAIN else str(level) for level in dict.fromkeys(isa)]


def _compile_all(
    console: Console, folder: Path, levels: Sequence[str], command: tuple[str, ...]
) -> tuple[set[Path], Counter[str]]:
    """Compile all sources for some instruction sets, on all cores.

    Returns:
        The kernels' files, and the number of failures by message.

    Raises:
        OSError: if the folder cannot be written to.
    """
    work = [(source, level) for level in levels for source in kernels.c_sources()]
    paths: set[Path] = set()
    failures: Counter[str] = Counter()
    progress = Progress(
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("kernels"),
        TimeElapsedColumn(),
        console=console,
    )
    # A thread only waits for its compiler.
    with progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        task = progress.add_task("", total=len(work))
        futures = [
            pool.submit(prebuilt.compile_ahead, folder, source, level, command)
            for source, level in work
        ]
        try:
            for future in as_completed(futures):
                try:
                    paths.add(future.result())
                except disk_cache.BuildError as error:
                    failures[str(error)] += 1
                progress.advance(task)
        except BaseException:  # the folder cannot be written to, or Ctrl-C
            pool.shutdown(cancel_futures=True)
            raise
    return paths, failures


def _build_guards(console: Console, folder: Path) -> tuple[str, bool]:
    """Build the guards in C++.

    Returns:
        A line of the report, and True if a compiler has failed.

    Raises:
        OSError: if the folder cannot be written to.
    """
    try:
        cpp_compiler.checked_tool()
    except disk_cache.BuildError as error:
        return f"no guards in C++: {error}", False
    began = time.perf_counter()
    try:
        with console.status("compiling the guards in C++"):
            path = extension.build_into(folder)
    except disk_cache.BuildError as error:
        return f"no guards in C++: {error}", True
    extension.prune(folder, keep={path})
    size = path.stat().st_size / 1e6
    took = time.perf_counter() - began
    return f"guards in C++ for {target.description()}: {size:.1f} MB, in {took:.1f} s", False


def _is_used(folder: Path) -> bool:
    try:
        used = prebuilt.folder()
    except disk_cache.BuildError:
        return False
    return used is not None and used.resolve() == folder.resolve()


def _not_writable(folder: Path, error: OSError) -> str:
    return f"{folder} cannot be written to ({error.strerror})"


# Sources. -----------------------------------------------------------------------------------------


def _write_sources(console: Console, folder: Path) -> None:
    """Write every generated source to a file that is named by its hash.

    Sources of another version are removed, so that ``diff -rq`` compares two versions.
    """
    c = _named(kernels.c_sources(), ".c")
    triton = _named(kernels.triton_sources(), ".py")
    files = c | triton
    try:
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / name).write_bytes(text.encode())
        for path in folder.iterdir():
            if _SOURCE_NAME.fullmatch(path.name) and path.name not in files:
                path.unlink()
    except OSError as error:
        raise typer.BadParameter(
            f"{_not_writable(folder, error)}.", param_hint="--sources"
        ) from None
    line = f"{len(c)} C sources and {len(triton)} Triton sources in {folder}"
    console.print(escape(line), soft_wrap=True)


def _named(sources: Iterable[str], suffix: str) -> dict[str, str]:
    """Return sources by the first 32 hex digits of their SHA-256 and a suffix."""
    return {hashlib.sha256(text.encode()).hexdigest()[:32] + suffix: text for text in sources}
