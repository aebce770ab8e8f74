"""Declarations: the vocabulary of an optimizer's class body.

A class body names the hyperparameters of a rule, with their ranges and defaults, and its states,
with their initial values. The constructor, its signature, its checks, the layout of the state and
the traced graph all follow from them.
"""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Annotated, Any, TypeAlias

import torch

from stepforge.hyperparameter import Hyperparameter, Interval
from stepforge.rule import Rule, State

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


def hyper(
    *, default: Any, kw_only: bool = False, init: bool = True, optional_in_checkpoint: bool = False
) -> Any:
    """Declare a hyperparameter with more than a default.

    Args:
        default: its default.
        kw_only: True if the constructor takes it by keyword only.
        init: False for a value that a subclass fixes: the constructor does not take it, and
            loading a checkpoint does not change it.
        optional_in_checkpoint: True if checkpoints may lack it: older ones do.

    Example:
        >>> from stepforge import Adam
        >>> class AlwaysAMSGrad(Adam):
        ...     amsgrad: bool = hyper(default=True, init=False)
    """
    return _Specifier(default, kw_only, init, optional_in_checkpoint)


@dataclass(frozen=True)
class _Specifier:
    default: Any
    kw_only: bool = False
    init: bool = True
    optional_in_checkpoint: bool = False


def zeros(key: str, *, when: str | None = None, unsigned: bool = False) -> Any:
    """Declare a state with one value per element, 0 at first, in the parameter's dtype.

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
    """Declare a state like :func:`zeros`, with another initial value.

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
    """Declare a state with one number per parameter: a zero-dimensional float32 tensor.

    The new value that a rule returns is rounded to that dtype when it is stored. A rule that
    computes with the rounded number applies :func:`stepforge.ops.round_to_state_dtype` itself.

    Args:
        key: its name in ``optimizer.state[p]`` and in checkpoints.
        init: its initial value.

    Example:
        >>> scalar("mu_product", init=1.0).scalar
        True
    """
    return State(key, init, scalar=True)


def read_body(
    body: type, inherited: Mapping[str, Hyperparameter]
) -> tuple[dict[str, Hyperparameter], dict[str, State]]:
    """Return the declarations of a class body, added to the inherited ones.

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
            if isinstance(vars(body).get(name), _Specifier):
                delattr(body, name)  # an argument of the constructor that no group has
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
        optional_in_checkpoint=given.optional_in_checkpoint,
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
    """Return ``X`` for an annotation ``X | None``, else the annotation."""
    given = [x for x in typing.get_args(annotation) if x is not type(None)]
    return given[0] if len(given) == 1 and type(None) in typing.get_args(annotation) else annotation


def _bare(annotation: Any) -> Any:
    if typing.get_origin(annotation) is Annotated:
        return typing.get_args(annotation)[0]
    return annotation


def signature_of(
    hyperparameters: Mapping[str, Hyperparameter],
    params_annotation: Any,
    others: Sequence[inspect.Parameter] = (),
) -> inspect.Signature:
    """Return the constructor's signature, without ``self``, from the declarations.

    Args:
        hyperparameters: the hyperparameters.
        params_annotation: the type of ``params``.
        others: further arguments, by keyword only.
    """
    taken = [h for h in hyperparameters.values() if h.init]
    keyword, positional = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("params", positional, annotation=params_annotation)]
    for h in sorted(taken, key=lambda h: h.keyword_only):
        kind = keyword if h.keyword_only else positional
        parameters.append(
            inspect.Parameter(h.name, kind, default=h.default, annotation=h.annotation)
        )
    return inspect.Signature([*parameters, *others], return_annotation=None)
