"""Run a module in several processes, and join process groups, for tests of sharded optimizers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def process_group(store: Path, rank: int = 0, processes: int = 1) -> Iterator[None]:
    """Join a process group of gloo for the length of a ``with`` statement.

    Args:
        store: the file by which the processes find each other.
        rank: the rank of this process.
        processes: the number of processes in the group.
    """
    file_store = torch.distributed.FileStore(str(store), processes)
    torch.distributed.init_process_group("gloo", store=file_store, rank=rank, world_size=processes)
    yield
    torch.distributed.destroy_process_group()


def run_ranks(module: str, group_sizes: tuple[int, ...], make_folder: Callable[[], Path]) -> Path:
    """Run a module as every rank of some process groups, all at once.

    Args:
        module: the module. Its arguments are the rank, the number of processes in its group, and
            the folder.
        group_sizes: the number of processes of each process group.
        make_folder: makes an empty folder.

    Returns:
        The folder in which the processes left their results.
    """
    for _ in range(3):
        folder = make_folder()
        exit_codes, output = _run(module, group_sizes, folder)
        # A thread of gloo's own dies of a segmentation fault once in some dozens of runs, in none
        # of our code. A fault of ours would appear every time.
        if -signal.SIGSEGV not in exit_codes:
            break
    assert not any(exit_codes), output
    return folder


def _run(module: str, group_sizes: tuple[int, ...], folder: Path) -> tuple[list[int], str]:
    """Return the exit codes of the processes, and their output."""
    with contextlib.ExitStack() as logs:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", module, str(rank), str(size), str(folder)],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=logs.enter_context((folder / f"log-{rank}-{size}").open("w")),
                stderr=subprocess.STDOUT,
                text=True,
            )
            for size in group_sizes
            for rank in range(size)
        ]
    try:
        _wait(ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    output = "\n".join(file.read_text() for file in sorted(folder.glob("log-*")))
    return [rank.returncode for rank in ranks], output


def _wait(ranks: list[subprocess.Popen[str]]) -> None:
    """Wait until all processes have ended, or one has failed: the others would wait for it."""
    while any(rank.poll() is None for rank in ranks):
        if any(rank.returncode for rank in ranks):
            return
        for rank in ranks:
            try:
                rank.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                break
