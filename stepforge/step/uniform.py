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

from stepforge.backends.batch import Coefficient, Seeds
from stepforge.formats import param_seed, step_seed
from stepforge.ops import NUMBERS, VOCABULARY, to_float32
from stepforge.program import Graph, Program
from stepforge.rule import Rule

__all__ = [
    "ScalarStates",
    "UniformProgram",
    "param_seeds",
    "round_coefficients",
    "shared_vector",
    "step_seeds",
]


@dataclass(frozen=True)
class ScalarStates:
    """The step counts and scalar states of a launch's parameters.

    Attributes:
        tensors: for each key, ``step`` among them: one vector, whose elements are the parameters'
            own tensors; or a list of those tensors.
    """

    tensors: Mapping[str, torch.Tensor | list[torch.Tensor]]

    @classmethod
    def as_vectors(cls, states: Sequence[dict[str, Any]], keys: Sequence[str]) -> ScalarStates:
        """Return the scalar states as vectors; the states of the parameters become elements."""
        return cls({key: _as_vector(states, key) for key in keys})

    def on_host(self) -> Mapping[str, np.ndarray[Any, Any]]:
        """Return an array for each key, one element per parameter."""
        if self._shared is not None:
            return self._shared
        return {
            key: x.numpy() if isinstance(x, torch.Tensor) else np.array([float(each) for each in x])
            for key, x in self.tensors.items()
        }

    @functools.cached_property
    def _shared(self) -> Mapping[str, np.ndarray[Any, Any]] | None:
        """Arrays that share the memory of the vectors; None if that is not possible."""
        vectors = [x for x in self.tensors.values() if isinstance(x, torch.Tensor)]
        if len(vectors) < len(self.tensors) or any(
            x.device.type != "cpu" or x.requires_grad for x in vectors
        ):
            return None
        return {key: x.numpy() for key, x in zip(self.tensors, vectors)}

    def on_device(self) -> dict[str, torch.Tensor]:
        """Return a vector for each key, one element per parameter."""
        return {
            key: x if isinstance(x, torch.Tensor) else torch.stack([each.reshape(()) for each in x])
            for key, x in self.tensors.items()
        }

    def by_param(self) -> Iterator[dict[str, Any]]:
        """Yield each parameter's scalars as autograd must see them.

        Clones, as the step overwrites its scalar states in place.
        """
        columns = {key: list(x) for key, x in self.tensors.items()}
        for values in zip(*columns.values()):
            yield {
                key: x.clone() if x.requires_grad else float(x) for key, x in zip(columns, values)
            }

    def store(self, key: str, values: Any, skipped: torch.Tensor | None) -> None:
        """Store the new values of a scalar state.

        Args:
            key: its key.
            values: one number, or one per parameter in an array, vector or list.
            skipped: true on the device if the step is skipped; None if it is not.
        """
        tensors = self.tensors[key]
        if isinstance(tensors, torch.Tensor):
            if skipped is None and self._shared is not None and _fits(values, tensors.dtype):
                self._shared[key].fill(values)  # a fraction of the time of torch's fill_
                torch.autograd.graph.increment_version(tensors)
            else:
                _store(tensors, values, skipped)
        else:
            for tensor, value in zip(tensors, _by_param(values, len(tensors))):
                _store(tensor, value, skipped)

    def count_step(self, skipped: torch.Tensor | None) -> None:
        """Add one to the step counts, unless the step is skipped."""
        one = 1 if skipped is None else torch.where(skipped, 0.0, 1.0)
        steps = self.tensors["step"]
        if isinstance(steps, torch.Tensor):
            if skipped is None and self._shared is not None:  # a third of the time of torch's add_
                counts = self._shared["step"]
                np.add(counts, 1, out=counts)
                torch.autograd.graph.increment_version(steps)
            else:
                steps.add_(one)
        elif len(steps) == 1:
            steps[0].add_(one)
        else:
            torch._foreach_add_(steps, one)

    @property
    def device(self) -> torch.device:
        """The device of the step counts."""
        steps = self.tensors["step"]
        return steps.device if isinstance(steps, torch.Tensor) else steps[0].device


def _fits(value: Any, dtype: torch.dtype) -> bool:
    """Return True for a number that a dtype can hold, perhaps rounded."""
    return type(value) is float and (dtype == torch.float64 or abs(value) < 3e38)


