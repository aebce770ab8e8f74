"""Small graphs, and two ways to run them: a compiled kernel, and the reference backend."""

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
from stepforge.backends.native import compiler
from stepforge.backends.native.source import c_source
from stepforge.backends.spec import KernelSpec
from stepforge.expr import Expr, Trace
from stepforge.ops import VOCABULARY
from stepforge.program import Graph, evaluate
from tests.conformance.table import OPTIMIZERS

#: The tensors of one parameter, one for each column of a graph.
Columns: TypeAlias = dict[str, torch.Tensor]

ARITHMETICS = {"float": torch.float32, "double": torch.float64}

#: The instruction sets that kernels can be compiled for and that this processor has; "" is the
#: plain one. The names serve as ids of tests.
_LEVELS = [*compiler.LEVELS, ""]
INSTRUCTION_SETS = {
    level or "plain": level for level in _LEVELS[_LEVELS.index(compiler.instruction_set()) :]
}


def traced(rule: Callable[..., Any], uniform: Sequence[str] = ()) -> Graph:
    """Return the graph of ``rule(p, g, *uniform)``, which returns ``p`` or results by name."""
    trace = Trace()
    varying = [trace.input(name, varying=True) for name in "pg"]
    results = rule(*varying, *map(trace.input, uniform))
    return Graph.of({"p": results} if isinstance(results, Expr) else results)


def graph_of(name: str, **options: Any) -> Graph:
    """Return the graph of an optimizer's rule under these options."""
    optimizer = OPTIMIZERS[name].ours([torch.zeros(1)], **options)
    return optimizer.rule.graph(optimizer.param_groups[0])


def spec_of(graph: Graph, dtype: torch.dtype, arithmetic: torch.dtype | None = None) -> KernelSpec:
    """Return the spec of a graph whose columns all have one dtype."""
    return KernelSpec.of(graph, dict.fromkeys(columns_of(graph), dtype), arithmetic=arithmetic)


def columns_of(graph: Graph) -> tuple[str, ...]:
    """Return the columns that a kernel reads, then those it only writes."""
    return tuple(dict.fromkeys([*graph.varying.inputs, *graph.results]))


def c_of(graph: Graph, dtype: torch.dtype, arithmetic: torch.dtype = torch.float32) -> str:
    """Return the C of a graph whose columns all have one dtype."""
    return c_source(spec_of(graph, dtype, arithmetic))


def coefficients_of(
    graph: Graph, values: Mapping[str, float], arithmetic: torch.dtype
) -> list[bool | float]:
    """Return the coefficients for these uniform inputs, rounded to the kernel's arithmetic."""
    scalar = np.float64 if arithmetic == torch.float64 else np.float32
    with np.errstate(all="ignore"):
        found = evaluate(graph.uniform, values, (), VOCABULARY)[: len(graph.coefficients)]
        return [bool(x) if isinstance(x, (bool, np.bool_)) else float(scalar(x)) for x in found]


def batch_of(
    graph: Graph,
    params: Sequence[Columns],
    coefficients: Sequence[Sequence[float]],
    arithmetic: torch.dtype,
    **fields: Any,
) -> Batch:
    """Return a batch of parameters, each with its coefficients; ``fields`` are passed on."""
    scalar = np.float64 if arithmetic == torch.float64 else np.float32
    dtypes = [np.bool_ if node.boolean else scalar for node in graph.coefficients]
    columns = {name: [param[name] for param in params] for name in params[0]}
    vectors = [np.array(c, dtype=d) for c, d in zip(zip(*coefficients, strict=True), dtypes)]
    return Batch.of(graph, columns, vectors, arithmetic=arithmetic, **fields)


def step_by_kernel(batch: Batch) -> None:
    """Step parameters in place by the compiled kernel; fail if the reference steps them."""
    with mock.patch.object(reference, "run", side_effect=AssertionError("not by a kernel")):
        native.run(batch)


def results_of(
    step: Callable[[Batch], None],
    graph: Graph,
    params: Sequence[Columns],
    coefficients: Sequence[Sequence[float]],
    arithmetic: torch.dtype,
) -> list[Columns]:
    """Step copies of parameters by a function, and return the results of each."""
    copies = [{name: tensor.clone() for name, tensor in param.items()} for param in params]
    step(batch_of(graph, copies, coefficients, arithmetic))
    return [{name: param[name] for name in graph.results} for param in copies]


#: The same by the compiled kernel, and by the reference.
by_kernel = functools.partial(results_of, step_by_kernel)
by_reference = functools.partial(results_of, reference.run)


def special_values(dtype: torch.dtype) -> torch.Tensor:
    """Return zeros of both signs, denormals, values around 1, the largest, infinities, NaN, ..."""
    info = torch.finfo(dtype)
    tiny, least = info.smallest_normal, info.smallest_normal * info.eps
    sizes = [0.0, least, tiny - least, tiny, math.sqrt(tiny) / 3, 1 - info.eps / 2, 1.0]
    sizes += [1 + info.eps, 2 / 3, 0.1, math.pi, math.sqrt(info.max) * 3, info.max, math.inf]
    return torch.tensor([*sizes, *(-size for size in sizes), math.nan], dtype=dtype)


def every_pair(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two tensors whose elements pair every value with every value."""
    count = len(values)
    return values.repeat_interleave(count), values.repeat(count)


def with_results(graph: Graph, param: Mapping[str, torch.Tensor]) -> Columns:
    """Return a parameter's tensors with columns that are only written, like ``p``, full of 7."""
    return {**{name: torch.full_like(param["p"], 7) for name in columns_of(graph)}, **param}


def run_compiler(arguments: Iterable[str | Path]) -> subprocess.CompletedProcess[str]:
    """Run the compiler that the library would use."""
    command = [*compiler.compiler(), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def in_new_process(
    function: Callable[..., None], *arguments: str, timeout_s: float = 60, **environment: str
) -> str:
    """Call a function of a test module in a new process, and return the output.

    Warnings are errors. Fail if the process fails, or if it does not end in time.
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
