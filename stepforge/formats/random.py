"""Random bits: a hash of (seed, step, parameter) and the element index."""

from __future__ import annotations

import math
from typing import Any

import torch

from stepforge.formats.float_bits import UINT32_MAX
from stepforge.formats.format import traced
from stepforge.ops import UInt32

__all__ = ["DRAW", "STEP_SEED", "hash32", "param_seed", "random_uint32", "result_salt", "step_seed"]


def hash32(w: UInt32) -> UInt32:
    """Hash a uint32 to a uint32, one to one; every output bit depends on every input bit.

    Two rounds of a multiplication between shifts. The constants are from Chris Wellons's search
    for the smallest bias, "Prospecting for Hash Functions" (2018), ``lowbias32``.

    Args:
        w: a symbol, or int64 numbers from 0 up and below 2**32.

    Example:
        >>> [hash32(1), hash32(2)]
        [1753845952, 3507691905]
    """
    w = (w ^ (w >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    w = (w ^ (w >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return w ^ (w >> 16)


def param_seed(seed: Any, index: Any) -> Any:
    """Return the seed of a parameter, constant over steps.

    Args:
        seed: the seed of the run, from 0 up and below 2**32.
        index: of the parameter in the optimizer. Both may be arrays or tensors of int64.

    Example:
        >>> param_seed(0, 1) != param_seed(1, 0)
        True
    """
    return hash32(hash32(seed) ^ index)


def step_seed(seed: Any, step: Any) -> Any:
    """Return the seed of a parameter in one step.

    Args:
        seed: the parameter's, from :func:`param_seed`.
        step: the number of the step, below 2**31. Both may be arrays or tensors of int64.

    Example:
        >>> step_seed(param_seed(0, 0), step=1) != step_seed(param_seed(0, 0), step=2)
        True
    """
    return hash32(seed ^ step)


#: The program of :func:`step_seed`: from ``seed`` and ``step`` to a uint32.
STEP_SEED = traced(step_seed, "seed_u32", "step_u32")


def result_salt(position: int) -> int:
    """Return the number to add to a step seed, so that each result of a step has its own bits.

    Example:
        >>> result_salt(0), result_salt(1)
        (0, 2246822507)
    """
    return position * 0x85EBCA6B & UINT32_MAX


def _draw(index: UInt32, key: UInt32) -> UInt32:
    """Return a uint32 per element, evenly spread over neighbours and new in every step.

    Multiples of the golden ratio's fraction fill the range as evenly as possible. The key shifts
    all of them by the same random amount. So each element's draw is uniform, and the mean over
    many elements has a smaller error than independent draws would give.

    It is a sum, so elements may be counted from any other: the draw at the start is their key.
    """
    return (index * 0x9E3779B9 + key) & 0xFFFFFFFF


#: The program of a draw: from ``index`` and ``key`` to a uint32.
DRAW = traced(_draw, "index_u32", "key_u32")


def random_uint32(shape: torch.Size, start: int, key: Any, device: torch.device) -> torch.Tensor:
    """Return a random uint32, as int64, for each element of a tensor.

    Args:
        shape: the shape of the tensor.
        start: the index of its first element; not 0 for a slice of a larger tensor.
        key: the step seed, with the salt of the result added: an int, or a tensor of one int64.
        device: the device of the result.
    """
    index = torch.arange(math.prod(shape), device=device).view(shape)
    drawn: torch.Tensor = _draw((index + start) & UINT32_MAX, key)
    return drawn
