"""The plan of a step: rows laid out once for their backends, and kept while nothing has moved.

Walking over parameters, states and options in Python costs more than a kernel takes. A plan knows
what the last step found; before it is used again it is compared with what is there now, down to
every tensor's address and layout, by loops that run in C. What differs makes it stale.
"""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from stepforge.backends import Backend, Batch
from stepforge.backends.batch import LossScale, Words, arithmetic
from stepforge.coefficients import (
    device_values,
    differentiable_values,
    for_each_row,
    host_values,
    keys,
    rounded,
    streams,
)
from stepforge.declare import EXECUTION_FLAGS, Rule, is_off
from stepforge.entries import first_index
from stepforge.expr import Graph
from stepforge.rows import Row, checked_rows, keep_new_states, stepping
from stepforge.sharding import is_plain, is_sharded, local
from stepforge.signals import Deferred


@dataclass(frozen=True)
class Launch:
    """Rows that one backend steps together.

    Attributes:
        backend: who runs it.
        batch: what it runs.
        steps: the step counts of the rows.
        scalars: the scalar states of the rows, each with its new value.
        sharded: the parameters and states of which the batch has the parts that are here. Autograd
            looks at their versions, and a kernel writes to the parts.
    """

    backend: Backend
    batch: Batch
    steps: list[torch.Tensor]
    scalars: list[tuple[torch.Tensor, Any]]
    sharded: list[torch.Tensor] = field(default_factory=list)

    def scaled(self, loss_scale: LossScale) -> Launch:
        """The same, on gradients of which a gradient scaler says that.

        A backend that waits for its device is told numbers, and so is who keeps step counts on the
        host.
        """
        device = self.batch.columns["p"][0].device
        if not self.backend.asynchronous or any(step.device != device for step in self.steps):
            loss_scale = loss_scale.read()
        return replace(self, batch=replace(self.batch, loss_scale=loss_scale))

    def run(self) -> None:
        """Steps the rows, and keeps what changes beside their tensors: scalar states and steps."""
        scale = self.batch.loss_scale
        if scale is not None and scale.on_host and scale.found_inf:
            return
        self.backend.run(self.batch)
        if self.sharded:
            torch.autograd.graph.increment_version(self.sharded)
        skipped = self._skipped()
        with torch.set_grad_enabled(self.batch.differentiable):
            for state, value in self.scalars:
                _keep(state, value, skipped)
            more = 1 if skipped is None else torch.where(skipped, 0.0, 1.0)
            if len(self.steps) == 1:
                self.steps[0].add_(more)
            else:
                torch._foreach_add_(self.steps, more)

    def _skipped(self) -> torch.Tensor | None:
        """Whether the step is skipped, if only the device knows."""
        scale = self.batch.loss_scale
        if scale is None or scale.on_host:
            return None
        device = self.batch.columns["p"][0].device
        return scale.on_device(device, self.batch.dtype)[1].reshape(()) != 0


def _keep(state: torch.Tensor, value: Any, skipped: torch.Tensor | None) -> None:
    """Gives a scalar state its new value, unless the step is skipped."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if skipped is not None:
        value = torch.where(skipped, state, value)
    if isinstance(value, torch.Tensor):
        state.copy_(value)
    else:
        state.fill_(value)


def run(launches: Iterable[Launch]) -> None:
    """Steps what a step has to step, between two signals' handlers."""
    with Deferred():
        for launch in launches:
            launch.run()


def launches(rule: Rule, rows: Sequence[Row]) -> list[Launch]:
    """What steps those rows, of which nothing is to be kept."""
    return [_prepared(_launch(rule, batch)) for batch in _batches(rows)]


