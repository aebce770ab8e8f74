"""The table of parameters that one launch of a kernel steps, on their device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from stepforge.backends.aliasing import addresses
from stepforge.backends.batch import Batch, is_capturing, uploaded
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.triton import kernel as kernels
from stepforge.backends.triton.kernel import BLOCK, kernel_for
from stepforge.backends.triton.strides import dimensions
from stepforge.backends.triton.variant import WIDEST, Variant
from stepforge.formats import BLOCK as CHUNK


class Table:
    """The addresses, sizes and strides of parameters, on their device.

    Attributes:
        indices: the indices of the table's parameters in the batch.
        counts: the blocks of each of them.
        blocks: the number of all blocks.

    Args:
        batch: holds the parameters. Other gradients may be bound later, and the table run with
            other coefficients.
        members: the indices of the table's parameters in the batch.
        dense: True if all tensors of each parameter have their elements in one order without gaps,
            which must be the order of a contiguous tensor if there are formats.

    Raises:
        RuntimeError: there is no kernel for them, or a tensor has no memory.
    """

    def __init__(self, batch: Batch, members: Sequence[int], *, dense: bool) -> None:
        spec = batch.spec
        self.indices = list(members)
        columns = {name: [batch.columns[name][index] for index in members] for name in spec.tensors}
        rows = list(zip(*(columns[name] for name in spec.elements)))
        # Sums are in the order of a contiguous tensor, as random bits and blocks are.
        in_order = bool(spec.formats or spec.graph.reductions)
        shapes = [[] if dense else dimensions(row, in_order=in_order) for row in rows]
        dims = max(map(len, shapes))
        self.device = rows[0][0].device
        sizes = np.array([row[0].numel() for row in rows], np.int64)
        lengths = np.array([math.prod(row[0].shape[1:]) for row in rows], np.int64)
        divided = (lengths if spec.in_blocks else sizes).tolist()
        kernel = kernel_for(spec, Variant.of(spec, dims, divided, self.device))
        if isinstance(kernel, str):
            dtypes = ", ".join(map(str, spec.dtypes))
            raise RuntimeError(f"there is no kernel for {dtypes}: {kernel}")
        self.kernel = kernel
        self.occupied = sizes > 0
        args = kernel.args
        if args.in_blocks:
            sizes = np.array([len(row[0]) for row in rows]) * (-(-lengths // CHUNK) * CHUNK)
        self.counts = blocks = -(-sizes // BLOCK)
        self.blocks = int(blocks.sum())
        self._records = np.zeros((len(rows), args.width), np.int64)
        self._records[:, args.first] = np.cumsum(blocks) - blocks
        self._records[:, args.size] = sizes
        for name in args.states:
            self._records[:, args.address(name)] = self._checked(addresses(columns[name]))
        for position, shape in enumerate(shapes):
            padded = [(1, (0,) * len(args.elements))] * (dims - len(shape)) + shape
            for dim, (length, steps) in enumerate(padded):
                self._records[position, args.extent(dim)] = length
                for name, step in zip(args.elements, steps):
                    self._records[position, args.stride(name, dim)] = step
        if args.in_blocks:
            self._records[:, args.row_length] = lengths
        if args.is_random:
            assert batch.first_indices is not None
            self._records[:, args.start] = batch.first_indices[self.indices]
        self.bind_gradients(addresses(batch.columns["g"]))
        self._aligned = {
            name: _alignment(self._records[:, args.address(name)]) for name in args.states
        }
        self.rows, self.gradients, self.coefficients, self.step_seeds, self.members = (
            Mirror(self.device) for _ in range(5)
        )
        self._owners: tuple[torch.Tensor, torch.Tensor] | None = None
        self._captured: list[torch.Tensor] = []  # as in Mirror
        if not is_capturing():  # allocate now: running out of memory must precede any change
            self._owners_of(self.rows.show(self._records))
            self.gradients.show(self._gradients)
            if self.device.type == "cuda" and _may_be_captured(batch):
                kernels.load_writer(self.device)  # the next step may be captured

    def bind_gradients(self, gradients: np.ndarray[Any, Any]) -> None:
        """Take other gradients of the same layouts.

        Args:
            gradients: their addresses, one per parameter of the batch.

        Raises:
            RuntimeError: one has no memory.
        """
        self._gradients = self._checked(gradients[self.indices])

    def run(
        self, batch: Batch, grad_scale: GradScale | None = None, partial: torch.Tensor | None = None
    ) -> None:
        """Step the parameters with the gradients that are bound.

        Args:
            batch: the batch of the table's parameters, with the coefficients of this step.
            grad_scale: the scale of the gradients.
            partial: float64, reductions x blocks: takes the reductions of each block.
        """
        if not self.blocks:
            return
        rows = self.rows.show(self._records)
        tables = (
            self._owners_of(rows),
            rows,
            self.gradients.show(self._gradients),
            self._coefficients_of(batch),
            self._step_seeds_of(batch),
        )
        scale = None
        if grad_scale is not None:
            scale = grad_scale.on_device(self.device, batch.spec.arithmetic)
        self.kernel.launch(
            self.blocks,
            *tables,
            {**self._aligned, "g": _alignment(self._gradients)},
            scale,
            partial,
        )
        keep_until_done(x for x in tables if isinstance(x, torch.Tensor))

    def _coefficients_of(self, batch: Batch) -> torch.Tensor | list[float]:
        """Return the coefficients: a row per parameter, or the numbers that all share."""
        arithmetic = batch.spec.arithmetic
        if batch.matrix is not None:
            return self._of_members(batch.matrix)
        if _has_device_values(batch):
            columns = [_on_device(c, len(batch), self.device) for c in batch.coefficients]
            return self._of_members(torch.stack([c.to(arithmetic) for c in columns], dim=1))
        if batch.shares_coefficients:
            return [float(value) for value in batch.coefficients]  # type: ignore[arg-type]
        dtype = np.float64 if arithmetic == torch.float64 else np.float32
        rows = np.empty((len(batch), len(batch.coefficients)), dtype)
        for position, value in enumerate(batch.coefficients):
            rows[:, position] = value
        is_whole = len(self.indices) == len(batch)
        return self.coefficients.show(rows if is_whole else rows[self.indices])

    def _step_seeds_of(self, batch: Batch) -> torch.Tensor | None:
        """Return the seeds of the parameters' random bits; None if rounding takes none."""
        if batch.step_seeds is None or not self.kernel.args.is_random:
            return None
        if isinstance(batch.step_seeds, np.ndarray):
            return self.step_seeds.show(batch.step_seeds[self.indices])
        return self._of_members(batch.step_seeds)

    def _of_members(self, values: torch.Tensor) -> torch.Tensor:
        """Return the rows of this table's parameters from a row per parameter of the batch."""
        if len(self.indices) == len(values):
            return values
        return values[self.members.show(np.array(self.indices))]

    def _owners_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the parameter of each block; computed on the device, when the rows are new."""
        if self._owners is None or self._owners[0] is not rows:
            first = rows[:, self.kernel.args.first].contiguous()
            blocks = torch.arange(self.blocks, device=self.device)
            # Among parameters with the same first block, all but the last are empty.
            owners = torch.searchsorted(first, blocks, right=True, out_int32=True) - 1
            if is_capturing():
                return owners
            self._owners = rows, owners
        elif is_capturing():
            self._captured.append(self._owners[1])
        return self._owners[1]

    def _checked(self, addresses: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return addresses as int64: some are 2**63 or more, and Triton casts the bits."""
        if (addresses[self.occupied] == 0).any():
            raise RuntimeError("a tensor has no memory: its data pointer is null")
        return addresses.view(np.int64)


