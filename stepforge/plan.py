"""The plan of a step: rows laid out once for their backends, and kept while nothing has moved.

Walking over parameters, states and options in Python costs more than a kernel takes. A plan holds
what the last step found; before it is used again it is compared with what is there now, down to
every tensor's identity, address and layout, by loops that run in C. What differs makes it stale.
"""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
from stepforge.entries import first_index, local
from stepforge.expr import Graph
from stepforge.ops import scalar_dtype
from stepforge.rows import Row, checked_rows, keep_new_states, stepping


@dataclass(frozen=True)
class Launch:
    """Rows that one backend steps together.

    Attributes:
        backend: who runs it.
        batch: what it runs.
        steps: the step counts of the rows.
        scalars: the scalar states of the rows, each with its new value.
    """

    backend: Backend
    batch: Batch
    steps: list[torch.Tensor]
    scalars: list[tuple[torch.Tensor, Any]]

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
        skipped = self._skipped()
        with torch.no_grad():
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
    stepped = set(map(id, (row.p for row in rows)))
    lanes = [Lane.of(rule, batch, launch) for batch, launch in zip(batches, prepared)]
    plan = Plan(
        lanes=tuple(lane for _, lane in lanes),
        groups=_Groups.of(rule, groups),
        idle=tuple(p for group in groups for p in group["params"] if id(p) not in stepped),
        entries=tuple(state.values()),
        environment=_environment(),
    )
    return [launch for launch, _ in lanes], plan


@dataclass(frozen=True)
class Plan:
    """What a step was made from, to make the next one of. It holds no gradients.

    Attributes:
        lanes: what each launch was made from.
        groups: the param groups as they were.
        idle: the parameters that had no gradient.
        entries: the entries of ``optimizer.state``.
        environment: the variables that choose backends.
    """

    lanes: tuple[Lane, ...]
    groups: _Groups
    idle: tuple[torch.Tensor, ...]
    entries: tuple[Any, ...]
    environment: tuple[str | None, ...]

    def renewed(
        self, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]
    ) -> list[Launch] | None:
        """The launches of another step, with its gradients and coefficients; None if stale."""
        if (
            self.environment != _environment()
            or not self.groups.hold(groups)
            or any(p.grad is not None for p in self.idle)
            or len(state) != len(self.entries)
            or not all(map(operator.is_, state.values(), self.entries))
        ):
            return None
        launches = [lane.renewed() for lane in self.lanes]
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
        or step.dtype != (torch.float32 if _on_device(row) else scalar_dtype())
        or (_on_device(row) and step.device != row.p.device)
        or any(type(x) not in (torch.Tensor, torch.nn.Parameter) for x in tensors)
    )