def lay_out(
    rule: Rule,
    groups: Sequence[dict[str, Any]],
    state: MutableMapping[Any, dict[str, Any]],
    *,
    refuses_sparse: str | None,
    captured: bool = False,
) -> tuple[list[Launch], Plan | None]:
    """What the next step runs. Raises before anything has changed.

    Args:
        rule: the optimizer's rule.
        groups: its param groups.
        state: its state, to which what is missing is added.
        refuses_sparse: what to say of a sparse gradient; None if the rule takes them.
        captured: whether a graph knows where numbers of a capturable group are, which then stay
            there.

    Returns:
        The launches, and the plan to keep for the steps that follow, if one can be kept.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`~stepforge.rows.checked_rows` does.
    """
    rows = checked_rows(rule, stepping(groups, state), refuses_sparse=refuses_sparse)
    batches = _batches(rows)
    prepared = [_prepared(_launch(rule, batch)) for batch in batches]
    keep_new_states(rows, state)
    if not rows or not all(map(_is_plain, rows)):
        return prepared, None
    if captured and not all(
        _are_vectors(rule, batch) for batch in batches if batch[0].group["capturable"]
    ):
        return prepared, None
    lanes = [
        Lane.of(rule, groups, state, batch, launch) for batch, launch in zip(batches, prepared)
    ]
    stepped = {id(row.p) for row in rows}
    plan = Plan(
        lanes=tuple(lane for _, lane in lanes),
        groups=_Groups.of(rule, groups),
        idle=[id(p) not in stepped for group in groups for p in group["params"]],
        entries=list(map(id, state)),
        environment=_environment(),
    )
    return [launch for launch, _ in lanes], plan


@dataclass(frozen=True)
class Plan:
    """What a step was made from, to make the next one of.

    It owns no parameter, gradient, state or group, so that those which are dropped are freed at
    once. It knows parameters by their ids: should another one have come to bear an id, it is read
    from the groups and the state like any other, and its address and layout are compared.

    Attributes:
        lanes: what each launch was made from.
        groups: the param groups as they were.
        idle: for each parameter of the groups, in order, whether it had no gradient.
        entries: the ids of the keys of ``optimizer.state``, in order.
        environment: the variables that choose backends.
    """

    lanes: tuple[Lane, ...]
    groups: _Groups
    idle: list[bool]
    entries: list[int]
    environment: tuple[str | None, ...]

    def renewed(
        self, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]
    ) -> list[Launch] | None:
        """The launches of another step, with its gradients and coefficients; None if stale."""
        if self.environment != _environment() or list(map(id, state)) != self.entries:
            return None
        params = self.groups.params_of(groups)
        if params is None:
            return None
        gradients = list(map(_grad, params))
        if list(map(operator.is_, gradients, itertools.repeat(None))) != self.idle:
            return None
        entries = list(state.values())
        launches = [lane.renewed(groups, params, gradients, entries) for lane in self.lanes]
        return [x for x in launches if x is not None] if all(launches) else None


def _prepared(launch: Launch) -> Launch:
    prepared = launch.backend.prepare(launch.batch)
    return replace(launch, batch=replace(launch.batch, prepared=prepared))


def _environment() -> tuple[str | None, ...]:
    return os.environ.get("STEPFORGE_BACKEND"), os.environ.get("STEPFORGE_ISA")


def _on_device(row: Row) -> bool:
    """Whether a row's numbers are not to be waited for: steps, scalar states, coefficients."""
    return bool(row.group["capturable"]) or row.state["step"].device.type != "cpu"


def _is_plain(row: Row) -> bool:
    """Whether a row's tensors are nothing but memory, of the dtypes and devices they began with."""
    tensors = [row.p, row.g, *(x for x in row.state.values() if isinstance(x, torch.Tensor))]
    step = row.state["step"]
    return not (
        row.group["differentiable"]
        or row.p.is_complex()
        or row.g.is_sparse
        or step.dtype not in (torch.float32, torch.float64)
        or (_on_device(row) and step.device != row.p.device)
        or not all(map(is_plain, tensors))
    )


