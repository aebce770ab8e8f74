"""The layout of a parameter's state: its keys, shapes, dtypes and formats."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stepforge.formats import (
    BLOCK,
    BLOCK_FORMATS,
    Format,
    Part,
    split_weight,
    stochastic,
    tensor_name,
)
from stepforge.ops import scalar_dtype
from stepforge.rule import Rule, State
from stepforge.state.sharding import is_cut_within_rows

__all__ = [
    "HALF_DTYPES",
    "LOW_BITS",
    "StateLayout",
    "StateTensor",
    "block_format_of",
    "block_formats",
    "dtypes_after_step",
    "format_keys",
    "holds_all_bits",
    "is_flat",
    "scalar_device",
    "scalar_state_dtype",
    "state_layout",
]

#: Parameters with fewer elements keep full states: together they take little memory, and a small
#: error hurts them most.
MIN_ELEMENTS = 4096
#: Shorter rows of dimension 0 would need a scale for every few elements.
MIN_ROW = BLOCK // 2

_STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: The dtypes of weights that can be split or rounded at random.
HALF_DTYPES = (torch.bfloat16, torch.float16)
#: The keys of a weight's low bits in a parameter's state, with their dtypes.
LOW_BITS = {
    part.key(): part.dtype
    for width in (24, 32)
    for part in split_weight(torch.bfloat16, width).parts
    if part.name
}


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a parameter's state, with one value per element or per block.

    Attributes:
        key: its key in ``optimizer.state[p]``.
        column: the letter of the state it belongs to; ``p`` for low bits of the parameter.
        part: its part of that state's format.
        shape: its shape.
    """

    key: str
    column: str
    part: Part
    shape: tuple[int, ...]

    @functools.cached_property
    def name(self) -> str:
        """Its name among all tensors of a step."""
        return tensor_name(self.column, self.part)


@dataclass(frozen=True, eq=False)
class StateLayout:
    """The layout of a parameter's state.

    Attributes:
        states: the declarations of its states, by letter.
        scalars: the keys of its scalar states, ``step`` first.
        tensors: its tensors, those of a column together.
        formats: the format of each column that has one; columns are ``p`` and the states' letters.
        dtypes: the dtype of each tensor of a step but the gradient, by name.
        keeps_longer_dtypes: True if a state in a longer dtype than this layout's stays in it, as in
            torch.optim after a parameter has changed its dtype.
        unmet: for each option that has no effect on this parameter, the reason.
    """

    states: Mapping[str, State]
    scalars: tuple[str, ...]
    tensors: tuple[StateTensor, ...]
    formats: Mapping[str, Format]
    dtypes: Mapping[str, torch.dtype]
    keeps_longer_dtypes: bool
    unmet: Mapping[str, str]

    @functools.cached_property
    def keys(self) -> tuple[str, ...]:
        """The keys of the parameter's state."""
        return (*self.scalars, *(tensor.key for tensor in self.tensors))

    @functools.cached_property
    def _tensor_dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(tensor.part.dtype for tensor in self.tensors)

    def is_complete(self, param_state: Mapping[str, Any]) -> bool:
        """Return True if a parameter's state has all keys, in exactly these dtypes."""
        found: list[Any] = list(map(param_state.get, self.keys))
        if any(x is None for x in found):
            return False
        return tuple(x.dtype for x in found[len(self.scalars) :]) == self._tensor_dtypes

    @functools.cached_property
    def columns(self) -> tuple[tuple[str, Format | None, list[StateTensor]], ...]:
        """Each column with its format and its tensors in the state."""
        return tuple(
            (column, self.formats.get(column), [x for x in self.tensors if x.column == column])
            for column in dict.fromkeys(tensor.column for tensor in self.tensors)
        )

    def columns_to_change(
        self, param_state: Mapping[str, Any]
    ) -> Iterator[tuple[str, Format | None, list[StateTensor]]]:
        """Yield the columns that a state lacks a tensor of, or has in another format."""
        for column, format_, tensors in self.columns:
            found = [param_state.get(tensor.key) for tensor in tensors]
            if format_ is None and self.keeps_longer_dtypes and found[0] is not None:
                is_right = _holds(found[0].dtype, tensors[0].part.dtype)
            else:
                is_right = all(
                    x is not None and x.dtype == tensor.part.dtype
                    for x, tensor in zip(found, tensors)
                )
            if not is_right:
                yield column, format_, tensors

    @functools.cached_property
    def keys_of_other_formats(self) -> set[str]:
        """The keys that a state has in other formats only."""
        keys = set(LOW_BITS)
        for state in self.states.values():
            keys |= {state.key}.union(*(format_keys(state, x) for x in block_formats(state)))
        return keys - set(self.keys)


