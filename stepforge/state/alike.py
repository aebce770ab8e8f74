"""Tensors that are alike: what is checked or made for the first of them serves the others."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from stepforge.state.sharding import is_plain, is_sharded, local_part

__all__ = ["differences", "grouped", "layout_differences"]

_Member = TypeVar("_Member")

#: Read all that decides how a tensor of plain memory may be used. Each runs in C, and the first
#: reads much at once: thousands of tensors do not stay in a CPU's cache from one read to the next.
_READS: tuple[Callable[[Any], Hashable], ...] = (
    operator.attrgetter("dtype", "shape", "device"),
    torch.Tensor.stride,
    torch.Tensor.is_inference,
)
_layout = operator.attrgetter("layout")
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_STRIDED = frozenset({torch.strided})


def differences(
    read: Callable[[Any], Hashable], objects: Sequence[Any]
) -> Iterator[Sequence[Hashable]]:
    """Yield one number per object, equal for objects that read alike; nothing if all do.

    Args:
        read: reads an object.
        objects: the objects.
    """
    # Nothing is kept of each object where none differs: Python's garbage collector would look at
    # tuples of thousands of them again and again.
    distinct = set(map(read, objects))
    if len(distinct) > 1:
        numbers = {value: number for number, value in enumerate(distinct)}
        yield list(map(numbers.__getitem__, map(read, objects)))


def layout_differences(objects: Sequence[Any]) -> Iterator[Sequence[Hashable]]:
    """Yield :func:`differences` of objects that should be tensors, in all that tells them apart.

    Tensors of plain memory are alike if they have the same dtype, shape, strides and device, and
    are inference tensors or not. DTensors are alike if their local parts are, on the same mesh and
    with the same placements. Any other tensor is like itself only. Objects that are no tensors are
    alike if they have the same type.
    """
    if _PLAIN.issuperset(map(type, objects)) and _STRIDED.issuperset(map(_layout, objects)):
        for read in _READS:
            yield from differences(read, objects)
    else:
        yield from differences(_signature, objects)


def _signature(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return type(x)
    if is_sharded(x):
        return type(x), getattr(x, "_spec", id(x)), _signature(local_part(x))
    if not is_plain(x) or x.layout != torch.strided:
        return id(x)
    return tuple(read(x) for read in _READS)


def grouped(
    members: Sequence[_Member], told_apart: Iterable[Sequence[Hashable]]
) -> list[Sequence[_Member]]:
    """Return the members that nothing tells apart together, in the order of the first of each.

    Args:
        members: the members.
        told_apart: the :func:`differences` between them.
    """
    columns = list(told_apart)
    if not columns:
        return [members] if members else []
    found: dict[Hashable, list[_Member]] = {}
    for member, key in zip(members, zip(*columns)):
        found.setdefault(key, []).append(member)
    return list(found.values())