@dataclass(frozen=True)
class _Groups:
    """Param groups as they were, compared by loops that run in C.

    Numbers are read anew by the lanes; only what graphs and backends depend on counts here.

    Attributes:
        params: the ids of the parameters of all groups, in order.
        counts: how many each has.
        flags: reads the options of a group that change what runs, whatever their value.
        options: what it read.
        amounts: for each option that changes what runs if it is zero, its value in each group.
    """

    params: list[int]
    counts: list[int]
    flags: Callable[[Mapping[str, Any]], Any]
    options: list[Any]
    amounts: dict[str, list[Any]]

    @classmethod
    def of(cls, rule: Rule, groups: Sequence[Mapping[str, Any]]) -> _Groups:
        flags = operator.itemgetter(
            *(n for n, h in rule.hyperparameters.items() if h.static or n in EXECUTION_FLAGS)
        )
        params = _each(groups, "params")
        return cls(
            list(map(id, itertools.chain.from_iterable(params))),
            list(map(len, params)),
            flags,
            list(map(flags, groups)),
            {n: _each(groups, n) for n, h in rule.hyperparameters.items() if h.zero_is_off},
        )

    def params_of(self, groups: Sequence[Mapping[str, Any]]) -> list[torch.Tensor] | None:
        """The parameters of groups that have the same ones and run the same; else None."""
        params = _each(groups, "params")
        members = list(itertools.chain.from_iterable(params))
        is_same = (
            list(map(len, params)) == self.counts
            and list(map(id, members)) == self.params
            and list(map(self.flags, groups)) == self.options
            and all(
                list(map(is_off, _each(groups, name))) == list(map(is_off, known))
                for name, known in self.amounts.items()
                if not all(map(operator.is_, _each(groups, name), known))
            )
        )
        return members if is_same else None


def _each(groups: Iterable[Mapping[str, Any]], name: str) -> list[Any]:
    """An option of each group."""
    return list(map(operator.itemgetter(name), groups))


