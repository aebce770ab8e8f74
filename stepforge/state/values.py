"""The values of a parameter's state: initial values, and conversion between formats."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepforge.formats import BLOCK, Format, split_weight
from stepforge.ops import scalar_dtype
from stepforge.rule import Rule, State
from stepforge.state.alike import differences, grouped, layout_differences
from stepforge.state.layout import (
    HALF_DTYPES,
    LOW_BITS,
    StateLayout,
    StateTensor,
    block_format_of,
    block_formats,
    format_keys,
    is_flat,
    scalar_device,
    scalar_state_dtype,
    state_layout,
)
from stepforge.state.sharding import (
    is_cut_within_rows,
    is_sharded,
    local,
    local_columns,
    place_like,
    shard_like,
)

__all__ = [
    "block_problem",
    "completed",
    "converted",
    "copied_in_own_format",
    "decoded",
    "decoded_if_cut",
    "initial_states",
    "joined_weight",
    "scalar_state",
]


def initial_states(
    rule: Rule, params: Sequence[torch.Tensor], group: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the states of a group's parameters before their first step."""
    made: dict[int, dict[str, Any]] = {}
    found = itertools.chain(layout_differences(params), differences(is_flat, params))
    for alike in grouped(params, found):
        states = completed(state_layout(rule, group, alike[0]), alike, group, [{}] * len(alike))
        made |= zip(map(id, alike), states)
    return [made[id(p)] for p in params]


