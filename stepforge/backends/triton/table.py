"""The table of rows that one launch of a kernel steps, on the device of the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stepforge.backends.batch import Batch, is_capturing
from stepforge.backends.memory import addresses, elements_of_graph, extent, tensors_of_graph
from stepforge.backends.triton import kernel as kernels
from stepforge.backends.triton.kernel import BLOCK, WIDEST, kernel_for
from stepforge.backends.triton.strides import dimensions
from stepforge.formats import BLOCK as CHUNK


class Table:
    """Rows of the same dtypes: where they are, what they are stepped with.

    Args:
        batch: holds the rows; they may be aimed at other gradients, and run with other
            coefficients.
        members: which of its rows they are.
        dense: whether all tensors of each row have their elements in one order without gaps, which
            must be that of a contiguous tensor if there are formats.

    Raises:
        RuntimeError: there is no kernel for them, or a tensor has no memory.
    """

    def __init__(self, batch: Batch, members: Sequence[int], *, dense: bool) -> None:
        graph, formats = batch.graph, batch.formats
        self._members = list(members)
        names = tensors_of_graph(graph, formats)
        columns = {name: [batch.columns[name][index] for index in members] for name in names}
        rows = list(zip(*(columns[name] for name in elements_of_graph(graph, formats))))
        shapes = [[] if dense else dimensions(row, in_order=bool(formats)) for row in rows]
        dims = max(map(len, shapes))
        dtypes = tuple(columns[name][0].dtype for name in names)
        kernel = kernel_for(graph, dtypes, batch.dtype, dims, formats)
        if isinstance(kernel, str):
            raise RuntimeError(f"there is no kernel for {', '.join(map(str, dtypes))}: {kernel}")
        self.kernel = kernel
        self.device = rows[0][0].device
        sizes = np.array([row[0].numel() for row in rows], np.int64)
        self.occupied = sizes > 0
        record = kernel.record
        if record.in_blocks:
            lengths = np.array([math.prod(row[0].shape[1:]) for row in rows], np.int64)
            sizes = np.array([len(row[0]) for row in rows]) * (-(-lengths // CHUNK) * CHUNK)
        blocks = -(-sizes // BLOCK)
        self.blocks = int(blocks.sum())
        self._records = np.zeros((len(rows), record.width), np.int64)
        self._records[:, record.first] = np.cumsum(blocks) - blocks
        self._records[:, record.size] = sizes
        for name in record.kept:
            self._records[:, record.address(name)] = self._addresses(columns[name])
        for position, shape in enumerate(shapes):
            padded = [(1, (0,) * len(record.elements))] * (dims - len(shape)) + shape
            for dim, (length, steps) in enumerate(padded):
                self._records[position, record.extent(dim)] = length
                for name, step in zip(record.elements, steps):
                    self._records[position, record.stride(name, dim)] = step
        if record.in_blocks:
            self._records[:, record.length] = lengths
        if record.is_random:
            assert batch.starts is not None
            self._records[:, record.start] = batch.starts[self._members]
        gradients = [batch.columns["g"][index] for index in members]
        self._gradients = self._addresses(gradients)
        self._extents = np.fromiter(map(extent, gradients), np.int64, len(gradients))
        self._aligned = {
            name: _alignment(self._records[:, record.address(name)]) for name in record.kept
        }
        self.rows, self.gradients, self.numbers, self.keys, self.members = (
            Mirror(self.device) for _ in range(5)
        )
        self._owners: tuple[torch.Tensor, torch.Tensor] | None = None
        if not is_capturing():  # memory that is lacking should be so before any step
            self._owners_of(self.rows.show(self._records))
            self.gradients.show(self._gradients)
            if self.device.type == "cuda" and _is_captured(batch):
                kernels.load_writer(self.device)  # the next step may be

    def aim(self, gradients: Sequence[torch.Tensor]) -> None:
        """Takes other gradients of the same layouts, one for each row of the batch.

        Raises:
            RuntimeError: one has no memory.
        """
        self._gradients = self._addresses([gradients[index] for index in self._members])

    def gradient_spans(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Where the memory of each gradient begins and ends."""
        begins = self._gradients[self.occupied]
        ends = begins + self._extents[self.occupied]
        return begins.astype(np.uint64), ends.astype(np.uint64)

    def run(self, batch: Batch) -> None:
        """Steps the rows with the coefficients of a batch that has them where the first one had.

        Its gradients are those that the table was made with, or has been aimed at since.
        """
        if not self.blocks:
            return
        rows = self.rows.show(self._records)
        tables = (
            self._owners_of(rows),
            rows,
            self.gradients.show(self._gradients),
            self._numbers_of(batch),
            self._keys_of(batch),
        )
        scale = batch.loss_scale
        self.kernel.launch(
            self.blocks,
            *tables,
            {**self._aligned, "g": _alignment(self._gradients)},
            None if scale is None else scale.on_device(self.device, batch.dtype),
        )
        self._keep_until_done(tables)

    def _keep_until_done(self, tables: Sequence[torch.Tensor | None]) -> None:
        """Has their memory outlive a launch on a stream other than that they were made on."""
        if self.device.type != "cpu" and not is_capturing():
            stream = torch.get_device_module(self.device).current_stream(self.device)
            for table in tables:
                if table is not None:
                    table.record_stream(stream)

    def _numbers_of(self, batch: Batch) -> torch.Tensor:
        """The coefficients: of each row, or in one row those of all."""
        is_whole = len(self._members) == len(batch)
        if _has_device_values(batch):
            columns = [_on_device(c, len(batch), self.device) for c in batch.coefficients]
            return self._of_members(torch.stack([c.to(batch.dtype) for c in columns], dim=1))
        count = len(batch) if any(isinstance(c, np.ndarray) for c in batch.coefficients) else 1
        dtype = np.float64 if batch.dtype == torch.float64 else np.float32
        numbers = np.empty((count, len(batch.coefficients)), dtype)
        for position, value in enumerate(batch.coefficients):
            numbers[:, position] = value
        return self.numbers.show(numbers if is_whole or count == 1 else numbers[self._members])

    def _keys_of(self, batch: Batch) -> torch.Tensor | None:
        """The words from which the random bits of each row follow; None if rounding takes none."""
        if batch.keys is None or not self.kernel.record.is_random:
            return None
        if isinstance(batch.keys, np.ndarray):
            return self.keys.show(batch.keys[self._members])
        return self._of_members(batch.keys)

    def _of_members(self, given: torch.Tensor) -> torch.Tensor:
        """Of what the device has for each row of a batch, what is of these."""
        if len(self._members) == len(given):
            return given
        return given[self.members.show(np.array(self._members))]

    def _owners_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The row of each block; computed where the rows are, when they are new."""
        if self._owners is None or self._owners[0] is not rows:
            first = rows[:, self.kernel.record.first].contiguous()
            blocks = torch.arange(self.blocks, device=self.device)
            # Of rows that begin with the same block all but the last are empty.
            owners = torch.searchsorted(first, blocks, right=True, out_int32=True) - 1
            if is_capturing():
                return owners
            self._owners = rows, owners
        return self._owners[1]

    def _addresses(self, tensors: Sequence[torch.Tensor]) -> np.ndarray[Any, Any]:
        # Some devices have addresses from 2**63 on; Triton casts what has the same bits.
        begins = addresses(tensors).view(np.int64)
        if (begins[self.occupied] == 0).any():
            raise RuntimeError("a tensor has no memory: its data pointer is null")
        return begins


class Mirror:
    """A host array as it was last shown to a device: uploaded when it has changed, and only then.

    Attributes:
        uploads: how often it was.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.uploads = 0
        self._shown: tuple[np.ndarray[Any, Any], torch.Tensor] | None = None

    def show(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """The array on the device."""
        if is_capturing():
            return written(array, self.device)
        if self._shown is None or not _are_equal(self._shown[0], array):
            self._shown = array.copy(), _uploaded(array, self.device)
            self.uploads += 1
        return self._shown[1]


def written(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """The array in memory of its own, written by launches that carry the numbers themselves.

    A captured graph would copy from memory of the host again at every replay, long after that has
    come to hold something else.
    """
    words = np.ascontiguousarray(array).reshape(-1).view(np.int32)
    table = torch.empty(len(words), dtype=torch.int32, device=device)
    kernels.write(table, words)
    like = torch.from_numpy(array[:0].copy())
    return table.view(like.dtype).view(array.shape)


def _uploaded(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(array.copy())
    if device.type == "cpu":
        return host
    # torch frees pinned memory only after the copy that reads it.
    return host.pin_memory().to(device, non_blocking=True)


def _are_equal(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """In every bit: 0.0 is not -0.0, and NaN is NaN."""
    return (
        one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()
    )


def _on_device(
    value: float | np.ndarray[Any, Any] | torch.Tensor | list[torch.Tensor],
    count: int,
    device: torch.device,
) -> torch.Tensor:
    """A coefficient as a vector with an element for each row."""
    if isinstance(value, list):
        value = torch.stack(value)
    if isinstance(value, torch.Tensor) and (value.device == device or value.device.type != "cpu"):
        return value.to(device, non_blocking=True).expand(count)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        array = np.asarray(value, np.float64)
        sent = written(array, device) if is_capturing() else _uploaded(array, device)
        return sent.expand(count)
    return torch.full((count,), float(value), dtype=torch.float64, device=device)


def _has_device_values(batch: Batch) -> bool:
    """Whether coefficients are only known to the device."""
    return any(isinstance(c, (torch.Tensor, list)) for c in batch.coefficients)


def _is_captured(batch: Batch) -> bool:
    """Whether a graph may be captured of such a batch, whose numbers then are on the device."""
    return _has_device_values(batch) or isinstance(batch.keys, torch.Tensor)


def _alignment(addresses: np.ndarray[Any, Any]) -> int:
    """How many bytes, at most :data:`WIDEST`, all addresses are multiples of."""
    together = int(np.bitwise_or.reduce(addresses, initial=WIDEST))
    return together & -together