@dataclass(frozen=True)
class Lane:
    """What a launch was made from, to make that of the next step of.

    Attributes:
        launch: the launch, without tensors and coefficients.
        rule: the optimizer's rule.
        params: takes the parameters of its rows out of those of all groups.
        entries: takes their entries out of those of ``optimizer.state``.
        keys: the names of the states that the rows keep.
        columns: for each tensor of a batch that is a state, its place among ``keys``.
        addresses: where the parameters begin, and then the states of each row in the order of
            ``keys``.
        layout: tells whether tensors, these and then the gradients, have the dtypes, shapes,
            strides and devices they had.
        numbers: the step numbers, then the scalar states: one vector each, of which the rows'
            own tensors are elements.
        groups: the positions of its distinct param groups.
        own: for each row which of them is its own.
        streams: for each row what its keys follow from; None if nothing is rounded at random.
        on_device: whether its numbers are not to be waited for.
    """

    launch: Launch
    rule: Rule
    params: _Take
    entries: _Take
    keys: tuple[str, ...]
    columns: Mapping[str, int]
    addresses: list[int]
    layout: Any
    numbers: Mapping[str, torch.Tensor]
    groups: list[int]
    own: np.ndarray[Any, Any]
    streams: Words | None
    on_device: bool

    @classmethod
    def of(
        cls,
        rule: Rule,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Any, Any],
        rows: Sequence[Row],
        launch: Launch,
    ) -> tuple[Launch, Lane]:
        """The lane of those rows, whose step numbers and scalar states become views; the launch."""
        declared = [s for s in rule.states.values() if s.on(rows[0].group)]
        states = tuple(row.state for row in rows)
        kept = rows[0].kept
        numbers = {
            key: _as_one_vector(states, key)
            for key in ("step", *(s.key for s in declared if s.scalar))
        }
        scalars = [s[rule.states[x].key] for x in launch.batch.graph.scalars for s in states]
        launch = replace(
            launch,
            steps=[numbers["step"]],
            scalars=list(zip(scalars, (value for _, value in launch.scalars))),
        )
        tensors = [*(row.p for row in rows), *_read(states, kept.keys)]
        distinct, own = _groups_of(rows)
        members = list(itertools.chain.from_iterable(_each(groups, "params")))
        of_params, of_entries, of_groups = map(_places, (members, state, groups))
        batch = replace(launch.batch, columns={}, coefficients=[])
        lane = cls(
            replace(launch, batch=batch, steps=[], scalars=[]),
            rule,
            _take([of_params[id(row.p)] for row in rows], len(members)),
            _take([of_entries[id(row.p)] for row in rows], len(state)),
            kept.keys,
            {slot.name: kept.keys.index(slot.key) for slot in kept.slots},
            _addresses(tensors),
            _layout_check([*tensors, *(row.g for row in rows)]),
            numbers,
            [of_groups[id(group)] for group in distinct],
            own,
            None if launch.batch.keys is None else _streams(rule, rows),
            _on_device(rows[0]),
        )
        return launch, lane

    def renewed(
        self,
        groups: Sequence[Mapping[str, Any]],
        params: list[torch.Tensor],
        gradients: list[torch.Tensor],
        entries: list[Any],
    ) -> Launch | None:
        """The launch with this step's tensors and coefficients; None if anything has moved.

        Args:
            groups: the param groups.
            params: the parameters of all of them.
            gradients: the gradient of each.
            entries: the values of ``optimizer.state``.
        """
        params, gradients = self.params(params), self.params(gradients)
        try:
            states = _read(self.entries(entries), self.keys)
            is_same = _addresses([*params, *states]) == self.addresses
        except (KeyError, TypeError, RuntimeError):  # no dict, no such key, no tensor, no memory
            return None
        if not is_same or not self.layout(*params, *states, *gradients):
            return None
        batch, graph = self.launch.batch, self.launch.batch.graph
        if batch.prepared is not None:
            batch.prepared.aim(gradients)
        distinct = [groups[position] for position in self.groups]
        coefficients, scalars = _split(graph, self._uniform_values(graph, distinct))
        width = len(self.keys)
        columns = {name: states[place::width] for name, place in self.columns.items()}
        return replace(
            self.launch,
            batch=replace(
                batch,
                columns={"p": params, "g": gradients, **columns},
                coefficients=[rounded(c, len(params), batch.dtype) for c in coefficients],
                keys=None if self.streams is None else keys(self.streams, self.numbers["step"]),
            ),
            steps=[self.numbers["step"]],
            scalars=[
                (
                    self.numbers[self.rule.states[letter].key],
                    value if isinstance(value, torch.Tensor) else np.asarray(value),
                )
                for letter, value in zip(graph.scalars, scalars)
            ],
        )

    def _uniform_values(self, graph: Graph, distinct: Sequence[Mapping[str, Any]]) -> list[Any]:
        if self.on_device:
            (group,) = distinct
            return device_values(graph, _device_inputs(self.rule, group, self.numbers))
        numbers = {key: vector.numpy() for key, vector in self.numbers.items()}
        return host_values(graph, _host_inputs(self.rule, graph, distinct, self.own, numbers))


_Take: TypeAlias = Callable[[list[Any]], list[Any]]


def _take(positions: list[int], count: int) -> _Take:
    """A function that takes the elements at some positions out of a list of so many."""
    if positions == list(range(count)):
        return list
    if len(positions) == 1:
        return lambda values: [values[positions[0]]]
    take = operator.itemgetter(*positions)
    return lambda values: list(take(values))


def _places(keys: Iterable[Any]) -> dict[int, int]:
    """The first position of each object, by its id."""
    places: dict[int, int] = {}
    for position, key in enumerate(keys):
        places.setdefault(id(key), position)
    return places


def _groups_of(rows: Sequence[Row]) -> tuple[list[Mapping[str, Any]], np.ndarray[Any, Any]]:
    """The distinct param groups of rows, and for each row which of them is its own."""
    distinct = {id(row.group): row.group for row in rows}
    places = {key: place for place, key in enumerate(distinct)}
    return list(distinct.values()), np.array([places[id(row.group)] for row in rows])


_grad = operator.attrgetter("grad")


def _read(states: Iterable[dict[str, Any]], keys: Sequence[str]) -> list[Any]:
    """The values of those keys in each dict, one after the other."""
    if len(keys) == 1:
        return list(map(operator.itemgetter(*keys), states))
    return list(itertools.chain.from_iterable(map(operator.itemgetter(*keys), states)))


