"""Guards: find the tensors of the next step, or say why a kept plan no longer fits.

A kept step must never run with stale addresses, so its guards compare all that a plan depends on:
param groups and options, the keys of ``optimizer.state``, and every tensor's address and layout.
They compare in loops that run in C: a Python loop would take longer than the kernels.
"""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from stepforge.hyperparameter import EXECUTION_FLAGS, is_off
from stepforge.rule import Rule
from stepforge.step.launch import StepTensors
from stepforge.step.params import ParamStep, WithGradient

__all__ = ["GivenGuards", "Guards", "Launches"]

#: The parameters of each launch, with their tensors.
Launches: TypeAlias = Sequence[tuple[Sequence[ParamStep], StepTensors]]


@dataclass(frozen=True)
class Guards:
    """The record of everything a plan depends on.

    It owns no parameter, gradient, state or group, so what the user drops is freed at once. It
    knows parameters by their ids. If another one has come to bear an id, it is read from the groups
    and the state like any other, and its address and layout are compared.

    Attributes:
        groups: the param groups.
        without_gradient: for each parameter of the groups, in order, True if it had no gradient.
        state_keys: the ids of the keys of ``optimizer.state``, in order.
        launches: the tensors of each launch.
    """

    groups: _GroupGuard
    without_gradient: list[bool]
    state_keys: list[int]
    launches: tuple[_TensorGuard, ...]

    @classmethod
    def record(
        cls,
        rule: Rule,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Any, Any],
        launches: Launches,
    ) -> Guards:
        """Record param groups and state as they are.

        Args:
            rule: the optimizer's rule.
            groups: its param groups.
            state: its state.
            launches: the parameters of each launch, with their tensors.
        """
        members = list(itertools.chain.from_iterable(_of_each(groups, "params")))
        stepped = {id(param.p) for params, _ in launches for param in params}
        return cls(
            _GroupGuard.record(rule, groups),
            [id(p) not in stepped for p in members],
            list(map(id, state)),
            _tensor_guards(launches, members, list(state)),
        )

    def find(
        self, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]
    ) -> list[StepTensors] | str:
        """Return the tensors of each launch in the next step; or why the plan is stale.

        Args:
            groups: the param groups.
            state: the optimizer's state.
        """
        if list(map(id, state)) != self.state_keys:
            return "optimizer.state has other keys"
        params = self.groups.find_params(groups)
        if isinstance(params, str):
            return params
        gradients = list(map(_grad, params))
        if list(map(operator.is_, gradients, itertools.repeat(None))) != self.without_gradient:
            return "other parameters have a gradient"
        return _find_tensors(self.launches, params, gradients, list(state.values()))


@dataclass(frozen=True)
class GivenGuards:
    """The record of a plan whose tensors are given, by the operator of ``torch.compile``.

    Attributes:
        groups: the param groups.
        indices: the indices in the optimizer of the parameters that are given.
        launches: the tensors of each launch.
    """

    groups: _GroupGuard
    indices: list[int]
    launches: tuple[_TensorGuard, ...]

    @classmethod
    def record(
        cls,
        rule: Rule,
        groups: Sequence[Mapping[str, Any]],
        given: Sequence[WithGradient],
        launches: Launches,
    ) -> GivenGuards:
        """Record param groups and the given tensors as they are."""
        params = [p for _, p, *_ in given]
        return cls(
            _GroupGuard.record(rule, groups),
            [index for index, *_ in given],
            _tensor_guards(launches, params, params),
        )

    def find(
        self, groups: Sequence[Mapping[str, Any]], given: Sequence[WithGradient]
    ) -> list[StepTensors] | str:
        """Return the tensors of each launch; or why the plan is stale."""
        members = self.groups.find_params(groups)
        if isinstance(members, str):
            return members
        indices, params, gradients, _, states = map(list, zip(*given))
        if indices != self.indices:
            return "other parameters have a gradient"
        return _find_tensors(self.launches, params, gradients, states)


