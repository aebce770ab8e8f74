"""The plan of a step: which rows go to which backend, with which coefficients.

A step has two halves. The first checks every parameter and raises before anything has changed; the
second makes missing states, gathers rows into batches and runs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stepforge.backends import Backend, Batch, Choice, choose
from stepforge.backends.batch import Coefficient
from stepforge.declare import Rule, State, is_off
from stepforge.expr import Graph, evaluate
from stepforge.ops import VOCABULARY, scalar_dtype


@dataclass
class Row:
    """One parameter with what a step needs of it.

    Attributes:
        p: the parameter.
        g: its gradient, coalesced if sparse.
        group: the options of its param group.
        choice: the backend that serves it.
        state: its entry of ``optimizer.state``; empty before :func:`prepare`.
    """

    p: torch.Tensor
    g: torch.Tensor
    group: Mapping[str, Any]
    choice: Choice
    state: dict[str, Any]


def check(
    rule: Rule,
    groups: Iterable[Mapping[str, Any]],
    state: Mapping[Any, Any],
    *,
    refuses_sparse: str | None,
    compiling: bool = False,
) -> list[list[Row]]:
    """The rows of a step by group: every parameter that has a gradient. Changes nothing.

    Args:
        rule: the optimizer's rule.
        groups: the optimizer's param groups.
        state: the optimizer's state.
        refuses_sparse: what to say of a sparse gradient; None if the rule takes them.
        compiling: whether ``torch.compile`` traces the step.

    Raises:
        RuntimeError: a gradient is sparse and may not be, or no backend can do what was asked for.
        TypeError: a parameter is neither real nor complex floating point.
    """
    return [
        _checked_rows(group, rule.graph(group), state, refuses_sparse, compiling)
        for group in groups
    ]


def _checked_rows(
    group: Mapping[str, Any],
    graph: Graph,
    state: Mapping[Any, Any],
    refuses_sparse: str | None,
    compiling: bool,
) -> list[Row]:
    rows = []
    choices: dict[Any, Choice] = {}
    params = group["params"]
    if len(set(map(id, params))) < len(params):
        params = list(dict.fromkeys(params))
    for p in params:
        g = p.grad
        if g is None:
            continue
        if g.is_sparse:
            g = _coalesced(g, group, refuses_sparse)
        # All that a choice depends on: parameters alike in it are asked about once.
        kind = (p.dtype, g.dtype, p.device, g.layout, type(p))
        if kind not in choices:
            _check_dtypes(p, g)
            choices[kind] = choose(p, g, group, graph, compiling=compiling)
        rows.append(Row(p, g, group, choices[kind], {}))
        if group["differentiable"] and state.get(p, {}).get("step", p.data).requires_grad:
            raise RuntimeError("`requires_grad` is not supported for `step` in differentiable mode")
    return rows


def _coalesced(
    g: torch.Tensor, group: Mapping[str, Any], refuses_sparse: str | None
) -> torch.Tensor:
    if refuses_sparse:
        raise RuntimeError(refuses_sparse)
    if not is_off(group.get("weight_decay", 0)):
        raise RuntimeError("weight_decay option is not compatible with sparse gradients")
    return g.coalesce()


def _check_dtypes(p: torch.Tensor, g: torch.Tensor) -> None:
    if not (p.is_floating_point() or p.is_complex()):
        raise TypeError(
            f"a parameter of dtype {p.dtype} has a gradient; only floating point and complex "
            "parameters can be optimized"
        )
    if g.is_complex() and not p.is_complex():
        raise TypeError(f"a parameter of dtype {p.dtype} has a gradient of {g.dtype}")


def initial_state(rule: Rule, p: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter before its first step, ``step`` included."""
    on_device = group["capturable"] or group["fused"]
    # A generated kernel or a captured graph counts on the device, in float32 as torch.optim does.
    dtype = torch.float32 if group["fused"] else scalar_dtype()
    device = p.device if on_device else torch.device("cpu")
    state: dict[str, Any] = {"step": torch.zeros((), dtype=dtype, device=device)}
    for declared in rule.states.values():
        if declared.on(group):
            state[declared.key] = _initial_value(declared, p, group, dtype, device)
    return state


