"""Scalar states: the step counts and other numbers that each parameter of a launch has one of."""

from __future__ import annotations

import functools
import itertools
import operator
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stepforge.ops import to_float32

__all__ = ["ScalarStates", "shared_vector"]


@dataclass(frozen=True)
class ScalarStates:
    """The step counts and scalar states of a launch's parameters.

    Attributes:
        tensors: for each key, ``step`` among them: one vector, whose elements are the parameters'
            own tensors; or a list of those tensors.
    """

    tensors: Mapping[str, torch.Tensor | list[torch.Tensor]]

    @classmethod
    def as_vectors(cls, states: Sequence[dict[str, Any]], keys: Sequence[str]) -> ScalarStates:
        """Return the scalar states as vectors; the states of the parameters become elements."""
        return cls({key: _as_vector(states, key) for key in keys})

    def on_host(self, key: str) -> Any:
        """Return the number on which all parameters agree, else a float64 array of theirs.

        Numbers take a fraction of the time of arrays, and give the same results.
        """
        if self._host_vectors is not None:
            return self._host_vectors[key].read()
        values = self.tensors[key]
        array = np.array(
            values.tolist() if isinstance(values, torch.Tensor) else list(map(float, values)),
            np.float64,
        )
        return float(array[0]) if (array == array[0]).all() else array

    @functools.cached_property
    def _host_vectors(self) -> Mapping[str, _HostVector] | None:
        """The vectors as memory of the host; None if there are none, or autograd must see them."""
        vectors = [x for x in self.tensors.values() if isinstance(x, torch.Tensor)]
        if len(vectors) < len(self.tensors) or not all(map(_HostVector.serves, vectors)):
            return None
        return dict(zip(self.tensors, map(_HostVector, vectors)))

    def on_device(self) -> dict[str, torch.Tensor]:
        """Return a vector for each key, one element per parameter."""
        return {
            key: x if isinstance(x, torch.Tensor) else torch.stack([each.reshape(()) for each in x])
            for key, x in self.tensors.items()
        }

    def by_param(self) -> Iterator[dict[str, Any]]:
        """Yield each parameter's scalars as autograd must see them.

        Clones, as the step overwrites its scalar states in place.
        """
        columns = {key: list(x) for key, x in self.tensors.items()}
        for values in zip(*columns.values()):
            yield {
                key: x.clone() if x.requires_grad else float(x) for key, x in zip(columns, values)
            }

    def store(self, key: str, values: Any, skipped: torch.Tensor | None) -> None:
        """Store the new values of a scalar state.

        Args:
            key: its key.
            values: one number, or one per parameter in an array, vector or list.
            skipped: true on the device if the step is skipped; None if it is not.
        """
        tensors = self.tensors[key]
        if isinstance(tensors, torch.Tensor):
            if skipped is None and self._host_vectors is not None and type(values) is float:
                self._host_vectors[key].fill(values)
            else:
                _store(tensors, values, skipped)
        else:
            for tensor, value in zip(tensors, _by_param(values, len(tensors))):
                _store(tensor, value, skipped)

    def count_step(self, skipped: torch.Tensor | None) -> None:
        """Add one to the step counts, unless the step is skipped."""
        if skipped is None and self._host_vectors is not None:
            vector = self._host_vectors["step"]
            count = vector.read()
            if type(count) is float:
                vector.fill(count + 1)
                return
        one = 1 if skipped is None else torch.where(skipped, 0.0, 1.0)
        steps = self.tensors["step"]
        if isinstance(steps, torch.Tensor):
            steps.add_(one)
        elif len(steps) == 1:
            steps[0].add_(one)
        else:
            torch._foreach_add_(steps, one)

    @property
    def device(self) -> torch.device:
        """The device of the step counts."""
        steps = self.tensors["step"]
        return steps.device if isinstance(steps, torch.Tensor) else steps[0].device


class _HostVector:
    """A vector in the memory of the host, read and written in a few calls.

    numpy and torch take several times as long, which is most of a step of a few small parameters.

    Args:
        vector: a vector that :meth:`serves` accepts.
    """

    __slots__ = ("_array", "_bytes", "_number", "_vector")

    def __init__(self, vector: torch.Tensor) -> None:
        self._vector = vector
        self._array = vector.numpy()
        self._bytes = self._array.view(np.uint8).data
        self._number = struct.Struct(self._array.dtype.char)

    @staticmethod
    def serves(vector: torch.Tensor) -> bool:
        """Return True if a vector is on the host, of floats, gapless and unseen by autograd."""
        return (
            vector.device.type == "cpu"
            and vector.dtype in (torch.float32, torch.float64)
            and vector.is_contiguous()
            and not vector.requires_grad
        )

    def read(self) -> Any:
        """Return the number on which all elements agree, bit for bit, else a float64 array."""
        content = self._bytes.tobytes()
        size = self._number.size
        if content == content[:size] * len(self._array):
            return self._number.unpack_from(content)[0]
        return self._array.astype(np.float64)

    def fill(self, value: float) -> None:
        """Write a number to all elements, rounded to nearest, and tell autograd."""
        if self._array.dtype == np.float32:
            value = to_float32(value)
        self._bytes[:] = self._number.pack(value) * len(self._array)
        torch.autograd.graph.increment_version(self._vector)


def shared_vector(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the vector that has exactly these tensors as elements, in order; None if none has."""
    base: torch.Tensor | None = tensors[0]._base
    if base is None or base.dim() != 1 or len(base) != len(tensors):
        return None
    if not all(map(operator.is_, map(_base, tensors), itertools.repeat(base))):
        return None
    begin, step = base.data_ptr(), base.stride(0) * base.itemsize
    is_in_order = all(
        map(operator.eq, map(torch.Tensor.data_ptr, tensors), itertools.count(begin, step))
    )
    return base if is_in_order else None


_base = operator.attrgetter("_base")


def _as_vector(states: Sequence[dict[str, Any]], key: str) -> torch.Tensor:
    tensors = list(map(operator.itemgetter(key), states))
    shared = shared_vector(tensors)
    if shared is not None:
        return shared
    if any(map(torch.Tensor.dim, tensors)):
        tensors = [x.reshape(()) for x in tensors]
    vector = torch.stack(tensors).detach()
    for state, element in zip(states, vector.unbind()):
        state[key] = element
    return vector


def _store(state: torch.Tensor, value: Any, skipped: torch.Tensor | None) -> None:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if skipped is not None:
        value = torch.where(skipped, state, value)
    if isinstance(value, torch.Tensor):
        state.copy_(value)
    else:
        state.fill_(value)


def _by_param(values: Any, count: int) -> list[Any]:
    """Return values as a list, one per parameter."""
    if isinstance(values, list):
        return values
    if isinstance(values, np.ndarray):
        return list(np.broadcast_to(values, (count,)).tolist())
    if isinstance(values, torch.Tensor) and values.dim() == 1:
        return list(values.expand(count).unbind())
    return [values] * count