def state_layout(rule: Rule, group: Mapping[str, Any], p: torch.Tensor) -> StateLayout:
    """Return the layout of a parameter's state under the options of its param group."""
    states = tuple((letter, s) for letter, s in rule.states.items() if s.on(group))
    options = group["state_format"], group["master_weight_bits"], group["stochastic_rounding"]
    return _layout(states, *options, p.dtype, tuple(p.shape), _why_blocks_are_cut(p))


@functools.lru_cache(maxsize=4096)
def _layout(
    states: tuple[tuple[str, State], ...],
    state_format: str | None,
    master_weight_bits: int | None,
    stochastic_rounding: bool,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    why_cut: str | None,
) -> StateLayout:
    formats: dict[str, Format] = {}
    unmet = {"state_format": _why_in_full(state_format, dtype, shape, why_cut)}
    if master_weight_bits:
        unmet["master_weight_bits"] = _why_left_alone(dtype, "has them already")
    if stochastic_rounding:
        unmet["stochastic_rounding"] = _why_left_alone(dtype, "is stored as it is computed")
    tensors = []
    for letter, state in states:
        if state.scalar:
            continue
        plain = _plain_dtype(dtype, state_format)
        if state_format and state_format in BLOCK_FORMATS and unmet["state_format"] is None:
            formats[letter] = BLOCK_FORMATS[state_format](state.unsigned)
        elif plain == torch.bfloat16 and state_format and state.unsigned:
            formats[letter] = stochastic(plain)
        parts = formats[letter].parts if letter in formats else (Part("", plain),)
        tensors += [StateTensor(x.key(state.key), letter, x, x.shape(shape)) for x in parts]
    if dtype in HALF_DTYPES and master_weight_bits:
        formats["p"] = split_weight(dtype, master_weight_bits)
        tensors += [StateTensor(x.key(), "p", x, shape) for x in formats["p"].parts if x.name]
    elif dtype in HALF_DTYPES and stochastic_rounding:
        formats["p"] = stochastic(dtype)
    return StateLayout(
        states=dict(states),
        scalars=("step", *(state.key for _, state in states if state.scalar)),
        tensors=tuple(tensors),
        formats=formats,
        dtypes={"p": dtype, **{tensor.name: tensor.part.dtype for tensor in tensors}},
        keeps_longer_dtypes=state_format is None,
        unmet={option: reason for option, reason in unmet.items() if reason is not None},
    )


def dtypes_after_step(
    layout: StateLayout, group: Mapping[str, Any], param_state: Mapping[str, Any]
) -> dict[str, torch.dtype]:
    """Return the dtypes of a parameter's state after its next step, by key.

    Args:
        layout: the layout of the state.
        group: the options of the parameter's group.
        param_state: the state as it is; empty before the first step.
    """
    changing = {column for column, _, _ in layout.columns_to_change(param_state)}
    scalars = {
        key: param_state[key].dtype if key in param_state else scalar_state_dtype(group)
        for key in layout.scalars
    }
    return scalars | {
        x.key: x.part.dtype if x.column in changing else param_state[x.key].dtype
        for x in layout.tensors
    }