def completed(
    layout: StateLayout,
    params: Sequence[torch.Tensor],
    group: Mapping[str, Any],
    states: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return the states of parameters, with everything their layout names, in the formats it names.

    Args:
        layout: the layout of the states.
        params: the parameters, alike in all that their states depend on.
        group: the options of their param group.
        states: the states as they are, all of the same keys, and with tensors that are alike. They
            are not changed.

    Returns:
        The same dicts if they were complete, otherwise new ones.

    Raises:
        RuntimeError: a tensor in another format has another shape than its parameter.
    """
    first = _completed_state(layout, params[0], group, states[0])
    if first is states[0]:
        return list(states)
    if states[0] or is_sharded(params[0]):  # values are converted, or sharded one by one
        rest = zip(params[1:], states[1:])
        return [first, *(_completed_state(layout, p, group, state) for p, state in rest)]
    # A clone has memory of its own, which is freed, pickled and moved alone.
    columns = [[x, *map(torch.clone, itertools.repeat(x, len(states) - 1))] for x in first.values()]
    return [dict(zip(first, values)) for values in zip(*columns)]


def _completed_state(
    layout: StateLayout, p: torch.Tensor, group: Mapping[str, Any], param_state: dict[str, Any]
) -> dict[str, Any]:
    """Return one state completed: the same dict if it was complete, otherwise a new one."""
    if layout.is_complete(param_state) or (
        all(key in param_state for key in layout.scalars)
        and not list(layout.columns_to_change(param_state))
    ):
        return param_state
    new = converted(layout, p, param_state) if param_state else {}
    states = {state.key: state for state in layout.states.values()}
    for key in layout.scalars:
        if key not in param_state:
            value = states[key].init if key in states else 0.0
            new[key] = scalar_state(value, p, group)
    for column, format_, tensors in layout.columns_to_change(param_state):
        if tensors[0].key not in new:
            new |= _initial_column(layout.states.get(column), format_, tensors, p, group)
    if not param_state:  # new keys are in order
        return new
    other = layout.keys_of_other_formats
    whole = {key: x for key, x in param_state.items() if key not in other} | new
    # In torch.optim's order, scalars first.
    return {key: whole[key] for key in [*layout.keys, *whole]}


def converted(
    layout: StateLayout, p: torch.Tensor, param_state: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return new tensors for all states that are in another format than their layout's.

    Args:
        layout: the layout of the state.
        p: the parameter.
        param_state: the state as it is.

    Raises:
        RuntimeError: a tensor has another shape than its format.
    """
    new: dict[str, torch.Tensor] = {}
    for column, format_, tensors in layout.columns_to_change(param_state):
        is_weight = column == "p"
        found = (
            _low_bits(param_state)
            if is_weight
            else _local_numbers(layout.states[column], param_state, p)
        )
        if found is None:
            continue
        made = {x.key: _filled(p, x, 0) for x in tensors}
        parts = {x.part.name: local(made[x.key]) for x in tensors}
        if is_weight:
            low = parts["low"]
            low.copy_(_low_bits_as(local(found), low.dtype, p.dtype))
        elif format_ is None:
            parts[""].copy_(found)
        else:
            format_.write(parts, found.float().to(parts[""].device) + 0.0)  # and no -0
        new |= made
    return new


def decoded(state: State, param_state: Mapping[str, Any], p: torch.Tensor) -> torch.Tensor:
    """Return a state as plain numbers: a new tensor, sharded as the parameter is.

    Its dtype is the longer one of the state's and the parameter's.

    Args:
        state: the declaration of the state.
        param_state: the parameter's state, in any format.
        p: the parameter.

    Raises:
        RuntimeError: codes and scales disagree.
    """
    x = _local_numbers(state, param_state, p)
    assert x is not None
    dtype = torch.promote_types(x.dtype, p.dtype)
    if state.key not in param_state:
        return shard_like(p, x.to(dtype), p.shape)
    found: torch.Tensor = param_state[state.key].detach()
    return found.to(dtype, copy=True)


def joined_weight(p: torch.Tensor, param_state: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the float32 weight that a step updates; None if the state has no bits of it.

    Args:
        p: the parameter.
        param_state: its state.
    """
    low = _low_bits(param_state)
    if p.dtype not in HALF_DTYPES or low is None:
        return None
    format_ = split_weight(p.dtype, 24 if low.dtype == torch.int8 else 32)
    return shard_like(p, format_.read({"": local(p.detach()), "low": local(low)}), p.shape)


def copied_in_own_format(
    state: State, param_state: Mapping[str, Any], p: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Copy a state from elsewhere to where its parameter is, in the format that it has.

    For a parameter that is sharded within rows, codes become plain numbers: a process would not
    have all elements of a block.

    Args:
        state: the declaration of the state.
        param_state: the parameter's state elsewhere, in any format.
        p: the parameter.
    """
    format_ = block_format_of(state, param_state)
    if format_ is None:
        return {state.key: place_like(p, param_state[state.key])}
    if is_cut_within_rows(p):
        numbers = _local_numbers(state, param_state, p)
        assert numbers is not None
        return {state.key: place_like(p, numbers)}
    return {key: place_like(p, param_state[key]) for key in format_keys(state, format_)}


def decoded_if_cut(
    layout: StateLayout, param_state: Mapping[str, Any], p: torch.Tensor
) -> dict[str, Any]:
    """Return a state with codes decoded if its parameter is sharded within rows, else as it is.

    Args:
        layout: the layout of the state.
        param_state: the state, in tensors of :func:`~stepforge.state.sharding.empty_part`; a tensor
            on the device meta is absent.
        p: the parameter.
    """
    numbers: dict[str, Any] = {}
    used: set[str] = set()
    states = layout.states.values() if is_cut_within_rows(p) else ()
    for state, format_ in [(x, format_) for x in states for format_ in block_formats(x)]:
        found = [param_state.get(key) for key in format_keys(state, format_)]
        if all(
            x is not None and x.dtype == part.dtype and not x.is_meta
            for x, part in zip(found, format_.parts)
        ):
            read = {part.name: local(x) for part, x in zip(format_.parts, found) if x is not None}
            x = format_.read(read, blocks=local_columns(p) // BLOCK)
            numbers[state.key] = shard_like(p, x, p.shape)
            used |= set(format_keys(state, format_))
    return {key: x for key, x in param_state.items() if key not in used} | numbers


def block_problem(format_: Format, codes: torch.Tensor, scales: Any, p: torch.Tensor) -> str | None:
    """Say how codes and their scales do not fit a parameter; None if they do."""
    code, scale = format_.parts
    wanted = scale.shape(p.shape) if p.dim() else ()
    if codes.shape != p.shape:
        return f"has codes of shape {tuple(codes.shape)}"
    if codes.dtype != code.dtype:
        return f"has codes of {codes.dtype}, which must be {code.dtype}"
    if not isinstance(scales, torch.Tensor):
        return f"has codes without scales, which must be of shape {wanted}"
    if tuple(scales.shape) != wanted:
        return f"has codes with scales of shape {tuple(scales.shape)}, which must be {wanted}"
    if not scales.is_floating_point():
        return f"has codes with scales of {scales.dtype}, which must be {scale.dtype}"
    return None


def scalar_state(value: Any, p: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
    """Return a scalar state, or the step count, as an optimizer keeps it; a copy.

    Args:
        value: a number, or a tensor of one element, whose dtype stays if it is floating point.
        p: the parameter.
        group: the options of its param group.
    """
    device = scalar_device(p, group)
    if not isinstance(value, torch.Tensor):
        # torch.tensor, as torch.zeros has no known value under FakeTensorMode.
        return torch.tensor(float(value), dtype=scalar_state_dtype(group), device=device)
    dtype = value.dtype if value.is_floating_point() else scalar_dtype()
    return value.detach().reshape(()).to(device, dtype, copy=True)


def _local_numbers(
    state: State, param_state: Mapping[str, Any], p: torch.Tensor
) -> torch.Tensor | None:
    """Return the local part of a state as plain numbers, from any format; None if it is absent."""
    format_ = block_format_of(state, param_state)
    if format_ is None:
        return local(param_state[state.key]) if state.key in param_state else None
    codes, scales = map(param_state.get, format_keys(state, format_))
    assert codes is not None
    problem = block_problem(format_, codes, scales, p)
    if problem or scales is None:
        raise RuntimeError(
            f"of a parameter of shape {tuple(p.shape)} the state {state.key} {problem}: delete "
            "optimizer.state[p] to begin anew"
        )
    return format_.read({"": local(codes), "scale": local(scales)})


def _low_bits(param_state: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the low bits of a weight, 8 or 16; None if there are none."""
    found = (param_state[key] for key in LOW_BITS if isinstance(param_state.get(key), torch.Tensor))
    return next(found, None)


def _low_bits_as(low: torch.Tensor, dtype: torch.dtype, weight: torch.dtype) -> torch.Tensor:
    """Convert the low bits of a weight to int8 or int16."""
    if low.dtype == dtype:
        return low
    # A bfloat16 keeps 8 or 16 bits below its own, a float16 8 or 15.
    factor = 2.0 ** (8 if weight == torch.bfloat16 else 7)
    if dtype == torch.int16:
        return (low.float() * factor).to(dtype)
    return (low.float() / factor).round().clamp(-128, 127).to(dtype)


def _initial_column(
    state: State | None,
    format_: Format | None,
    tensors: Sequence[StateTensor],
    p: torch.Tensor,
    group: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """Return the tensors of a state before the first step; of the weight's low bits for None."""
    value: Any = state.init if state else 0.0
    if isinstance(value, str):
        value = group[value]
    if state is None or format_ is None:
        if p.is_complex():
            value = complex(value, value)  # real and imaginary parts are separate numbers
        return {x.key: _filled(p, x, value) for x in tensors}
    encoded = _encoded(format_, float(value))
    return {x.key: _filled(p, x, encoded[x.part.name]) for x in tensors}


@functools.lru_cache(maxsize=64)
def _encoded(format_: Format, value: float) -> dict[str, float]:
    """Return a number in a format: the value of each part, by name."""
    # On the host, whatever the default device is.
    one = {x.name: torch.zeros(x.shape((1, 1)), dtype=x.dtype, device="cpu") for x in format_.parts}
    format_.write(one, torch.full((1, 1), value, device="cpu"))
    return {name: x.item() for name, x in one.items()}


def _filled(p: torch.Tensor, tensor: StateTensor, value: complex) -> torch.Tensor:
    """Return a new tensor of a state, filled with a number, on the device and sharding of p."""
    dtype = tensor.part.dtype
    if not tensor.part.of_block:
        # Codes are contiguous, in the order of their blocks, whatever the parameter's strides.
        is_plain_number = dtype.is_floating_point or dtype.is_complex
        order = torch.preserve_format if is_plain_number else torch.contiguous_format
        return torch.full_like(p.detach(), value, dtype=dtype, memory_format=order)
    here = local(p.detach())
    scales = here.new_full((here.shape[0], tensor.shape[1]), value, dtype=dtype)
    return shard_like(p, scales, tensor.shape)