def shared_vector(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the vector that has exactly these tensors as elements, in order; None if none has."""
    base: torch.Tensor | None = tensors[0]._base
    if base is None or base.dim() != 1 or len(base) != len(tensors):
        return None
    if not all(map(operator.is_, map(_base, tensors), itertools.repeat(base))):
        return None
    begin, step = base.data_ptr(), base.stride(0) * base.itemsize
    is_in_order = all(
        map(operator.eq, map(torch.Tensor.data_ptr, tensors), itertools.count(begin, step))
    )
    return base if is_in_order else None


_base = operator.attrgetter("_base")


def _as_vector(states: Sequence[dict[str, Any]], key: str) -> torch.Tensor:
    tensors = list(map(operator.itemgetter(key), states))
    shared = shared_vector(tensors)
    if shared is not None:
        return shared
    if any(map(torch.Tensor.dim, tensors)):
        tensors = [x.reshape(()) for x in tensors]
    vector = torch.stack(tensors).detach()
    for state, element in zip(states, vector.unbind()):
        state[key] = element
    return vector


def _store(state: torch.Tensor, value: Any, skipped: torch.Tensor | None) -> None:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if skipped is not None:
        value = torch.where(skipped, state, value)
    if isinstance(value, torch.Tensor):
        state.copy_(value)
    else:
        state.fill_(value)


def _by_param(values: Any, count: int) -> list[Any]:
    """Return values as a list, one per parameter."""
    if isinstance(values, list):
        return values
    if isinstance(values, np.ndarray):
        return list(np.broadcast_to(values, (count,)).tolist())
    if isinstance(values, torch.Tensor) and values.dim() == 1:
        return list(values.expand(count).unbind())
    return [values] * count


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
        self, groups: Sequence[Mapping[str, Any]], scalars: ScalarStates
    ) -> tuple[list[Any], list[Any]]:
        """Compute the values of the next step.

        Args:
            groups: all param groups of the optimizer.
            scalars: the step counts and scalar states.

        Returns:
            The graph's coefficients, not yet rounded, and the new values of its scalar states.
        """
        own = [groups[index] for index in self.groups]
        program = self.graph.uniform
        run, names = _function(program), program.inputs
        if self.on_device:
            # In float32, powers and differences of nearly equal numbers would lose what a step
            # needs: RAdam's rectifier would be 0.6% off at its sixth step.
            inputs = self._device_inputs(own[0], scalars.on_device())
            values = run(*(_wide(inputs[name]) for name in names))
        elif self.differentiable:
            rows = self._differentiable_inputs(own[0], scalars)
            results = [run(*(_wide(row[name]) for name in names)) for row in rows]
            values = [list(column) for column in zip(*results)]
        else:
            values = _run_on_host(program, self._host_inputs(own, scalars.on_host()))
        count = len(self.graph.coefficients)
        return values[:count], values[count:]

    def _host_inputs(
        self, groups: Sequence[Mapping[str, Any]], scalars: Mapping[str, np.ndarray[Any, Any]]
    ) -> list[Any]:
        """Return the inputs as float64 arrays; as one number where all parameters agree.

        Numbers take a fraction of the time of arrays, and give the same bits.
        """
        inputs = self._host_options.read(groups).copy()
        for place, key in self._scalar_inputs:
            inputs[place] = _agreed(scalars[key])
            if key == "step":
                inputs[place] += 1
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
            self._convert(groups, values)
            self._seen = values if all(map(_is_constant, values)) else []
        return self._inputs

    def _convert(self, groups: Sequence[Mapping[str, Any]], values: list[Any]) -> None:
        """Convert the options that have changed."""
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
                self._inputs[place] = numbers[0] if same else np.array(numbers)[self._group_of]


_NUMBERS = frozenset({float, int, bool})


def _is_constant(value: Any) -> bool:
    """Return True if an object can never hold another value."""
    return type(value) in _NUMBERS or (
        type(value) is tuple and _NUMBERS.issuperset(map(type, value))
    )


def _agreed(column: np.ndarray[Any, Any]) -> Any:
    """Return the number on which all elements agree, else all elements in float64."""
    content = column.tobytes()
    if content == content[: column.itemsize] * len(column):
        return float(column[0])
    return column.astype(np.float64)


def _run_on_host(program: Program, inputs: Sequence[Any]) -> list[Any]:
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
    constants = program.registers(dict.fromkeys(program.inputs))
    names = [f"r{n}" if x is None else repr(x) for n, x in enumerate(constants)]
    lines = [f"def run({', '.join(names[: len(program.inputs)])}):"]
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
        made = step_seed(seeds, scalars.on_host()["step"].astype(np.int64) + 1)
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
