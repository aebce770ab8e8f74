"""The plan of a step: which rows go to which backend, with which coefficients.

A step has two halves. The first checks every parameter and raises before anything has changed; the
second makes missing states, gathers rows into batches and runs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stepforge.backends import Batch, Choice, choose
from stepforge.declare import Rule, State
from stepforge.expr import Expr, Graph, evaluate
from stepforge.ops import VOCABULARY, scalar_dtype


@dataclass
class Row:
    """One parameter with what a step needs of it.

    Attributes:
        p: the parameter.
        g: its gradient, coalesced if sparse.
        group: the options of its param group.
        state: its entry of ``optimizer.state``.
        choice: the backend that serves it.
    """

    p: torch.Tensor
    g: torch.Tensor
    group: Mapping[str, Any]
    state: dict[str, Any]
    choice: Choice


def check(
    groups: Iterable[Mapping[str, Any]], state: Mapping[Any, Any], *, refuses_sparse: str | None
) -> list[Row]:
    """The rows of a step: every parameter that has a gradient. Changes nothing.

    Args:
        groups: the optimizer's param groups.
        state: the optimizer's state.
        refuses_sparse: what to say of a sparse gradient; None if the rule takes them.

    Raises:
        RuntimeError: a gradient is sparse and may not be, or no backend can do what was asked for.
        TypeError: a parameter is neither real nor complex floating point.
    """
    rows = []
    for group in groups:
        for p in group["params"]:
            g = p.grad
            if g is None:
                continue
            if g.is_sparse:
                if refuses_sparse:
                    raise RuntimeError(refuses_sparse)
                if not _is_off(group.get("weight_decay", 0)):
                    raise RuntimeError(
                        "weight_decay option is not compatible with sparse gradients"
                    )
                g = g.coalesce()
            if not (p.is_floating_point() or p.is_complex()):
                raise TypeError(
                    f"a parameter of dtype {p.dtype} has a gradient; only floating point and "
                    "complex parameters can be optimized"
                )
            if g.is_complex() and not p.is_complex():
                raise TypeError(f"a parameter of dtype {p.dtype} has a gradient of {g.dtype}")
            entry = state.get(p, {})
            if group["differentiable"] and getattr(entry.get("step"), "requires_grad", False):
                raise RuntimeError(
                    "`requires_grad` is not supported for `step` in differentiable mode"
                )
            rows.append(Row(p, g, group, entry, choose(p, g, group)))
    return rows


def _is_off(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) and value == 0


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


def run(rule: Rule, rows: list[Row]) -> None:
    """Steps the rows: makes the states that are missing, computes, counts the step."""
    for row in rows:
        _complete(rule, row)
    for members in _batches(rule, rows):
        _run_batch(rule, members)


def _complete(rule: Rule, row: Row) -> None:
    keys = ["step", *(s.key for s in rule.states.values() if s.on(row.group))]
    missing = [key for key in keys if key not in row.state]
    if missing:
        fresh = initial_state(rule, row.p, row.group)
        row.state.update({key: fresh[key] for key in missing})


def _batches(rule: Rule, rows: list[Row]) -> Iterator[list[Row]]:
    """Rows that can run together. Options that are not flags may differ within a batch."""
    batches: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        # Device values cannot be told apart without waiting for them: a group at a time.
        alone = id(row.group) if row.group["capturable"] or row.group["differentiable"] else None
        graph = id(rule.graph(row.group))
        key = (row.choice.backend.name, graph, row.p.device, _arithmetic(row.p), alone)
        batches.setdefault(key, []).append(row)
    return iter(batches.values())


def _arithmetic(p: torch.Tensor) -> torch.dtype:
    wide = (torch.float64, torch.complex128)
    return torch.float64 if p.dtype in wide else torch.float32


def _run_batch(rule: Rule, rows: list[Row]) -> None:
    group, dtype = rows[0].group, _arithmetic(rows[0].p)
    graph = rule.graph(group)
    steps = [row.state["step"] for row in rows]
    if group["capturable"]:
        values = _device_values(rule, graph, rows)
    elif group["differentiable"]:
        values = _differentiable_values(rule, graph, rows)
    else:
        values = _host_values(rule, graph, rows)
    coefficients = {
        node: _coefficient(values[node], len(rows), dtype) for node in graph.coefficients
    }
    columns = {
        "p": [_real(row.p) for row in rows],
        "g": [_real(row.g) for row in rows],
    }
    for letter, declared in rule.states.items():
        if declared.on(group) and not declared.scalar:
            columns[letter] = [_real(row.state[declared.key]) for row in rows]
    batch = Batch(graph, columns, coefficients, dtype, differentiable=group["differentiable"])
    rows[0].choice.backend.run(batch)
    for letter, declared in rule.states.items():
        if declared.scalar:
            for row, value in zip(rows, _for_each_row(values[graph.outputs[letter]], len(rows))):
                row.state[declared.key].fill_(value)
    torch._foreach_add_(steps, 1)


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
    return torch.view_as_real(x.resolve_conj())


def _uniform_inputs(graph: Graph) -> dict[str, Expr]:
    return {str(node.value): node for node in graph.inputs if not node.varying}


def _host_values(rule: Rule, graph: Graph, rows: list[Row]) -> dict[Expr, Any]:
    """The uniform values of all rows in float64, one array element a row."""
    groups = {id(row.group): dict(rule.uniform_values(row.group)) for row in rows}
    scalars = {letter: s.key for letter, s in rule.states.items() if s.scalar}
    values: dict[Expr, Any] = {}
    for name, node in _uniform_inputs(graph).items():
        if name == "t":
            numbers = [float(row.state["step"]) + 1 for row in rows]
        elif name in scalars:
            numbers = [float(row.state[scalars[name]]) for row in rows]
        elif len(groups) == 1:
            numbers = [float(groups[id(rows[0].group)][name])]
        else:
            numbers = [float(groups[id(row.group)][name]) for row in rows]
        values[node] = np.array(numbers, dtype=np.float64)
    with np.errstate(all="ignore"):
        return evaluate(graph.uniform, values, VOCABULARY)


def _differentiable_values(rule: Rule, graph: Graph, rows: list[Row]) -> dict[Expr, Any]:
    """The uniform values as numbers, and as float64 tensors where autograd has to see them."""
    by_row = []
    for row in rows:
        known = dict(rule.uniform_values(row.group), t=float(row.state["step"]) + 1)
        for letter, s in rule.states.items():
            if s.scalar:
                known[letter] = float(row.state[s.key])
        values = {node: _wide(known[name]) for name, node in _uniform_inputs(graph).items()}
        by_row.append(evaluate(graph.uniform, values, VOCABULARY))
    return {node: [values[node] for values in by_row] for node in by_row[0]}


def _device_values(rule: Rule, graph: Graph, rows: list[Row]) -> dict[Expr, Any]:
    """The uniform values as float64 vectors on the device, without waiting for it."""
    known = dict(rule.uniform_values(rows[0].group))
    known["t"] = torch.stack([row.state["step"] for row in rows]).to(torch.float64) + 1
    for letter, s in rule.states.items():
        if s.scalar:
            known[letter] = torch.stack([row.state[s.key] for row in rows])
    values = {node: _wide(known[name]) for name, node in _uniform_inputs(graph).items()}
    return evaluate(graph.uniform, values, VOCABULARY)


def _wide(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return float(value)
    value = value.to(torch.float64)
    return value.reshape(()) if value.numel() == 1 and value.dim() != 1 else value


def _coefficient(values: Any, count: int, dtype: torch.dtype) -> list[Any]:
    """A uniform value for each row, rounded to the dtype of the arithmetic."""
    if isinstance(values, np.ndarray) and values.dtype != np.bool_ and dtype == torch.float32:
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
    return [_rounded(value, dtype) for value in _for_each_row(values, count)]


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, float) and dtype == torch.float32:
        return float(np.float32(value))
    return value


def _for_each_row(values: Any, count: int) -> list[Any]:
    if isinstance(values, list):
        return values
    if isinstance(values, np.ndarray):
        return list(np.broadcast_to(values, (count,)).tolist())
    if isinstance(values, torch.Tensor) and values.dim() == 1:
        return list(values.expand(count).unbind())
    return [values] * count
