"""The entry of a parameter in ``optimizer.state``: what it holds, in which format, and at first."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stepforge.declare import Rule, State
from stepforge.formats import BLOCK, Format, Part, Storage, codes, joined, rounded, tensor_name
from stepforge.ops import scalar_dtype
from stepforge.sharding import local

__all__ = [
    "LOW_BITS",
    "SHORT",
    "Kept",
    "Slot",
    "adopted",
    "code_keys",
    "completed",
    "converted",
    "decoded",
    "dtypes",
    "first_index",
    "initial_state",
    "is_flat",
    "is_in_full",
    "joined_weight",
    "kept",
    "local",
    "mismatch",
    "placed",
    "space",
    "without_cut_codes",
]

#: Parameters with fewer elements keep their states in full: all of them together are little, and
#: among them are those that a small error hurts most.
SMALLEST = 4096
#: Rows of dimension 0 that are shorter would need a scale for each few elements.
SHORTEST = BLOCK // 2

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: The dtypes of weights that can be joined with more bits or rounded at random.
SHORT = (torch.bfloat16, torch.float16)
#: The keys under which an entry may have the lower bits of its weight, with their dtypes.
LOW_BITS = {
    part.key(): part.dtype
    for width in (24, 32)
    for part in joined(torch.bfloat16, width).parts
    if part.name
}


@dataclass(frozen=True)
class Slot:
    """One tensor of an entry, which has its elements for those of the parameter.

    Attributes:
        key: its key in the entry.
        column: the letter of the state it belongs to; ``p`` for the parameter itself.
        part: which part of that it is.
        shape: its shape.
    """

    key: str
    column: str
    part: Part
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """What it is called among all tensors of a step."""
        return tensor_name(self.column, self.part)


@dataclass(frozen=True, eq=False)
class Kept:
    """What the entry of a parameter holds.

    Attributes:
        states: the declarations of its states by their letters.
        scalars: the keys of its numbers, that of the step first.
        slots: its tensors, those of a column one after the other.
        storage: how they and the parameter are stored.
        as_found: whether states in a longer dtype than theirs stay in it, as torch.optim's do when
            their parameter has changed its own.
        unmet: for each option that asks of the parameter what it does not get, the reason.
    """

    states: Mapping[str, State]
    scalars: tuple[str, ...]
    slots: tuple[Slot, ...]
    storage: Storage
    as_found: bool
    unmet: Mapping[str, str]

    @functools.cached_property
    def keys(self) -> tuple[str, ...]:
        """All keys of the entry."""
        return (*self.scalars, *(slot.key for slot in self.slots))

    @functools.cached_property
    def _dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(slot.part.dtype for slot in self.slots)

    def is_whole(self, entry: Mapping[str, Any]) -> bool:
        """Whether an entry has all that it should hold, in just the dtypes in which it should."""
        found: list[Any] = list(map(entry.get, self.keys))
        if any(x is None for x in found):
            return False
        return tuple(x.dtype for x in found[len(self.scalars) :]) == self._dtypes

    def columns(self) -> Iterator[tuple[str, Format | None, list[Slot]]]:
        """The letter of each column with its format and its tensors in the entry."""
        for column in dict.fromkeys(slot.column for slot in self.slots):
            slots = [slot for slot in self.slots if slot.column == column]
            yield column, self.storage.formats.get(column), slots


def kept(rule: Rule, group: Mapping[str, Any], p: torch.Tensor) -> Kept:
    """What the entry of a parameter holds under its group's options."""
    states = tuple((letter, s) for letter, s in rule.states.items() if s.on(group))
    options = group["state_format"], group["master_weight_bits"], group["stochastic_rounding"]
    return _kept(states, *options, p.dtype, tuple(p.shape), _why_cut(p))


