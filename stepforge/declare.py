"""Declarations: what an optimizer's class body says, and the checks that follow from it.

A class body names the hyperparameters of a rule with their ranges and defaults, and its states
with their initial values. The constructor, its signature, its checks, the layout of the state and
the traced graph all come from here.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import numbers
import operator
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Annotated, Any, NoReturn, TypeAlias

import torch

from stepforge.expr import Expr, Graph, Trace

__all__ = [
    "Betas",
    "Decay",
    "Hyperparameter",
    "Interval",
    "LearningRate",
    "NonNegative",
    "Rule",
    "Seed",
    "State",
    "TensorBetas",
    "full",
    "hyper",
    "scalar",
    "zeros",
]


@dataclass(frozen=True)
class Interval:
    """The values that a hyperparameter may take: ``low <= value < high``, never NaN.

    Attributes:
        low: the smallest allowed value.
        high: the bound above; infinity allows every number from ``low`` up.
        zero_is_off: True if a value of exactly 0 switches the term off, so that it leaves no
            trace in the graph.
    """

    low: float = 0.0
    high: float = math.inf
    zero_is_off: bool = False

    def __contains__(self, value: object) -> bool:
        return bool(self.low <= value) and (self.high == math.inf or bool(value < self.high))  # type: ignore[operator]

    def __str__(self) -> str:
        return f">= {self.low:g}" + ("" if self.high == math.inf else f" and < {self.high:.10g}")


#: A number from 0 up.
NonNegative: TypeAlias = Annotated[float, Interval()]
#: A learning rate: a number from 0 up, or a tensor of one element.
LearningRate: TypeAlias = Annotated[float | torch.Tensor, Interval()]
#: A weight decay: a number from 0 up, or a tensor of one element; 0 switches it off.
Decay: TypeAlias = Annotated[float | torch.Tensor, Interval(zero_is_off=True)]
#: Two coefficients of moving averages, each in [0, 1).
Betas: TypeAlias = Annotated[tuple[float, float], Interval(high=1.0)]
#: As :data:`Betas`; both may be tensors of one element.
TensorBetas: TypeAlias = Annotated[
    tuple[float | torch.Tensor, float | torch.Tensor], Interval(high=1.0)
]

#: A seed of random numbers: 32 bits.
Seed: TypeAlias = Annotated[int, Interval(high=2.0**32)]

#: The options that choose how a step runs and how its numbers are stored, not what it computes: no
#: rule sees them, and loading a checkpoint leaves them as they are.
EXECUTION_FLAGS = (
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "state_format",
    "master_weight_bits",
    "stochastic_rounding",
    "rounding_seed",
)

# torch.optim's words for what it calls by another name than the argument's.
_LABELS = {"lr": "learning rate", "eps": "epsilon value"}


@dataclass(frozen=True)
class Hyperparameter:
    """One hyperparameter, as declared by an annotated name in a class body.

    Attributes:
        name: the constructor's argument and the param group's key.
        default: its default.
        annotation: its type, for the constructor's signature.
        interval: its range, or None for a flag.
        length: the number of components of a tuple, or None for a plain value.
        tensors: True if a one-element tensor may stand for a number.
        optional: True if a flag may also be None.
        choices: the values it may have beside None; None if it is a flag or a number.
        keyword_only: True if the constructor takes it by keyword only.
        init: False if the constructor does not take it and the default always holds.
        newer: True if checkpoints may lack it, as they can be older than it is.
    """

    name: str
    default: Any
    annotation: Any
    interval: Interval | None = None
    length: int | None = None
    tensors: bool = False
    optional: bool = False
    choices: tuple[Any, ...] | None = None
    keyword_only: bool = False
    init: bool = True
    newer: bool = False

    @property
    def static(self) -> bool:
        """Whether a rule may branch on it: flags are Python values while a rule is traced."""
        return self.interval is None

    @property
    def zero_is_off(self) -> bool:
        """Whether a value of exactly 0 leaves no trace in the graph."""
        return self.interval is not None and self.interval.zero_is_off

    def checked(self, value: Any) -> Any:
        """The value in the form in which a param group keeps it.

        Raises:
            ValueError: it is NaN or outside the range, or a tensor or tuple of another size.
            TypeError: it is of another kind.
        """
        if self.choices is not None:
            return self._checked_choice(value)
        if self.interval is None:
            return self._checked_flag(value)
        if self.length is None:
            return self._checked_number(value, self.name, _LABELS.get(self.name))
        if isinstance(value, (str, torch.Tensor)) or not hasattr(value, "__len__"):
            raise TypeError(
                f"{self.name} must be a tuple of {self.length} numbers {self.interval}, "
                f"but got {value!r}"
            )
        if len(value) != self.length:
            raise ValueError(
                f"{self.name} must have {self.length} components, but got {tuple(value)!r}"
            )
        singular = self.name.removesuffix("s")
        return tuple(
            _without_dimensions(
                self._checked_number(
                    component, f"{self.name}[{index}]", f"{singular} parameter at index {index}"
                )
            )
            for index, component in enumerate(value)
        )

    def components(self, value: Any) -> Iterator[tuple[str, Any]]:
        """The single numbers of a value, each with the name of its symbol."""
        if self.length is None:
            yield self.name, value
        else:
            yield from ((f"{self.name}[{index}]", x) for index, x in enumerate(value))

    def _checked_flag(self, value: Any) -> Any:
        if isinstance(value, bool) or (value is None and self.optional):
            return value
        if isinstance(value, numbers.Integral) and int(value) in (0, 1):
            return bool(value)
        allowed = "True, False or None" if self.optional else "True or False"
        raise TypeError(f"Invalid {self.name} value: {value!r}; it must be {allowed}")

    def _checked_choice(self, value: Any) -> Any:
        assert self.choices is not None
        for choice in (None, *self.choices):
            if type(value) is type(choice) and value == choice:
                return choice
        allowed = ", ".join(map(repr, (None, *self.choices)))
        raise ValueError(f"Invalid {self.name} value: {value!r}; it must be one of {allowed}")

    def _checked_number(self, value: Any, name: str, label: str | None) -> Any:
        assert self.interval is not None
        if isinstance(value, torch.Tensor):
            if not self.tensors:
                raise TypeError(f"{name} must be a number {self.interval}, but got a tensor")
            if value.is_complex():
                raise TypeError(f"{name} must be a number {self.interval}, but got {value!r}")
            if value.numel() != 1:
                raise ValueError(
                    f"Tensor {name} must be 1-element, but has {value.numel()} elements"
                )
            if value.is_meta:
                return value
        elif isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number {self.interval}, but got {value!r}")
        elif not _fits_a_float(value):
            raise ValueError(
                f"Invalid {label or f'{name} value'}: it is larger than any float; it must be a "
                f"number {self.interval}"
            )
        if self.annotation is int and not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be a whole number {self.interval}, but got {value!r}")
        if value not in self.interval:
            shown = value.item() if isinstance(value, torch.Tensor) else value
            raise ValueError(
                f"Invalid {label or f'{name} value'}: {shown}; it must be a number {self.interval}"
            )
        return int(value) if self.annotation is int else value


def _fits_a_float(value: Any) -> bool:
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _without_dimensions(value: Any) -> Any:
    return value.reshape(()) if isinstance(value, torch.Tensor) else value


def hyper(*, default: Any, kw_only: bool = False, init: bool = True, newer: bool = False) -> Any:
    """A hyperparameter with more to say than its default.

    Args:
        default: its default.
        kw_only: whether the constructor takes it by keyword only.
        init: False for a value that a subclass fixes: the constructor does not take it, and
            loading a checkpoint does not change it.
        newer: True if checkpoints may lack it, as they can be older than it is.

    Example:
        >>> from stepforge import Adam
        >>> class AlwaysAMSGrad(Adam):
        ...     amsgrad: bool = hyper(default=True, init=False)
    """
    return _Specifier(default, kw_only, init, newer)


@dataclass(frozen=True)
class _Specifier:
    default: Any
    kw_only: bool = False
    init: bool = True
    newer: bool = False


@dataclass(frozen=True)
class State:
    """One state of a rule, kept for every parameter.

    Attributes:
        key: its name in ``optimizer.state[p]`` and in checkpoints.
        init: its initial value: a number, or the name of the hyperparameter that holds it.
        scalar: True for one number a parameter, False for one an element.
        when: the name of the flag that turns it on; None if it is always there.
        unsigned: True if it is never below 0 and moves in small steps, as averages of squares do.
            Formats of few bits then spend none on a sign, and round at random.
    """

    key: str
    init: float | str = 0.0
    scalar: bool = False
    when: str | None = None
    unsigned: bool = False

    def on(self, group: Mapping[str, Any]) -> bool:
        """Whether a param group with these options keeps this state."""
        return self.when is None or bool(group[self.when])


def zeros(key: str, *, when: str | None = None, unsigned: bool = False) -> Any:
    """A state with one value for every element, 0 at first, in the dtype of the parameter.

    Args:
        key: its name in ``optimizer.state[p]`` and in checkpoints.
        when: the flag that turns it on. The rule gets None, and may return None, while it is off.
        unsigned: True if the rule never returns a number below 0 for it, as of an average of
            squares. It matters where it is stored in few bits.

    Example:
        >>> zeros("exp_avg")
        State(key='exp_avg', init=0.0, scalar=False, when=None, unsigned=False)
    """
    return State(key, 0.0, scalar=False, when=when, unsigned=unsigned)


def full(key: str, init: float | str, *, when: str | None = None, unsigned: bool = False) -> Any:
    """As :func:`zeros`, with another initial value.

    Args:
        key: its name in ``optimizer.state[p]`` and in checkpoints.
        init: the value, or the name of the hyperparameter that holds it.
        when: the flag that turns it on.
        unsigned: as for :func:`zeros`.

    Example:
        >>> full("sum", init="initial_accumulator_value").init
        'initial_accumulator_value'
    """
    return State(key, init, scalar=False, when=when, unsigned=unsigned)


def scalar(key: str, init: float = 0.0) -> Any:
    """A state with one number a parameter: a tensor without dimensions, float32.

    What a rule returns for it is rounded to that dtype when it is kept; a rule that wants to
    compute with the rounded number applies :func:`stepforge.ops.stored` itself.

    Args:
        key: its name in ``optimizer.state[p]`` and in checkpoints.
        init: its initial value.

    Example:
        >>> scalar("mu_product", init=1.0).scalar
        True
    """
    return State(key, init, scalar=True)


@dataclass(frozen=True)
class Rule:
    """An update rule with its declarations.

    Attributes:
        function: ``rule(h, t, p, g, *states) -> (p, *states)``.
        hyperparameters: by name, in the constructor's order.
        states: by the rule's own letter, in the order of its arguments.
    """

    function: Callable[..., Any]
    hyperparameters: Mapping[str, Hyperparameter]
    states: Mapping[str, State]
    _graphs: dict[tuple[Any, ...], Graph] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        arguments = list(inspect.signature(self.function).parameters)
        expected = ["h", "t", "p", "g", *self.states]
        if len(arguments) < 4 or arguments[4:] != expected[4:]:
            raise TypeError(
                f"rule {self.function.__name__}({', '.join(arguments)}) does not match its "
                f"declared states; its arguments must be ({', '.join(expected)})"
            )

    def graph(self, group: Mapping[str, Any]) -> Graph:
        """The rule traced under a param group's options, once for each choice of the static ones.

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
        """The graphs of all choices of the static options; some of them may be equal."""
        choices = map(_choices, self._statics.values())
        for values in itertools.product(*choices):
            yield self._graph(dict(zip(self._statics, values)))

    @functools.cached_property
    def _statics(self) -> dict[str, Hyperparameter]:
        """What a rule may branch on, and what may leave no trace."""
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

    def numbers(self, groups: Iterable[Mapping[str, Any]], symbol: str) -> list[Any]:
        """The number that each param group gives for a symbol of the graph.

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

    def uniform_values(self, group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Every number that a param group gives the rule, with the name of its symbol."""
        return ((symbol, *self.numbers([group], symbol)) for symbol in self._components)

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
        if trace.has_words:
            raise TypeError(
                f"rule {self.function.__name__} computes with words: bits, from_bits, number and "
                "word are for formats, as a rule runs in float64 too"
            )
        return Graph.of(self._named_results(results, states))

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
    return isinstance(result, Expr) and not (result.boolean or result.word)


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


