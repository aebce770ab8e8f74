"""A rule: the function of an update, its declarations, and the graphs traced from it."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from stepforge.expr import Expr, Trace
from stepforge.hyperparameter import EXECUTION_FLAGS, Hyperparameter, is_off
from stepforge.metrics import Metric, traced
from stepforge.program import Graph


@dataclass(frozen=True)
class State:
    """One state of a rule; every parameter has its own.

    Attributes:
        key: its name in ``optimizer.state[p]`` and in checkpoints.
        init: its initial value: a number, or the name of the hyperparameter that holds it.
        scalar: True for one number per parameter, False for one per element.
        when: the name of the flag that turns it on; None if it is always there.
        unsigned: True if it is never below 0 and moves in small steps, as averages of squares do.
            Formats of few bits then have no sign bit, and round at random.
    """

    key: str
    init: float | str = 0.0
    scalar: bool = False
    when: str | None = None
    unsigned: bool = False

    def on(self, group: Mapping[str, Any]) -> bool:
        """Return True if a param group with these options has this state."""
        return self.when is None or bool(group[self.when])


@dataclass(frozen=True)
class Rule:
    """An update rule with its declarations.

    Attributes:
        function: ``rule(h, t, p, g, *states) -> (p, *states)``.
        hyperparameters: by name, in the constructor's order.
        states: by the rule's own letter, in the order of its arguments.
        metrics: the metrics that a step computes of what it stores, by name.
    """

    function: Callable[..., Any]
    hyperparameters: Mapping[str, Hyperparameter]
    states: Mapping[str, State]
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    _metered: MutableMapping[tuple[Any, ...], Rule] = field(
        default_factory=weakref.WeakValueDictionary, repr=False, compare=False
    )
    _graphs: dict[tuple[Any, ...], Graph] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        arguments = list(inspect.signature(self.function).parameters)
        expected = ["h", "t", "p", "g", *self.states]
        if len(arguments) < 4 or arguments[4:] != expected[4:]:
            raise TypeError(
                f"rule {self.function.__name__}({', '.join(arguments)}) does not match its "
                f"declared states; its arguments must be ({', '.join(expected)})"
            )

    def with_metrics(self, metrics: Mapping[str, Metric]) -> Rule:
        """Return the same rule, with metrics; the same object for the same metrics."""
        if not metrics:
            return self
        key = tuple(metrics.items())
        rule = self._metered.get(key)
        if rule is None:
            rule = Rule(self.function, self.hyperparameters, self.states, metrics)
            self._metered[key] = rule
        return rule

    def graph(self, group: Mapping[str, Any]) -> Graph:
        """Return the graph under the options of a param group, traced once per choice of flags.

        Varying inputs are named ``p``, ``g`` and by the states' letters, uniform ones ``t``, by
        the hyperparameters' names (``betas[0]`` for a component) and by the states' letters.
        """
        return self._graph(
            {
                name: group[name] if parameter.static else is_off(group[name])
                for name, parameter in self._statics.items()
            }
        )

    def graphs(self) -> Iterator[Graph]:
        """Yield the graphs of all choices of the flags; some of them may be equal."""
        choices = map(_choices, self._statics.values())
        for values in itertools.product(*choices):
            yield self._graph(dict(zip(self._statics, values)))

    @functools.cached_property
    def _statics(self) -> dict[str, Hyperparameter]:
        """The hyperparameters that a rule may branch on, or that may leave no trace."""
        return {
            name: parameter
            for name, parameter in self.hyperparameters.items()
            if (parameter.static or parameter.zero_is_off) and name not in EXECUTION_FLAGS
        }

    def _graph(self, statics: Mapping[str, Any]) -> Graph:
        key = tuple(statics.values())
        if key not in self._graphs:
            self._graphs[key] = self._traced(statics)
        return self._graphs[key]

    def option_names(self, symbols: Iterable[str]) -> list[str]:
        """Return the options that symbols of the graph come from, each once."""
        return list(dict.fromkeys(self._components[symbol][0] for symbol in symbols))

    def option_values(self, groups: Iterable[Mapping[str, Any]], symbol: str) -> list[Any]:
        """Return each param group's value of a symbol of the graph.

        Raises:
            TypeError: one was set by hand to something that is no number.
            ValueError: one was set by hand to a tuple of another length.
        """
        name, component = self._components[symbol]
        values = list(map(operator.itemgetter(name), groups))
        if component is not None:
            declared = self.hyperparameters[name]
            if not _TUPLES.issuperset(map(type, values)) or {*map(len, values)} != {
                declared.length
            }:
                values = list(map(declared.checked, values))
            values = list(map(operator.itemgetter(component), values))
        if not _NUMBERS.issuperset(map(type, values)):
            check = self.hyperparameters[name].checked
            for group in groups:
                check(group[name])
        return values

    @functools.cached_property
    def _components(self) -> dict[str, tuple[str, int | None]]:
        """For each uniform symbol its hyperparameter and, of a tuple, which component it is."""
        return {
            symbol: (name, None if parameter.length is None else index)
            for name, parameter in self.hyperparameters.items()
            if not parameter.static
            for index, (symbol, _) in enumerate(
                parameter.components([None] * (parameter.length or 1))
            )
        }

    def option_items(self, group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Return all symbols that come from a param group's options, each with its value."""
        return ((symbol, *self.option_values([group], symbol)) for symbol in self._components)

    def _traced(self, statics: Mapping[str, Any]) -> Graph:
        trace = Trace()
        h = _Options(self.function.__name__)
        for name, parameter in self.hyperparameters.items():
            if name in EXECUTION_FLAGS:
                continue
            if parameter.static:
                setattr(h, name, statics[name])
            elif statics.get(name):
                setattr(h, name, trace.constant(0))
            elif parameter.length is None:
                setattr(h, name, trace.input(name))
            else:
                empty = [None] * parameter.length
                names = [component for component, _ in parameter.components(empty)]
                setattr(h, name, tuple(map(trace.input, names)))
        t, p = trace.input("t"), trace.input("p", varying=True)
        g = trace.input("g", varying=True)
        states = {
            letter: trace.input(letter, varying=not state.scalar) if state.on(statics) else None
            for letter, state in self.states.items()
        }
        results = self.function(h, t, p, -g if statics.get("maximize") else g, *states.values())
        if trace.has_uint32:
            raise TypeError(
                f"rule {self.function.__name__} computes with uint32: bitcast_u32, bitcast_f32, "
                "i32_to_f32 and f32_to_i32 are for formats, as a rule runs in float64 too"
            )
        metrics = traced(self.metrics, trace) if self.metrics else {}
        return Graph.of(self._named_results(results, states), metrics)

    def _named_results(self, results: Any, states: Mapping[str, Expr | None]) -> dict[str, Expr]:
        name = self.function.__name__
        letters = ["p", *states]
        results = results if isinstance(results, tuple) else (results,)
        if len(results) != len(letters):
            raise TypeError(
                f"rule {name} returned {len(results)} values; it must return {', '.join(letters)}"
            )
        outputs = {}
        for letter, result in zip(letters, results, strict=True):
            if letter != "p" and states[letter] is None:
                continue
            varying = letter == "p" or not self.states[letter].scalar
            if not _is_number(result) or result.varying != varying:
                kind = "one value for every element" if varying else "one number a parameter"
                raise TypeError(f"rule {name} returned `{result}` for {letter}, which has {kind}")
            outputs[letter] = result
        return outputs


def _is_number(result: Any) -> bool:
    return isinstance(result, Expr) and not (result.boolean or result.uint32)


#: The types that numbers usually have; a value of another type is looked at more closely.
_NUMBERS = frozenset({float, int, torch.Tensor, torch.nn.Parameter})


_TUPLES = frozenset({tuple, list})


class _Options:
    """The ``h`` of a rule while it is traced."""

    def __init__(self, rule: str) -> None:
        self._rule = rule

    def __getattr__(self, name: str) -> NoReturn:
        known = ", ".join(name for name in vars(self) if name != "_rule")
        raise AttributeError(f"rule {self._rule} reads h.{name}, but declared are {known}")


def _choices(parameter: Hyperparameter) -> tuple[Any, ...]:
    """Return the values of a flag; for a number, True if it may be off."""
    if not parameter.init:
        return (parameter.default if parameter.static else is_off(parameter.default),)
    return (False, True, None) if parameter.optional else (False, True)