class Mirror:
    """A device copy of a host array, uploaded only when the array has changed.

    Attributes:
        uploads: the number of uploads.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.uploads = 0
        # Tensors that a captured graph reads, which may replay as long as the table exists.
        self._captured: list[torch.Tensor] = []
        self._shown: tuple[np.ndarray[Any, Any], torch.Tensor] | None = None

    def show(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """Return the array on the device."""
        is_shown = self._shown is not None and _are_equal(self._shown[0], array)
        if is_capturing():
            if self._shown is None or not is_shown:
                return written(array, self.device)
            self._captured.append(self._shown[1])
        elif not is_shown:
            self._shown = array.copy(), uploaded(array, self.device)
            self.uploads += 1
        assert self._shown is not None
        return self._shown[1]


def keep_until_done(tables: Iterable[torch.Tensor]) -> None:
    """Keep the memory of tables until launches are done, on whatever stream those run."""
    if not is_capturing():
        for table in tables:
            if table.device.type != "cpu":
                stream = torch.get_device_module(table.device).current_stream(table.device)
                table.record_stream(stream)


def written(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """Return a device copy of an array, written by launches that carry its numbers as arguments.

    A captured graph would repeat a copy from host memory at every replay, when that memory holds
    something else; and a capture may pin no memory.
    """
    words = np.ascontiguousarray(array).reshape(-1).view(np.int32)
    table = torch.empty(len(words), dtype=torch.int32, device=device)
    kernels.write(table, words)
    like = torch.from_numpy(array[:0].copy())
    return table.view(like.dtype).view(array.shape)


def _are_equal(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """Compare every bit: 0.0 is not -0.0, and NaN is NaN."""
    return (
        one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()
    )


def _on_device(
    value: float | np.ndarray[Any, Any] | torch.Tensor | list[torch.Tensor],
    count: int,
    device: torch.device,
) -> torch.Tensor:
    """Return a coefficient as a device vector with one element per parameter."""
    if isinstance(value, list):
        value = torch.stack(value)
    if isinstance(value, torch.Tensor) and (value.device == device or value.device.type != "cpu"):
        return value.to(device, non_blocking=True).expand(count)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        array = np.asarray(value, np.float64)
        sent = written(array, device) if is_capturing() else uploaded(array, device)
        return sent.expand(count)
    return torch.full((count,), float(value), dtype=torch.float64, device=device)


def _has_device_values(batch: Batch) -> bool:
    """Return True if coefficients are device tensors."""
    return any(isinstance(c, (torch.Tensor, list)) for c in batch.coefficients)


def _may_be_captured(batch: Batch) -> bool:
    """Return True if a CUDA graph may capture the batch: its numbers are device tensors."""
    return _has_device_values(batch) or isinstance(batch.step_seeds, torch.Tensor)


def _alignment(addresses: np.ndarray[Any, Any]) -> int:
    """Return the largest power of two, at most :data:`WIDEST`, that divides all addresses."""
    together = int(np.bitwise_or.reduce(addresses, initial=WIDEST))
    return together & -together
