"""The launches that combine numbers of blocks into reductions: of each parameter, then of all."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stepforge.backends.batch import is_capturing
from stepforge.backends.disk_cache import BuildError
from stepforge.backends.reduction import BLOCK
from stepforge.backends.triton.kernel import launch_context, load
from stepforge.backends.triton.reduction_source import combine_source
from stepforge.backends.triton.table import Mirror, keep_until_done

__all__ = ["LAUNCH_OPTIONS", "Rounds", "numbers_of_blocks"]

#: Triton's options of a launch that reduces blocks.
LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


class Rounds:
    """The rounds that combine the numbers of blocks, in the order of backends/reduction.py.

    Args:
        ops: the reductions.
        counts: the blocks of each parameter.
        first: the first block of each.
        device: the device of the parameters.

    Raises:
        RuntimeError: the source of the kernel cannot be kept.
    """

    def __init__(
        self,
        ops: Sequence[str],
        counts: np.ndarray[Any, Any],
        first: np.ndarray[Any, Any],
        device: torch.device,
    ) -> None:
        self._combine = _combine(tuple(ops))
        of_each = _rounds(counts.tolist(), first.tolist())
        rounds = [*of_each, *_rounds([len(counts)], [0])]
        # The rounds that end with results: of each parameter, and of all.
        self._final = (len(of_each) - 1, len(rounds) - 1)
        self._sizes = [len(begins) for begins, _ in rounds]
        # Rows of an even number of int64 begin at multiples of 16 bytes, as any other memory does:
        # Triton compiles once.
        self._table = np.zeros((len(rounds), 2, max(self._sizes) + max(self._sizes) % 2), np.int64)
        for row, (begins, sizes) in zip(self._table, rounds):
            row[:, : len(begins)] = begins, sizes
        self._shown = Mirror(device)
        if not is_capturing():  # running out of memory must precede any change
            self._shown.show(self._table)

    def run(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the reductions of each parameter, and in a last row those of all.

        Args:
            numbers: float64, reductions x blocks.
        """
        table = self._shown.show(self._table)
        found = []
        with launch_context(numbers.device):
            for number, (size, (begins, counts)) in enumerate(zip(self._sizes, table)):
                out = numbers_of_blocks(len(numbers), size, numbers.device)
                self._combine[(size,)](
                    numbers, numbers.shape[1], begins, counts, out, size,
                    BLOCK=BLOCK, **LAUNCH_OPTIONS,
                )  # fmt: skip
                numbers = out
                if number in self._final:
                    found.append(out)
        keep_until_done([table])
        return torch.cat(found, dim=1).t()


def numbers_of_blocks(reductions: int, blocks: int, device: torch.device) -> torch.Tensor:
    """Return memory for a number of each reduction and block."""
    return torch.empty((reductions, blocks), dtype=torch.float64, device=device)


def _rounds(counts: Sequence[int], first: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the rounds until each group of numbers is one number.

    Args:
        counts: the count of numbers in each group.
        first: the position of each group's first number. Later, groups follow one another.

    Returns:
        For each round the first number of each result, and the count of its numbers.

    Example:
        >>> _rounds([2, 0], [0, 2])
        [([0, 2], [2, 0])]
        >>> [list(map(len, each)) for each in _rounds([3000, 5], [5, 0])]
        [[4, 4], [2, 2]]
    """
    rounds: list[tuple[list[int], list[int]]] = []
    while not rounds or max(counts) > 1:
        begins, sizes, results = [], [], []
        for begin, count in zip(first, counts):
            pieces = max(1, -(-count // BLOCK))
            begins += [begin + piece * BLOCK for piece in range(pieces)]
            sizes += [min(BLOCK, count - piece * BLOCK) for piece in range(pieces)]
            results.append(pieces)
        rounds.append((begins, sizes))
        counts, first = results, [0, *itertools.accumulate(results)]
    return rounds


@functools.cache
def _combine(ops: tuple[str, ...]) -> Any:
    try:
        return load(combine_source(ops)).combine
    except BuildError as error:
        raise RuntimeError(str(error)) from None
