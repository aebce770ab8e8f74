"""Control and metrics of steps: clipping, skipping, and what is known of the last step.

To clip or to skip takes a pass over the gradients before the step, which changes nothing. What it
finds goes to the kernels as what they take anyway: a factor of all gradients, and whether to change
anything. Metrics of gradients come from that pass if there is one. All other metrics are reductions
that a step makes of what it stores.
"""

from __future__ import annotations

import functools
import itertools
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch

from stepforge.backends.grad_scale import GradScale
from stepforge.expr import Trace
from stepforge.metrics import METRICS, Metric, checked, of_gradients, traced
from stepforge.ops import VOCABULARY, minimum
from stepforge.program import Graph, Program, evaluate
from stepforge.step.launch import BoundLaunch
from stepforge.step.metric_values import Members, of_each, together
from stepforge.step.passes import Rows, reduced

__all__ = ["Control", "clip_factor", "gradient_passes"]


def clip_factor(grad_norm: Any, max_grad_norm: float) -> Any:
    """Return the factor of all gradients, as ``torch.nn.utils.clip_grad_norm_`` defines it.

    Args:
        grad_norm: the 2-norm of all gradients: a number or a tensor.
        max_grad_norm: the norm that they may have.

    Example:
        >>> clip_factor(4.0, 1.0)
        0.24999993750001562
    """
    return minimum(1.0, max_grad_norm / (grad_norm + 1e-6))


@dataclass(frozen=True)
class _GradientPass:
    """The pass over the gradients before a step.

    Attributes:
        graph: computes metrics.
        facts: computes those that a step is controlled by, given the reductions of the pass.
    """

    graph: Graph
    facts: Program

    @classmethod
    @functools.lru_cache(maxsize=64)
    def of(cls, metrics: tuple[tuple[str, Metric], ...], facts: tuple[str, ...]) -> _GradientPass:
        """Return the pass of some metrics, by name, with the names of those that control."""
        nodes = traced(dict(metrics), Trace())
        graph = Graph.of({}, nodes)
        return cls(graph, Program.of([nodes[name] for name in facts], given=graph.reductions))


def gradient_passes() -> Iterator[Graph]:
    """Yield the pass of every choice of options, without metrics of a user's own."""
    choices = itertools.product((1.0, None), (True, False), (True, False))
    controls = [
        Control(max_grad_norm=norm, skip_nonfinite=skips, telemetry=measures)
        for norm, skips, measures in choices
    ]
    yield from dict.fromkeys(own.gradient_pass for own in controls if own.makes_pass)


