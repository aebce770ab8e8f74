"""Small graphs, and two ways to run one: its compiled kernel, and the reference's operations."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
import torch

from stepforge.backends import Batch, native, reference
from stepforge.backends.native import build
from stepforge.backends.native.source import c_source
from stepforge.backends.spec import KernelSpec
from stepforge.expr import Expr, Trace
from stepforge.ops import VOCABULARY
from stepforge.program import Graph, evaluate
from tests.conformance.table import OPTIMIZERS

#: One parameter: a tensor for each column of a graph.
Row: TypeAlias = dict[str, torch.Tensor]

ARITHMETICS = {"float": torch.float32, "double": torch.float64}

#: The instruction sets that kernels can be compiled for and this processor has; "" is the plain
#: one. Named so that they can stand in the id of a test.
_LEVELS = [*build.LEVELS, ""]
INSTRUCTION_SETS = {
    level or "plain": level for level in _LEVELS[_LEVELS.index(build.instruction_set()) :]
}


def traced(rule: Callable[..., Any], uniform: Sequence[str] = ()) -> Graph:
    """The graph of ``rule(p, g, *uniform)``, which returns results by name, or ``p`` alone."""
    trace = Trace()
    varying = [trace.input(name, varying=True) for name in "pg"]
    results = rule(*varying, *map(trace.input, uniform))
    return Graph.of({"p": results} if isinstance(results, Expr) else results)


def graph_of(name: str, **options: Any) -> Graph:
    """The graph of an optimizer's rule under these options."""
    optimizer = OPTIMIZERS[name].ours([torch.zeros(1)], **options)
    return optimizer.rule.graph(optimizer.param_groups[0])


def spec_of(graph: Graph, stored: torch.dtype, arithmetic: torch.dtype | None = None) -> KernelSpec:
    """The spec of a graph with all its columns stored in one dtype."""
    return KernelSpec.of(graph, dict.fromkeys(columns_of(graph), stored), arithmetic=arithmetic)


def columns_of(graph: Graph) -> tuple[str, ...]:
    """The columns that a kernel reads, then those it only writes."""
    return tuple(dict.fromkeys([*graph.varying.inputs, *graph.results]))


def c_of(graph: Graph, stored: torch.dtype, arithmetic: torch.dtype = torch.float32) -> str:
    """The C of a graph with all its columns stored in one dtype."""
    return c_source(spec_of(graph, stored, arithmetic))


def coefficients(
    graph: Graph, values: Mapping[str, float], arithmetic: torch.dtype
) -> list[bool | float]:
    """What a kernel is told, rounded to its arithmetic, when the uniform inputs are these."""
    number = np.float64 if arithmetic == torch.float64 else np.float32
    with np.errstate(all="ignore"):
        found = evaluate(graph.uniform, values, (), VOCABULARY)[: len(graph.coefficients)]
        return [bool(x) if isinstance(x, (bool, np.bool_)) else float(number(x)) for x in found]


def batch_of(
    graph: Graph,
    rows: Sequence[Row],
    numbers: Sequence[Sequence[float]],
    arithmetic: torch.dtype,
    **values: Any,
) -> Batch:
    """The rows with the coefficients of each; ``values`` are other fields of the batch."""
    number = np.float64 if arithmetic == torch.float64 else np.float32
    kinds = [np.bool_ if node.boolean else number for node in graph.coefficients]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    given = [np.array(c, dtype=k) for c, k in zip(zip(*numbers, strict=True), kinds)]
    return Batch.of(graph, columns, given, arithmetic=arithmetic, **values)


def step_by_kernel(batch: Batch) -> None:
    """Steps rows in place by the compiled kernel; fails if it is left to the reference."""
    with mock.patch.object(reference, "run", side_effect=AssertionError("not by a kernel")):
        native.run(batch)


def _results(
    step: Callable[[Batch], None],
    graph: Graph,
    rows: Sequence[Row],
    numbers: Sequence[Sequence[float]],
    arithmetic: torch.dtype,
) -> list[Row]:
    copies = [{name: tensor.clone() for name, tensor in row.items()} for row in rows]
    step(batch_of(graph, copies, numbers, arithmetic))
    return [{name: row[name] for name in graph.results} for row in copies]


#: The results of each row (of a graph, given its coefficients, in an arithmetic) by the compiled
#: kernel and by the reference; the rows stay as they are.
by_kernel = functools.partial(_results, step_by_kernel)
by_reference = functools.partial(_results, reference.run)


def special(dtype: torch.dtype) -> torch.Tensor:
    """Zeros of both signs, denormals, numbers next to 1, the largest, infinities, NaN, others."""
    info = torch.finfo(dtype)
    tiny, least = info.smallest_normal, info.smallest_normal * info.eps
    sizes = [0.0, least, tiny - least, tiny, math.sqrt(tiny) / 3, 1 - info.eps / 2, 1.0]
    sizes += [1 + info.eps, 2 / 3, 0.1, math.pi, math.sqrt(info.max) * 3, info.max, math.inf]
    return torch.tensor([*sizes, *(-size for size in sizes), math.nan], dtype=dtype)


def every_pair(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors that hold every pair of the values between them."""
    count = len(values)
    return values.repeat_interleave(count), values.repeat(count)


def with_results(graph: Graph, row: Mapping[str, torch.Tensor]) -> Row:
    """A row with memory of a parameter's kind, full of sevens, for what is only written."""
    return {**{name: torch.full_like(row["p"], 7) for name in columns_of(graph)}, **row}


def run_compiler(arguments: Iterable[str | Path]) -> subprocess.CompletedProcess[str]:
    """Runs the compiler that the library would use."""
    command = [*build.compiler(), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def in_new_process(
    function: Callable[..., None], *arguments: str, timeout_s: float = 60, **environment: str
) -> str:
    """Calls a function of a test module in a new process, warnings being errors; its output.

    Fails if the process fails, and if it does not end in time.
    """
    code = (
        f"import sys; from {function.__module__} import {function.__name__} as f; f(*sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        cwd=Path(__file__).parents[2],
        env=os.environ | environment,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}\n{done.stderr}"
    return done.stdout