def _initial_value(
    declared: State,
    p: torch.Tensor,
    group: Mapping[str, Any],
    scalar_dtype: torch.dtype,
    scalar_device: torch.device,
) -> torch.Tensor:
    value = group[declared.init] if isinstance(declared.init, str) else declared.init
    if declared.scalar:
        return torch.full((), value, dtype=scalar_dtype, device=scalar_device)
    if p.is_complex():
        value = complex(value, value)  # real and imaginary parts are averaged each by itself
    return torch.full_like(p.detach(), value, memory_format=torch.preserve_format)


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


def prepare(
    rule: Rule,
    rows: list[list[Row]],
    state: MutableMapping[Any, dict[str, Any]],
    *,
    compiling: bool = False,
) -> list[Launch]:
    """Makes the states that are missing, and lays the rows out for their backends.

    Args:
        rule: the optimizer's rule.
        rows: what :func:`check` found to be right.
        state: the optimizer's state.
        compiling: whether ``torch.compile`` traces the step. It would take a number for a constant
            and compile anew when it changes, so coefficients become tensors.
    """
    batches: dict[tuple[Any, ...], list[Row]] = {}
    graphs: dict[int, Graph] = {}
    for members in filter(None, rows):
        group = members[0].group
        graph = rule.graph(group)
        graphs[id(group)] = graph
        _complete(rule, members, state)
        # Device values cannot be told apart without waiting for them: a group at a time. Of other
        # groups, options that are not flags may differ within a batch.
        alone = id(group) if group["capturable"] or group["differentiable"] else None
        for row in members:
            key = (row.choice.backend.name, id(graph), row.p.device, _arithmetic(row.p), alone)
            batches.setdefault(key, []).append(row)
    return [
        _launch(rule, graphs[id(batch[0].group)], batch, compiling) for batch in batches.values()
    ]


def count(launch: Launch) -> None:
    """Keeps what a launch that has run changes beside its tensors: scalar states and steps."""
    with torch.no_grad():
        for state, value in launch.scalars:
            state.fill_(value)
        torch._foreach_add_(launch.steps, 1)


def _complete(rule: Rule, rows: list[Row], state: MutableMapping[Any, dict[str, Any]]) -> None:
    """Looks up the states of a group's rows, and makes those that are missing."""
    keys = {"step", *(s.key for s in rule.states.values() if s.on(rows[0].group))}
    for row in rows:
        row.state = state[row.p]
        if not row.state.keys() >= keys:
            fresh = initial_state(rule, row.p, row.group)
            row.state.update({k: v for k, v in fresh.items() if k not in row.state})


def _arithmetic(p: torch.Tensor) -> torch.dtype:
    wide = (torch.float64, torch.complex128)
    return torch.float64 if p.dtype in wide else torch.float32


def _launch(rule: Rule, graph: Graph, rows: list[Row], compiling: bool) -> Launch:
    group, dtype = rows[0].group, _arithmetic(rows[0].p)
    if group["capturable"]:
        values = _device_values(rule, graph, rows)
    elif group["differentiable"]:
        values = _differentiable_values(rule, graph, rows)
    else:
        values = _host_values(rule, graph, rows)
    numbers = len(graph.coefficients)
    coefficients = [_coefficient(value, len(rows), dtype) for value in values[:numbers]]
    if compiling:
        coefficients = [_as_tensors(c, rows[0].p.device) for c in coefficients]
    columns = {
        "p": [_real(row.p) for row in rows],
        "g": [_real(row.g.resolve_conj()) for row in rows],
    }
    for letter, declared in rule.states.items():
        if declared.on(group) and not declared.scalar:
            columns[letter] = [_real(row.state[declared.key]) for row in rows]
    scalars = [
        (row.state[rule.states[letter].key], value)
        for letter, column in zip(graph.scalars, values[numbers:])
        for row, value in zip(rows, _for_each_row(column, len(rows)))
    ]
    batch = Batch(graph, columns, coefficients, dtype, differentiable=group["differentiable"])
    return Launch(rows[0].choice.backend, batch, [row.state["step"] for row in rows], scalars)