class Control:
    """Clips and skips the steps of an optimizer, and keeps the metrics of the last one.

    Args:
        max_grad_norm: the norm that all gradients together may have; None for any.
        skip_nonfinite: True to skip steps with a gradient that is not finite.
        telemetry: True for the metrics of :mod:`stepforge.metrics`; a dict for more of one's own.

    Attributes:
        skipped: the number of steps skipped so far.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: ``max_grad_norm`` is not a positive, finite number, or the name of a metric is
            taken.
    """

    #: The options and their defaults: nothing is clipped, skipped or measured.
    DEFAULTS: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"max_grad_norm": None, "skip_nonfinite": False, "telemetry": False}
    )

    def __init__(
        self, *, max_grad_norm: Any = None, skip_nonfinite: Any = False, telemetry: Any = False
    ) -> None:
        if max_grad_norm is not None:
            if isinstance(max_grad_norm, bool) or not isinstance(max_grad_norm, numbers.Real):
                raise TypeError(
                    f"max_grad_norm is {max_grad_norm!r}; it must be a number above 0, or None"
                )
            if not 0 < float(max_grad_norm) < math.inf:
                raise ValueError(
                    f"Invalid max_grad_norm: {max_grad_norm}; it must be above 0 and finite"
                )
        if not isinstance(skip_nonfinite, bool):
            raise TypeError(f"skip_nonfinite is {skip_nonfinite!r}; it must be True or False")
        if not isinstance(telemetry, (bool, Mapping)):
            raise TypeError(
                f"telemetry is {telemetry!r}; it must be True, False, or a dict of metrics"
            )
        self.max_grad_norm = None if max_grad_norm is None else float(max_grad_norm)
        self.skip_nonfinite = skip_nonfinite
        self.telemetry = telemetry if isinstance(telemetry, bool) else dict(telemetry) or True
        self.skipped: torch.Tensor | int = 0
        self._clip_factor: torch.Tensor | float | None = None
        self._of_gradients: Rows | None = None
        self._of_step: Rows | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options."""
        return {name: getattr(self, name) for name in self.DEFAULTS}

    @functools.cached_property
    def metrics(self) -> Mapping[str, Metric]:
        """The metrics of every step, by name."""
        if self.telemetry is False:
            return {}
        return METRICS if self.telemetry is True else checked(self.telemetry)

    @property
    def makes_pass(self) -> bool:
        """True if a pass over the gradients comes before the step."""
        return self.max_grad_norm is not None or self.skip_nonfinite

    @functools.cached_property
    def _facts(self) -> tuple[str, ...]:
        """The metrics that a step is controlled by."""
        wanted = {"grad_norm": self.max_grad_norm is not None, "nonfinite": self.skip_nonfinite}
        return tuple(name for name, is_wanted in wanted.items() if is_wanted)

    @functools.cached_property
    def _gradient_pass(self) -> _GradientPass:
        known = {**METRICS, **self.metrics}
        wanted = {*self._facts, *of_gradients(self.metrics)}
        metrics = tuple((name, known[name]) for name in known if name in wanted)
        return _GradientPass.of(metrics, self._facts)

    @property
    def gradient_pass(self) -> Graph:
        """The pass over the gradients before a step."""
        return self._gradient_pass.graph

    @functools.cached_property
    def step_metrics(self) -> Mapping[str, Metric]:
        """The metrics that the step itself computes."""
        if not self.makes_pass:
            return self.metrics
        before = of_gradients(self.metrics)
        return {name: metric for name, metric in self.metrics.items() if name not in before}

    def count_skipped(self) -> None:
        """Count a step that a gradient scaler has found not finite."""
        self._count(1.0)

    def _count(self, found_inf: torch.Tensor | float) -> None:
        """Count a step if a number is not zero."""
        if isinstance(found_inf, torch.Tensor) and not isinstance(self.skipped, torch.Tensor):
            self.skipped = torch.full((), self.skipped, device=found_inf.device)
        # In place on a device, where a graph may repeat it.
        self.skipped += found_inf != 0

    def measured(
        self, launches: Sequence[BoundLaunch], grad_scale: GradScale | None
    ) -> GradScale | None:
        """Return the scale of the gradients of a step, with its clipping. Changes no tensor.

        Args:
            launches: all launches of the step.
            grad_scale: the scale before.
        """
        if not self.makes_pass:
            if self.metrics and grad_scale is not None:
                self._count(grad_scale.found_inf)
            return grad_scale
        rows = self._of_gradients = reduced(self.gradient_pass, launches, grad_scale)
        facts = evaluate(self._gradient_pass.facts, {}, rows.of_all(), VOCABULARY)
        found = dict(zip(self._facts, facts))
        scale = GradScale() if grad_scale is None else grad_scale
        clip, found_inf = scale.clip, scale.found_inf
        if self.max_grad_norm is not None:
            clip = self._clip_factor = clip_factor(found["grad_norm"], self.max_grad_norm)
        if self.skip_nonfinite:
            found_inf = _either(found_inf, found["nonfinite"])
        if self.skip_nonfinite or self.metrics:
            self._count(found_inf)
        return GradScale(scale.scale, found_inf, clip)

    def record(self, rows: Rows | None) -> None:
        """Keep what a step has found of what it stored; None if it has nothing to find."""
        self._of_step = rows

    def known(
        self, groups: Sequence[Mapping[str, Any]], by: Literal["group", "parameter"] | None
    ) -> Any:
        """Return what :meth:`stepforge.Optimizer.metrics` does.

        Args:
            groups: the param groups of the optimizer.
            by: the way to divide the parameters.

        Raises:
            ValueError: ``by`` is none of these.
        """
        if by not in (None, "group", "parameter"):
            raise ValueError(f"by is {by!r}; it must be None, 'group' or 'parameter'")
        rows = [rows for rows in (self._of_gradients, self._of_step) if rows is not None]
        order = (*METRICS, *self.metrics)
        if by == "parameter":
            return of_each(rows, Members.of(groups), order)
        if by == "group":
            return [together(rows, members, order) for members in Members.by_group(groups)]
        found = together(rows, Members.of(groups), order)
        if self._clip_factor is not None:
            found["clip_factor"] = torch.as_tensor(self._clip_factor, dtype=torch.float64)
        if self.skip_nonfinite or self.metrics:
            found["skipped"] = torch.as_tensor(self.skipped).clone()
        return found


def _either(one: torch.Tensor | float, other: torch.Tensor | float) -> torch.Tensor | float:
    """Return a number that is not zero if one of two is not."""
    if not isinstance(one, torch.Tensor) and not isinstance(other, torch.Tensor):
        return float(bool(one) or bool(other))
    return (torch.as_tensor(one) != 0).logical_or(torch.as_tensor(other) != 0).double()
