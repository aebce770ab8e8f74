"""Variants of a kernel: for the tables that it steps, and for the GPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from stepforge.backends.spec import KernelSpec
from stepforge.formats import BLOCK as CHUNK

__all__ = [
    "AMPERE",
    "WIDEST",
    "Target",
    "Variant",
    "begins_rows_with_words",
    "elements_of_thread",
    "target_of",
    "units",
]

#: Bytes of the widest load or store; an address must be a multiple of them.
WIDEST = 16


@dataclass(frozen=True)
class Target:
    """The properties of a GPU that decide how a kernel is written, not what it computes.

    Attributes:
        lanes: the threads of a warp.
        root_takes_denormals: False if Triton's rounded root of a denormal is NaN, as on AMD: it is
            made from the reciprocal root, which takes a denormal for 0.
        rounds_bfloat16: True if an instruction rounds to bfloat16, to nearest, ties to even.
        has_fast_float64: True if float64 takes a few times as long as float32, not 32 or 64 times.
    """

    lanes: int = 32
    root_takes_denormals: bool = True
    rounds_bfloat16: bool = False
    has_fast_float64: bool = True

    @property
    def is_amd(self) -> bool:
        """True for a GPU of AMD."""
        return not self.root_takes_denormals


#: NVIDIA's GPUs from compute capability 8.0, which was called Ampere.
AMPERE = Target(rounds_bfloat16=True)


#: The compute capabilities of P100, V100, A100, H100 and H200, B200: NVIDIA's CUDA C++ Programming
#: Guide, throughput of arithmetic instructions. In all others float64 takes 32 or 64 times as long.
_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


def target_of(device: torch.device) -> Target:
    """Return the properties of a device; of a CPU those of the interpreter."""
    return _target_of(device.type, device.index)


@functools.cache
def _target_of(kind: str, index: int | None) -> Target:
    if kind != "cuda":
        return Target()
    if torch.version.hip:
        lanes = torch.cuda.get_device_properties(index).warp_size
        # Those for computing have warps of 64, all others of 32.
        return Target(lanes, root_takes_denormals=False, has_fast_float64=lanes == 64)
    capability = torch.cuda.get_device_capability(index)
    target = AMPERE if capability >= (8, 0) else Target()
    return replace(target, has_fast_float64=capability in _FAST_FLOAT64)


@dataclass(frozen=True)
class Variant:
    """A variant of a spec's kernel.

    Attributes:
        dims: the dimensions of a parameter's tensors for the kernel; 0 if all tensors of every
            parameter are dense in one order.
        unit: a number that divides the size of every parameter, or, if elements share scales, the
            length of every row of dimension 0. One of :func:`units`; 1 with dimensions.
        target: the GPU.
    """

    dims: int = 0
    unit: int = 1
    target: Target = Target()

    @classmethod
    def of(
        cls, spec: KernelSpec, dims: int, lengths: Iterable[int], device: torch.device
    ) -> Variant:
        """Return the variant for some parameters.

        Args:
            spec: the kernel's spec.
            dims: the dimensions of their tensors.
            lengths: the size of each, or the lengths of rows of dimension 0 if elements share
                scales.
            device: their device.
        """
        divisor = math.gcd(*lengths)  # 0 if all are empty, which everything divides
        unit = next(unit for unit in units(spec) if divisor % unit == 0)
        return cls(dims, 1 if dims else unit, target_of(device))


def begins_rows_with_words(spec: KernelSpec, shape: Sequence[int]) -> bool:
    """Return True if all rows of dimension 0 begin with a word of the widest accesses.

    Also where it makes no difference, as elements share no scales.
    """
    return not spec.in_blocks or math.prod(shape[1:]) % WIDEST == 0


def units(spec: KernelSpec) -> tuple[int, ...]:
    """Return the numbers of elements that make a difference to a kernel, the largest first.

    Chunks of elements that share a scale are whole, or can be read in the widest words. Otherwise,
    a number of elements of every tensor that fills such words.
    """
    if spec.in_blocks:
        return (CHUNK, WIDEST, 1)
    narrowest = min(spec.dtype_of[tensor].itemsize for tensor in spec.elements)
    return (WIDEST // narrowest, 1)


def elements_of_thread(spec: KernelSpec, variant: Variant) -> int:
    """Return the elements that a thread of a kernel steps.

    They are 8, two words of 16 bytes of float32. They are 4 in float64, whose numbers take two
    registers; where a word of one column has 4 elements and of another 8, which would be passed on
    through shared memory; and on AMD, whose compiler makes wide accesses only then.
    """
    sizes = {spec.dtype_of[tensor].itemsize for tensor in spec.elements}
    is_mixed = len(sizes) > 1 and max(sizes) >= 4 and not spec.in_blocks
    return 4 if is_mixed or variant.target.is_amd or spec.arithmetic == torch.float64 else 8
