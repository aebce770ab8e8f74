"""The Triton source of a uniform kernel: one lane computes the uniform values of a parameter.

The varying kernel reads them from memory. The same lane advances the step count, the scalar states
and the random seed of its parameter.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import torch

from stepforge.backends.triton.expressions import commented, function, type_name
from stepforge.backends.triton.powers import FLOAT64_FUNCTIONS, float64_functions
from stepforge.backends.triton.variant import Target
from stepforge.backends.triton.words import NUMBER_FUNCTIONS, number_of
from stepforge.formats import STEP_SEED
from stepforge.program import Graph

__all__ = ["Scalar", "UniformSpec", "uniform_source"]


@dataclass(frozen=True)
class Scalar:
    """An input that each parameter has in memory: the step count or a scalar state.

    Attributes:
        name: its name in the program.
        dtype: its dtype in memory.
        has_index: True if positions in a vector are read, False if the rows are the positions.
    """

    name: str
    dtype: torch.dtype
    has_index: bool = False


@dataclass(frozen=True)
class UniformSpec:
    """A uniform kernel: its computation, and the places of its numbers.

    Attributes:
        graph: the graph whose uniform program it runs.
        arithmetic: the dtype of the coefficients, float32 or float64.
        scalars: the scalars of a parameter, with the step count, ``t``.
        tensors: the inputs that are options in tensors; the other options are arguments.
        stored: the dtype that the operation ``stored`` rounds to.
        is_random: True if it makes the seeds of a step.
    """

    graph: Graph
    arithmetic: torch.dtype
    scalars: tuple[Scalar, ...]
    tensors: frozenset[str]
    stored: torch.dtype
    is_random: bool

    @property
    def options(self) -> tuple[str, ...]:
        """The inputs that are options."""
        known = {scalar.name for scalar in self.scalars}
        return tuple(name for name in self.graph.uniform.inputs if name not in known)


def uniform_source(spec: UniformSpec) -> str:
    """Return the Python source of a module whose function ``advance`` is the kernel."""
    program = spec.graph.uniform
    about = (
        f'"""The uniform values of a step, in float64, rounded to {_bare(spec.arithmetic)}; '
        'written by stepforge."""'
    )
    operations = [instruction.op for instruction in program.instructions]
    text = f"{textwrap.fill(about, 100)}\n\nimport triton\nimport triton.language as tl\n\n\n"
    text += NUMBER_FUNCTIONS[2] + float64_functions(operations)
    if program.outputs:
        more = FLOAT64_FUNCTIONS | {"stored": _rounding(spec.stored)}
        arguments = [f"{name}_in" for name in _variables(spec)]
        text += function("uniform", program, arguments, torch.float64, Target(), operations=more)
        text += "\n\n\n"
    if spec.is_random:
        arguments = [f"{name}_in" for name in STEP_SEED.inputs]
        text += function("step_seed", STEP_SEED, arguments, torch.float32, Target())
        text += "\n\n\n"
    return text + _kernel(spec)


def _kernel(spec: UniformSpec) -> str:
    """Return the kernel, whose arguments are those of :meth:`UniformKernel.run`."""
    arguments = ["coefficients", "rows", "found_inf"]
    for position, scalar in enumerate(spec.scalars):
        arguments += [f"scalar{position}", f"index{position}"][: 1 + scalar.has_index]
    arguments += ["seeds", "step_seeds"] if spec.is_random else []
    variables, options = dict(zip(spec.graph.uniform.inputs, _variables(spec))), []
    for name in spec.options:
        variable = variables[name]
        if name in spec.tensors:
            arguments.append(f"{variable}_at")
            options.append(f"{variable}_in = tl.load({variable}_at).to(tl.float64)  # {name}")
        else:
            words = f"{variable}_high", f"{variable}_low"
            arguments += words
            options.append(f"{variable}_in = {number_of(words)}  # {name}")
    lines = ["row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)", "inside = row < rows"]
    for position, scalar in enumerate(spec.scalars):
        place = f"tl.load(index{position} + row, inside)" if scalar.has_index else "row"
        lines.append(f"at{position} = scalar{position} + {place}")
        read = f"tl.load(at{position}, inside).to(tl.float64)"
        read += " + 1.0" if scalar.name == "t" else ""
        lines.append(f"{_scalar(position)}_in = {read}  # {scalar.name}")
    lines += [*options, *_results(spec)]
    given = ",\n    ".join([*arguments, "SKIPPABLE: tl.constexpr", "BLOCK: tl.constexpr"])
    fixed = textwrap.fill(
        f"@triton.jit(do_not_specialize={arguments})",
        100,
        subsequent_indent=" " * 31,
        break_long_words=False,
    )
    body = "\n    ".join(lines)
    return f"{fixed}\ndef advance(\n    {given},\n):\n    {body}\n"


def _results(spec: UniformSpec) -> list[str]:
    """Return the lines that compute the results and write them."""
    graph, lines = spec.graph, []
    coefficients = [f"c{position}" for position in range(len(graph.coefficients))]
    news = [f"{_scalar(_position(spec, name))}_out" for name in graph.scalars]
    if graph.uniform.outputs:
        given = ", ".join(f"{variable}_in" for variable in _variables(spec))
        lines += textwrap.wrap(
            f"({', '.join([*coefficients, *news])}) = uniform({given})",
            90,
            subsequent_indent=" " * 8,
        )
        lines.append(f"to = coefficients + row * {len(coefficients)}")
    number = type_name(spec.arithmetic)
    for position, (name, node) in enumerate(zip(coefficients, graph.coefficients)):
        store = f"tl.store(to + {position}, {name}.to({number}), inside)"
        lines.append(commented(store, node))
    steps = _position(spec, "t")
    if spec.is_random:
        step = f"{_scalar(steps)}_in.to(tl.int64).to(tl.uint32)"
        lines.append(f"seed = step_seed(tl.load(seeds + row, inside).to(tl.uint32), {step})")
        lines.append("tl.store(step_seeds + row, seed.to(tl.int64), inside)")
    lines += ["if SKIPPABLE:", "    inside = row < tl.where(tl.load(found_inf) == 0, rows, 0)"]
    written = {"t": f"{_scalar(steps)}_in"} | dict(zip(graph.scalars, news))
    for position, scalar in enumerate(spec.scalars):
        if scalar.name in written:
            value = f"{written[scalar.name]}.to({type_name(scalar.dtype)})"
            lines.append(f"tl.store(at{position}, {value}, inside)")
    return lines


def _variables(spec: UniformSpec) -> list[str]:
    """Return a name for each input of the program: an input may have any name."""
    known = [scalar.name for scalar in spec.scalars]
    return [
        _scalar(known.index(name)) if name in known else f"o{spec.options.index(name)}"
        for name in spec.graph.uniform.inputs
    ]


def _position(spec: UniformSpec, scalar: str) -> int:
    return [each.name for each in spec.scalars].index(scalar)


def _scalar(position: int) -> str:
    return f"s{position}"


def _rounding(dtype: torch.dtype) -> str:
    """Return the expression that rounds a float64 to a dtype of scalar states."""
    return "{0}" if dtype == torch.float64 else f"{{0}}.to({type_name(dtype)}).to(tl.float64)"


def _bare(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
