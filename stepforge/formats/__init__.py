"""Storage formats: tensors in fewer bits than a step computes with.

A format is written once, as ``decode`` and ``encode`` in the vocabulary of rules, on float32 and
uint32. Both are traced into programs. The reference runs the programs on tensors; kernels run them
between memory and registers, so no float32 copy of a state ever exists.

* :func:`int8_blocks`: one byte per element, and one scale per block of elements.
* :func:`split_weight`: a 16-bit weight, and its low bits in a state.
* :func:`stochastic`: 16 bits, rounded up or down at random so that the mean is right.

Random bits are a hash of (seed, step, parameter) and the element index. So they do not depend on
the backend, the number of threads, or sharding between rows.
"""

from stepforge.formats.format import BLOCK, Format, Part, tensor_name, tensor_names
from stepforge.formats.int8 import int8_blocks
from stepforge.formats.random import (
    DRAW,
    hash32,
    param_seed,
    random_uint32,
    result_salt,
    step_seed,
)
from stepforge.formats.split_weight import split_weight
from stepforge.formats.stochastic import stochastic

__all__ = [
    "BLOCK",
    "DRAW",
    "Format",
    "Part",
    "hash32",
    "int8_blocks",
    "param_seed",
    "random_uint32",
    "result_salt",
    "split_weight",
    "step_seed",
    "stochastic",
    "tensor_name",
    "tensor_names",
]
