"""The table of parameters for a pass that makes reductions: a step that stores nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stepforge.backends.aliasing import addresses
from stepforge.backends.batch import Batch, Gradients
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.native.kernel import kernel_for
from stepforge.backends.reduction import BLOCK

__all__ = ["ReductionTable"]


class ReductionTable:
    """The addresses and sizes of parameters with dense memory, for a pass.

    Args:
        batch: the parameters. Other gradients may be bound later, and the table run with other
            coefficients.

    Raises:
        RuntimeError: there is no kernel for them.
    """

    def __init__(self, batch: Batch) -> None:
        spec = batch.spec
        kernel = kernel_for(spec)
        if isinstance(kernel, str):
            raise RuntimeError(
                f"there is no kernel for {', '.join(map(str, spec.dtypes))}: {kernel}"
            )
        columns = [batch.columns[name] for name in spec.tensors]
        self._records = np.stack([addresses(column) for column in columns], axis=1)
        self._gradients = self._records[:, spec.tensors.index("g")] if "g" in spec.tensors else None
        self._sizes = np.array([x.numel() for x in columns[0]], np.int64)
        blocks = -(-self._sizes // BLOCK)
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(blocks)])
        count = len(spec.graph.reductions)
        self._coefficients = np.empty((len(batch), len(spec.graph.coefficients)), kernel.number)
        self._partial = np.empty((count, max(len(batch), int(self._starts[-1]))))
        self._totals = np.empty((len(batch) + 1, count))
        tables = (self._starts, self._sizes, self._records, self._coefficients)
        written = (self._partial, self._totals)
        places = (table.ctypes.data for table in (*tables, *written))
        self._launch_args = len(batch), int(self._sizes.sum()), *places
        self._launch: Callable[..., None] = kernel.launch_metered

    def bind_gradients(self, gradients: Gradients) -> None:
        """Take other gradients of the same layouts."""
        if self._gradients is not None:
            gradients.write_addresses(self._gradients)

    def run(self, batch: Batch, grad_scale: GradScale | None = None) -> np.ndarray[Any, Any]:
        """Return the reductions of each parameter, and in a last row those of all."""
        for position, values in enumerate(batch.coefficients):
            self._coefficients[:, position] = values
        factor = 1.0 if grad_scale is None else grad_scale.factor(batch.spec.arithmetic)
        self._launch(*self._launch_args, factor)
        return self._totals.copy()
