"""What a backend is given: one graph and the rows it is to be run on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from stepforge.expr import Graph
from stepforge.formats import Format, apart, random_words, tensor_name, tensors_of

#: How many elements a part of a batch has, so that the dozen tensors of a step stay in the cache
#: of a CPU. Between 2**16 and 2**18 measures the same; the whole of a large tensor 10 times more.
CACHED = 2**17


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which parameters of a dtype are stepped: float32, or float64 for float64."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


#: The values of a uniform node.
Coefficient: TypeAlias = "float | np.ndarray[Any, Any] | torch.Tensor | list[torch.Tensor]"


#: A word for each row, as int64, where the coefficients are.
Words: TypeAlias = "np.ndarray[Any, Any] | torch.Tensor"


class Prepared(Protocol):
    """What a backend keeps of a batch for the next step of the same tensors."""

    def aim(self, gradients: list[torch.Tensor]) -> None:
        """Takes the next step's gradients; raises before anything has run if it cannot."""


@dataclass(frozen=True)
class LossScale:
    """What a gradient scaler says of a step's gradients; ``torch.amp.GradScaler`` does.

    Attributes:
        scale: what the loss was multiplied by; None if the gradients are divided by it already.
        found_inf: not zero if a gradient is not finite, and the step is to be skipped.
    """

    scale: torch.Tensor | float | None
    found_inf: torch.Tensor | float

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> LossScale | None:
        """What has been said to an optimizer; None if nothing has."""
        scale = getattr(optimizer, "grad_scale", None)
        found_inf = getattr(optimizer, "found_inf", None)
        if scale is None and found_inf is None:
            return None
        return cls(scale, 0.0 if found_inf is None else found_inf)

    @property
    def on_host(self) -> bool:
        """Whether its numbers can be read without waiting for a device."""
        return all(
            not isinstance(x, torch.Tensor) or x.device.type == "cpu"
            for x in (self.scale, self.found_inf)
        )

    def read(self) -> LossScale:
        """The same in numbers of the host, which waits for those on a device."""
        return LossScale(None if self.scale is None else float(self.scale), float(self.found_inf))

    def on_device(
        self, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What gradients are multiplied by and ``found_inf``, an element each, without waiting."""
        found_inf = _placed(self.found_inf, device)
        if self.scale is None:
            return torch.ones((), dtype=dtype, device=device), found_inf
        return _placed(self.scale, device).double().reciprocal().to(dtype), found_inf

    def unscale(self, dtype: torch.dtype) -> float:
        """What gradients are multiplied by, rounded to the dtype of the arithmetic."""
        if self.scale is None:
            return 1.0
        wide = torch.tensor(1.0 / float(self.scale), dtype=torch.float64, device="cpu")
        return float(wide.to(dtype))


def _placed(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    return torch.full((), value, dtype=torch.float64, device=device)


def is_capturing() -> bool:
    """Whether what is done on the GPU is only recorded, for a CUDA graph."""
    ready = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return ready and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Batch:
    """Rows that share a graph, a device and an arithmetic; one row for each parameter.

    Attributes:
        graph: what to compute.
        columns: for each varying input its tensors, one a row: parameters ``p``, gradients ``g``
            and states, all real, a row's all of one shape. Results are stored into the column
            of the same name. Storage may be of any floating dtype and any strides. Where there is
            a format its other parts stand beside it, as ``"m.scale"``.
        coefficients: for each of ``graph.coefficients``, in order, its value, rounded to ``dtype``
            or true or false: a number for all rows, an array or a vector on the device with one a
            row, or, where autograd has to see them, a list of tensors without dimensions.
        dtype: the dtype of the arithmetic, float32 or float64, whatever the storage.
        formats: of the columns that have one.
        keys: for each row the word from which its random bits follow; None if no format rounds at
            random.
        starts: for each row the index of its first element, as a word, which is not 0 in a part of
            a tensor; int64.
        differentiable: whether autograd must see the step.
        loss_scale: what a gradient scaler says of the gradients; None if nothing.
        prepared: what the backend's ``prepare`` made of these rows with other gradients of the
            same layout and other coefficients; None if it made nothing.
    """

    graph: Graph
    columns: dict[str, list[torch.Tensor]]
    coefficients: list[Coefficient]
    dtype: torch.dtype
    formats: Mapping[str, Format] = field(default_factory=dict)
    keys: Words | None = None
    starts: np.ndarray[Any, Any] | None = None
    differentiable: bool = False
    loss_scale: LossScale | None = None
    prepared: Prepared | None = None

    def __len__(self) -> int:
        return len(self.columns["p"])

    @property
    def written(self) -> list[str]:
        """The names of the tensors that a step writes to."""
        return [name for column in self.graph.results for name in tensors_of(column, self.formats)]

    @property
    def in_blocks(self) -> bool:
        """Whether elements share scales."""
        return any(format_.in_blocks for format_ in self.formats.values())

    def read(self, column: str, index: int) -> torch.Tensor:
        """The numbers of a row's tensor, in the dtype of the arithmetic; perhaps the tensor."""
        if column not in self.formats:
            return self.columns[column][index].to(self.dtype)
        return self.formats[column].read(self._parts(column, index)).to(self.dtype)

    def store(self, column: str, index: int, value: torch.Tensor) -> None:
        """Stores numbers into a row's tensor."""
        if column not in self.formats:
            self.columns[column][index].copy_(value)
            return
        random = {}
        if self.formats[column].is_random:
            assert self.keys is not None
            assert self.starts is not None
            key = self.keys[index] + apart(self.graph.results.index(column))
            start = int(self.starts[index])
            random = {"random": random_words(value.shape, start, key, value.device)}
        self.formats[column].write(self._parts(column, index), value, **random)

    def _parts(self, column: str, index: int) -> dict[str, torch.Tensor]:
        parts = self.formats[column].parts
        return {part.name: self.columns[tensor_name(column, part)][index] for part in parts}

    def pieces(self, limit: int) -> Iterator[Batch]:
        """The same work in parts of about ``limit`` elements each.

        An operation on a part leaves its result in the processor's cache, where the next one finds
        it; on the whole each would go through memory. Long rows are cut, short ones share a part.
        """
        rows: list[dict[str, torch.Tensor]] = []
        origins: list[int] = []
        offsets: list[int] = []
        size = 0
        for index in range(len(self)):
            whole = {name: c[index] for name, c in self.columns.items()}
            for offset, row in _cut(
                whole, limit, flat=not self.in_blocks, any_dim=not self.formats
            ):
                if rows and size + row["p"].numel() > limit:
                    yield self._part(rows, origins, offsets)
                    rows, origins, offsets, size = [], [], [], 0
                rows.append(row)
                origins.append(index)
                offsets.append(offset)
                size += row["p"].numel()
        if rows:
            yield self._part(rows, origins, offsets)

    @property
    def unscale(self) -> float:
        """What gradients are multiplied by before all else."""
        return 1.0 if self.loss_scale is None else self.loss_scale.unscale(self.dtype)

    def unscaled(self) -> Batch:
        """The same work on gradients that no loss scale is in, copies if need be."""
        factor = self.unscale
        if factor == 1.0:
            return self
        gradients = [g.to(self.dtype) * factor for g in self.columns["g"]]
        return replace(self.with_columns(self.columns | {"g": gradients}), loss_scale=None)

    def numbers(self) -> list[list[Any]]:
        """The coefficients as lists, one element a row, of Python numbers or of tensors."""
        return [
            c.tolist()
            if isinstance(c, np.ndarray)
            else list(c.unbind())
            if isinstance(c, torch.Tensor)
            else c
            if isinstance(c, list)
            else [c] * len(self)
            for c in self.coefficients
        ]

    def rows(self, indices: list[int]) -> Batch:
        """Only the rows of those numbers."""
        return self._part(
            [{name: c[index] for name, c in self.columns.items()} for index in indices],
            indices,
            [0] * len(indices),
        )

    def with_columns(self, columns: dict[str, list[torch.Tensor]]) -> Batch:
        """The same rows in other tensors."""
        return replace(self, columns=columns, prepared=None)

    def _part(
        self, rows: list[dict[str, torch.Tensor]], origins: list[int], offsets: list[int]
    ) -> Batch:
        return replace(
            self,
            prepared=None,
            columns={name: [row[name] for row in rows] for name in self.columns},
            coefficients=[_of_rows(c, origins) for c in self.coefficients],
            keys=None if self.keys is None else self.keys[origins],
            starts=None if self.starts is None else self.starts[origins] + np.array(offsets),
        )


def _of_rows(coefficient: Coefficient, rows: list[int]) -> Coefficient:
    if isinstance(coefficient, np.ndarray):
        return coefficient[rows]
    if isinstance(coefficient, torch.Tensor):
        return coefficient[torch.tensor(rows, device=coefficient.device)]
    return [coefficient[row] for row in rows] if isinstance(coefficient, list) else coefficient


def _cut(
    row: dict[str, torch.Tensor], limit: int, *, flat: bool, any_dim: bool
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """A row in parts of at most ``limit`` elements, or nearly, each a view.

    Args:
        row: the tensors.
        limit: how many elements a part has.
        flat: whether a part may end within a row of dimension 0.
        any_dim: whether the elements of a part need not follow one another.

    Returns:
        For each part the index of its first element, and its tensors.
    """
    p = row["p"]
    if p.numel() <= limit or row["g"].is_sparse:
        yield 0, row
        return
    dim = 0
    if flat and all(tensor.is_contiguous() for tensor in row.values()):
        row = {name: tensor.view(-1) for name, tensor in row.items()}
    elif any_dim:
        dim = max(range(p.dim()), key=p.size)
    length = row["p"].size(dim)
    step = max(1, limit * length // p.numel())
    for start in range(0, length, step):
        size = min(step, length - start)
        part = {name: tensor.narrow(dim, start, size) for name, tensor in row.items()}
        yield start * (p.numel() // length), part
