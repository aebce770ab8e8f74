"""Guards: find the tensors of the next step, or say why a kept plan no longer fits.

A kept step must never run with stale addresses, so its guards compare all that a plan depends on:
param groups and options, the keys of ``optimizer.state``, and every tensor's address and layout.

There are two kinds with the same answers. Those in C++ (guards.cpp) read a thousand tensors several
times as fast. Those in this file need no compiler, and are their oracle. They compare in loops that
run in C: a Python loop would take longer than the kernels.
"""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from stepforge import extension
from stepforge.hyperparameter import EXECUTION_FLAGS, is_off
from stepforge.rule import Rule
from stepforge.state.sharding import is_sharded
from stepforge.step.launch import StepTensors
from stepforge.step.params import ParamStep, WithGradient

__all__ = [
    "Groups",
    "Guards",
    "PythonGuards",
    "Source",
    "Watched",
    "gradient_pattern",
    "in_cpp",
    "record",
]

#: The origin of a step's states: ``optimizer.state``; or the parameters, gradients and states that
#: the operator of ``torch.compile`` is given.
Source: TypeAlias = "Mapping[Any, Any] | Sequence[WithGradient]"

#: The param groups of an optimizer.
Groups: TypeAlias = Sequence[Mapping[str, Any]]

#: The environment variables that choose what runs.
_VARIABLES = ("STEPFORGE_BACKEND", "STEPFORGE_ISA", "STEPFORGE_GUARDS")


class Guards(Protocol):
    """The record of everything a plan depends on.

    It owns no parameter, gradient, state or group, so what the user drops is freed at once. It
    knows parameters by their ids. If another one has come to bear an id, it is read from the groups
    and the state like any other, and its address and layout are compared.
    """

    def find(self, groups: Groups, source: Source) -> list[StepTensors] | str:
        """Return the tensors of each launch in the next step; or why the plan is stale.

        Args:
            groups: the param groups.
            source: the states, from the origin that was recorded.
        """


def record(watched: Watched, groups: Groups, source: Source) -> Guards:
    """Record param groups and tensors as they are: in C++ if that is built.

    Args:
        watched: what to record.
        groups: the param groups.
        source: the origin of the states.
    """
    return in_cpp(watched, groups, source) or PythonGuards.record(watched, groups, source)


def in_cpp(watched: Watched, groups: Groups, source: Source) -> Guards | None:
    """Return :func:`record` in C++; None while there is no extension.

    Raises:
        RuntimeError: ``STEPFORGE_GUARDS`` asks for what there is not.
    """
    module = extension.module()
    if isinstance(module, str):
        return None
    guards: Guards = module.Guards(
        groups,
        source,
        watched.is_given,
        [tuple(vars(places).values()) for places in watched.launches],
        watched.flags,
        watched.amounts,
        is_off,
        _VARIABLES,
        watched.spec_fields,
    )
    return guards


def gradient_pattern(groups: Groups, source: Source) -> Hashable:
    """Return a key for the set of parameters that have a gradient.

    Args:
        groups: the param groups.
        source: the origin of the states.
    """
    if not isinstance(source, Mapping):
        return tuple(index for index, *_ in source)
    params = itertools.chain.from_iterable(_of_each(groups, "params"))
    return bytes(_exist(map(_grad, params)))


@dataclass(frozen=True)
class LaunchPlaces:
    """The places of a launch's tensors among those of a step.

    Attributes:
        params: the positions of its parameters among all that a step finds.
        states: the positions of their states.
        keys: the keys of a state.
        scalars: the number of those keys, at the front, that are scalars.
        is_sharded: True if the parameters are DTensors.
    """

    # guards.cpp reads them in this order.
    params: list[int]
    states: list[int]
    keys: tuple[str, ...]
    scalars: int
    is_sharded: bool


