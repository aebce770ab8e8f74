"""What leaves an optimizer: its state dict, and the same for who knows nothing of formats."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepforge.declare import EXECUTION_FLAGS, Rule
from stepforge.entries import decoded, joined_weight

__all__ = ["full_precision_weights", "pack", "to_torch"]


def pack(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Mapping[str, Any]]
) -> dict[str, Any]:
    """The state dict: parameters are replaced by their numbers; tensors are not copied."""
    numbers: dict[int, int] = {}
    packed_groups = []
    start = 0
    for group in groups:
        for number, p in enumerate(group["params"], start):
            numbers.setdefault(id(p), number)
        packed = {name: value for name, value in group.items() if name != "params"}
        packed["params"] = [numbers[id(p)] for p in group["params"]]
        packed_groups.append(packed)
        start += len(group["params"])
    packed_state = {
        (numbers[id(key)] if isinstance(key, torch.Tensor) else key): value
        for key, value in state.items()
    }
    return {"state": packed_state, "param_groups": packed_groups}


def to_torch(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer as its twin in torch.optim would have saved it.

    States are plain numbers whatever format they are in: in float32 if they were codes of 8 bits,
    otherwise in the longer of their own dtype and the parameter's. In loading torch.optim casts
    them to the dtype of its parameters, so that nothing is lost where those are float32, as with
    the weights of :func:`full_precision_weights`. The lower bits of weights are left out, and so
    are the options that the twin does not know; those that users have put into groups are not.

    A plain ``state_dict()`` is for this library: torch.optim would take codes for numbers.

    Args:
        optimizer: one of this library. Nothing in the answer aliases it. Hooks of its
            ``state_dict`` are not called.

    Returns:
        A state dict. Sharded parameters have sharded states, as DTensors.

    Raises:
        TypeError: the optimizer is not of this library.
        RuntimeError: codes and scales of a state disagree.

    Example:
        >>> from stepforge import Adam
        >>> p = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = Adam([p], state_format="int8")
        >>> p.grad = torch.ones(64, 64)
        >>> optimizer.step()
        >>> twin = torch.optim.Adam([p])
        >>> twin.load_state_dict(to_torch(optimizer))
        >>> twin.state[p]["exp_avg"].dtype
        torch.float32
    """
    rule = getattr(optimizer, "_rule", None)
    if not isinstance(rule, Rule):
        raise TypeError(
            f"to_torch is for optimizers of this library, but got {type(optimizer).__name__}"
        )
    unknown = set(EXECUTION_FLAGS) - _options_of_twin(type(optimizer))
    groups = [
        {
            name: value if name == "params" else _copied(value)
            for name, value in group.items()
            if name not in unknown
        }
        for group in optimizer.param_groups
    ]
    state = {
        key: _in_full(rule, entry, key) if isinstance(key, torch.Tensor) else _copied(entry)
        for key, entry in optimizer.state.items()
    }
    return pack(groups, state)


def full_precision_weights(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The state dict of a model, with the weights that an optimizer steps.

    Args:
        model: the model.
        optimizer: an optimizer of all or some of its parameters.

    Returns:
        ``model.state_dict()``, in which the parameters whose lower bits the optimizer keeps
        (``master_weight_bits``) are new float32 tensors, joined with those; DTensors if they are
        sharded. All other values are the model's own.

    Example:
        >>> from stepforge import Adam
        >>> model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
        >>> _ = model.weight.data.fill_(1)
        >>> optimizer = Adam(model.parameters(), lr=2**-12, master_weight_bits=24)
        >>> model.weight.grad = torch.ones_like(model.weight)
        >>> optimizer.step()
        >>> model.weight.item(), full_precision_weights(model, optimizer)["weight"].item()
        (1.0, 0.999755859375)
    """
    # Under all of its names, of which a parameter that modules share has several.
    entries = {
        name: (p, optimizer.state[p])
        for name, p in model.state_dict(keep_vars=True).items()
        if isinstance(p, torch.Tensor) and p in optimizer.state
    }
    joined = {name: joined_weight(*found) for name, found in entries.items()}
    return model.state_dict() | {name: x for name, x in joined.items() if x is not None}


def _options_of_twin(cls: type) -> set[str]:
    """The options that the optimizer of torch.optim knows whose name a class or its base has."""
    ours = (base for base in cls.__mro__ if base.__module__.startswith(f"{__package__}.rules."))
    base: type = next(ours, torch.optim.Optimizer)
    twin = getattr(torch.optim, base.__name__)
    # AdamW takes what Adam does, not all of it in its own constructor.
    optimizers = (base for base in twin.__mro__ if issubclass(base, torch.optim.Optimizer))
    return {name for base in optimizers for name in inspect.signature(base).parameters}


def _in_full(rule: Rule, entry: Mapping[str, Any], p: torch.Tensor) -> dict[str, Any]:
    """The entry of a parameter with all states as plain numbers."""
    states = {state.key: state for state in rule.states.values() if not state.scalar}
    of_formats = {"low_bits", *(f"{key}_scale" for key in states)}
    return {
        key: decoded(states[key], entry, p) if key in states else _copied(value)
        for key, value in entry.items()
        if key not in of_formats
    }


def _copied(value: Any) -> Any:
    # The storage of a step number, which deepcopy would take along, holds those of all parameters.
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