def is_off(value: Any) -> bool:
    """Whether a value that ``zero_is_off`` is exactly 0; a tensor never is, as it can change."""
    return not isinstance(value, torch.Tensor) and value == 0


def _choices(parameter: Hyperparameter) -> tuple[Any, ...]:
    """The values of a flag; of a number, whether it is off."""
    if not parameter.init:
        return (parameter.default if parameter.static else is_off(parameter.default),)
    return (False, True, None) if parameter.optional else (False, True)


def read_body(
    body: type, inherited: Mapping[str, Hyperparameter]
) -> tuple[dict[str, Hyperparameter], dict[str, State]]:
    """The declarations in a class body, after those it inherits.

    Args:
        body: the class.
        inherited: the hyperparameters of its base, by name. A name that is declared again keeps
            its place in the constructor, as in a dataclass, unless it was keyword-only before.

    Returns:
        All hyperparameters by name, and the body's own states by the rule's letter.

    Raises:
        TypeError: a hyperparameter has no default, or a type that is none of those in this module.
    """
    hyperparameters = dict(inherited)
    # Types named in strings may be those of this module, wherever the class is defined.
    scope = globals() | vars(sys.modules[body.__module__])
    annotations = inspect.get_annotations(body, globals=scope, eval_str=True)
    for name, annotation in annotations.items():
        if isinstance(annotation, InitVar) or name.startswith("_"):
            continue
        if name not in vars(body):
            raise TypeError(f"hyperparameter {name} of {body.__name__} has no default")
        declared = _declared(name, annotation, vars(body)[name])
        if name in inherited and inherited[name].keyword_only and not declared.keyword_only:
            del hyperparameters[name]
        hyperparameters[name] = declared
        delattr(body, name)
    states = {name: value for name, value in vars(body).items() if isinstance(value, State)}
    return hyperparameters, states