def _real(x: torch.Tensor) -> torch.Tensor:
    """The local part of a sharded tensor, and the real view of a complex one."""
    if hasattr(x, "to_local"):
        x = x.to_local()
    if not x.is_complex():
        return x
    if x.is_sparse:
        values = torch.view_as_real(x._values())
        return torch.sparse_coo_tensor(
            x._indices(), values, (*x.shape, 2), is_coalesced=True, check_invariants=False
        )
    return torch.view_as_real(x)


def _host_values(rule: Rule, graph: Graph, rows: list[Row]) -> list[Any]:
    """The uniform values of all rows in float64, one array element a row."""
    groups = {id(row.group): row.group for row in rows}
    options = {key: dict(rule.uniform_values(group)) for key, group in groups.items()}
    scalars = {letter: s.key for letter, s in rule.states.items() if s.scalar}
    inputs: dict[str, Any] = {}
    for name in graph.uniform.inputs:
        if name == "t":
            numbers = [float(row.state["step"]) + 1 for row in rows]
        elif name in scalars:
            numbers = [float(row.state[scalars[name]]) for row in rows]
        elif len(groups) == 1:
            numbers = [float(options[id(rows[0].group)][name])]
        else:
            known = {key: float(values[name]) for key, values in options.items()}
            numbers = [known[id(row.group)] for row in rows]
        inputs[name] = np.array(numbers, dtype=np.float64)
    with np.errstate(all="ignore"):
        return evaluate(graph.uniform, inputs, (), VOCABULARY)


def _differentiable_values(rule: Rule, graph: Graph, rows: list[Row]) -> list[Any]:
    """The uniform values as numbers, and as float64 tensors where autograd has to see them."""
    by_row = []
    for row in rows:
        known = dict(rule.uniform_values(row.group), t=float(row.state["step"]) + 1)
        for letter, s in rule.states.items():
            if s.scalar:
                known[letter] = float(row.state[s.key])
        inputs = {name: _wide(known[name]) for name in graph.uniform.inputs}
        by_row.append(evaluate(graph.uniform, inputs, (), VOCABULARY))
    return [list(values) for values in zip(*by_row)]


def _device_values(rule: Rule, graph: Graph, rows: list[Row]) -> list[Any]:
    """The uniform values as float64 vectors on the device, without waiting for it."""
    known = dict(rule.uniform_values(rows[0].group))
    known["t"] = torch.stack([row.state["step"] for row in rows]).to(torch.float64) + 1
    for letter, s in rule.states.items():
        if s.scalar:
            known[letter] = torch.stack([row.state[s.key] for row in rows])
    inputs = {name: _wide(known[name]) for name in graph.uniform.inputs}
    return evaluate(graph.uniform, inputs, (), VOCABULARY)


def _wide(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return float(value)
    value = value.to(torch.float64)
    return value.reshape(()) if value.numel() == 1 and value.dim() != 1 else value


def _coefficient(values: Any, count: int, dtype: torch.dtype) -> Coefficient:
    """A uniform value for each row, rounded to the dtype of the arithmetic."""
    if isinstance(values, torch.Tensor) or (
        isinstance(values, list) and any(isinstance(value, torch.Tensor) for value in values)
    ):
        rows = _for_each_row(values, count)
        return [torch.as_tensor(value, dtype=torch.float64).to(dtype) for value in rows]
    array = np.broadcast_to(np.asarray(values), (count,))
    if array.dtype == np.bool_:
        return array
    with np.errstate(over="ignore"):
        return array.astype(np.float64 if dtype == torch.float64 else np.float32)


def _as_tensors(column: Coefficient, device: torch.device) -> Coefficient:
    if isinstance(column, np.ndarray):
        return list(torch.from_numpy(column).to(device).unbind())
    return column


def _for_each_row(values: Any, count: int) -> list[Any]:
    if isinstance(values, list):
        return values
    if isinstance(values, np.ndarray):
        return list(np.broadcast_to(values, (count,)).tolist())
    if isinstance(values, torch.Tensor) and values.dim() == 1:
        return list(values.expand(count).unbind())
    return [values] * count
