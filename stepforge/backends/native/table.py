"""The table of rows that one call of a kernel steps."""

from __future__ import annotations

import numpy as np
import torch

from stepforge.backends import reference
from stepforge.backends.batch import Batch
from stepforge.backends.memory import Aliasing, addresses, count_writes
from stepforge.backends.native.kernel import kernel_for
from stepforge.backends.native.source import Record
from stepforge.formats import BLOCK


class Table:
    """Rows of dense memory and of the same dtypes, which one call steps: where they are.

    Args:
        batch: the rows; it may be aimed at other gradients, and run with other coefficients.

    Raises:
        RuntimeError: there is no kernel for them, or a tensor has no memory.
    """

    def __init__(self, batch: Batch) -> None:
        graph = batch.graph
        record = Record.of(graph, batch.formats)
        columns = [batch.columns[name] for name in record.tensors]
        dtypes = tuple(column[0].dtype for column in columns)
        kernel = kernel_for(graph, dtypes, batch.dtype, batch.formats)
        if isinstance(kernel, str):
            raise RuntimeError(f"there is no kernel for {', '.join(map(str, dtypes))}: {kernel}")
        self.kernel = kernel
        self.sizes = np.array([x.numel() for x in columns[0]], dtype=np.int64)
        self.occupied = self.sizes > 0
        self.records = np.zeros((len(batch), record.width), np.uint64)
        for position, column in enumerate(columns):
            self.records[:, position] = addresses(column)
        units = self.sizes
        if record.length:
            # Of tensors without elements any length will do.
            lengths = [max(1, x.numel() // max(1, len(x))) for x in columns[0]]
            self.records[:, len(columns)] = lengths
            units = np.array([len(x) for x in columns[0]]) * -(-np.array(lengths) // BLOCK)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(units * self.occupied)])
        self.numbers = np.empty((len(batch), len(graph.coefficients)), dtype=kernel.number)
        self.arguments = (
            len(batch),
            int(self.sizes.sum()),
            self.starts.ctypes.data,
            self.records.ctypes.data,
            self.numbers.ctypes.data,
        )
        self.gradient = record.tensors.index("g") if "g" in record.tensors else None
        self.aliasing = Aliasing(batch)
        self._check_memory()

    def aim(self, gradients: list[torch.Tensor]) -> None:
        """Takes other gradients of the same layout.

        Raises:
            RuntimeError: one has no memory.
        """
        self.aliasing.aim(gradients)
        if self.gradient is not None:
            self.records[:, self.gradient] = self.aliasing.gradients
            if not self.aliasing.gradients.all():
                self._check_memory()

    def overlaps(self) -> bool:
        """True if memory that is kept is also another tensor's of these rows."""
        return self.aliasing.found()

    def run(self, batch: Batch) -> None:
        """Steps the rows with the coefficients of a batch of just these rows.

        Its gradients are those that the table was made with, or has been aimed at since.
        """
        if self.overlaps():
            reference.run(batch)
            return
        if any(isinstance(values, (np.ndarray, torch.Tensor)) for values in batch.coefficients):
            for position, values in enumerate(batch.coefficients):
                self.numbers[:, position] = values
        else:
            self.numbers[:] = batch.coefficients
        if self.kernel.record.random:
            begins = np.asarray(batch.starts, np.uint64) << np.uint64(32)
            self.records[:, -1] = begins | np.asarray(batch.keys, np.uint64)
        self.kernel.launch(*self.arguments, unscale=batch.unscale)
        count_writes(batch)

    def _check_memory(self) -> None:
        tensors = self.records[self.occupied, : len(self.kernel.record.tensors)]
        if (tensors == 0).any():
            raise RuntimeError("a tensor has no memory: its data pointer is null")