def _tensor_guards(
    launches: Launches, params: Sequence[Any], owners: Sequence[Any]
) -> tuple[_TensorGuard, ...]:
    """Record the tensors of each launch.

    Args:
        launches: the parameters of each launch, with their tensors.
        params: all parameters that a step finds, in order.
        owners: the parameters that its states belong to, in order.
    """
    param_places, state_places = _places(params), _places(owners)
    return tuple(
        _TensorGuard.record(
            launch,
            tensors,
            _take([param_places[id(param.p)] for param in launch], len(params)),
            _take([state_places[id(param.p)] for param in launch], len(owners)),
        )
        for launch, tensors in launches
    )


def _find_tensors(
    launches: Sequence[_TensorGuard], params: list[Any], gradients: list[Any], states: list[Any]
) -> list[StepTensors] | str:
    """Return the tensors of each launch; or why the plan is stale."""
    found: list[StepTensors] = []
    for guard in launches:
        tensors = guard.find(params, gradients, states)
        if isinstance(tensors, str):
            return tensors
        found.append(tensors)
    return found


@dataclass(frozen=True)
class _GroupGuard:
    """The parameters of the groups, and the options and variables that change what runs.

    Numbers are read in every step; only options that graphs and backends depend on are compared.

    Attributes:
        params: the ids of the parameters of all groups, in order.
        counts: the number of parameters of each group.
        read_flags: reads the options of a group that change what runs, whatever their value.
        flags: the flags of each group.
        amounts: for each option that changes what runs if it is zero, its value in each group.
        environment: the variables that choose backends.
    """

    params: list[int]
    counts: list[int]
    read_flags: Callable[[Mapping[str, Any]], Any]
    flags: list[Any]
    amounts: dict[str, list[Any]]
    environment: tuple[str | None, ...]

    @classmethod
    def record(cls, rule: Rule, groups: Sequence[Mapping[str, Any]]) -> _GroupGuard:
        read_flags = operator.itemgetter(
            *(n for n, h in rule.hyperparameters.items() if h.static or n in EXECUTION_FLAGS)
        )
        params = _of_each(groups, "params")
        return cls(
            list(map(id, itertools.chain.from_iterable(params))),
            list(map(len, params)),
            read_flags,
            list(map(read_flags, groups)),
            {n: _of_each(groups, n) for n, h in rule.hyperparameters.items() if h.zero_is_off},
            _environment(),
        )

    def find_params(self, groups: Sequence[Mapping[str, Any]]) -> list[torch.Tensor] | str:
        """Return the parameters of all groups; or what has changed."""
        if self.environment != _environment():
            return "an environment variable that chooses backends has changed"
        params = _of_each(groups, "params")
        members = list(itertools.chain.from_iterable(params))
        if list(map(len, params)) != self.counts or list(map(id, members)) != self.params:
            return "the param groups have other parameters"
        if list(map(self.read_flags, groups)) != self.flags:
            return "an option that changes what runs has another value"
        for name, known in self.amounts.items():
            values = _of_each(groups, name)
            if not all(map(operator.is_, values, known)) and (
                list(map(is_off, values)) != list(map(is_off, known))
            ):
                return f"{name} was turned on or off"
        return members


_Take: TypeAlias = Callable[[list[Any]], list[Any]]


