"""The uniform program of a launch on its device: one kernel, which also advances scalars."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stepforge.backends import cache, disk_cache
from stepforge.backends.batch import Coefficient, DeviceValues, Scalars, Seeds, is_capturing
from stepforge.backends.disk_cache import BuildError
from stepforge.backends.spec import KernelSpec
from stepforge.backends.triton.kernel import is_interpreted, launch_context, load
from stepforge.backends.triton.uniform_source import Scalar, UniformSpec, uniform_source
from stepforge.backends.triton.words import words_of
from stepforge.ops import scalar_dtype
from stepforge.state.elements import Elements

__all__ = ["UniformKernel"]

#: The parameters of one program of a launch: as many as run at once on a GPU that has few units
#: for float64.
_BLOCK = 32
_FLOATS = (torch.float32, torch.float64)


class UniformKernel:
    """Computes the uniform values of a launch's parameters, and advances their scalars.

    Args:
        spec: the kernel of the launch.
        scalars: the step counts, named ``t``, and the scalar states.
        seeds: the seed of each parameter; None if nothing is rounded at random.
    """

    def __init__(
        self, spec: KernelSpec, scalars: Mapping[str, Scalars], seeds: Seeds | None
    ) -> None:
        self._spec = spec
        self._scalars = dict(scalars)
        self._vectors = list(map(_vector, scalars.values()))
        self._seeds = None if seeds is None else torch.as_tensor(seeds)
        self._device = self._vectors[0].device
        self._rows = len(scalars["t"])
        self._memory: _Memory | None = None
        self._kernels: dict[tuple[frozenset[str], torch.dtype], _Compiled] = {}

    @staticmethod
    def serves(scalars: Mapping[str, Scalars]) -> bool:
        """Return True if the kernel can read and write the scalars."""
        vectors = map(_vector, scalars.values())
        return all(x.is_contiguous() and x.dtype in _FLOATS for x in vectors)

    def bind(self, options: Mapping[str, Any]) -> DeviceValues:
        """Return the values of the next step, not yet written. Changes nothing.

        Args:
            options: the options among the inputs of the uniform program, in their order: numbers,
                or tensors, which the device reads.

        Raises:
            RuntimeError: the source of the kernel cannot be kept.
        """
        given = {name: self._option(value) for name, value in options.items()}
        tensors = {name for name, value in given.items() if isinstance(value, torch.Tensor)}
        kernel = self._kernel(frozenset(tensors))
        # A captured graph takes memory of its own, and keeps it.
        memory = None if is_capturing() else self._memory
        if memory is None:
            memory = self._allocated()
            if not is_capturing():
                self._memory = memory
        advance = functools.partial(self._advance, kernel, memory, list(given.values()))
        return DeviceValues(memory.matrix, memory.columns, memory.step_seeds, advance)

    def _allocated(self) -> _Memory:
        shape = self._rows, len(self._spec.graph.coefficients)
        matrix = torch.empty(shape, dtype=self._spec.arithmetic, device=self._device)
        seeds = None if self._seeds is None else torch.empty_like(self._seeds)
        return _Memory(matrix, list(matrix.unbind(1)), seeds)

    def _advance(
        self,
        kernel: _Compiled,
        memory: _Memory,
        options: Sequence[float | torch.Tensor],
        found_inf: torch.Tensor | None,
    ) -> None:
        """Write the values of the next step, and advance the scalars."""
        seeds = [] if self._seeds is None else [self._seeds, memory.step_seeds]
        words = itertools.chain.from_iterable(map(_arguments, options))
        given = [*self._addresses, *seeds, *words]
        kernel.launch(memory.matrix, self._rows, found_inf, given)
        torch.autograd.graph.increment_version(self._vectors)

    @functools.cached_property
    def _addresses(self) -> list[torch.Tensor]:
        """The vector of each scalar, followed by the positions in it if they have gaps."""
        return [
            x
            for each in self._scalars.values()
            for x in ((each.vector, each.index) if isinstance(each, Elements) else (each,))
        ]

    def _option(self, value: Any) -> float | torch.Tensor:
        """Return an option as a number of the host, or as a tensor that the kernel can read."""
        if not isinstance(value, torch.Tensor):
            return float(value)
        if value.device == self._device and value.dtype in _FLOATS:
            return value
        if value.device.type == "cpu" != self._device.type:
            return float(value)
        return value.to(self._device, torch.float64, non_blocking=True)

    def _kernel(self, tensors: frozenset[str]) -> _Compiled:
        """Return the kernel for options of which some are tensors."""
        stored = scalar_dtype()
        kernel = self._kernels.get((tensors, stored))
        if kernel is None:
            scalars = tuple(
                Scalar(name, _vector(x).dtype, isinstance(x, Elements))
                for name, x in self._scalars.items()
            )
            graph, arithmetic = self._spec.graph, self._spec.arithmetic
            is_random = self._seeds is not None
            spec = UniformSpec(graph, arithmetic, scalars, tensors, stored, is_random)
            found = _compiled(spec, is_interpreted())
            if isinstance(found, str):
                raise RuntimeError(found)
            kernel = self._kernels[tensors, stored] = found
        return kernel


@dataclass(frozen=True, eq=False)
class _Memory:
    """The memory of a step's values.

    Attributes:
        matrix: the coefficients, a row per parameter.
        columns: the columns of the matrix.
        step_seeds: the seed of each parameter; None if nothing is rounded at random.
    """

    matrix: torch.Tensor
    columns: list[Coefficient]
    step_seeds: torch.Tensor | None


class _Compiled:
    """A kernel, which Triton compiles when it is launched.

    Args:
        spec: its computation.

    Raises:
        BuildError: its source cannot be kept.
        ImportError: Triton cannot be imported.
    """

    def __init__(self, spec: UniformSpec) -> None:
        self._advance = load(uniform_source(spec)).advance
        self._compiled: set[tuple[Any, ...]] = set()

    def launch(
        self,
        coefficients: torch.Tensor,
        rows: int,
        found_inf: torch.Tensor | None,
        given: Sequence[Any],
    ) -> None:
        """Launch the kernel.

        Args:
            coefficients: to be written.
            rows: the number of parameters.
            found_inf: not zero if the step is to be skipped; None if it is not.
            given: the other arguments, in the kernel's order.

        Raises:
            RuntimeError: a graph is captured, and the kernel has not been compiled.
        """
        skipped = None if found_inf is None else found_inf.dtype
        variant = coefficients.device, skipped, *map(_dtype, given)
        if is_capturing() and not self.knows(variant):
            raise RuntimeError(
                "a graph cannot capture the compilation of a kernel: before the capture, step once "
                "with the same options, and with a gradient scaler if the capture has one"
            )
        with launch_context(coefficients.device):
            self._advance[(-(-rows // _BLOCK),)](
                coefficients,
                rows,
                found_inf,
                *given,
                SKIPPABLE=found_inf is not None,
                BLOCK=_BLOCK,
                num_warps=1,
                enable_fp_fusion=False,
            )
        self._compiled.add(variant)

    def knows(self, variant: tuple[Any, ...]) -> bool:
        """Return True if the kernel has been launched on this device, with these dtypes."""
        return variant in self._compiled


@cache.made_once(disk_cache.cache_circumstances)
def _compiled(spec: UniformSpec, _interpreted: bool) -> _Compiled | str:
    try:
        return _Compiled(spec)
    except BuildError as error:
        return str(error)
    except ImportError as error:
        return f"triton cannot be imported ({error})"


def _vector(scalars: Scalars) -> torch.Tensor:
    """Return the vector that has the scalars."""
    return scalars.vector if isinstance(scalars, Elements) else scalars


def _dtype(argument: Any) -> torch.dtype | None:
    return argument.dtype if isinstance(argument, torch.Tensor) else None


def _arguments(value: float | torch.Tensor) -> tuple[Any, ...]:
    """Return the arguments of an option: a pointer, or the words of a number."""
    return (value,) if isinstance(value, torch.Tensor) else words_of(value, torch.float64)