@functools.lru_cache(maxsize=4096)
def _kept(
    states: tuple[tuple[str, State], ...],
    state_format: str | None,
    master_weight_bits: int | None,
    stochastic_rounding: bool,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    cut: str | None,
) -> Kept:
    formats: dict[str, Format] = {}
    unmet = {"state_format": _why_not(state_format, dtype, shape, cut)}
    if master_weight_bits:
        unmet["master_weight_bits"] = _why_left_alone(dtype, "has them already")
    if stochastic_rounding:
        unmet["stochastic_rounding"] = _why_left_alone(dtype, "is stored as it is computed")
    slots = []
    for letter, state in states:
        if state.scalar:
            continue
        plain = _full_dtype(dtype, state_format)
        if state_format == "int8" and unmet["state_format"] is None:
            formats[letter] = codes(state.unsigned)
        elif plain == torch.bfloat16 and state_format and state.unsigned:
            formats[letter] = rounded(plain)
        parts = formats[letter].parts if letter in formats else (Part("", plain),)
        slots += [Slot(x.key(state.key), letter, x, x.shape(shape)) for x in parts]
    if dtype in SHORT and master_weight_bits:
        formats["p"] = joined(dtype, master_weight_bits)
        slots += [Slot(x.key(), "p", x, shape) for x in formats["p"].parts if x.name]
    elif dtype in SHORT and stochastic_rounding:
        formats["p"] = rounded(dtype)
    return Kept(
        dict(states),
        ("step", *(state.key for _, state in states if state.scalar)),
        tuple(slots),
        Storage(formats, {"p": dtype, **{slot.name: slot.part.dtype for slot in slots}}),
        state_format is None,
        {option: reason for option, reason in unmet.items() if reason is not None},
    )


def _full_dtype(dtype: torch.dtype, state_format: str | None) -> torch.dtype:
    """The dtype of states that are plain tensors."""
    if state_format is None or dtype.is_complex:
        return dtype
    if state_format == "int8":  # of those that have no codes
        return torch.float32 if dtype in SHORT else dtype
    return _DTYPES[state_format]


def _why_cut(p: torch.Tensor) -> str | None:
    """Name the sharding of a parameter that cuts rows of dimension 0; None for any other."""
    if p.dim() == 1 and is_flat(p):
        return "a flat vector of FullyShardedDataParallel, which has no rows"
    if _is_cut(p):
        return "sharded along another dimension than 0, where shards would cut blocks"
    return None


def _is_cut(p: torch.Tensor) -> bool:
    """Return True for a parameter that is sharded along another dimension than 0."""
    placements = getattr(p, "placements", ())
    return any(not x.is_replicate() and getattr(x, "dim", None) != 0 for x in placements)


def is_flat(p: torch.Tensor) -> bool:
    """Return True for a flat vector of FSDP1, and for a view of one that stands for a parameter."""
    return getattr(p, "_fsdp_flattened", False)


def _why_not(
    state_format: str | None, dtype: torch.dtype, shape: tuple[int, ...], cut: str | None
) -> str | None:
    """Say why the states of a parameter are not in that format; None if they are."""
    if dtype.is_complex and state_format == "int8":
        return "complex numbers have no codes of 8 bits"
    if dtype.is_complex and state_format and _DTYPES[state_format] != dtype.to_real():
        return f"states of {_name(dtype)} parameters keep their dtype"
    if state_format != "int8":
        return None
    if cut:
        return cut
    if math.prod(shape) < SMALLEST:
        return f"fewer than {SMALLEST:,} elements"
    if math.prod(shape[1:]) < SHORTEST:
        return f"fewer than {SHORTEST} elements in a row of dimension 0"
    return None


def _why_left_alone(dtype: torch.dtype, in_full: str) -> str | None:
    """Say why weights of a dtype take no more bits and no random rounding; None if they do.

    Args:
        dtype: the dtype.
        in_full: what to say of one that loses no bits of the arithmetic.
    """
    if dtype in SHORT:
        return None
    return f"{_name(dtype)} {in_full if is_in_full(dtype) else 'is neither bfloat16 nor float16'}"


