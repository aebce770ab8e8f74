"""A storage format: its tensors, and the programs that decode and encode them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stepforge.expr import REDUCTIONS, Trace
from stepforge.ops import VOCABULARY, f32_to_i32
from stepforge.program import Program, evaluate, reachable

__all__ = ["BLOCK", "Format", "Part", "tensor_name", "tensor_names", "traced", "traced_scale"]

#: Elements that share a scale. Blocks restart at every row of dimension 0, so sharding along
#: dimension 0 cuts between blocks.
BLOCK = 128


@dataclass(frozen=True)
class Part:
    """One tensor of a format.

    Attributes:
        name: ``""`` for the tensor that stands for the state or parameter itself; for the others,
            the suffix of their name.
        dtype: its dtype. Integers are read as uint32, negative ones in two's complement.
        of_block: True for one element per block, False for one per element.
        suffix: the end of its key in ``optimizer.state[p]``. A key without a suffix holds plain
            numbers; a key with a suffix always has this dtype.
    """

    name: str
    dtype: torch.dtype
    of_block: bool = False
    suffix: str = ""

    def shape(self, of: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Return the part's shape for a parameter of shape ``of``.

        Example:
            >>> Part("scale", torch.float32, of_block=True).shape((3, 200))
            (3, 2)
        """
        return (of[0], -(-math.prod(of[1:]) // BLOCK)) if self.of_block else tuple(of)

    def key(self, state: str = "") -> str:
        """Return the part's key in ``optimizer.state[p]``.

        Args:
            state: the key of its state; ``""`` for a part of the parameter.

        Example:
            >>> Part("scale", torch.float32, of_block=True, suffix="scale").key("exp_avg")
            'exp_avg_scale'
        """
        return "_".join(filter(None, (state, self.suffix)))


@dataclass(frozen=True, eq=False)
class Format:
    """A storage format. All its arithmetic is in float32 and uint32.

    Attributes:
        name: for people.
        parts: its tensors; the first one is named ``""``.
        decode: from the parts (``stored`` for the first) to a float32.
        encode: from ``x``, ``scale`` if there are blocks, and ``random``, a uint32, if rounding is
            random, to the parts with one element per element.
        magnitude: from ``x`` to uint32, of which the largest in a block is found. None without
            blocks.
        scale: the scale of a block, given the largest. None without blocks.
        has_infinity: False if no stored value decodes to an infinity. Kernels then skip ``finite``
            on what they have just decoded.
    """

    name: str
    parts: tuple[Part, ...]
    decode: Program
    encode: Program
    magnitude: Program | None = None
    scale: Program | None = None
    has_infinity: bool = True

    @property
    def in_blocks(self) -> bool:
        """True if elements share scales."""
        return self.magnitude is not None

    @property
    def elements(self) -> tuple[Part, ...]:
        """The parts with one element per element: all but the scales."""
        return tuple(part for part in self.parts if not part.of_block)

    @property
    def is_random(self) -> bool:
        """True if rounding takes random bits."""
        return "random" in self.encode.inputs

    def read(
        self, parts: Mapping[str, torch.Tensor], blocks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Decode tensors.

        Args:
            parts: each part, by name.
            blocks: the block of each element of a row, if only a slice of each row is given; None
                for whole rows.

        Returns:
            A new float32 tensor, of the shape of the first part.
        """
        inputs: dict[str, torch.Tensor] = {}
        for part in self.parts:
            tensor = parts[part.name]
            if part.of_block:
                inputs[part.name] = _per_element(tensor, parts[""].shape, blocks)
            else:
                is_integer = not part.dtype.is_floating_point
                inputs[part.name or "stored"] = f32_to_i32(tensor) if is_integer else tensor.float()
        x: torch.Tensor = evaluate(self.decode, inputs, (), VOCABULARY)[0]
        return x.clone() if self.decode.may_alias(self.decode.outputs[0]) else x

    def write(
        self,
        parts: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        random: torch.Tensor | None = None,
    ) -> None:
        """Encode a tensor in place.

        Args:
            parts: each part, by name; written to.
            x: the numbers to store, float32 or float64.
            random: one uint32 per element, from :func:`~stepforge.formats.random_uint32`, if
                rounding is random; None rounds to nearest.
        """
        if random is None:
            random = torch.full((), 1 << 31, dtype=torch.int64, device=x.device)
        inputs: dict[str, Any] = {"x": x.float()}
        if self.magnitude is not None and self.scale is not None:
            (magnitudes,) = evaluate(self.magnitude, inputs, (), VOCABULARY)
            (scales,) = evaluate(self.scale, {}, [_block_maxima(magnitudes)], VOCABULARY)
            parts["scale"].copy_(scales)
            inputs["scale"] = _per_element(scales, x.shape)
        encoded = evaluate(self.encode, inputs | {"random": random}, (), VOCABULARY)
        for part, value in zip(self.elements, encoded):
            # torch's narrowing of integers wraps around, as uint32 does.
            parts[part.name].copy_(value.to(part.dtype))


def traced(function: Callable[..., Any], *inputs: str) -> Program:
    """Trace a function of symbols into a program.

    Args:
        function: takes one symbol per input.
        inputs: their names. A name that ends in ``_u32`` is a uint32, and loses that ending.
    """
    trace = Trace()
    symbols = [
        trace.input(name.removesuffix("_u32"), varying=True, uint32=name.endswith("_u32"))
        for name in inputs
    ]
    results = function(*symbols)
    return Program.of(list(results) if isinstance(results, tuple) else [results])


def traced_scale(function: Callable[..., Any]) -> tuple[Program, Program]:
    """Trace the scale of a block: a function of its numbers, with one reduction over the block.

    Args:
        function: takes one symbol, the numbers.

    Returns:
        The programs :attr:`Format.magnitude` and :attr:`Format.scale`.
    """
    trace = Trace()
    scale = function(trace.input("x", varying=True))
    (reduction,) = (node for node in reachable([scale]) if node.op in REDUCTIONS)
    return Program.of(reduction.args), Program.of([scale], given=[reduction])


def tensor_name(column: str, part: Part) -> str:
    """Return the name of a part among all tensors of a step.

    Example:
        >>> tensor_name("m", Part("scale", torch.float32))
        'm.scale'
    """
    return f"{column}.{part.name}" if part.name else column


def tensor_names(column: str, formats: Mapping[str, Format]) -> list[str]:
    """Return the names of all tensors that store a column."""
    if column not in formats:
        return [column]
    return [tensor_name(column, part) for part in formats[column].parts]


def _block_maxima(magnitudes: torch.Tensor) -> torch.Tensor:
    """Return the maximum of each block, of shape (rows, blocks)."""
    rows = magnitudes.reshape(magnitudes.shape[0], math.prod(magnitudes.shape[1:]))
    missing = -rows.shape[1] % BLOCK
    padded = torch.nn.functional.pad(rows, (0, missing))
    blocks = padded.view(len(rows), padded.shape[1] // BLOCK, BLOCK)
    return blocks.amax(2) if blocks.numel() else blocks.new_zeros(blocks.shape[:2])


def _per_element(
    scales: torch.Tensor, shape: torch.Size, blocks: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the scale of each element."""
    if blocks is not None:
        return scales[:, blocks].reshape(shape)
    each = scales.repeat_interleave(BLOCK, dim=1)
    return each[:, : math.prod(shape[1:])].reshape(shape)
