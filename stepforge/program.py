"""Programs: the straight-line code of an expression graph, and the two programs of a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stepforge.expr import REDUCTIONS, Expr

#: The symbols of metrics: a parameter as it is stored after the step, its change before rounding,
#: and its number of elements.
NEW_P, CHANGE, SIZE = "new_p", "change", "size"


@dataclass(frozen=True)
class Instruction:
    """One operation of a program, on numbered registers.

    Attributes:
        op: the operation's name.
        args: the registers of its operands.
        out: the register of its value, written by no earlier instruction.
        last: the registers that neither a later instruction nor an output reads.
    """

    op: str
    args: tuple[int, ...]
    out: int
    last: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """A straight-line program over numbered registers.

    The registers hold the inputs, then values given from outside, then constants, then the value of
    each instruction in turn.

    Attributes:
        inputs: the names of the inputs.
        given: the nodes whose values are given.
        constants: the numbers; a uint32 is a Python int.
        instructions: the operations, operands first.
        outputs: the registers of the results.
        nodes: the node of the graph that each register holds.
    """

    inputs: tuple[str, ...]
    given: tuple[Expr, ...]
    constants: tuple[float, ...]
    instructions: tuple[Instruction, ...]
    outputs: tuple[int, ...]
    nodes: tuple[Expr, ...]

    @classmethod
    def of(cls, results: Sequence[Expr], given: Sequence[Expr] = ()) -> Program:
        """Return the program that computes some nodes, with the values of others given."""
        nodes = reachable(results, stop=given)
        inputs = [node for node in nodes if node.op == "input" and node not in set(given)]
        constants = [node for node in nodes if node.op == "constant"]
        operations = [node for node in nodes if node.args and node not in set(given)]
        held = (*inputs, *given, *constants, *operations)
        register = {node: number for number, node in enumerate(held)}
        last_reader = {arg: node for node in operations for arg in node.args}
        kept = {*results, *constants}
        return cls(
            inputs=tuple(str(node.value) for node in inputs),
            given=tuple(given),
            constants=tuple(node.value for node in constants),  # type: ignore[misc]
            instructions=tuple(
                Instruction(
                    node.op,
                    tuple(register[arg] for arg in node.args),
                    register[node],
                    tuple(
                        register[arg]
                        for arg in dict.fromkeys(node.args)
                        if last_reader[arg] is node and arg not in kept
                    ),
                )
                for node in operations
            ),
            outputs=tuple(register[node] for node in results),
            nodes=held,
        )

    def registers(self, inputs: Mapping[str, Any], given: Sequence[Any] = ()) -> list[Any]:
        """Return the registers at the start; those of the instructions are None."""
        loaded = [inputs[name] for name in self.inputs]
        return [*loaded, *given, *self.constants, *[None] * len(self.instructions)]

    def may_alias(self, register: int) -> bool:
        """Return True if a register can hold the same object as another, not a fresh one."""
        return self.nodes[register].op in ("input", "where")


def evaluate(
    program: Program,
    inputs: Mapping[str, Any],
    given: Sequence[Any],
    operations: Mapping[str, Callable[..., Any]],
) -> list[Any]:
    """Run a program.

    Args:
        program: the program.
        inputs: the value of each input, by name.
        given: the given values, in the program's order.
        operations: the function of each operation, by name.

    Returns:
        The values of the program's outputs, in their order.
    """
    registers = program.registers(inputs, given)
    for instruction in program.instructions:
        args = [registers[register] for register in instruction.args]
        registers[instruction.out] = operations[instruction.op](*args)
        for register in instruction.last:
            registers[register] = None
    return [registers[register] for register in program.outputs]


@dataclass(frozen=True, eq=False)
class Graph:
    """A traced rule: two straight-line programs, the uniform one and the varying one.

    Where a rule has reductions, passes over the tensors come before, each a graph without results.
    A graph with metrics makes reductions, too: a pass of what it reads, a step of what it stores.

    Attributes:
        coefficients: the uniform nodes that the varying program reads, except constants. A kernel
            needs no other numbers.
        scalars: the names of the results that are uniform.
        uniform: computes the coefficients, then the scalars.
        results: the names of the results that vary and are not simply an input of their own name.
        varying: computes the results, then what the measure is given; given the coefficients.
        reductions: the reductions, in order.
        measure: computes what is reduced, for each reduction, from numbers of the varying program
            and from :data:`NEW_P`.
        before: the passes before this one. Their reductions, in order, are given to the uniform
            program.
        metrics: the names of the metrics.
        metric: computes the metrics, given the reductions, and :data:`SIZE`.
        at_rest: the pass that makes the same reductions where a step changes nothing; None for a
            pass.
    """

    coefficients: tuple[Expr, ...]
    scalars: tuple[str, ...]
    uniform: Program
    results: tuple[str, ...]
    varying: Program
    reductions: tuple[Expr, ...]
    measure: Program
    before: tuple[Graph, ...] = ()
    metrics: tuple[str, ...] = ()
    metric: Program | None = None
    at_rest: Graph | None = None

    @classmethod
    def of(cls, outputs: Mapping[str, Expr], metrics: Mapping[str, Expr] | None = None) -> Graph:
        """Return the graph of some results, without the nodes that no result needs.

        Args:
            outputs: the results, by name.
            metrics: uniform nodes of reductions, by name.
        """
        passes: list[Graph] = []
        for reductions in _by_pass(outputs.values()):
            passes.append(cls._pass({}, reductions, passes))
        if not metrics:
            return cls._pass(outputs, [], passes)
        reductions = [node for node in reachable(metrics.values()) if node.op in REDUCTIONS]
        graph = cls._pass(outputs, _in_step(reductions, outputs), passes)
        return replace(
            graph,
            metrics=tuple(metrics),
            metric=Program.of(list(metrics.values()), given=reductions),
            at_rest=cls.of_reductions(_at_rest(reductions)) if outputs else None,
        )

    @classmethod
    def of_reductions(cls, reductions: Sequence[Expr]) -> Graph:
        """Return the graph of a pass that makes some reductions, which need no others."""
        return cls._pass({}, reductions, [])

    @classmethod
    def _pass(
        cls, outputs: Mapping[str, Expr], reductions: Sequence[Expr], before: Sequence[Graph]
    ) -> Graph:
        scalars = {name: node for name, node in outputs.items() if not node.varying}
        results = {
            name: node
            for name, node in outputs.items()
            if node.varying and not (node.op == "input" and node.value == name)
        }
        known = [node for graph in before for node in graph.reductions]
        operands = [node.args[0] for node in reductions]
        kept = _before_storing(operands)
        computed = [*results.values(), *kept]
        varying = [node for node in reachable(computed, stop=known) if node.varying]
        read = {arg for node in varying for arg in node.args if not arg.varying}
        coefficients = tuple(
            sorted((n for n in read if n.op != "constant"), key=lambda node: node.index)
        )
        return cls(
            coefficients=coefficients,
            scalars=tuple(scalars),
            uniform=Program.of([*coefficients, *scalars.values()], given=known),
            results=tuple(results),
            varying=Program.of(computed, given=coefficients),
            reductions=tuple(reductions),
            measure=Program.of(operands, given=kept),
            before=tuple(before),
        )


def _before_storing(operands: Sequence[Expr]) -> list[Expr]:
    """Return the nodes that some nodes are computed from, and that do not follow from NEW_P."""
    nodes = reachable(operands)
    follow: set[Expr] = set()
    for node in nodes:
        if (node.op == "input" and node.value == NEW_P) or not follow.isdisjoint(node.args):
            follow.add(node)
    needed = {*operands, *(arg for node in follow for arg in node.args)} - follow
    return [node for node in nodes if node in needed and node.op != "constant"]


def _in_step(reductions: Sequence[Expr], outputs: Mapping[str, Expr]) -> list[Expr]:
    """Return reductions in a step with some results, if any."""
    if not outputs:
        return list(reductions)
    trace = outputs["p"].trace
    p, change = (trace.input(name, varying=True) for name in ("p", CHANGE))
    return [trace.replaced(node, {change: _change(outputs["p"], p)}) for node in reductions]


def _at_rest(reductions: Sequence[Expr]) -> list[Expr]:
    """Return the same reductions in a step that changes nothing."""
    trace = reductions[0].trace
    p, new_p, change = (trace.input(name, varying=True) for name in ("p", NEW_P, CHANGE))
    return [trace.replaced(node, {new_p: p, change: p - p}) for node in reductions]


def _change(new: Expr, p: Expr) -> Expr:
    """Return how much a parameter changes: not 0 where the change is lost to rounding.

    Args:
        new: the parameter after the step.
        p: the parameter before.
    """
    if new.op in ("add", "sub"):
        first, second = new.args[::-1] if new.args[1] is p and new.op == "add" else new.args
        second = second if new.op == "add" else -second
        return second if first is p else _change(first, p) + second
    if new.op == "mul" and new.args[0] is p and not new.args[1].varying:
        return p * (new.args[1] - 1)
    return new - p


def _by_pass(roots: Iterable[Expr]) -> list[list[Expr]]:
    """Return the reductions that some nodes need, by the pass over the tensors that makes them."""
    made_in: dict[Expr, int] = {}  # the number of passes before a node is known
    passes: list[list[Expr]] = []
    for node in reachable(roots):
        made_in[node] = max((made_in[arg] for arg in node.args), default=0)
        if node.op in REDUCTIONS:
            if made_in[node] == len(passes):
                passes.append([])
            passes[made_in[node]].append(node)
            made_in[node] += 1
    return passes


def reachable(roots: Iterable[Expr], stop: Sequence[Expr] = ()) -> list[Expr]:
    """Return the nodes that the roots depend on, operands first, up to those in ``stop``."""
    seen: set[Expr] = set()
    pending = list(roots)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(() if node in set(stop) else node.args)
    return sorted(seen, key=lambda node: node.index)