@dataclass(frozen=True)
class Watched:
    """Everything that guards compare, without the values.

    Numbers are read in every step; only options that graphs and backends depend on are compared.

    Attributes:
        flags: the options that change what runs, whatever their value.
        amounts: the options that change what runs if they are zero.
        launches: the tensors of each launch.
        spec_fields: the attributes of a DTensor's spec; empty without DTensors.
        is_given: True if ``torch.compile`` gives the tensors.
    """

    flags: tuple[str, ...]
    amounts: tuple[str, ...]
    launches: tuple[LaunchPlaces, ...]
    spec_fields: tuple[str, ...]
    is_given: bool

    @classmethod
    def by(
        cls,
        rule: Rule,
        launches: Sequence[Sequence[ParamStep]],
        params: Iterable[Any],
        owners: Iterable[Any],
        *,
        is_given: bool = False,
    ) -> Watched:
        """Return what the plan of some launches depends on.

        Args:
            rule: the optimizer's rule.
            launches: the parameters of each launch.
            params: all parameters that a step finds, in order.
            owners: the parameters that its states belong to, in order.
            is_given: True if ``torch.compile`` gives the tensors.
        """
        hyperparameters = rule.hyperparameters.items()
        param_places, state_places = _places(params), _places(owners)
        places = tuple(
            LaunchPlaces(
                [param_places[id(param.p)] for param in launch],
                [state_places[id(param.p)] for param in launch],
                launch[0].layout.keys,
                len(launch[0].layout.scalars),
                is_sharded(launch[0].p),
            )
            for launch in launches
        )
        specs = [_spec(launch[0].p) for launch in launches if is_sharded(launch[0].p)]
        return cls(
            tuple(n for n, h in hyperparameters if h.static or n in EXECUTION_FLAGS),
            tuple(n for n, h in hyperparameters if h.zero_is_off),
            places,
            # A hash is made when it is asked for, and says nothing that the others do not.
            tuple(name for name in vars(specs[0]) if name != "_hash") if specs else (),
            is_given,
        )


@dataclass(frozen=True)
class PythonGuards:
    """Guards that need no compiler.

    Attributes:
        watched: the things that they compare.
        groups: the param groups.
        origins: the ids of the keys of ``optimizer.state``, in order; or the indices of the
            parameters that are given. Keys that come after these do not matter: other parameters
            may have got a state since.
        has_gradient: for each parameter that a step finds, True if it has a gradient.
        launches: the tensors of each launch.
    """

    watched: Watched
    groups: _GroupGuard
    origins: list[int]
    has_gradient: list[bool]
    launches: tuple[_TensorGuard, ...]

    @classmethod
    def record(cls, watched: Watched, groups: Groups, source: Source) -> PythonGuards:
        """Record param groups and tensors as they are."""
        members = _Members.of(groups, source, is_given=watched.is_given)
        return cls(
            watched,
            _GroupGuard.record(watched, groups),
            members.origins,
            _exist(members.gradients),
            tuple(_TensorGuard.record(places, members) for places in watched.launches),
        )

    def find(self, groups: Groups, source: Source) -> list[StepTensors] | str:
        """Return the tensors of each launch in the next step; or why the plan is stale."""
        is_given = self.watched.is_given
        if not is_given and list(map(id, source))[: len(self.origins)] != self.origins:
            return "optimizer.state has other keys"
        stale = self.groups.stale(groups)
        if stale:
            return stale
        members = _Members.of(groups, source, is_given=is_given)
        has_other_indices = is_given and members.origins != self.origins
        if has_other_indices or _exist(members.gradients) != self.has_gradient:
            return "other parameters have a gradient"
        found: list[StepTensors] = []
        for guard in self.launches:
            tensors = guard.find(members)
            if isinstance(tensors, str):
                return tensors
            found.append(tensors)
        return found


@dataclass(frozen=True)
class _Members:
    """The tensors of a step, before they are sorted into launches.

    Attributes:
        origins: as in :class:`PythonGuards`.
        params: the parameters.
        gradients: the gradient of each, or None.
        states: the values of ``optimizer.state``; or the state of each parameter that is given.
    """

    origins: list[int]
    params: list[Any]
    gradients: list[Any]
    states: list[Any]

    @classmethod
    def of(cls, groups: Groups, source: Source, *, is_given: bool) -> _Members:
        if is_given:
            origins, params, gradients, _, states = map(list, zip(*source))
            return cls(origins, params, gradients, states)
        assert isinstance(source, Mapping)
        params = list(itertools.chain.from_iterable(_of_each(groups, "params")))
        return cls(list(map(id, source)), params, list(map(_grad, params)), list(source.values()))


