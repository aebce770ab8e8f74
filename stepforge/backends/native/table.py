"""The table of parameters that one call of a kernel steps: addresses, sizes and coefficients."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from stepforge.backends import reference
from stepforge.backends.aliasing import Aliasing, addresses, increment_versions
from stepforge.backends.batch import Batch, Gradients
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.native.kernel import kernel_for
from stepforge.backends.reduction import BLOCK as REDUCED
from stepforge.backends.reduction import Totals
from stepforge.formats import BLOCK

__all__ = ["Table"]


class Table:
    """The addresses and sizes of parameters with dense memory.

    Args:
        batch: the parameters. Other gradients may be bound later, and the table run with other
            coefficients.

    Raises:
        RuntimeError: there is no kernel for them, or a tensor has no memory.
    """

    def __init__(self, batch: Batch) -> None:
        spec = batch.spec
        kernel = kernel_for(spec)
        if isinstance(kernel, str):
            dtypes = ", ".join(map(str, spec.dtypes))
            raise RuntimeError(f"there is no kernel for {dtypes}: {kernel}")
        self.kernel = kernel
        columns = [batch.columns[name] for name in spec.tensors]
        self.sizes = np.array([x.numel() for x in columns[0]], dtype=np.int64)
        self.occupied = self.sizes > 0
        self.records = np.zeros((len(batch), kernel.args.width), np.uint64)
        for position, column in enumerate(columns):
            self.records[:, position] = addresses(column)
        units = self.sizes
        if kernel.args.row_length:
            # For tensors without elements any length will do.
            lengths = [max(1, x.numel() // max(1, len(x))) for x in columns[0]]
            self.records[:, len(columns)] = lengths
            units = np.array([len(x) for x in columns[0]]) * -(-np.array(lengths) // BLOCK)
        units = units * self.occupied
        self.totals: np.ndarray[Any, Any] | None = None
        if kernel.reductions:
            self._filled_sizes = units * (BLOCK if kernel.args.row_length else 1)
            units = -(-self._filled_sizes // REDUCED)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(units)])
        self.coefficients = np.empty(
            (len(batch), len(spec.graph.coefficients)), dtype=kernel.number
        )
        # The coefficients of a parameter, and of all, where all have the same.
        self._row = struct.Struct(str(self.coefficients.shape[1]) + self.coefficients.dtype.char)
        self._rows = self.coefficients.view(np.uint8).reshape(-1).data
        tables = [self.starts, self.records, self.coefficients]
        if kernel.reductions:
            self._partial = np.empty((kernel.reductions, max(len(batch), int(self.starts[-1]))))
            self.totals = np.empty((len(batch) + 1, kernel.reductions))
            tables = [self.starts, self._filled_sizes, *tables[1:], self._partial, self.totals]
        self._launch: Callable[..., None] = (
            kernel.launch_metered if kernel.reductions else kernel.launch
        )
        self.launch_args = len(batch), int(self.sizes.sum()), *(x.ctypes.data for x in tables)
        own = self.records[:, spec.tensors.index("g")] if "g" in spec.tensors else None
        self.aliasing = Aliasing(batch, out=own)
        self._check_memory()

    def bind_gradients(self, gradients: Gradients) -> None:
        """Take other gradients of the same layouts.

        Raises:
            RuntimeError: one has no memory.
        """
        self.aliasing.bind_gradients(gradients)
        if not gradients.disjoint and not self.aliasing.gradients.all():
            self._check_memory()

    def run(self, batch: Batch, grad_scale: GradScale | None = None) -> Totals | None:
        """Step the parameters with the gradients that are bound.

        Args:
            batch: the same parameters and gradients, with the coefficients of this step.
            grad_scale: the scale of the gradients.

        Returns:
            The reductions of what is stored, overwritten by the next run; None if there are none.
        """
        if self.aliasing.found():
            return reference.run(batch, grad_scale=grad_scale)
        if batch.shares_coefficients:
            self._rows[:] = self._row.pack(*batch.coefficients) * len(self.sizes)
        else:
            for position, values in enumerate(batch.coefficients):
                self.coefficients[:, position] = values
        if self.kernel.args.random:
            starts = np.asarray(batch.first_indices, np.uint64) << np.uint64(32)
            self.records[:, -1] = starts | np.asarray(batch.step_seeds, np.uint64)
        factor = 1.0 if grad_scale is None else grad_scale.factor(batch.spec.arithmetic)
        self._launch(*self.launch_args, factor)
        increment_versions(batch)
        return self.totals

    def _check_memory(self) -> None:
        tensors = self.records[self.occupied, : len(self.kernel.args.tensors)]
        if (tensors == 0).any():
            raise RuntimeError("a tensor has no memory: its data pointer is null")