def _declared(name: str, annotation: Any, default: Any) -> Hyperparameter:
    given = default if isinstance(default, _Specifier) else _Specifier(default)
    make = functools.partial(
        Hyperparameter,
        name,
        given.default,
        keyword_only=given.kw_only,
        init=given.init,
        newer=given.newer,
    )
    if annotation is bool or annotation == (bool | None):
        return make(_bare(annotation), optional=annotation is not bool)
    if typing.get_origin(_required(annotation)) is typing.Literal:
        return make(annotation, choices=typing.get_args(_required(annotation)), optional=True)
    intervals = [x for x in getattr(annotation, "__metadata__", ()) if isinstance(x, Interval)]
    if not intervals:
        raise TypeError(
            f"hyperparameter {name} is annotated with {annotation!r}; it must be bool, "
            "bool | None, or a type of stepforge.declare such as NonNegative or Betas"
        )
    bare = _bare(annotation)
    is_tuple = typing.get_origin(bare) is tuple
    number = typing.get_args(bare)[0] if is_tuple else bare
    return make(
        bare,
        interval=intervals[-1],
        length=len(typing.get_args(bare)) if is_tuple else None,
        tensors=torch.Tensor in typing.get_args(number),
    )


def _required(annotation: Any) -> Any:
    """What ``... | None`` is beside None."""
    given = [x for x in typing.get_args(annotation) if x is not type(None)]
    return given[0] if len(given) == 1 and type(None) in typing.get_args(annotation) else annotation


def _bare(annotation: Any) -> Any:
    if typing.get_origin(annotation) is Annotated:
        return typing.get_args(annotation)[0]
    return annotation


def signature_of(
    hyperparameters: Mapping[str, Hyperparameter], params_annotation: Any
) -> inspect.Signature:
    """The constructor that the declarations describe, ``self`` left out."""
    taken = [h for h in hyperparameters.values() if h.init]
    keyword, positional = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("params", positional, annotation=params_annotation)]
    for h in sorted(taken, key=lambda h: h.keyword_only):
        kind = keyword if h.keyword_only else positional
        parameters.append(
            inspect.Parameter(h.name, kind, default=h.default, annotation=h.annotation)
        )
    return inspect.Signature(parameters, return_annotation=None)