@dataclass(frozen=True)
class _GroupGuard:
    """The parameters of the groups, and the options and variables that change what runs.

    Attributes:
        params: the ids of the parameters of all groups, in order.
        counts: the number of parameters of each group.
        read_flags: reads the flags of a group.
        flags: the flags of each group.
        amounts: for each option that changes what runs if it is zero, its value in each group.
        variables: the values of the environment variables.
    """

    params: list[int]
    counts: list[int]
    read_flags: Callable[[Mapping[str, Any]], Any]
    flags: list[Any]
    amounts: dict[str, list[Any]]
    variables: list[str | None]

    @classmethod
    def record(cls, watched: Watched, groups: Groups) -> _GroupGuard:
        read_flags = operator.itemgetter(*watched.flags)
        params = _of_each(groups, "params")
        return cls(
            list(map(id, itertools.chain.from_iterable(params))),
            list(map(len, params)),
            read_flags,
            list(map(read_flags, groups)),
            {name: _of_each(groups, name) for name in watched.amounts},
            list(map(os.environ.get, _VARIABLES)),
        )

    def stale(self, groups: Groups) -> str | None:
        """Say what has changed; None if nothing has."""
        if list(map(os.environ.get, _VARIABLES)) != self.variables:
            return "an environment variable that chooses backends has changed"
        params = _of_each(groups, "params")
        ids = list(map(id, itertools.chain.from_iterable(params)))
        if list(map(len, params)) != self.counts or ids != self.params:
            return "the param groups have other parameters"
        if list(map(self.read_flags, groups)) != self.flags:
            return "an option that changes what runs has another value"
        for name, known in self.amounts.items():
            values = _of_each(groups, name)
            if not all(map(operator.is_, values, known)) and (
                list(map(is_off, values)) != list(map(is_off, known))
            ):
                return f"{name} was turned on or off"
        return None


_Take: TypeAlias = Callable[[list[Any]], list[Any]]


@dataclass(frozen=True)
class _TensorGuard:
    """The addresses and layouts of a launch's tensors; of their local parts if they are DTensors.

    Attributes:
        places: the places of the tensors.
        take_params: takes the launch's parameters, or gradients, from those of a step.
        take_states: takes their states.
        specs: the meshes and placements of parameters, gradients and states that are DTensors.
        addresses: the addresses of the parameters, then of the states in the order of the keys.
        same_layout: returns True if tensors, these and then the gradients, have the same dtypes,
            shapes, strides and devices.
    """

    places: LaunchPlaces
    take_params: _Take
    take_states: _Take
    specs: list[Any]
    addresses: list[int]
    same_layout: Callable[..., bool]

    @classmethod
    def record(cls, places: LaunchPlaces, members: _Members) -> _TensorGuard:
        take_params, take_states = _take(places.params), _take(places.states)
        params, gradients = take_params(members.params), take_params(members.gradients)
        found, specs = _read_tensors(places, params, gradients, take_states(members.states))
        tensors = [*found.params, *found.states]
        return cls(
            places,
            take_params,
            take_states,
            specs,
            _addresses(tensors),
            _layout_check([*tensors, *found.gradients]),
        )

    def find(self, members: _Members) -> StepTensors | str:
        """Return the launch's tensors; or what has changed."""
        params, gradients = self.take_params(members.params), self.take_params(members.gradients)
        try:
            states = self.take_states(members.states)
            found, specs = _read_tensors(self.places, params, gradients, states)
            if specs != self.specs:
                return "a DTensor has another mesh, or other placements"
            has_moved = _addresses([*found.params, *found.states]) != self.addresses
        # No dict, no such key, no tensor, no DTensor, or no memory.
        except (KeyError, TypeError, AttributeError, RuntimeError):
            return "a state is missing, or is no tensor"
        if has_moved:
            return "a parameter or state has another address"
        if not self.same_layout(*found.params, *found.states, *found.gradients):
            return "a tensor has another dtype, shape, stride or device"
        return found


def _read_tensors(
    places: LaunchPlaces, params: list[Any], gradients: list[Any], states: list[Any]
) -> tuple[StepTensors, list[Any]]:
    """Return the tensors of a launch, and the specs of those that are DTensors.

    Raises:
        KeyError, TypeError, AttributeError: a state is missing, or something is no DTensor.
    """
    tensors = _read(states, places.keys)
    if not places.is_sharded:
        return StepTensors(params, gradients, tensors, len(places.keys), places.scalars), []
    sharded = [*params, *_read(states, places.keys[places.scalars :])]
    specs = list(map(_spec, [*sharded, *gradients]))
    found = StepTensors(
        list(map(_local, params)),
        list(map(_local, gradients)),
        [x if type(x) is torch.Tensor else x._local_tensor for x in tensors],
        len(places.keys),
        places.scalars,
        sharded,
    )
    return found, specs


def _take(positions: list[int]) -> _Take:
    """Return a function that takes some positions out of a list."""
    count = len(positions)
    if positions == list(range(count)):
        return lambda values: values[:count]
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


def _exist(gradients: Iterable[Any]) -> list[bool]:
    return list(map(operator.is_not, gradients, itertools.repeat(None)))


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
