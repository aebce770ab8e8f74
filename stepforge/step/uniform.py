"""Uniform values: the numbers of a step that are one per parameter, not one per element.

The uniform program of a graph computes them from hyperparameters, step counts and scalar states, in
float64, for all parameters of a launch together: on the host; on the device where capturable
demands it; or parameter by parameter in tensors where autograd must see them.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stepforge.backends.batch import Coefficient, Seeds, uploaded
from stepforge.formats import param_seed, step_seed
from stepforge.ops import NUMBERS, VOCABULARY, to_float32
from stepforge.program import Graph, Program
from stepforge.rule import Rule
from stepforge.state.elements import Elements
from stepforge.step.scalar_states import ScalarStates

__all__ = [
    "UniformProgram",
    "param_seeds",
    "round_coefficients",
    "step_seeds",
]


@dataclass(frozen=True)
class UniformProgram:
    """The uniform program of a launch, and where its inputs come from.

    Attributes:
        rule: the optimizer's rule.
        graph: the graph whose uniform program it is.
        groups: the indices of the launch's distinct param groups.
        group_of: for each parameter, the position of its group in ``groups``.
        on_device: True if scalars live on the device and must not be synchronized; there is one
            group then.
        differentiable: True if autograd must see the values.
    """

    rule: Rule
    graph: Graph
    groups: tuple[int, ...]
    group_of: np.ndarray[Any, Any]
    on_device: bool
    differentiable: bool

    def run(
        self,
        groups: Sequence[Mapping[str, Any]],
        scalars: ScalarStates,
        reduced: Sequence[Any] = (),
    ) -> tuple[list[Any], list[Any]]:
        """Compute the values of the next step.

        Args:
            groups: all param groups of the optimizer.
            scalars: the step counts and scalar states.
            reduced: the reductions of the passes before: each one number for all parameters, or
                one per parameter in an array, or in a tensor on a device.

        Returns:
            The graph's coefficients, not yet rounded, and the new values of its scalar states.
        """
        own = [groups[index] for index in self.groups]
        program = self.graph.uniform
        count = len(self.graph.coefficients)
        if not (self.on_device or self.differentiable):
            inputs = [*self._host_inputs(own, scalars), *reduced]
            device = next((x.device for x in reduced if isinstance(x, torch.Tensor)), None)
            if device is not None:
                inputs = [_sent(x, device) for x in inputs]
            values = _run_on_host(program, inputs)
            return values[:count], values[count:]
        run, names = _function(program), program.inputs
        if self.on_device:
            # In float32, powers and differences of nearly equal numbers would lose what a step
            # needs: RAdam's rectifier would be 0.6% off at its sixth step.
            named = self._device_inputs(own[0], scalars.on_device())
            given = [torch.as_tensor(x) for x in reduced]
            values = run(*(_wide(named[name]) for name in names), *given)
        else:
            rows = self._differentiable_inputs(own[0], scalars)
            results = [
                run(*(_wide(row[name]) for name in names), *(x[place] for x in reduced))
                for place, row in enumerate(rows)
            ]
            values = [list(column) for column in zip(*results)]
        return values[:count], values[count:]

    def scalars_on_device(self, scalars: ScalarStates) -> dict[str, torch.Tensor | Elements]:
        """Return the step counts, as ``t``, and the scalar states, by letter."""
        found = {key: x for key, x in scalars.tensors.items() if not isinstance(x, list)}
        keys = {letter: state.key for letter, state in self.rule.states.items()}
        states = {letter: found[key] for letter, key in keys.items() if key in found}
        return {"t": found["step"], **states}

    def options(self, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the options of the launch's group that are inputs, numbers or tensors.

        Args:
            groups: all param groups of the optimizer.

        Raises:
            TypeError, ValueError: one was set by hand to something that is no number.
        """
        own = [groups[self.groups[0]]]
        return {symbol: self.rule.option_values(own, symbol)[0] for symbol in self._option_inputs}

    @functools.cached_property
    def _option_inputs(self) -> list[str]:
        """The inputs that are options."""
        others = {place for place, _ in self._scalar_inputs}
        inputs = enumerate(self.graph.uniform.inputs)
        return [symbol for place, symbol in inputs if place not in others]

    def _host_inputs(self, groups: Sequence[Mapping[str, Any]], scalars: ScalarStates) -> list[Any]:
        """Return the inputs: one number where all parameters agree, else a float64 array."""
        inputs = self._host_options.read(groups).copy()
        for place, key in self._scalar_inputs:
            value = scalars.on_host(key)
            inputs[place] = value + 1 if key == "step" else value
        return inputs

    @functools.cached_property
    def _scalar_inputs(self) -> list[tuple[int, str]]:
        """The places of inputs that are the step number or a scalar state, and their state keys."""
        keys = {letter: state.key for letter, state in self.rule.states.items()} | {"t": "step"}
        inputs = enumerate(self.graph.uniform.inputs)
        return [(place, keys[symbol]) for place, symbol in inputs if symbol in keys]

    @functools.cached_property
    def _host_options(self) -> _HostOptions:
        """The inputs that are options."""
        others = {place for place, _ in self._scalar_inputs}
        inputs = enumerate(self.graph.uniform.inputs)
        symbols = [None if place in others else symbol for place, symbol in inputs]
        return _HostOptions(self.rule, symbols, self.group_of)

    def _device_inputs(
        self, group: Mapping[str, Any], scalars: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Return a group's options, and a device vector for each scalar."""
        options = dict(self.rule.option_items(group))
        states = {letter: s.key for letter, s in self.rule.states.items() if s.key in scalars}
        return {
            # A host tensor combines with device vectors only if it has no dimensions.
            **{k: x.reshape(()) if isinstance(x, torch.Tensor) else x for k, x in options.items()},
            **{letter: scalars[key] for letter, key in states.items()},
            "t": scalars["step"].to(torch.float64) + 1,
        }

    def _differentiable_inputs(
        self, group: Mapping[str, Any], scalars: ScalarStates
    ) -> Iterator[dict[str, Any]]:
        """Yield the inputs of each parameter."""
        options = dict(self.rule.option_items(group))
        for own in scalars.by_param():
            states = {letter: own[s.key] for letter, s in self.rule.states.items() if s.key in own}
            yield {**options, **states, "t": own["step"] + 1}


class _HostOptions:
    """The options of a launch's groups as float64 inputs; each is converted when it has changed.

    Args:
        rule: the optimizer's rule.
        symbols: the inputs of the graph; None for those that are no options.
        group_of: for each parameter, the position of its group.
    """

    def __init__(
        self, rule: Rule, symbols: Sequence[str | None], group_of: np.ndarray[Any, Any]
    ) -> None:
        self._rule = rule
        self._symbols = symbols
        self._group_of = group_of
        self._names = rule.option_names(filter(None, symbols))
        self._seen: list[Any] = []
        self._inputs: list[Any] = [None] * len(symbols)

    def read(self, groups: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return each input: one number where all groups agree, else an array.

        None for those that are no options. The list is for reading only.
        """
        values = [group[name] for group in groups for name in self._names]
        # The same objects, not equal ones: 0.0 equals -0.0.
        if len(values) != len(self._seen) or not all(map(operator.is_, values, self._seen)):
            self._inputs = self._converted(groups, values)
            self._seen = values if all(map(_is_constant, values)) else []
        return self._inputs

    def _converted(self, groups: Sequence[Mapping[str, Any]], values: list[Any]) -> list[Any]:
        """Return the inputs, with the options converted that have changed."""
        # A new list: if one option is no number, the inputs stay those of the values seen.
        inputs = self._inputs.copy()
        count = len(self._names)
        changed = {
            name
            for place, name in enumerate(self._names)
            if not self._seen
            or not all(map(operator.is_, values[place::count], self._seen[place::count]))
        }
        for place, symbol in enumerate(self._symbols):
            if symbol is not None and not changed.isdisjoint(self._rule.option_names([symbol])):
                numbers = list(map(float, self._rule.option_values(groups, symbol)))
                same = numbers.count(numbers[0]) == len(numbers)
                inputs[place] = numbers[0] if same else np.array(numbers)[self._group_of]
        return inputs


_NUMBERS = frozenset({float, int, bool})


def _is_constant(value: Any) -> bool:
    """Return True if an object can never hold another value."""
    return type(value) in _NUMBERS or (
        type(value) is tuple and _NUMBERS.issuperset(map(type, value))
    )


def _sent(value: Any, device: torch.device) -> Any:
    """Return an input beside tensors on a device: an array becomes one of them."""
    return uploaded(value, device) if isinstance(value, np.ndarray) else value


def _run_on_host(program: Program, inputs: Sequence[Any]) -> list[Any]:
    if torch.Tensor in map(type, inputs):
        return _function(program)(*inputs)
    if np.ndarray not in map(type, inputs):
        return _function_of_numbers(program)(*inputs)
    with np.errstate(all="ignore"):
        return _function(program)(*inputs)


_INFIX = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "neg": "-{0}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
}


_INFIX_OF_NUMBERS = _INFIX | {
    "div": "{0} / {1} if {1} else div({0}, {1})",
    "where": "{1} if {0} else {2}",
}


@functools.cache
def _function(program: Program) -> Callable[..., list[Any]]:
    """Return a program as a function of numbers, arrays or tensors."""
    return _compiled(program, VOCABULARY, _INFIX)


@functools.cache
def _function_of_numbers(program: Program) -> Callable[..., list[Any]]:
    """Return a program as a function of numbers, in a fraction of the time."""
    return _compiled(program, NUMBERS, _INFIX_OF_NUMBERS)


def _compiled(
    program: Program, functions: Mapping[str, Callable[..., Any]], infix: Mapping[str, str]
) -> Callable[..., list[Any]]:
    """Compile a program to one Python function: it runs in every step of every launch.

    Args:
        program: the program.
        functions: the function of each operation.
        infix: Python's expression for operations that have one.
    """
    given = len(program.inputs) + len(program.given)
    constants = program.registers(dict.fromkeys(program.inputs), [None] * len(program.given))
    names = [f"r{n}" if x is None else repr(x) for n, x in enumerate(constants)]
    lines = [f"def run({', '.join(names[:given])}):"]
    for instruction in program.instructions:
        args = [names[register] for register in instruction.args]
        call = infix.get(instruction.op, f"{instruction.op}({', '.join(args)})").format(*args)
        lines.append(f"    {names[instruction.out]} = {call}")
    lines.append(f"    return [{', '.join(names[register] for register in program.outputs)}]")
    scope: dict[str, Any] = {**functions, "inf": math.inf, "nan": math.nan}  # as repr writes them
    exec("\n".join(lines), scope)
    run: Callable[..., list[Any]] = scope["run"]
    return run


def _wide(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return float(value)
    value = value.to(torch.float64)
    return value.reshape(()) if value.numel() == 1 and value.dim() != 1 else value


def round_coefficients(columns: list[Any], count: int, dtype: torch.dtype) -> list[Coefficient]:
    """Round results of the uniform program to the dtype of the arithmetic.

    Args:
        columns: for each result one number, or one per parameter in an array, vector or list.
        count: the number of parameters.
        dtype: float32 or float64.
    """
    if _NUMBERS.issuperset(map(type, columns)):  # the usual case, in a few C calls
        if dtype == torch.float64:
            return columns
        floats = _floats(len(columns))
        try:
            packed = floats.pack(*columns)
        except OverflowError:
            return [_round_coefficient(values, count, dtype) for values in columns]
        numbers = zip(columns, floats.unpack(packed))
        return [x if type(x) is bool else number for x, number in numbers]
    return [_round_coefficient(values, count, dtype) for values in columns]


@functools.cache
def _floats(count: int) -> struct.Struct:
    return struct.Struct(f"{count}f")


def _round_coefficient(values: Any, count: int, dtype: torch.dtype) -> Coefficient:
    if isinstance(values, torch.Tensor):
        return values.to(torch.float64).expand(count).to(dtype)
    if isinstance(values, list):
        if any(isinstance(value, torch.Tensor) for value in values):
            return [torch.as_tensor(value, dtype=torch.float64).to(dtype) for value in values]
        values = np.array(values)
    if isinstance(values, np.ndarray):
        if values.dtype == np.bool_ or dtype == torch.float64:
            return values
        with np.errstate(over="ignore"):
            return values.astype(np.float32)
    return values if isinstance(values, bool) or dtype == torch.float64 else to_float32(values)


def param_seeds(
    seeds: np.ndarray[Any, Any], indices: np.ndarray[Any, Any], device: torch.device
) -> Seeds:
    """Return the seed of each parameter, constant over steps.

    Args:
        seeds: the rounding seed of each parameter's group.
        indices: the index of each parameter in the optimizer.
        device: the device of the result; an array for a CPU.
    """
    if device.type == "cpu":
        made: Seeds = param_seed(seeds, indices)
    else:
        made = param_seed(_arange_on(device, seeds), _arange_on(device, indices))
    return made


def step_seeds(seeds: Seeds, scalars: ScalarStates) -> Seeds:
    """Return the seed of each parameter in the next step.

    Args:
        seeds: the result of :func:`param_seeds`.
        scalars: the step counts, on the device of the seeds.
    """
    if isinstance(seeds, torch.Tensor):
        made: Seeds = step_seed(seeds, scalars.on_device()["step"].detach().long() + 1)
    else:
        steps = np.asarray(scalars.on_host("step")).astype(np.int64)
        made = step_seed(seeds, np.broadcast_to(steps, seeds.shape) + 1)
    return made


def _arange_on(device: torch.device, numbers: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return integers as a device tensor without a copy from the host, which no capture allows."""
    known = list(map(int, numbers))
    begins = [0, *(i for i in range(1, len(known)) if known[i] != known[i - 1] + 1), len(known)]
    return torch.cat(
        [
            torch.arange(known[begin], known[begin] + end - begin, device=device)
            for begin, end in itertools.pairwise(begins)
        ]
    )
