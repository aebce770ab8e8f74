"""Metrics of a step, each written once, in the vocabulary of rules.

A metric is a function of some of these symbols, by their names: the parameter ``p`` before the step
and ``new_p`` as it is stored after it, the gradient ``g``, the ``change`` of the parameter before
it is rounded to its dtype, and the ``size``, its number of elements. It returns one number a
parameter, made of reductions. Of a param group and of all parameters it is computed alike, from the
reductions over all their elements.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from stepforge.expr import REDUCTIONS, Expr, Trace
from stepforge.ops import count, largest, norm, where
from stepforge.program import CHANGE, NEW_P, SIZE

__all__ = ["METRICS", "Metric", "checked", "of_gradients", "traced"]

#: A metric: a function of symbols.
Metric: TypeAlias = Callable[..., Any]

#: The symbols that a metric may take, and whether each differs between the elements of a tensor.
_SYMBOLS = {"p": True, "g": True, NEW_P: True, CHANGE: True, SIZE: False}


def grad_norm(g: Any) -> Any:
    """Return the 2-norm of a gradient."""
    return norm(g)


def grad_max(g: Any) -> Any:
    """Return the largest magnitude in a gradient; NaN if one is NaN."""
    return largest(abs(g))


def nonfinite(g: Any) -> Any:
    """Return how many elements of a gradient are NaN or infinite."""
    return count(g - g != 0)


def update_norm(p: Any, new_p: Any) -> Any:
    """Return the 2-norm of the difference that a step has made."""
    return norm(new_p - p)


def param_norm(new_p: Any) -> Any:
    """Return the 2-norm of a parameter after the step."""
    return norm(new_p)


def update_ratio(p: Any, new_p: Any) -> Any:
    """Return the norm of the difference over that of the parameter."""
    return norm(new_p - p) / norm(new_p)


def lost(p: Any, g: Any, new_p: Any, change: Any, size: Any) -> Any:
    """Return the share of elements that were to change, and stayed what they were.

    Those without a gradient do not count: averages of gradients of long ago move nothing any more.
    """
    return count(where(new_p == p, where(g != 0, change, 0), 0) != 0) / size


#: The metrics of ``telemetry=True``, by name.
METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.__name__: metric
        for metric in (
            grad_norm,
            grad_max,
            nonfinite,
            update_norm,
            param_norm,
            update_ratio,
            lost,
        )
    }
)

#: The names in :meth:`Optimizer.metrics` that no metric may have.
_TAKEN = frozenset({*METRICS, "clip_factor", "skipped"})


def checked(own: Mapping[str, Metric]) -> Mapping[str, Metric]:
    """Return the metrics of ``telemetry=True``, and a user's own.

    Args:
        own: the user's metrics, by name.

    Raises:
        TypeError: a metric is no function of the symbols above, or not one number a parameter.
        ValueError: a name is taken.
    """
    for name, metric in own.items():
        if not isinstance(name, str) or not callable(metric):
            raise TypeError(f"telemetry has {name!r}: {metric!r}; it must map names to functions")
        if name in _TAKEN:
            raise ValueError(f"telemetry has a metric {name!r}, which is the name of another one")
        unknown = [x for x in inspect.signature(metric).parameters if x not in _SYMBOLS]
        if unknown:
            raise TypeError(
                f"metric {name} takes {', '.join(unknown)}; it may take {', '.join(_SYMBOLS)}"
            )
    traced(own, Trace())  # raises for any other mistake
    return {**METRICS, **own}


def of_gradients(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Return the metrics that need nothing but gradients."""
    return {
        name: metric
        for name, metric in metrics.items()
        if {"g", SIZE}.issuperset(inspect.signature(metric).parameters)
    }


def traced(metrics: Mapping[str, Metric], trace: Trace) -> dict[str, Expr]:
    """Return the node of each metric.

    Raises:
        TypeError: a metric is not one number a parameter, made of reductions of its elements.
    """
    symbols = {name: trace.input(name, varying=varies) for name, varies in _SYMBOLS.items()}
    nodes = {}
    for name, metric in metrics.items():
        node = metric(*(symbols[x] for x in inspect.signature(metric).parameters))
        if not isinstance(node, Expr) or node.varying or node.boolean or node.uint32:
            raise TypeError(
                f"metric {name} returned `{node}`; it must return one number a parameter: "
                "norm, total, largest or count of something, or what follows from those"
            )
        for reduction in _reductions_in(node):
            if reduction.value == "all":
                raise TypeError(
                    f"metric {name} reduces across=ALL; leave that out, as a metric is computed of "
                    "each parameter, of each param group and of all parameters"
                )
            if _depends_on(reduction, symbols[SIZE]):
                raise TypeError(f"metric {name} reduces what depends on size: use it outside")
            if _reductions_in(reduction.args[0]):
                raise TypeError(
                    f"metric {name} reduces what follows from a reduction, which takes a pass of "
                    "its own: a metric has one"
                )
        nodes[name] = node
    return nodes


def _reductions_in(node: Expr) -> list[Expr]:
    """Return the reductions that a node depends on, itself included."""
    own = [node] if node.op in REDUCTIONS else []
    return [*own, *(x for arg in node.args for x in _reductions_in(arg))]


def _depends_on(node: Expr, other: Expr) -> bool:
    return node is other or any(_depends_on(arg, other) for arg in node.args)