@dataclass(frozen=True)
class _TensorGuard:
    """The addresses and layouts of a launch's tensors; of their local parts if they are DTensors.

    Attributes:
        take_params: takes the launch's parameters from those of all groups.
        take_states: takes their states from the values of ``optimizer.state``.
        keys: the keys of a state.
        scalars: the number of those keys, at the front, that are scalars.
        specs: the meshes and placements of parameters, gradients and states that are DTensors;
            None if the parameters are not.
        addresses: the addresses of the parameters, then of the states in the order of ``keys``.
        same_layout: returns True if tensors, these and then the gradients, have the same dtypes,
            shapes, strides and devices.
    """

    take_params: _Take
    take_states: _Take
    keys: tuple[str, ...]
    scalars: int
    specs: list[Any] | None
    addresses: list[int]
    same_layout: Callable[..., bool]

    @classmethod
    def record(
        cls,
        params: Sequence[ParamStep],
        found: StepTensors,
        take_params: _Take,
        take_states: _Take,
    ) -> _TensorGuard:
        layout = params[0].layout
        keys, scalars = layout.keys, len(layout.scalars)
        tensors = [*found.params, *found.states]
        specs = None
        if found.sharded:
            states = _read([x.state for x in params], keys[scalars:])
            specs = list(map(_spec, [*(x.p for x in params), *(x.g for x in params), *states]))
        return cls(
            take_params,
            take_states,
            keys,
            scalars,
            specs,
            _addresses(tensors),
            _layout_check([*tensors, *found.gradients]),
        )

    def find(
        self, params: list[torch.Tensor], gradients: list[Any], states: list[Any]
    ) -> StepTensors | str:
        """Return the launch's tensors; or what has changed.

        Args:
            params: the parameters of all groups.
            gradients: the gradient of each.
            states: the values of ``optimizer.state``.
        """
        params, gradients = self.take_params(params), self.take_params(gradients)
        sharded: list[torch.Tensor] = []
        try:
            states = self.take_states(states)
            tensors = _read(states, self.keys)
            if self.specs is not None:
                parts = _read(states, self.keys[self.scalars :])
                if list(map(_spec, [*params, *gradients, *parts])) != self.specs:
                    return "a DTensor has another mesh, or other placements"
                sharded = [*params, *parts]
                params, gradients = list(map(_local, params)), list(map(_local, gradients))
                tensors = [x if type(x) is torch.Tensor else x._local_tensor for x in tensors]
            has_moved = _addresses([*params, *tensors]) != self.addresses
        # No dict, no such key, no tensor, no DTensor, or no memory.
        except (KeyError, TypeError, AttributeError, RuntimeError):
            return "a state is missing, or is no tensor"
        if has_moved:
            return "a parameter or state has another address"
        if not self.same_layout(*params, *tensors, *gradients):
            return "a tensor has another dtype, shape, stride or device"
        return StepTensors(params, gradients, tensors, sharded)


def _environment() -> tuple[str | None, ...]:
    return os.environ.get("STEPFORGE_BACKEND"), os.environ.get("STEPFORGE_ISA")


def _take(positions: list[int], count: int) -> _Take:
    """Return a function that takes some positions out of a list of that length."""
    if positions == list(range(count)):
        return list
    if len(positions) == 1:
        return lambda values: [values[positions[0]]]
    take = operator.itemgetter(*positions)
    return lambda values: list(take(values))


def _places(keys: Iterable[Any]) -> dict[int, int]:
    """Return the first position of each object, by its id."""
    places: dict[int, int] = {}
    for position, key in enumerate(keys):
        places.setdefault(id(key), position)
    return places


_grad = operator.attrgetter("grad")
_spec = operator.attrgetter("_spec")
_local = operator.attrgetter("_local_tensor")


def _of_each(groups: Iterable[Mapping[str, Any]], name: str) -> list[Any]:
    """Return an option of each group."""
    return list(map(operator.itemgetter(name), groups))


def _read(states: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> list[Any]:
    """Return the values of some keys of each dict, one dict's after the other's."""
    if len(keys) == 1:
        return list(map(operator.itemgetter(*keys), states))
    return list(itertools.chain.from_iterable(map(operator.itemgetter(*keys), states)))


def _addresses(tensors: Iterable[torch.Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, tensors))


def _layout_check(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """Return a function that compares the layouts of as many tensors with these."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        guards = TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(x.shape) for x in tensors],  # type: ignore[misc]
            dynamic_dims_strides=[list(x.stride()) for x in tensors],  # type: ignore[misc]
        )
    except (ImportError, TypeError):  # private to torch: another version may not have it
        known = list(map(_layout, tensors))
        return lambda *found: list(map(_layout, found)) == known
    check: Callable[..., bool] = guards.check
    return check


def _layout(x: torch.Tensor) -> tuple[Any, ...]:
    return x.dtype, x.shape, x.stride(), x.device, x.layout, x.is_neg(), type(x)
