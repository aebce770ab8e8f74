"""Reductions on a GPU: a launch for the pass, and one for each round that combines its numbers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stepforge.backends import cache, disk_cache
from stepforge.backends.aliasing import addresses
from stepforge.backends.batch import Batch, Gradients, is_capturing, uploaded
from stepforge.backends.disk_cache import BuildError
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.reduction import BLOCK, in_one_order
from stepforge.backends.spec import KernelSpec
from stepforge.backends.triton.kernel import is_interpreted, launch_context, load
from stepforge.backends.triton.reduction_source import combine_source, pass_source
from stepforge.backends.triton.table import Mirror
from stepforge.backends.triton.variant import Target, target_of

__all__ = ["PassTable", "serves"]

_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def serves(batch: Batch) -> bool:
    """Return True if launches can make the reductions of a pass over dense tensors."""
    spec = batch.spec
    rows = zip(*(batch.columns[name] for name in spec.tensors))
    return (
        not spec.formats
        and not spec.graph.coefficients
        and not is_capturing()
        and not any(x.is_sparse for x in batch.columns["g"])
        and all(in_one_order(row, is_flat=False) for row in rows)
    )


class PassTable:
    """The addresses and sizes of dense parameters, and the rounds that combine their numbers.

    Args:
        batch: the parameters, which :func:`serves` accepts. Other gradients may be bound later.

    Raises:
        RuntimeError: the source of a kernel cannot be kept.
    """

    def __init__(self, batch: Batch) -> None:
        spec = batch.spec
        columns = [batch.columns[name] for name in spec.tensors]
        self.device = columns[0][0].device
        self._kernels = _kernels(spec, target_of(self.device), is_interpreted())
        sizes = np.array([x.numel() for x in columns[0]], np.int64)
        blocks = -(-sizes // BLOCK)
        states = [addresses(batch.columns[name]) for name in spec.tensors if name != "g"]
        first = np.cumsum(blocks) - blocks
        rows = np.stack([first, sizes, *(x.view(np.int64) for x in states)], axis=1)
        self._gradients = addresses(batch.columns["g"])
        self._shown = Mirror(self.device)
        self._rows = uploaded(rows, self.device)
        owners = np.repeat(np.arange(len(sizes), dtype=np.int32), blocks)
        self._owners = uploaded(owners, self.device)
        self._rounds = [*_rounds(blocks.tolist())]
        self._of_all = [*_rounds([len(sizes)])]
        self._uploaded = [
            [uploaded(np.array(x, np.int64), self.device) for x in each]
            for each in (*self._rounds, *self._of_all)
        ]

    def bind_gradients(self, gradients: Gradients) -> None:
        """Take other gradients of the same layouts."""
        gradients.write_addresses(self._gradients)

    def run(self, batch: Batch, grad_scale: GradScale | None = None) -> torch.Tensor:
        """Return the reductions of each parameter, and in a last row those of all."""
        reduce, combine = self._kernels
        count = len(batch.spec.graph.reductions)
        factor = None
        if grad_scale is not None:
            factor, _ = grad_scale.on_device(self.device, batch.spec.arithmetic)
        blocks = len(self._owners)
        numbers = self._empty(count, blocks)
        given = self._shown.show(self._gradients.view(np.int64))
        with launch_context(self.device):
            if blocks:
                reduce[(blocks,)](
                    self._owners, self._rows, given, factor, numbers, blocks,
                    SCALED=factor is not None, BLOCK=BLOCK, **_OPTIONS,
                )  # fmt: skip
            found = []
            for number, (begins, counts) in enumerate(self._uploaded, start=1):
                out = self._empty(count, len(begins))
                combine[(len(begins),)](
                    numbers, numbers.shape[1], begins, counts, out, len(begins),
                    BLOCK=BLOCK, **_OPTIONS,
                )  # fmt: skip
                numbers = out
                if number in (len(self._rounds), len(self._uploaded)):
                    found.append(out)
        return torch.cat(found, dim=1).t()

    def _empty(self, count: int, size: int) -> torch.Tensor:
        return torch.empty((count, size), dtype=torch.float64, device=self.device)


def _rounds(counts: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the rounds until each group of numbers is one number.

    Args:
        counts: the count of numbers in each group; the groups follow one another.

    Returns:
        For each round the first number of each result, and the count of its numbers.

    Example:
        >>> _rounds([2, 0])
        [([0, 2], [2, 0])]
        >>> [list(map(len, each)) for each in _rounds([3000, 5])]
        [[4, 4], [2, 2]]
    """
    rounds: list[tuple[list[int], list[int]]] = []
    while not rounds or max(counts) > 1:
        begins, sizes, results, first = [], [], [], 0
        for count in counts:
            pieces = max(1, -(-count // BLOCK))
            begins += [first + piece * BLOCK for piece in range(pieces)]
            sizes += [min(BLOCK, count - piece * BLOCK) for piece in range(pieces)]
            results.append(pieces)
            first += count
        rounds.append((begins, sizes))
        counts = results
    return rounds


def _kernels(spec: KernelSpec, target: Target, interpreted: bool) -> tuple[Any, Any]:
    """Return the kernels of a pass: the pass, and what combines its numbers.

    Raises:
        RuntimeError: a source cannot be kept.
    """
    found = _made(spec, target, interpreted)
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@cache.made_once(disk_cache.cache_circumstances)
def _made(spec: KernelSpec, target: Target, _interpreted: bool) -> tuple[Any, Any] | str:
    ops = tuple(node.op for node in spec.graph.reductions)
    try:
        return load(pass_source(spec, target)).reduce, _combine(ops)
    except BuildError as error:
        return str(error)


@functools.cache
def _combine(ops: tuple[str, ...]) -> Any:
    return load(combine_source(ops)).combine
