"""Reductions on a GPU: a launch for the pass, and one for each round that combines its numbers."""

from __future__ import annotations

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
from stepforge.backends.triton.reduction_source import pass_source
from stepforge.backends.triton.rounds import LAUNCH_OPTIONS, Rounds, numbers_of_blocks
from stepforge.backends.triton.table import Mirror
from stepforge.backends.triton.variant import Target, target_of

__all__ = ["PassTable", "serves"]


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
        self._reduce = _kernel(spec, target_of(self.device), is_interpreted())
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
        ops = [node.op for node in spec.graph.reductions]
        self._rounds = Rounds(ops, blocks, first, self.device)

    def bind_gradients(self, gradients: Gradients) -> None:
        """Take other gradients of the same layouts."""
        gradients.write_addresses(self._gradients)

    def run(self, batch: Batch, grad_scale: GradScale | None = None) -> torch.Tensor:
        """Return the reductions of each parameter, and in a last row those of all."""
        factor = None
        if grad_scale is not None:
            factor, _ = grad_scale.on_device(self.device, batch.spec.arithmetic)
        blocks = len(self._owners)
        numbers = numbers_of_blocks(len(batch.spec.graph.reductions), blocks, self.device)
        given = self._shown.show(self._gradients.view(np.int64))
        with launch_context(self.device):
            if blocks:
                self._reduce[(blocks,)](
                    self._owners, self._rows, given, factor, numbers, blocks,
                    SCALED=factor is not None, BLOCK=BLOCK, **LAUNCH_OPTIONS,
                )  # fmt: skip
        return self._rounds.run(numbers)


def _kernel(spec: KernelSpec, target: Target, interpreted: bool) -> Any:
    """Return the kernel of a pass.

    Raises:
        RuntimeError: a source cannot be kept.
    """
    found = _made(spec, target, interpreted)
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@cache.made_once(disk_cache.cache_circumstances)
def _made(spec: KernelSpec, target: Target, _interpreted: bool) -> Any:
    try:
        return load(pass_source(spec, target)).reduce
    except BuildError as error:
        return str(error)
