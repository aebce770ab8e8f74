"""Batches: parameters that one kernel steps together, with the values of one step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from stepforge.backends.grad_scale import GradScale
from stepforge.backends.spec import KernelSpec
from stepforge.formats import Format, random_uint32, result_salt, tensor_name
from stepforge.program import Graph
from stepforge.state.elements import Elements

__all__ = [
    "CHUNK_ELEMENTS",
    "Batch",
    "Coefficient",
    "DeviceValues",
    "Gradients",
    "KernelTable",
    "LazyColumns",
    "Scalars",
    "Seeds",
    "UniformKernel",
    "is_capturing",
    "uploaded",
]

#: Elements of a chunk of the reference, so that the dozen tensors of a step stay in a CPU's cache.
#: Whole large tensors take 10 times as long.
CHUNK_ELEMENTS = 2**17

_NUMBERS = frozenset({float, int, bool})

#: The values of a uniform node.
Coefficient: TypeAlias = "float | np.ndarray[Any, Any] | torch.Tensor | list[torch.Tensor]"

#: One scalar per parameter, on a device.
Scalars: TypeAlias = "torch.Tensor | Elements"

#: One uint32 per parameter, as int64, on the device of the coefficients.
Seeds: TypeAlias = "np.ndarray[Any, Any] | torch.Tensor"


class KernelTable(Protocol):
    """The part of a batch that a backend keeps for the next step of the same tensors."""

    def bind_gradients(self, gradients: Gradients) -> None:
        """Take the gradients of the next step. Raises before any kernel has run if it cannot."""


class Gradients(Protocol):
    """The gradients of a step, one per parameter, of the layouts that a table was made for."""

    @property
    def disjoint(self) -> bool:
        """True if surely all have memory, and no memory of the step overlaps; False if not sure."""

    def write_addresses(self, out: np.ndarray[Any, Any]) -> None:
        """Write the address of each gradient into an array of uint64."""


@dataclass(frozen=True, eq=False)
class DeviceValues:
    """The uniform values of a step in the memory of a device, which a kernel is still to write.

    Attributes:
        matrix: the coefficients, a row per parameter, in the dtype of the arithmetic; a boolean is
            0 or 1.
        coefficients: the columns of the matrix.
        step_seeds: the seed of each parameter's random bits; None if no format rounds at random.
        advance: writes the values, and advances step counts and scalar states. Its argument is one
            number on the device, not zero if the step is to be skipped, which then advances
            nothing; None if it is not.
    """

    matrix: torch.Tensor
    coefficients: list[Coefficient]
    step_seeds: torch.Tensor | None
    advance: Callable[[torch.Tensor | None], None]


class UniformKernel(Protocol):
    """A kernel that computes the uniform values of a launch, and advances its scalars."""

    def bind(self, options: Mapping[str, Any]) -> DeviceValues:
        """Return the values of the next step, not yet written. Changes nothing.

        Args:
            options: the options among the inputs of the uniform program, in their order: numbers,
                or tensors, which the device reads.
        """


class LazyColumns(Mapping[str, list[torch.Tensor]]):
    """Columns of a batch that become lists when they are asked for: a kernel needs none.

    Args:
        names: the names of the columns.
        read: returns the tensors of a column.
        increment_versions: tells autograd that a kernel has written to the tensors.
    """

    __slots__ = ("_columns", "_names", "_read", "increment_versions")

    def __init__(
        self,
        names: Collection[str],
        read: Callable[[str], list[torch.Tensor]],
        increment_versions: Callable[[], None],
    ) -> None:
        self._names = names
        self._read = read
        self._columns: dict[str, list[torch.Tensor]] = {}
        self.increment_versions = increment_versions

    def __getitem__(self, name: str) -> list[torch.Tensor]:
        if name not in self._columns:
            if name not in self._names:
                raise KeyError(name)
            self._columns[name] = self._read(name)
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def is_capturing() -> bool:
    """Return True while a graph of the GPU records the current stream."""
    gpu = _capturing_gpu()
    return gpu is not None and gpu.is_initialized() and gpu.is_current_stream_capturing()


@functools.cache
def _capturing_gpu() -> Any:
    """Return ``torch.cuda``, ``torch.xpu`` or the like; None if no device here captures graphs."""
    accelerator = torch.accelerator.current_accelerator()
    gpu = None if accelerator is None else torch.get_device_module(accelerator)
    return gpu if hasattr(gpu, "is_current_stream_capturing") else None


def uploaded(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """Return a copy of an array on a device, without waiting for it."""
    host = torch.from_numpy(array.copy())
    if device.type == "cpu":
        return host
    # torch frees pinned memory only after the copy that reads it.
    return host.pin_memory().to(device, non_blocking=True)


@dataclass(eq=False)
class Batch:
    """Parameters of one kernel and one device, and the values of one step.

    Attributes:
        spec: the kernel.
        columns: the tensors of each name, one per parameter: parameters ``p``, gradients ``g``,
            states, and parts of formats such as ``m.scale``. All are real and local, and those of a
            parameter have one shape, scales excepted. Strides are any.
        coefficients: the value of each of the graph's coefficients, in order, rounded to the
            arithmetic or boolean: one number for all parameters, an array or a device vector with
            one per parameter, or, where autograd must see them, a list of zero-dimensional tensors.
        step_seeds: the seed of each parameter's random bits; None if no format rounds at random.
        first_indices: the flat index of each parameter's first element, int64; not 0 in a slice.
        differentiable: True if autograd must see the step.
        matrix: the coefficients, a row per parameter, if a kernel has written them so.
    """

    spec: KernelSpec
    columns: Mapping[str, list[torch.Tensor]]
    coefficients: list[Coefficient]
    step_seeds: Seeds | None = None
    first_indices: np.ndarray[Any, Any] | None = None
    differentiable: bool = False
    matrix: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        graph: Graph,
        columns: dict[str, list[torch.Tensor]],
        coefficients: list[Coefficient],
        formats: Mapping[str, Format] = MappingProxyType({}),
        arithmetic: torch.dtype | None = None,
        **values: Any,
    ) -> Batch:
        """Return a batch of tensors, with the spec that follows from their dtypes.

        Args:
            graph: the computation.
            columns: the tensors.
            coefficients: the values of the coefficients.
            formats: the format of each column that has one.
            arithmetic: float32 or float64; None for the arithmetic of ``p``'s dtype.
            values: the other attributes.

        Raises:
            ValueError: tensors of one name have several dtypes, so no one kernel takes them.
        """
        for name, column in columns.items():
            if len({x.dtype for x in column}) > 1:
                raise ValueError(
                    f"{name} has several dtypes: {sorted({str(x.dtype) for x in column})}"
                )
        dtypes = {name: column[0].dtype for name, column in columns.items()}
        spec = KernelSpec.of(graph, dtypes, formats, arithmetic)
        return cls(spec, columns, coefficients, **values)

    def __len__(self) -> int:
        return len(self.columns["p"])

    @property
    def shares_coefficients(self) -> bool:
        """True if each coefficient is one number for all parameters."""
        return _NUMBERS.issuperset(map(type, self.coefficients))

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.columns["p"][0].device

    def read(self, column: str, index: int) -> torch.Tensor:
        """Return a parameter's values of a column, in the arithmetic; maybe the tensor itself."""
        formats = self.spec.formats
        if column not in formats:
            return self.columns[column][index].to(self.spec.arithmetic)
        return formats[column].read(self._parts(column, index)).to(self.spec.arithmetic)

    def read_all(self, column: str) -> list[torch.Tensor]:
        """Return :meth:`read` of every parameter."""
        is_plain = column not in self.spec.formats
        if is_plain and self.spec.dtype_of[column] == self.spec.arithmetic:
            return self.columns[column]
        return [self.read(column, index) for index in range(len(self))]

    def store(self, column: str, index: int, value: torch.Tensor) -> None:
        """Store a parameter's values of a column."""
        formats = self.spec.formats
        if column not in formats:
            self.columns[column][index].copy_(value)
            return
        random = {}
        if formats[column].is_random:
            assert self.step_seeds is not None
            assert self.first_indices is not None
            seed = self.step_seeds[index] + result_salt(self.spec.graph.results.index(column))
            start = int(self.first_indices[index])
            random = {"random": random_uint32(value.shape, start, seed, value.device)}
        formats[column].write(self._parts(column, index), value, **random)

    def store_all(self, column: str, values: list[torch.Tensor]) -> None:
        """Do :meth:`store` for every parameter."""
        # List operations do not write to lazy negations.
        if column in self.spec.formats or any(x.is_neg() for x in self.columns[column]):
            for index, value in enumerate(values):
                self.store(column, index, value)
        else:
            torch._foreach_copy_(self.columns[column], values)

    def _parts(self, column: str, index: int) -> dict[str, torch.Tensor]:
        parts = self.spec.formats[column].parts
        return {part.name: self.columns[tensor_name(column, part)][index] for part in parts}

    def chunks(self, limit: int) -> Iterator[Batch]:
        """Yield the same work in chunks of about ``limit`` elements.

        An operation on a chunk leaves its result in the processor's cache, where the next one finds
        it; on a whole tensor each would go through memory. Large parameters are cut, small ones
        share a chunk.
        """
        sizes = [p.numel() for p in self.columns["p"]]
        if max(sizes, default=0) <= limit:
            yield from self._ranges(sizes, limit)
            return
        rows: list[dict[str, torch.Tensor]] = []
        origins: list[int] = []
        offsets: list[int] = []
        size = 0
        for index in range(len(self)):
            whole = {name: c[index] for name, c in self.columns.items()}
            for offset, row in _cut(
                whole, limit, flat=not self.spec.in_blocks, any_dim=not self.spec.formats
            ):
                if rows and size + row["p"].numel() > limit:
                    yield self._slices(rows, origins, offsets)
                    rows, origins, offsets, size = [], [], [], 0
                rows.append(row)
                origins.append(index)
                offsets.append(offset)
                size += row["p"].numel()
        if rows:
            yield self._slices(rows, origins, offsets)

    def _ranges(self, sizes: list[int], limit: int) -> Iterator[Batch]:
        """Yield consecutive parameters that have about ``limit`` elements together."""
        begin, elements = 0, 0
        for index, size in enumerate(sizes):
            if index > begin and elements + size > limit:
                yield self._range(begin, index)
                begin, elements = index, 0
            elements += size
        if sizes:
            yield self._range(begin, len(sizes))

    def _range(self, begin: int, end: int) -> Batch:
        """Return the batch of some consecutive parameters."""
        if begin == 0 and end == len(self):
            return self
        starts = self.first_indices
        return replace(
            self,
            columns={name: column[begin:end] for name, column in self.columns.items()},
            coefficients=[_of_params(c, slice(begin, end)) for c in self.coefficients],
            step_seeds=None if self.step_seeds is None else self.step_seeds[begin:end],
            first_indices=None if starts is None else starts[begin:end],
            matrix=None,
        )

    def by_coefficients(self) -> Iterator[Batch]:
        """Yield the parameters that share all coefficients, which are numbers or arrays."""
        if self.shares_coefficients:
            yield self
            return
        by_param = self.coefficients_by_param()
        members: dict[bytes, list[int]] = {}
        for index, values in enumerate(np.array(by_param, np.float64).T):
            members.setdefault(values.tobytes(), []).append(index)  # 0 and -0 differ
        for indices in members.values():
            yield replace(self.select(indices), coefficients=[c[indices[0]] for c in by_param])

    def unscaled(self, grad_scale: GradScale | None) -> Batch:
        """Return the same work on unscaled gradients, which are copies if there is a scale."""
        factor = 1.0 if grad_scale is None else grad_scale.factor(self.spec.arithmetic)
        if factor == 1.0:
            return self
        gradients = [g.to(self.spec.arithmetic) * factor for g in self.columns["g"]]
        return self.with_columns({**self.columns, "g": gradients})

    def coefficients_by_param(self) -> list[list[Any]]:
        """Return each coefficient as a list, one Python number or tensor per parameter."""
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

    def select(self, indices: list[int]) -> Batch:
        """Return the batch of some of the parameters."""
        return self._slices(
            [{name: c[index] for name, c in self.columns.items()} for index in indices],
            indices,
            [0] * len(indices),
        )

    def with_columns(self, columns: dict[str, list[torch.Tensor]]) -> Batch:
        """Return the same work on other tensors, possibly of other dtypes."""
        dtypes = {name: column[0].dtype for name, column in columns.items()}
        spec = KernelSpec.of(
            self.spec.graph, dtypes, self.spec.formats, arithmetic=self.spec.arithmetic
        )
        return replace(self, spec=spec, columns=columns)

    def _slices(
        self, rows: list[dict[str, torch.Tensor]], origins: list[int], offsets: list[int]
    ) -> Batch:
        """Return a batch of slices of parameters.

        Args:
            rows: the tensors of each slice, by name.
            origins: the index of each slice's parameter.
            offsets: the flat index of each slice's first element in its parameter.
        """
        starts = self.first_indices
        return replace(
            self,
            columns={name: [row[name] for row in rows] for name in self.columns},
            coefficients=[_of_params(c, origins) for c in self.coefficients],
            step_seeds=None if self.step_seeds is None else self.step_seeds[origins],
            first_indices=None if starts is None else starts[origins] + np.array(offsets),
            matrix=None,
        )


def _of_params(coefficient: Coefficient, indices: list[int] | slice) -> Coefficient:
    if isinstance(coefficient, np.ndarray):
        return coefficient[indices]
    if isinstance(indices, slice):
        return (
            coefficient[indices] if isinstance(coefficient, (torch.Tensor, list)) else coefficient
        )
    if isinstance(coefficient, torch.Tensor):
        return coefficient[torch.tensor(indices, device=coefficient.device)]
    return [coefficient[i] for i in indices] if isinstance(coefficient, list) else coefficient


def _cut(
    row: dict[str, torch.Tensor], limit: int, *, flat: bool, any_dim: bool
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Cut a parameter's tensors into views of about ``limit`` elements each.

    Args:
        row: the tensors, by name.
        limit: the elements of a slice.
        flat: True if a slice may end within a row of dimension 0.
        any_dim: True if the elements of a slice need not be consecutive.

    Yields:
        The flat index of a slice's first element, and its tensors.
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
