"""The Triton types of each dtype, and the conversions between memory and arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stepforge.backends.triton.variant import Target

__all__ = ["BFLOAT16_FUNCTIONS", "STORABLE", "TritonType", "triton_type"]


@dataclass(frozen=True)
class TritonType:
    """The Triton types of a dtype.

    Attributes:
        memory: the type of an element in memory.
        read: the expression that converts a loaded element to the arithmetic.
        write: the expression that converts a number to an element.
    """

    memory: str
    read: str = "{0}.to({number})"
    write: str = "{0}.to({memory})"


#: The types of parameters, gradients and states without a format. 16-bit dtypes are rounded to
#: float32 first, as in torch. bfloat16 is handled as bits, since only NVIDIA's GPUs since 8.0 have
#: an instruction that rounds it so.
STORABLE: dict[torch.dtype, TritonType] = {
    torch.float32: TritonType("tl.float32"),
    torch.float64: TritonType("tl.float64"),
    torch.bfloat16: TritonType(
        "tl.uint16", "from_bfloat16({0}).to({number})", "to_bfloat16({0}.to(tl.float32))"
    ),
    torch.float16: TritonType("tl.float16", write="{0}.to(tl.float32).to({memory})"),
}
#: bfloat16 where an instruction rounds it to nearest, ties to even.
_ROUNDED_BFLOAT16 = TritonType("tl.bfloat16", write="{0}.to(tl.float32).to({memory})")
#: The types of every dtype. Integers are read as uint32.
_TRITON_TYPES: dict[torch.dtype, TritonType] = STORABLE | {
    torch.uint8: TritonType("tl.uint8", "{0}.to(tl.uint32)"),
    torch.int8: TritonType("tl.int8", "{0}.to(tl.int32).to(tl.uint32, bitcast=True)"),
    torch.int16: TritonType("tl.int16", "{0}.to(tl.int32).to(tl.uint32, bitcast=True)"),
}


def triton_type(dtype: torch.dtype, target: Target) -> TritonType:
    """Return the Triton types of a dtype on a GPU."""
    if dtype == torch.bfloat16 and target.rounds_bfloat16:
        return _ROUNDED_BFLOAT16
    return _TRITON_TYPES[dtype]


BFLOAT16_FUNCTIONS = '''\
@triton.jit
def from_bfloat16(bits):
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def to_bfloat16(x):
    """To nearest, ties to even; NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)


'''
