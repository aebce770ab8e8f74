"""The memory layout that the tensors of a parameter have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

#: Dimensions, the outermost first: the length of each, and the stride of each tensor, in elements.
Dimensions: TypeAlias = list[tuple[int, tuple[int, ...]]]


def dimensions(tensors: Sequence[torch.Tensor], *, in_order: bool = False) -> Dimensions:
    """Return the fewest dimensions that describe tensors of one shape.

    Args:
        tensors: the tensors.
        in_order: True if the elements must have the order of a contiguous tensor.

    Returns:
        No dimensions if every tensor has its elements in the same such order without gaps.

    Example:
        >>> x = torch.zeros(2, 3, 4)
        >>> dimensions([x, x])
        []
        >>> dimensions([x, torch.zeros(3, 2, 4).transpose(0, 1)])
        [(2, (12, 4)), (3, (4, 8)), (4, (1, 1))]
        >>> dimensions([x.transpose(0, 2)])
        []
        >>> dimensions([x.transpose(0, 2)], in_order=True)
        [(4, (1,)), (3, (4,)), (2, (12,))]
    """
    if all(x.is_contiguous() for x in tensors) or not tensors[0].numel():
        return []
    dims: Dimensions = list(zip(tensors[0].shape, zip(*(x.stride() for x in tensors))))
    found: Dimensions = []
    for length, steps in dims if in_order else sorted(dims, key=lambda d: d[1], reverse=True):
        if length == 1:
            continue
        if found and all(outer == length * inner for outer, inner in zip(found[-1][1], steps)):
            found[-1] = (found[-1][0] * length, steps)
        else:
            found.append((length, steps))
    is_dense = len(found) < 2 and all(step == 1 for _, steps in found for step in steps)
    return [] if is_dense else found


def may_overlap(tensor: torch.Tensor) -> bool:
    """Return True if two elements of a tensor may share memory."""
    reach = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape)):
        if length > 1 and stride < reach:
            return tensor.numel() > 0
        reach += stride * (length - 1)
    return False