def _addresses(tensors: Iterable[torch.Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, tensors))


def _are_vectors(rule: Rule, rows: Sequence[Row]) -> bool:
    """Whether the step numbers and scalar states of rows are vectors already."""
    keys = ["step", *(s.key for s in rule.states.values() if s.scalar and s.on(rows[0].group))]
    return all(_shared_vector([row.state[key] for row in rows]) is not None for key in keys)


def _as_one_vector(states: Sequence[dict[str, Any]], key: str) -> torch.Tensor:
    """One vector of a scalar state of all rows, of which the rows' states become elements."""
    tensors = [state[key] for state in states]
    shared = _shared_vector(tensors)
    if shared is not None:
        return shared
    vector = torch.stack([x.detach().reshape(()) for x in tensors])
    for state, element in zip(states, vector.unbind()):
        state[key] = element
    return vector


def _shared_vector(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The vector whose elements these tensors are, all of them in its order; None if none is."""
    base: torch.Tensor | None = tensors[0]._base
    if (
        base is not None
        and base.dim() == 1
        and all(x._base is base for x in tensors)
        and _addresses(tensors) == _addresses(base.unbind())
    ):
        return base
    return None


def _layout_check(tensors: Sequence[torch.Tensor]) -> Any:
    """A function of as many tensors: whether they have these dtypes, shapes, strides, devices."""
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
    return guards.check


def _layout(x: torch.Tensor) -> tuple[Any, ...]:
    return x.dtype, x.shape, x.stride(), x.device, x.layout, x.is_neg(), type(x)


def _batches(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that can run together: of one backend, graph, device, arithmetic, formats, numbers.

    Options that are not flags may differ within a batch; but device values cannot be told apart
    without waiting for them, so there a group is alone.
    """
    batches: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        alone = _on_device(row) or row.group["differentiable"]
        key = (
            row.choice.backend.name,
            id(row.graph),
            row.kept.storage.key,
            row.p.device,
            arithmetic(row.p.dtype),
            tuple(row.state[key].dtype for key in row.kept.scalars),  # a vector has but one
            id(row.group) if alone else None,
        )
        batches.setdefault(key, []).append(row)
    return list(batches.values())


def _launch(rule: Rule, rows: Sequence[Row]) -> Launch:
    group, graph, dtype = rows[0].group, rows[0].graph, arithmetic(rows[0].p.dtype)
    coefficients, scalars = _split(graph, _uniform_values(rule, rows))
    given = [rounded(c, len(rows), dtype) for c in coefficients]
    columns = {
        "p": [_real(row.p) for row in rows],
        "g": [_real(row.g.resolve_conj()) for row in rows],
    }
    for slots in zip(*(row.kept.slots for row in rows)):
        columns[slots[0].name] = [_real(row.state[slot.key]) for row, slot in zip(rows, slots)]
    formats = rows[0].kept.storage.formats
    batch = Batch(graph, columns, given, dtype, formats, differentiable=group["differentiable"])
    if any(format_.is_random for format_ in formats.values()):
        batch = replace(
            batch,
            keys=keys(_streams(rule, rows), _steps(rows)),
            starts=np.array([first_index(row.p) for row in rows]),
        )
    return Launch(
        rows[0].choice.backend,
        batch,
        [row.state["step"] for row in rows],
        [
            (row.state[rule.states[letter].key], value)
            for letter, column in zip(graph.scalars, scalars)
            for row, value in zip(rows, for_each_row(column, len(rows)))
        ],
        [
            x
            for row in rows
            for x in (row.p, *(row.state[slot.key] for slot in row.kept.slots))
            if is_sharded(x)
        ],
    )


def _streams(rule: Rule, rows: Sequence[Row]) -> Words:
    """What the keys of each row follow from in all steps."""
    distinct, own = _groups_of(rows)
    seeds = np.array(rule.numbers(distinct, "rounding_seed"))[own]
    device = rows[0].p.device if _on_device(rows[0]) else torch.device("cpu")
    return streams(seeds, np.array([row.number for row in rows]), device)


def _steps(rows: Sequence[Row]) -> torch.Tensor:
    """The step counts of rows as one vector."""
    return torch.stack([row.state["step"].detach().reshape(()) for row in rows])


def _split(graph: Graph, values: list[Any]) -> tuple[list[Any], list[Any]]:
    """The results of the uniform program: coefficients, and the new values of scalar states."""
    return values[: len(graph.coefficients)], values[len(graph.coefficients) :]


def _uniform_values(rule: Rule, rows: Sequence[Row]) -> list[Any]:
    group, graph = rows[0].group, rows[0].graph
    keys = {"t": "step"} | {letter: s.key for letter, s in rule.states.items() if s.scalar}
    if _on_device(rows[0]):
        vectors = {key: torch.stack([row.state[key] for row in rows]) for key in keys.values()}
        return device_values(graph, _device_inputs(rule, group, vectors))
    if group["differentiable"]:
        options = dict(rule.uniform_values(group))
        by_row = [
            options | {letter: _seen(row.state[key]) for letter, key in keys.items()}
            for row in rows
        ]
        return differentiable_values(graph, [row | {"t": row["t"] + 1} for row in by_row])
    numbers = {key: np.array([float(row.state[key]) for row in rows]) for key in keys.values()}
    return host_values(graph, _host_inputs(rule, graph, *_groups_of(rows), numbers))


def _seen(number: torch.Tensor) -> torch.Tensor | float:
    """A scalar state as autograd is to see it: in-place writes then leave what it keeps alone."""
    return number.clone() if number.requires_grad else float(number)


def _device_inputs(
    rule: Rule, group: Mapping[str, Any], numbers: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """The inputs of the uniform program: the options of a group, and a vector of each number."""
    scalars = {letter: numbers[s.key] for letter, s in rule.states.items() if s.key in numbers}
    options = dict(rule.uniform_values(group))
    return {
        # One on the host meets vectors on a device only without dimensions.
        **{k: x.reshape(()) if isinstance(x, torch.Tensor) else x for k, x in options.items()},
        **scalars,
        "t": numbers["step"].to(torch.float64) + 1,
    }


def _host_inputs(
    rule: Rule,
    graph: Graph,
    groups: Sequence[Mapping[str, Any]],
    own: np.ndarray[Any, Any],
    numbers: Mapping[str, np.ndarray[Any, Any]],
) -> dict[str, Any]:
    """The inputs of the uniform program as float64 arrays; a number where all rows agree.

    Numbers go through the program several times faster, and to the same bits.

    Args:
        rule: the optimizer's rule.
        graph: whose program it is.
        groups: the distinct param groups of the rows.
        own: for each row which of them is its own.
        numbers: the step numbers and scalar states of the rows, by their keys.
    """
    inputs: dict[str, Any] = {}
    for name in graph.uniform.inputs:
        if name == "t":
            inputs[name] = _agreed(numbers["step"]) + 1
        elif name in rule.states:
            inputs[name] = _agreed(numbers[rule.states[name].key])
        else:
            known = list(map(float, rule.numbers(groups, name)))
            same = known.count(known[0]) == len(known)
            inputs[name] = known[0] if same else np.array(known)[own]
    return inputs


def _agreed(column: np.ndarray[Any, Any]) -> Any:
    """The number on which all rows agree, or all of them in float64."""
    first = column[0]
    return float(first) if (column == first).all() else column.astype(np.float64)


def _real(x: torch.Tensor) -> torch.Tensor:
    """The local part of a sharded tensor, and the real view of a complex one."""
    x = local(x)
    if not x.is_complex():
        return x
    if x.is_sparse:
        values = torch.view_as_real(x._values())
        return torch.sparse_coo_tensor(
            x._indices(), values, (*x.shape, 2), is_coalesced=True, check_invariants=False
        )
    return torch.view_as_real(x)
