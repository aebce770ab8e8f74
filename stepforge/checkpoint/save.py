"""State dicts, and exports for code that knows no formats."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stepforge.hyperparameter import EXECUTION_FLAGS
from stepforge.rule import Rule
from stepforge.state.layout import LOW_BITS, block_formats, format_keys
from stepforge.state.sharding import local
from stepforge.state.values import decoded, joined_weight

__all__ = [
    "Lent",
    "ParamGroup",
    "full_precision_weights",
    "lent",
    "local_options",
    "pack",
    "reset_low_bits",
    "to_torch",
]


class ParamGroup(dict[str, Any]):
    """Param group: a dict whose loop yields only the options that are saved.

    Everything else sees all options: ``group[name]``, ``in``, ``keys``, ``items``, copies.
    torch.distributed.checkpoint loops over the group itself when it unflattens a state dict, and
    fails for an option that was not saved.

    Args:
        options: the options.
        local: the names of options that are not saved, from :func:`local_options`.

    Example:
        >>> group = ParamGroup({"lr": 0.1, "state_format": "int8"}, frozenset({"state_format"}))
        >>> list(group), group["state_format"], len({**group})
        (['lr'], 'int8', 2)
    """

    def __init__(
        self, options: Mapping[str, Any] | None = None, local: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(options or {})
        self.local = local

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.keys() if name not in self.local)

    def __reduce__(self) -> tuple[Any, ...]:
        # A plain dict, so that a pickle depends on no module of this library.
        return dict, (list(self.items()),)


def local_options(cls: type) -> frozenset[str]:
    """Return the options of param groups that are not saved.

    They choose how a step runs and how states are stored; they are not loaded either, and the
    torch.optim twin does not have them. So a checkpoint of either library has all that the other
    one asks for.

    Args:
        cls: the optimizer's class.

    Example:
        >>> from stepforge import RAdam
        >>> sorted(local_options(RAdam))
        ['fused', 'master_weight_bits', 'rounding_seed', 'state_format', 'stochastic_rounding']
    """
    return frozenset(EXECUTION_FLAGS) - _options_of_twin(cls)


@dataclass(frozen=True)
class Lent:
    """The state of a parameter as a state dict shared it.

    ``torch.distributed.checkpoint.load`` writes into the tensors of a state dict. With
    ``allow_partial_load`` it leaves alone the tensors that a checkpoint lacks, or has in another
    format. Those are usually zeros, and a large step count would continue from them.

    Attributes:
        step: a copy of the step count.
        versions: the identity and the version of each tensor.
    """

    step: torch.Tensor
    versions: Mapping[str, tuple[int, int]]

    def unwritten(self, entry: Mapping[str, Any]) -> frozenset[str]:
        """Return the keys that still have the lent values, though the step count changed.

        None of them if any tensor was replaced, by whoever changed the state dict.
        """
        now = {key: _version(entry.get(key)) for key in self.versions}
        if any(x is None or x[0] != self.versions[key][0] for key, x in now.items()):
            return frozenset()
        if torch.equal(entry["step"], self.step):
            return frozenset()
        # Step counts share a version with those of other parameters, so it tells nothing.
        return frozenset(key for key, x in now.items() if x == self.versions[key])


def lent(state: Mapping[Any, Any]) -> dict[Any, Lent]:
    """Return, for each parameter, the tensors that a state dict shares with its receiver."""
    return {
        p: Lent(
            entry["step"].detach().clone(),
            {k: seen for k, x in entry.items() if (seen := _version(x))},
        )
        for p, entry in state.items()
        if isinstance(p, torch.Tensor) and isinstance(entry.get("step"), torch.Tensor)
    }


def _version(x: Any) -> tuple[int, int] | None:
    """Return the identity and version of a tensor; None if they tell nothing.

    A shard without elements is never written to.
    """
    if not isinstance(x, torch.Tensor) or local(x).is_inference() or not local(x).numel():
        return None
    return id(x), local(x)._version


def pack(
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Mapping[str, Any]],
    local: frozenset[str],
) -> dict[str, Any]:
    """Return the state dict: indices replace parameters; tensors are not copied.

    Args:
        groups: the param groups.
        state: the states of parameters, and other keys.
        local: the options that are left out.
    """
    numbers: dict[int, int] = {}
    packed_groups = []
    start = 0
    for group in groups:
        for number, p in enumerate(group["params"], start):
            numbers.setdefault(id(p), number)
        packed = {name: x for name, x in group.items() if name not in {"params", *local}}
        packed["params"] = [numbers[id(p)] for p in group["params"]]
        packed_groups.append(packed)
        start += len(group["params"])
    packed_state = {
        (numbers[id(key)] if isinstance(key, torch.Tensor) else key): value
        for key, value in state.items()
    }
    return {"state": packed_state, "param_groups": packed_groups}


def to_torch(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state dict that the twin in torch.optim would have saved.

    States become plain numbers: float32 if they were int8, otherwise the longer of their own dtype
    and the parameter's. torch.optim casts loaded states to the dtype of its parameters, so nothing
    is lost if those are float32, as with :func:`full_precision_weights`. The low bits of weights
    are left out.

    A plain ``state_dict()`` is for this library: torch.optim does not know the keys of int8 states.

    Args:
        optimizer: an optimizer of this library. Nothing in the result aliases it. Hooks of its
            ``state_dict`` are not called.

    Returns:
        A state dict. Sharded parameters have sharded states, as DTensors.

    Raises:
        TypeError: the optimizer is not of this library.
        RuntimeError: int8 codes and scales of a state disagree.

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
    rule = getattr(optimizer, "rule", None)
    if not isinstance(rule, Rule):
        raise TypeError(
            f"to_torch is for optimizers of this library, but got {type(optimizer).__name__}"
        )
    groups = [
        {name: value if name == "params" else _copied(value) for name, value in group.items()}
        for group in optimizer.param_groups
    ]
    state = {
        key: _in_full(rule, entry, key) if isinstance(key, torch.Tensor) else _copied(entry)
        for key, entry in optimizer.state.items()
    }
    return pack(groups, state, local_options(type(optimizer)))


def full_precision_weights(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Return the state dict of a model, with the weights that the optimizer updates.

    Args:
        model: the model.
        optimizer: an optimizer of all or some of its parameters.

    Returns:
        ``model.state_dict()``, in which the parameters whose lower bits the optimizer keeps
        (``master_weight_bits``) are new float32 tensors, joined with those; DTensors if they are
        sharded. All other values are the model's own. After weights were changed beside the
        optimizer, :func:`stepforge.checkpoint.reset_low_bits` has to come first.

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
    # Under all names: a parameter that modules share has several.
    entries = {
        name: (p, optimizer.state[p])
        for name, p in model.state_dict(keep_vars=True).items()
        if isinstance(p, torch.Tensor) and p in optimizer.state
    }
    joined = {name: joined_weight(*found) for name, found in entries.items()}
    return model.state_dict() | {name: x for name, x in joined.items() if x is not None}


def _options_of_twin(cls: type) -> set[str]:
    """Return the options of the torch.optim class with the name of a built-in class or base.

    A rule that torch does not have has only the options of every optimizer.
    """
    ours = (base for base in cls.__mro__ if base.__module__.startswith("stepforge.rules."))
    base: type = next(ours, torch.optim.Optimizer)
    twin = getattr(torch.optim, base.__name__, torch.optim.Optimizer)
    # AdamW has all options of Adam, but not all are in its own constructor.
    optimizers = (base for base in twin.__mro__ if issubclass(base, torch.optim.Optimizer))
    return {name for base in optimizers for name in inspect.signature(base).parameters}


def _in_full(rule: Rule, entry: Mapping[str, Any], p: torch.Tensor) -> dict[str, Any]:
    """Return the state of a parameter with all states as plain numbers."""
    states = [state for state in rule.states.values() if not state.scalar]
    owners = {state.key: state for state in states} | {
        key: state
        for state in states
        for x in block_formats(state)
        for key in format_keys(state, x)
    }
    # A state has the place of the first of its keys.
    keys = dict.fromkeys(owners[key].key if key in owners else key for key in entry)
    return {
        key: decoded(owners[key], entry, p) if key in owners else _copied(entry[key])
        for key in keys
        if key not in LOW_BITS
    }


def _copied(value: Any) -> Any:
    # The storage of a step number, which deepcopy would take along, holds those of all parameters.
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def reset_low_bits(optimizer: torch.optim.Optimizer) -> None:
    """Set the low bits of weights to zero, so that the 16-bit weights count as they are.

    Call it after changing the weights of a model whose optimizer has low bits of them
    (``master_weight_bits``), for example by ``model.load_state_dict`` or by averaging weights.
    Otherwise the next step joins the new weights with bits of the old ones. No version of a tensor
    tells of such a change reliably, so a step cannot. If the optimizer's state is loaded together
    with the model's, the bits are right already.

    Args:
        optimizer: an optimizer of this library. States keep their sharding.

    Raises:
        TypeError: the optimizer is not of this library.

    Example:
        >>> from stepforge import Adam
        >>> p = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> optimizer = Adam([p], lr=2**-12, master_weight_bits=24)
        >>> p.grad = torch.ones_like(p)
        >>> optimizer.step()
        >>> reset_low_bits(optimizer)
        >>> optimizer.state[p]["low_bits_8"].item()
        0
    """
    if not hasattr(optimizer, "rule"):
        raise TypeError(
            f"reset_low_bits is for optimizers of this library, but got {type(optimizer).__name__}"
        )
    for p, entry in optimizer.state.items():
        for key in LOW_BITS.keys() & entry.keys() if isinstance(p, torch.Tensor) else ():
            local(entry[key]).zero_()
