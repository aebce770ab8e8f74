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

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

from stepforge.formats.format import BLOCK, Format, Part, tensor_name, tensor_names
from stepforge.formats.int8 import int8_blocks
from stepforge.formats.random import (
    DRAW,
    STEP_SEED,
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
    "BLOCK_FORMATS",
    "DRAW",
    "STEP_SEED",
    "Format",
    "Part",
    "StateFormat",
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

#: The values of the option ``state_format``, besides None.
StateFormat: TypeAlias = Literal["float32", "bfloat16", "int8"]

#: The formats of states in blocks, by value of ``state_format``. Each is made for states that are
#: never below 0 (True) or of either sign (False). Their parts are codes and ``scale``.
BLOCK_FORMATS: Mapping[str, Callable[[bool], Format]] = {"int8": int8_blocks}
