"""The uniform values of a step: what the uniform program makes of hyperparameters and step numbers.

They are computed for all rows together, in float64: on the host, or where capturable demands it on
the device, or row by row in tensors where autograd has to see them.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from stepforge.backends.batch import Coefficient, Words
from stepforge.expr import Graph, Program
from stepforge.formats import key_of, stream_of
from stepforge.ops import VOCABULARY


def host_values(graph: Graph, columns: Mapping[str, Any]) -> list[Any]:
    """The results of the uniform program as numbers or float64 arrays, one element a row.

    Args:
        graph: its ``uniform`` program is run.
        columns: for each input a number, or an array with one element a row.
    """
    inputs = [columns[name] for name in graph.uniform.inputs]
    if not any(isinstance(column, np.ndarray) for column in inputs):
        return _function(graph.uniform)(*inputs)
    with np.errstate(all="ignore"):
        return _function(graph.uniform)(*inputs)


def differentiable_values(graph: Graph, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The results for each row: numbers, and float64 tensors where an input is a tensor.

    Args:
        graph: its ``uniform`` program is run.
        rows: the inputs of each row.
    """
    run = _function(graph.uniform)
    results = [run(*(_wide(row[name]) for name in graph.uniform.inputs)) for row in rows]
    return [list(column) for column in zip(*results)]


def device_values(graph: Graph, columns: Mapping[str, Any]) -> list[Any]:
    """The results as float64 vectors on the device, without waiting for it.

    In float32, powers and differences of nearly equal numbers would lose what a step needs: RAdam's
    rectifier would be 0.6% off at its sixth step.

    Args:
        graph: its ``uniform`` program is run.
        columns: for each input a number, a tensor of one element, or a vector of one a row.
    """
    return _function(graph.uniform)(*(_wide(columns[name]) for name in graph.uniform.inputs))


_INFIX = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "neg": "-{0}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
}


@functools.cache
def _function(program: Program) -> Callable[..., list[Any]]:
    """The program as one Python function of its inputs: it runs in every step of every lane."""
    constants = program.registers(dict.fromkeys(program.inputs))
    names = [f"r{n}" if x is None else repr(x) for n, x in enumerate(constants)]
    lines = [f"def run({', '.join(names[: len(program.inputs)])}):"]
    for instruction in program.instructions:
        args = [names[register] for register in instruction.args]
        call = _INFIX.get(instruction.op, f"{instruction.op}({', '.join(args)})").format(*args)
        lines.append(f"    {names[instruction.out]} = {call}")
    lines.append(f"    return [{', '.join(names[register] for register in program.outputs)}]")
    scope: dict[str, Any] = VOCABULARY | {"inf": math.inf, "nan": math.nan}  # as repr writes them
    exec("\n".join(lines), scope)
    run: Callable[..., list[Any]] = scope["run"]
    return run


def _wide(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return float(value)
    value = value.to(torch.float64)
    return value.reshape(()) if value.numel() == 1 and value.dim() != 1 else value


def rounded(values: Any, count: int, dtype: torch.dtype) -> Coefficient:
    """A result for each row, rounded to the dtype of the arithmetic."""
    if isinstance(values, torch.Tensor):
        return values.to(torch.float64).expand(count).to(dtype)
    if isinstance(values, list):  # a row each
        if any(isinstance(value, torch.Tensor) for value in values):
            return [torch.as_tensor(value, dtype=torch.float64).to(dtype) for value in values]
        values = np.array(values)
    if isinstance(values, np.ndarray):
        if values.dtype == np.bool_ or dtype == torch.float64:
            return values
        with np.errstate(over="ignore"):
            return values.astype(np.float32)
    return values if isinstance(values, bool) or dtype == torch.float64 else _single(values)


def _single(number: float) -> float:
    """The nearest float32."""
    try:
        return float(_FLOAT.unpack(_FLOAT.pack(number))[0])
    except OverflowError:
        return math.copysign(math.inf, number)


_FLOAT = struct.Struct("f")


def streams(seeds: np.ndarray[Any, Any], parameters: np.ndarray[Any, Any], device: Any) -> Words:
    """For each row what its keys follow from in all steps.

    Args:
        seeds: of random rounding, one a row.
        parameters: the number of each row's parameter among all of the optimizer.
        device: where the keys are wanted.
    """
    if device.type == "cpu":
        words: Words = stream_of(seeds, parameters)
    else:
        words = stream_of(_made_on(device, seeds), _made_on(device, parameters))
    return words


def keys(of_rows: Words, steps: torch.Tensor) -> Words:
    """For each row the word from which its random bits in the next step follow.

    Args:
        of_rows: what :func:`streams` made.
        steps: the steps that were taken, on the device of that.
    """
    if isinstance(of_rows, torch.Tensor):
        words: Words = key_of(of_rows, steps.long() + 1)
    else:
        words = key_of(of_rows, steps.numpy().astype(np.int64) + 1)
    return words


def _made_on(device: torch.device, numbers: np.ndarray[Any, Any]) -> torch.Tensor:
    """Numbers on a device, made there: a graph that is being captured can copy none from here."""
    known = list(map(int, numbers))
    begins = [0, *(i for i in range(1, len(known)) if known[i] != known[i - 1] + 1), len(known)]
    return torch.cat(
        [
            torch.arange(known[begin], known[begin] + end - begin, device=device)
            for begin, end in itertools.pairwise(begins)
        ]
    )


def for_each_row(values: Any, count: int) -> list[Any]:
    """A result as a list with one value a row."""
    if isinstance(values, list):
        return values
    if isinstance(values, np.ndarray):
        return list(np.broadcast_to(values, (count,)).tolist())
    if isinstance(values, torch.Tensor) and values.dim() == 1:
        return list(values.expand(count).unbind())
    return [values] * count