@dataclass(frozen=True)
class _Groups:
    """Param groups as they were, compared by loops that run in C.

    Numbers are read anew by the lanes; only what graphs and backends depend on counts here.

    Attributes:
        groups: the groups themselves.
        members: the parameters of all of them, in order.
        counts: how many each has.
        flags: reads the options of a group that change what runs, whatever their value.
        options: what it read.
        amounts: for each option that changes what runs if it is zero, its value in each group.
    """

    groups: tuple[Mapping[str, Any], ...]
    members: tuple[torch.Tensor, ...]
    counts: list[int]
    flags: Callable[[Mapping[str, Any]], Any]
    options: list[Any]
    amounts: dict[str, list[Any]]

    @classmethod
    def of(cls, rule: Rule, groups: Sequence[Mapping[str, Any]]) -> _Groups:
        flags = operator.itemgetter(
            *(n for n, h in rule.hyperparameters.items() if h.static or n in EXECUTION_FLAGS)
        )
        params = [group["params"] for group in groups]
        return cls(
            tuple(groups),
            tuple(itertools.chain.from_iterable(params)),
            list(map(len, params)),
            flags,
            list(map(flags, groups)),
            {n: _each(groups, n) for n, h in rule.hyperparameters.items() if h.zero_is_off},
        )

    def hold(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these are the same groups with the same members, and nothing else would run."""
        if len(groups) != len(self.groups) or not all(map(operator.is_, groups, self.groups)):
            return False
        params = _each(groups, "params")
        return (
            list(map(len, params)) == self.counts
            and all(map(operator.is_, itertools.chain.from_iterable(params), self.members))
            and list(map(self.flags, groups)) == self.options
            and all(
                list(map(is_off, _each(groups, name))) == list(map(is_off, known))
                for name, known in self.amounts.items()
                if not all(map(operator.is_, _each(groups, name), known))
            )
        )


def _each(groups: Iterable[Mapping[str, Any]], name: str) -> list[Any]:
    """An option of each group."""
    return list(map(operator.itemgetter(name), groups))


@dataclass(frozen=True)
class Lane:
    """What a launch was made from, kept for the next step.

    Attributes:
        launch: the launch, with neither gradients nor coefficients.
        rule: the optimizer's rule.
        states: the entries of ``optimizer.state`` of its rows.
        keys: the names of the states that the rows keep.
        tensors: the parameters, then the states of each row in the order of ``keys``.
        addresses: where they begin.
        layout: tells whether tensors, these and then the gradients, have the dtypes, shapes,
            strides and devices they had.
        numbers: the step numbers, then the scalar states: one vector each, of which the rows'
            own tensors are elements.
        groups: the distinct param groups, and for each row the number of its own.
        streams: for each row what its keys follow from; None if nothing is rounded at random.
        on_device: whether its numbers are not to be waited for.
    """

    launch: Launch
    rule: Rule
    states: tuple[dict[str, Any], ...]
    keys: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    addresses: list[int]
    layout: Any
    numbers: Mapping[str, torch.Tensor]
    groups: _GroupsOfRows
    streams: Words | None
    on_device: bool

    @classmethod
    def of(cls, rule: Rule, rows: Sequence[Row], launch: Launch) -> tuple[Launch, Lane]:
        """The lane of those rows, whose step numbers and scalar states become views; the launch."""
        declared = [s for s in rule.states.values() if s.on(rows[0].group)]
        states = tuple(row.state for row in rows)
        keys = rows[0].kept.keys
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
        tensors = [*(row.p for row in rows), *_read(states, keys)]
        columns = {name: c for name, c in launch.batch.columns.items() if name != "g"}
        lane = cls(
            replace(launch, batch=replace(launch.batch, columns=columns, coefficients=[])),
            rule,
            states,
            keys,
            tuple(tensors),
            _addresses(tensors),
            _layout_check([*tensors, *(row.g for row in rows)]),
            numbers,
            _GroupsOfRows.of(rows),
            None if launch.batch.keys is None else _streams(rule, rows),
            _on_device(rows[0]),
        )
        return launch, lane

    def renewed(self) -> Launch | None:
        """The launch with this step's gradients and coefficients; None if anything has moved."""
        count = len(self.states)
        gradients = list(map(_grad, self.tensors[:count]))
        if any(map(operator.is_, gradients, itertools.repeat(None))):
            return None
        try:
            found = _read(self.states, self.keys)
        except KeyError:
            return None
        if (
            not all(map(operator.is_, found, self.tensors[count:]))
            or _addresses(self.tensors) != self.addresses
            or not self.layout(*self.tensors, *gradients)
        ):
            return None
        batch, graph = self.launch.batch, self.launch.batch.graph
        if batch.prepared is not None:
            batch.prepared.aim(gradients)
        coefficients, scalars = _split(graph, self._uniform_values(graph))
        return replace(
            self.launch,
            batch=replace(
                batch,
                columns=batch.columns | {"g": gradients},
                coefficients=[rounded(c, count, batch.dtype) for c in coefficients],
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

    def _uniform_values(self, graph: Graph) -> list[Any]:
        if self.on_device:
            (group,) = self.groups.distinct
            return device_values(graph, _device_inputs(self.rule, group, self.numbers))
        numbers = {key: vector.numpy() for key, vector in self.numbers.items()}
        return host_values(graph, _host_inputs(self.rule, graph, self.groups, numbers))


@dataclass(frozen=True)
class _GroupsOfRows:
    """The distinct param groups of some rows, and for each row the number of its own."""

    distinct: tuple[Mapping[str, Any], ...]
    own: np.ndarray[Any, Any]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> _GroupsOfRows:
        distinct = {id(row.group): row.group for row in rows}
        position = {key: number for number, key in enumerate(distinct)}
        return cls(tuple(distinct.values()), np.array([position[id(row.group)] for row in rows]))


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
    """Rows that can run together: of one backend, graph, device, arithmetic and formats.

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
    )


def _streams(rule: Rule, rows: Sequence[Row]) -> Words:
    """What the keys of each row follow from in all steps."""
    groups = _GroupsOfRows.of(rows)
    seeds = np.array(rule.numbers(groups.distinct, "rounding_seed"))[groups.own]
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
    numbers = {key: np.array([float(row.state[key]) for row in rows]) for key in keys.values()}
    if group["differentiable"]:
        options = dict(rule.uniform_values(group))
        by_row = [
            options | {letter: float(numbers[key][i]) for letter, key in keys.items()}
            for i in range(len(rows))
        ]
        return differentiable_values(graph, [row | {"t": row["t"] + 1} for row in by_row])
    return host_values(graph, _host_inputs(rule, graph, _GroupsOfRows.of(rows), numbers))


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
    groups: _GroupsOfRows,
    numbers: Mapping[str, np.ndarray[Any, Any]],
) -> dict[str, Any]:
    """The inputs of the uniform program as float64 arrays; a number where all rows agree.

    Numbers go through the program several times faster, and to the same bits.
    """
    inputs: dict[str, Any] = {}
    for name in graph.uniform.inputs:
        if name == "t":
            inputs[name] = _agreed(numbers["step"]) + 1
        elif name in rule.states:
            inputs[name] = _agreed(numbers[rule.states[name].key])
        else:
            known = list(map(float, rule.numbers(groups.distinct, name)))
            same = known.count(known[0]) == len(known)
            inputs[name] = known[0] if same else np.array(known)[groups.own]
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