def is_in_full(dtype: torch.dtype) -> bool:
    """Return True if weights of a dtype hold all bits that a step computes."""
    return (dtype.to_real() if dtype.is_complex else dtype) in (torch.float32, torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def initial_state(rule: Rule, p: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a parameter before its first step."""
    return completed(kept(rule, group, p), p, group, {})


def completed(
    what: Kept, p: torch.Tensor, group: Mapping[str, Any], entry: dict[str, Any]
) -> dict[str, Any]:
    """An entry with all that it should hold, in the formats in which it should.

    Args:
        what: what it should hold.
        p: the parameter.
        group: the options of its param group.
        entry: what there is. It is not changed.

    Returns:
        The entry itself if nothing was missing, otherwise a new one.

    Raises:
        RuntimeError: what is in another format has another shape than the parameter.
    """
    if what.is_whole(entry) or (
        all(key in entry for key in what.scalars) and not list(_columns_to_change(what, entry))
    ):
        return entry
    new = converted(what, p, entry)
    states = {state.key: state for state in what.states.values()}
    for key in what.scalars:
        if key not in entry:
            new[key] = _number(states.get(key), p, group)
    for column, format_, slots in _columns_to_change(what, entry):
        if slots[0].key not in new:
            new |= _first(what.states.get(column), format_, slots, p, group)
    whole = {key: x for key, x in entry.items() if key not in _left_over(what)} | new
    # In torch.optim's order, numbers first.
    return {key: whole[key] for key in [*what.keys, *whole]}


def converted(what: Kept, p: torch.Tensor, entry: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What an entry has in another format than it should be in, in that one.

    Args:
        what: what it should hold.
        p: the parameter.
        entry: what there is.

    Raises:
        RuntimeError: a tensor has another shape than its format.
    """
    new: dict[str, torch.Tensor] = {}
    for column, format_, slots in _columns_to_change(what, entry):
        found = _low_bits(entry) if column == "p" else _numbers(what.states[column], entry, p)
        if found is None:
            continue
        made = {slot.key: _full(p, slot, 0) for slot in slots}
        parts = {slot.part.name: local(made[slot.key]) for slot in slots}
        if column == "p":
            parts["low"].copy_(_low_of_width(local(found), parts["low"].dtype, p.dtype))
        else:
            x = found
            if format_ is None:
                parts[""].copy_(x)
            else:
                format_.write(parts, x.float().to(parts[""].device) + 0.0)  # and no -0
        new |= made
    return new


def dtypes(
    what: Kept, group: Mapping[str, Any], entry: Mapping[str, Any]
) -> dict[str, torch.dtype]:
    """The dtypes that the tensors of an entry have once it is completed, by their keys.

    Args:
        what: what it should hold.
        group: the options of the parameter's group.
        entry: what there is; nothing before the first step.
    """
    changing = {column for column, _, _ in _columns_to_change(what, entry)}
    numbers = {
        key: entry[key].dtype if key in entry else _number_dtype(group) for key in what.scalars
    }
    return numbers | {
        slot.key: slot.part.dtype if slot.column in changing else entry[slot.key].dtype
        for slot in what.slots
    }


def _columns_to_change(
    what: Kept, entry: Mapping[str, Any]
) -> Iterator[tuple[str, Format | None, list[Slot]]]:
    """Those of which an entry lacks a tensor, or has it in another format."""
    for column, format_, slots in what.columns():
        found = [entry.get(slot.key) for slot in slots]
        if format_ is None and what.as_found and found[0] is not None:
            is_right = _holds(found[0].dtype, slots[0].part.dtype)
        else:
            is_right = all(
                x is not None and x.dtype == slot.part.dtype for x, slot in zip(found, slots)
            )
        if not is_right:
            yield column, format_, slots


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether every number of another dtype is one of this, or no number is one of both."""
    return (
        dtype == other
        or dtype.is_complex != other.is_complex
        or torch.promote_types(dtype, other) == dtype
    )


def _left_over(what: Kept) -> set[str]:
    """The keys that only other formats have."""
    keys = {key for s in what.states.values() if not s.scalar for key in (s.key, *code_keys(s))}
    return (keys | set(LOW_BITS)) - set(what.keys)


def code_keys(state: State) -> tuple[str, str]:
    """The keys of a state in 8 bits: of its codes, and of their scales."""
    byte, scale = codes(state.unsigned).parts
    return byte.key(state.key), scale.key(state.key)


def _numbers(state: State, entry: Mapping[str, Any], p: torch.Tensor) -> torch.Tensor | None:
    """What a state holds, whatever format it is in: the part of it that is here; None if nothing.

    Plain numbers come first, should there be codes left of another time.
    """
    of_codes, of_scales = code_keys(state)
    if state.key in entry or of_codes not in entry:
        return local(entry[state.key]) if state.key in entry else None
    tensor, scale = entry[of_codes], entry.get(of_scales)
    problem = mismatch(tensor, scale, p)
    if problem or scale is None:
        raise RuntimeError(
            f"of a parameter of shape {tuple(p.shape)} the state {state.key} {problem}: delete "
            "optimizer.state[p] to begin anew"
        )
    return codes(state.unsigned).read({"": local(tensor), "scale": local(scale)})


def _low_bits(entry: Mapping[str, Any]) -> torch.Tensor | None:
    """The lower bits of a weight, however many; None if there are none."""
    found = (entry[key] for key in LOW_BITS if isinstance(entry.get(key), torch.Tensor))
    return next(found, None)


def mismatch(tensor: torch.Tensor, scale: Any, p: torch.Tensor) -> str | None:
    """What codes of 8 bits and their scales disagree in; None if they agree."""
    wanted = Part("scale", torch.float32, of_block=True).shape(p.shape) if p.dim() else ()
    if tensor.shape != p.shape:
        return f"has codes of shape {tuple(tensor.shape)}"
    if tensor.dtype != torch.uint8:
        return f"has codes of {tensor.dtype}, which must be torch.uint8"
    if not isinstance(scale, torch.Tensor):
        return f"has codes without scales, which must be of shape {wanted}"
    if tuple(scale.shape) != wanted:
        return f"has codes with scales of shape {tuple(scale.shape)}, which must be {wanted}"
    if not scale.is_floating_point():
        return f"has codes with scales of {scale.dtype}, which must be torch.float32"
    return None


def decoded(state: State, entry: Mapping[str, Any], p: torch.Tensor) -> torch.Tensor:
    """A state as plain numbers: a new tensor, sharded as the parameter is.

    Its dtype is the parameter's, or a longer one that the state has more bits than.

    Args:
        state: which one.
        entry: what there is of the parameter; the state, in some format.
        p: the parameter.

    Raises:
        RuntimeError: its codes and scales disagree.
    """
    x = _numbers(state, entry, p)
    assert x is not None
    dtype = torch.promote_types(x.dtype, p.dtype)
    if state.key not in entry:
        return _sharded_as(p, x.to(dtype), p.shape)
    found: torch.Tensor = entry[state.key].detach()
    return found.to(dtype, copy=True)


def joined_weight(p: torch.Tensor, entry: Mapping[str, Any]) -> torch.Tensor | None:
    """The weight that is stepped, in float32, if some of its bits are in the state, else None.

    Args:
        p: the parameter.
        entry: what there is of it.
    """
    low = _low_bits(entry)
    if p.dtype not in SHORT or low is None:
        return None
    format_ = joined(p.dtype, 24 if low.dtype == torch.int8 else 32)
    return _sharded_as(p, format_.read({"": local(p.detach()), "low": local(low)}), p.shape)


def _low_of_width(low: torch.Tensor, dtype: torch.dtype, weight: torch.dtype) -> torch.Tensor:
    """The lower bits of a weight, as those of a shorter or longer one."""
    if low.dtype == dtype:
        return low
    # A bfloat16 keeps 8 or 16 bits of those below it, a float16 8 or 15.
    factor = 2.0 ** (8 if weight == torch.bfloat16 else 7)
    if dtype == torch.int16:
        return (low.float() * factor).to(dtype)
    return (low.float() / factor).round().clamp(-128, 127).to(dtype)


def _first(
    declared: State | None,
    format_: Format | None,
    slots: Sequence[Slot],
    p: torch.Tensor,
    group: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """The tensors of a column before the first step; of lower bits of a weight for None."""
    value: Any = declared.init if declared else 0.0
    if isinstance(value, str):
        value = group[value]
    if declared is None or format_ is None:
        if p.is_complex():
            value = complex(value, value)  # real and imaginary parts are averaged each by itself
        return {slot.key: _full(p, slot, value) for slot in slots}
    # On the host, whatever the default device is.
    one = {x.name: torch.zeros(x.shape((1, 1)), dtype=x.dtype, device="cpu") for x in format_.parts}
    format_.write(one, torch.full((1, 1), float(value), device="cpu"))
    return {slot.key: _full(p, slot, one[slot.part.name].item()) for slot in slots}


def _full(p: torch.Tensor, slot: Slot, value: complex) -> torch.Tensor:
    """A tensor for a slot, filled with a number, where and how the parameter is."""
    dtype = slot.part.dtype
    if not slot.part.of_block:
        # Codes lie in the order of their blocks, whatever the order of the parameter.
        is_plain = dtype.is_floating_point or dtype.is_complex
        order = torch.preserve_format if is_plain else torch.contiguous_format
        return torch.full_like(p.detach(), value, dtype=dtype, memory_format=order)
    here = local(p.detach())
    return _sharded_as(
        p, here.new_full((here.shape[0], slot.shape[1]), value, dtype=dtype), slot.shape
    )


def _sharded_as(p: torch.Tensor, here: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of that shape, of which this is the part that belongs to what is here of p."""
    if not hasattr(p, "placements"):
        return here
    from torch.distributed.tensor import DTensor

    assert isinstance(p, DTensor)
    strides = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(
        here.contiguous(), p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape),
        stride=strides,
    )  # fmt: skip


def placed(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A state from elsewhere, where and sharded as its parameter is; a copy.

    Args:
        x: the state, or its scales: whole, the same in all processes; or sharded.
        p: the parameter.
    """
    copied = x.detach().to(p.device, copy=True)
    if hasattr(p, "placements") == hasattr(x, "placements"):
        return copied
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(copied, DTensor):
        # No collective operation of gloo takes an int16.
        wide: Any = copied.to(torch.int32) if copied.dtype == torch.int16 else copied
        whole: torch.Tensor = wide.full_tensor()
        return whole.to(copied.dtype)
    assert isinstance(p, DTensor)
    return distribute_tensor(copied, p.device_mesh, p.placements, src_data_rank=None)


def adopted(state: State, entry: Mapping[str, Any], p: torch.Tensor) -> dict[str, torch.Tensor]:
    """A state from elsewhere, where and sharded as its parameter is, in the format that it has.

    A parameter that is cut through blocks gets numbers for codes, as here would not be all that a
    scale is for. Copies.

    Args:
        state: which one.
        entry: what there is elsewhere of the parameter; the state, in some format.
        p: the parameter.
    """
    if state.key not in entry and _is_cut(p):
        numbers = _numbers(state, entry, p)
        assert numbers is not None
        return {state.key: placed(numbers, p)}
    keys = (state.key,) if state.key in entry else code_keys(state)
    return {key: placed(entry[key], p) for key in keys}


def space(p: torch.Tensor, part: Part) -> torch.Tensor:
    """Space for a part of a state, sharded as its parameter is: not filled.

    Scales are those of the rows that are here, also of a parameter that is cut through its rows:
    they are the same then in all processes that share a row.

    Args:
        p: the parameter.
        part: says of which dtype it is, and whether it has an element for each element.
    """
    if not part.of_block:
        return torch.empty_like(p.detach(), dtype=part.dtype, memory_format=torch.contiguous_format)
    here, shape = local(p.detach()), part.shape(p.shape)
    rows = here.new_empty((here.shape[0], shape[1]), dtype=part.dtype)
    if not _is_cut(p):
        return _sharded_as(p, rows, shape)
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(p, DTensor)
    placements = [x if getattr(x, "dim", 0) == 0 else Replicate() for x in p.placements]
    return DTensor.from_local(
        rows, p.device_mesh, placements, run_check=False, shape=torch.Size(shape),
        stride=(shape[1], 1),
    )  # fmt: skip


def without_cut_codes(what: Kept, entry: Mapping[str, Any], p: torch.Tensor) -> dict[str, Any]:
    """An entry with numbers for codes if its parameter is cut through blocks, else as it is.

    Args:
        what: what it should hold.
        entry: what there is, in tensors of :func:`space`; on the device meta what is not.
        p: the parameter.
    """
    numbers: dict[str, Any] = {}
    used: set[str] = set()
    for state in what.states.values() if _is_cut(p) else ():
        parts = codes(state.unsigned).parts
        found = [entry.get(part.key(state.key)) for part in parts]
        if all(
            x is not None and x.dtype == y.dtype and not x.is_meta for x, y in zip(found, parts)
        ):
            columns = _local_columns(p)
            read = {part.name: local(x) for part, x in zip(parts, found) if x is not None}
            x = codes(state.unsigned).read(read, blocks=columns // BLOCK)
            numbers[state.key] = _sharded_as(p, x, p.shape)
            used |= {part.key(state.key) for part in parts}
    return {key: x for key, x in entry.items() if key not in used} | numbers


def _local_columns(p: torch.Tensor) -> torch.Tensor:
    """The indices in a row of dimension 0 of what is here of it."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(p, DTensor)
    sizes, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    row = p.shape[1:]
    columns = torch.arange(math.prod(row), device=p.device).view(row)
    for dim, (size, offset) in enumerate(zip(sizes[1:], offsets[1:])):
        columns = columns.narrow(dim, min(offset, row[dim]), size)
    return columns.flatten()


def first_index(p: torch.Tensor) -> int:
    """The index of the first element that is here, from which the others are counted on.

    Where all shards of a parameter are rows that follow one another it is that in the whole. Shards
    of other kinds have not the indices of the whole, but no two have the same.
    """
    if not hasattr(p, "placements"):
        return 0
    from torch.distributed.tensor import DTensor

    assert isinstance(p, DTensor)
    mesh = p.device_mesh
    at = mesh.get_coordinate()
    return 0 if at is None else _first_index(tuple(p.shape), mesh.shape, p.placements, tuple(at))


@functools.lru_cache(maxsize=4096)
def _first_index(
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    placements: tuple[Any, ...],
    at: tuple[int, ...],
) -> int:
    sizes = [1 if x.is_replicate() else size for x, size in zip(placements, mesh)]
    # Replicas have the same elements.
    own = tuple(0 if size == 1 else place for size, place in zip(sizes, at))
    shards = {own: _indices(shape, mesh, placements, own)}
    if any(hasattr(x, "split_factor") for x in placements):
        places = itertools.product(*map(range, sizes))
        shards = {place: _indices(shape, mesh, placements, place) for place in places}
    if any(len(x) and x[-1] - x[0] >= len(x) for here in shards.values() for x in here):
        # Some have pieces of several places: all are counted one after the other.
        before = itertools.takewhile(own.__ne__, shards)
        return sum(math.prod(map(len, shards[place])) for place in before)
    return sum(
        int(x[0]) * math.prod(map(len, shards[own][:dim])) * math.prod(shape[dim + 1 :])
        for dim, x in enumerate(shards[own])
        if len(x)
    )


def _indices(
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    placements: tuple[Any, ...],
    at: tuple[int, ...],
) -> list[np.ndarray[Any, Any]]:
    """The indices along each dimension of what a process has of a sharded parameter.

    Args:
        shape: that of the parameter.
        mesh: that of its mesh.
        placements: how it is sharded.
        at: the place of the process in the mesh.
    """
    indices = [np.arange(size) for size in shape]
    for placement, size, place in zip(placements, mesh, at):
        dim = getattr(placement, "dim", None)
        if dim is not None:
            # A strided shard has a part of each of several pieces.
            pieces = _chunks(indices[dim], getattr(placement, "split_factor", 1))
            indices[dim] = np.concatenate([_chunks(piece, size)[place] for piece in pieces])
    return indices


def _chunks(x: np.ndarray[Any, Any], count: int) -> list[np.ndarray[Any, Any]]:
    """Cut as torch.chunk does, but into as many as asked for, the last of them empty."""
    size = -(-len(x) // count)
    return [x[size * i : size * (i + 1)] for i in range(count)]


def _number(declared: State | None, p: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
    """The initial value of a scalar state; of the step number for None."""
    value = declared.init if declared else 0.0
    # A generated kernel or a captured graph keeps numbers on the device.
    device = p.device if group["capturable"] or group["fused"] else torch.device("cpu")
    # torch.tensor, as torch.zeros has no known value under FakeTensorMode.
    return torch.tensor(value, dtype=_number_dtype(group), device=device)


def _number_dtype(group: Mapping[str, Any]) -> torch.dtype:
    """The dtype of scalar states and of the step number: float32 where a kernel reads them."""
    return torch.float32 if group["fused"] else scalar_dtype()
