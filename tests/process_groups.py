"""Runs a module in several processes, for tests of sharded optimizers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_ranks(module: str, counts: tuple[int, ...], make_folder: Callable[[], Path]) -> Path:
    """The folder in which all processes of a module have left what they found.

    Args:
        module: what each runs, with its rank, the number of processes and the folder.
        counts: for each process group, of how many processes it is.
        make_folder: makes an empty folder.
    """
    for _ in range(3):
        folder = make_folder()
        codes, said = _run(module, counts, folder)
        # A thread of gloo's own dies of a segmentation fault once in some dozens of runs, in none
        # of our code. What is wrong here would be so every time.
        if -signal.SIGSEGV not in codes:
            break
    assert not any(codes), said
    return folder


def _run(module: str, counts: tuple[int, ...], folder: Path) -> tuple[list[int], str]:
    """What the processes return, and what they say."""
    with contextlib.ExitStack() as logs:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", module, str(rank), str(count), str(folder)],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=logs.enter_context((folder / f"said-{rank}-{count}").open("w")),
                stderr=subprocess.STDOUT,
                text=True,
            )
            for count in counts
            for rank in range(count)
        ]
    try:
        _wait(ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    said = "\n".join(file.read_text() for file in sorted(folder.glob("said-*")))
    return [rank.returncode for rank in ranks], said


def _wait(ranks: list[subprocess.Popen[str]]) -> None:
    """Waits until all have ended, or one has failed, for which the others would wait."""
    while any(rank.poll() is None for rank in ranks):
        if any(rank.returncode for rank in ranks):
            return
        for rank in ranks:
            try:
                rank.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                break