def scalar_state_dtype(group: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype of new scalar states; float32 where a fused kernel reads them."""
    return torch.float32 if group["fused"] else scalar_dtype()


def scalar_device(p: torch.Tensor, group: Mapping[str, Any]) -> torch.device:
    """Return the device of scalar states; the parameter's for a fused kernel or a CUDA graph."""
    return p.device if group["capturable"] or group["fused"] else torch.device("cpu")


@functools.cache
def block_formats(state: State) -> tuple[Format, ...]:
    """Return the formats in blocks that a state may have; none for a scalar state."""
    if state.scalar:
        return ()
    # Two options may share the format of one kind of states.
    return tuple(dict.fromkeys(make(state.unsigned) for make in BLOCK_FORMATS.values()))


@functools.cache
def format_keys(state: State, format_: Format) -> tuple[str, ...]:
    """Return the keys of a state in a format: of its codes, then of its scales."""
    return tuple(part.key(state.key) for part in format_.parts)


def block_format_of(state: State, param_state: Mapping[str, Any]) -> Format | None:
    """Return the format in blocks that a state is in; None if it has plain numbers, or is absent.

    Plain numbers win over codes that are left over.
    """
    if state.key in param_state:
        return None
    formats = block_formats(state)
    return next((x for x in formats if format_keys(state, x)[0] in param_state), None)


def is_flat(p: torch.Tensor) -> bool:
    """Return True for a flat vector of FSDP1, and for a parameter that is a view of one."""
    return getattr(p, "_fsdp_flattened", False)


def holds_all_bits(dtype: torch.dtype) -> bool:
    """Return True if weights of a dtype hold all bits that a step computes."""
    return (dtype.to_real() if dtype.is_complex else dtype) in (torch.float32, torch.float64)


def _plain_dtype(dtype: torch.dtype, state_format: str | None) -> torch.dtype:
    """Return the dtype of states that are plain tensors."""
    if state_format is None or dtype.is_complex:
        return dtype
    if state_format in BLOCK_FORMATS:  # of the states that are not stored in blocks
        return torch.float32 if dtype in HALF_DTYPES else dtype
    return _STATE_DTYPES[state_format]


def _why_blocks_are_cut(p: torch.Tensor) -> str | None:
    """Name the sharding that cuts a parameter's rows of dimension 0; None for any other."""
    if p.dim() == 1 and is_flat(p):
        return "a flat vector of FullyShardedDataParallel, which has no rows"
    if is_cut_within_rows(p):
        return "sharded along another dimension than 0, where shards would cut blocks"
    return None


def _why_in_full(
    state_format: str | None, dtype: torch.dtype, shape: tuple[int, ...], why_cut: str | None
) -> str | None:
    """Say why the states of a parameter are not in that format; None if they are."""
    if dtype.is_complex and state_format in BLOCK_FORMATS:
        return "complex numbers have no codes of 8 bits"
    if dtype.is_complex and state_format and _STATE_DTYPES[state_format] != dtype.to_real():
        return f"states of {_name(dtype)} parameters keep their dtype"
    if state_format not in BLOCK_FORMATS:
        return None
    if why_cut:
        return why_cut
    if math.prod(shape) < MIN_ELEMENTS:
        return f"fewer than {MIN_ELEMENTS:,} elements"
    if math.prod(shape[1:]) < MIN_ROW:
        return f"fewer than {MIN_ROW} elements in a row of dimension 0"
    return None


def _why_left_alone(dtype: torch.dtype, reason: str) -> str | None:
    """Say why weights of a dtype are neither split nor rounded at random; None if they may be.

    Args:
        dtype: the dtype.
        reason: the answer for a dtype that holds all bits of the arithmetic.
    """
    if dtype in HALF_DTYPES:
        return None
    return (
        f"{_name(dtype)} {reason if holds_all_bits(dtype) else 'is neither bfloat16 nor float16'}"
    )


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Return True if ``dtype`` holds all values of ``other``, or only one of them is complex."""
    return (
        dtype == other
        or dtype.is_complex != other.is_complex
        or torch.promote_types(dtype, other) == dtype
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
