"""Scalar states: the step counts and other numbers that each parameter of a launch has one of.

A launch reads and writes all of its parameters' numbers at once, so those of a kept plan are
elements of vectors. The vectors belong to the optimizer, not to the launch: the next step may have
other gradients, so other launches, which share some of the parameters. A parameter's number stays
where it is, and each launch knows the positions of its own.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stepforge.backends.batch import is_capturing, uploaded
from stepforge.ops import to_float32
from stepforge.state.elements import Elements
from stepforge.state.sharding import is_plain, local_part

__all__ = ["ScalarStates", "ScalarVectors"]


@dataclass(frozen=True)
class ScalarStates:
    """The step counts and scalar states of a launch's parameters.

    Attributes:
        tensors: for each key, ``step`` among them: one vector, whose elements are the parameters'
            own tensors; or elements of a vector that are; or a list of those tensors.
    """

    tensors: Mapping[str, torch.Tensor | Elements | list[torch.Tensor]]

    def on_host(self, key: str) -> Any:
        """Return the number on which all parameters agree, else a float64 array of theirs.

        Numbers take a fraction of the time of arrays, and give the same results.
        """
        if self._host_vectors is not None:
            return self._host_vectors[key].read()
        values = _values(self.tensors[key])
        array = np.array(
            values.tolist() if isinstance(values, torch.Tensor) else list(map(float, values)),
            np.float64,
        )
        return float(array[0]) if (array == array[0]).all() else array

    @functools.cached_property
    def _host_vectors(self) -> Mapping[str, _HostVector] | None:
        """The vectors as memory of the host; None if there are none, or autograd must see them."""
        found: dict[str, _HostVector] = {}
        for key, x in self.tensors.items():
            if isinstance(x, list):
                return None
            vector = x.vector if isinstance(x, Elements) else x
            if not _HostVector.serves(vector):
                return None
            found[key] = _HostVector(vector, x.index if isinstance(x, Elements) else None)
        return found

    def on_device(self) -> dict[str, torch.Tensor]:
        """Return a vector for each key, one element per parameter."""
        return {
            key: x if isinstance(x, torch.Tensor) else torch.stack([each.reshape(()) for each in x])
            for key, x in self._items()
        }

    def by_param(self) -> Iterator[dict[str, Any]]:
        """Yield each parameter's scalars as autograd must see them.

        Clones, as the step overwrites its scalar states in place.
        """
        columns = {key: list(x) for key, x in self._items()}
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
        if skipped is None and self._host_vectors is not None and type(values) is float:
            self._host_vectors[key].fill(values)
        elif isinstance(tensors, torch.Tensor):
            _store(tensors, values, skipped)
        elif isinstance(tensors, Elements):
            stored = tensors.read()
            _store(stored, values, skipped)
            tensors.write(stored)
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
        elif isinstance(steps, Elements):
            tensors = steps.read()
            steps.write(tensors.add_(one))
        elif len(steps) == 1:
            steps[0].add_(one)
        else:
            torch._foreach_add_(steps, one)

    @property
    def device(self) -> torch.device:
        """The device of the step counts."""
        steps = self.tensors["step"]
        first = steps.vector if isinstance(steps, Elements) else steps[0]
        return first.device

    def _items(self) -> Iterator[tuple[str, torch.Tensor | list[torch.Tensor]]]:
        """Yield each key with its numbers: in a vector, or in a list."""
        return ((key, _values(x)) for key, x in self.tensors.items())


def _values(tensors: torch.Tensor | Elements | list[torch.Tensor]) -> Any:
    """Return numbers in a vector or a list: elements of a vector in a new one."""
    return tensors.read() if isinstance(tensors, Elements) else tensors


class _HostVector:
    """A vector in the memory of the host, or elements of one, read and written in a few calls.

    numpy and torch take several times as long, which is most of a step of a few small parameters.

    Args:
        vector: a vector that :meth:`serves` accepts.
        index: the positions of the elements; None for all.
    """

    __slots__ = ("_array", "_bytes", "_index", "_number", "_vector")

    def __init__(self, vector: torch.Tensor, index: torch.Tensor | None) -> None:
        self._vector = vector
        self._array = vector.numpy()
        self._index = None if index is None else index.numpy()
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
        array = self._array if self._index is None else self._array[self._index]
        content = array.tobytes()
        size = self._number.size
        if content == content[:size] * len(array):
            return self._number.unpack_from(content)[0]
        return array.astype(np.float64)

    def fill(self, value: float) -> None:
        """Write a number to all elements, rounded to nearest, and tell autograd."""
        if self._array.dtype == np.float32:
            value = to_float32(value)
        if self._index is None:
            self._bytes[:] = self._number.pack(value) * len(self._array)
        else:
            self._array[self._index] = value
        torch.autograd.graph.increment_version(self._vector)


class ScalarVectors:
    """The vectors of an optimizer's scalar states: one for each key, device and dtype.

    A parameter keeps its element in all steps, whichever other parameters step with it. An element
    never becomes that of another parameter, so what the user has kept of a state is not written.
    """

    def __init__(self) -> None:
        self._vectors: dict[tuple[str, torch.device, torch.dtype], _Vector] = {}

    def scalar_states(
        self,
        params: Sequence[torch.Tensor],
        states: Sequence[dict[str, Any]],
        keys: Sequence[str],
        *,
        room: int,
    ) -> ScalarStates:
        """Return the scalar states of parameters; their tensors become elements of the vectors.

        Args:
            params: the parameters, each once.
            states: the state of each.
            keys: the keys of the scalar states.
            room: the number of the optimizer's parameters, all of which a vector should hold.
        """
        owners = list(map(id, params))
        return ScalarStates({key: self._elements(owners, states, key, room) for key in keys})

    def hold(
        self, params: Sequence[torch.Tensor], states: Sequence[dict[str, Any]], keys: Sequence[str]
    ) -> bool:
        """Return True if the scalar states are elements already, and nothing must be uploaded.

        Args:
            params: the parameters.
            states: the state of each.
            keys: the keys of the scalar states.
        """
        owners = list(map(id, params))
        for key in keys:
            tensors = [state[key] for state in states]
            vector = self._vectors.get(_kind(key, tensors[0]))
            places = [] if vector is None else vector.places(owners, tensors)
            if not places or None in places or (is_capturing() and not _is_range(places)):
                return False
        return True

    def _elements(
        self, owners: list[int], states: Sequence[dict[str, Any]], key: str, room: int
    ) -> torch.Tensor | Elements:
        """Return the scalar states of one key, after those without an element have got one."""
        tensors = [state[key] for state in states]
        kind = _kind(key, tensors[0])
        vector = self._vectors.get(kind)
        places: list[int | None] = [None] * len(owners)
        if vector is not None:
            places = vector.places(owners, tensors)
        new = [i for i, place in enumerate(places) if place is None]
        if new and (vector is None or not vector.takes(len(new))):
            vector = self._vectors[kind] = _Vector(tensors[0], max(room, len(owners)))
            new = list(range(len(owners)))
        assert vector is not None
        if new:
            elements = vector.add([owners[i] for i in new], [tensors[i] for i in new])
            for i, (place, element) in zip(new, elements):
                states[i][key], places[i] = element, place
        return vector.at(places)


class _Vector:
    """A vector with room for elements that come later.

    Args:
        like: a tensor of the vector's dtype and device.
        size: the number of elements that it has room for.
    """

    def __init__(self, like: torch.Tensor, size: int) -> None:
        self._tensor = torch.zeros(size, dtype=like.dtype, device=like.device)
        self._owners: list[int] = []  # the id of the parameter of each element so far

    def takes(self, count: int) -> bool:
        """Return True if there is room for more elements, to which this step may write."""
        is_writable = self._tensor.is_inference() == torch.is_inference_mode_enabled()
        return is_writable and len(self._owners) + count <= len(self._tensor)

    def places(self, owners: Sequence[int], tensors: Sequence[torch.Tensor]) -> list[int | None]:
        """Return the position of each tensor; None if it is no element, or another parameter's."""
        begin, size = self._tensor.data_ptr(), self._tensor.itemsize
        places: list[int | None] = []
        for owner, x in zip(owners, tensors):
            place = None
            if x._base is self._tensor and not x.is_neg():
                offset, rest = divmod(x.data_ptr() - begin, size)
                if rest == 0 and 0 <= offset < len(self._owners) and self._owners[offset] == owner:
                    place = offset
            places.append(place)
        return places

    def add(
        self, owners: list[int], tensors: list[torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Copy numbers into new elements; return the position of each, and its tensor."""
        if not all(map(is_plain, tensors)):
            tensors = list(map(local_part, tensors))
        if any(map(torch.Tensor.dim, tensors)):
            tensors = [x.reshape(()) for x in tensors]
        first = len(self._owners)
        part = self._tensor[first : first + len(tensors)]
        part.copy_(torch.stack(tensors).detach())
        self._owners += owners
        return zip(itertools.count(first), part.unbind())

    def at(self, places: Sequence[Any]) -> torch.Tensor | Elements:
        """Return the elements at some positions: as a vector if they are in order, without gaps."""
        if _is_range(places):
            return self._tensor[places[0] : places[0] + len(places)]
        return Elements(self._tensor, uploaded(np.array(places), self._tensor.device))


def _kind(key: str, x: torch.Tensor) -> tuple[str, torch.device, torch.dtype]:
    """Return the properties that the scalar states in one vector share."""
    return key, x.device, x.dtype


def _is_range(places: Sequence[Any]) -> bool:
    """Return True if positions follow each other."""
    return list(places) == list(range(places[0], places[0] + len(places)))


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
