"""Control of a step by all gradients: clipping by their norm, and steps that are skipped.

One pass over the gradients comes before the step and changes nothing. What it finds goes to the
kernels as what they take anyway: a factor of all gradients, and whether to change anything.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from stepforge.backends.grad_scale import GradScale
from stepforge.expr import Expr, Trace
from stepforge.ops import ALL, count, minimum, norm, sqrt
from stepforge.program import Graph
from stepforge.step.launch import BoundLaunch
from stepforge.step.passes import of_all

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


def _not_finite(g: Expr) -> Expr:
    return g - g != 0


@functools.cache
def _graph(names: tuple[str, ...]) -> Graph:
    """Return the graph of the pass that finds some facts about all gradients."""
    g = Trace().input("g", varying=True)
    facts = {
        "squares": norm(g, across=ALL).args[0],
        "nonfinite": count(_not_finite(g), across=ALL),
    }
    return Graph.of_reductions([facts[name] for name in names])


def gradient_passes() -> Iterator[Graph]:
    """Yield the pass of every choice of options."""
    for names in (("squares",), ("nonfinite",), ("squares", "nonfinite")):
        yield _graph(names)


class Control:
    """Clips and skips the steps of an optimizer.

    Args:
        max_grad_norm: the norm that all gradients together may have; None for any.
        skip_nonfinite: True to skip steps with a gradient that is not finite.

    Attributes:
        latest: what the last step found, numbers or tensors without dimensions: ``grad_norm`` and
            ``clip_factor`` if it clips.
        skipped: the number of steps skipped so far.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: ``max_grad_norm`` is not a positive, finite number.
    """

    #: The options and their defaults: nothing is clipped or skipped.
    DEFAULTS: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"max_grad_norm": None, "skip_nonfinite": False}
    )

    def __init__(self, *, max_grad_norm: Any = None, skip_nonfinite: Any = False) -> None:
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
        self.max_grad_norm = None if max_grad_norm is None else float(max_grad_norm)
        self.skip_nonfinite = skip_nonfinite
        self.latest: dict[str, torch.Tensor | float] = {}
        self.skipped: torch.Tensor | int = 0

    @property
    def options(self) -> dict[str, Any]:
        """The options."""
        return {name: getattr(self, name) for name in self.DEFAULTS}

    def count_skipped(self) -> None:
        """Count a step that a gradient scaler has found not finite."""
        self._count(1.0)

    def _count(self, found_inf: torch.Tensor | float) -> None:
        """Count a step if a number is not zero."""
        if isinstance(found_inf, torch.Tensor) and not isinstance(self.skipped, torch.Tensor):
            self.skipped = torch.full((), self.skipped, device=found_inf.device)
        # In place on a device, where a graph may repeat it.
        self.skipped += found_inf != 0

    @property
    def is_on(self) -> bool:
        """True if it has anything to do."""
        return self.max_grad_norm is not None or self.skip_nonfinite

    def measured(
        self, launches: Sequence[BoundLaunch], grad_scale: GradScale | None
    ) -> GradScale | None:
        """Return the scale of the gradients of a step, with its clipping. Changes no tensor.

        Args:
            launches: all launches of the step.
            grad_scale: the scale before.
        """
        if not self.is_on or not launches:
            return grad_scale
        totals = of_all(_graph(self._facts), launches, grad_scale)
        found = dict(zip(self._facts, totals))
        scale = GradScale() if grad_scale is None else grad_scale
        clip, found_inf = scale.clip, scale.found_inf
        self.latest = {}
        if self.max_grad_norm is not None:
            grad_norm = sqrt(found["squares"])
            clip = clip_factor(grad_norm, self.max_grad_norm)
            self.latest = {"grad_norm": grad_norm, "clip_factor": clip}
        if self.skip_nonfinite:
            found_inf = _either(found_inf, found["nonfinite"])
            self._count(found_inf)
        return GradScale(scale.scale, found_inf, clip)

    @functools.cached_property
    def _facts(self) -> tuple[str, ...]:
        """The names of what the pass finds."""
        wanted = {"squares": self.max_grad_norm is not None, "nonfinite": self.skip_nonfinite}
        return tuple(name for name, is_wanted in wanted.items() if is_wanted)

    def metrics(self) -> dict[str, torch.Tensor]:
        """Return what is known of the last step, as tensors without dimensions."""
        known = {k: torch.as_tensor(x, dtype=torch.float64) for k, x in self.latest.items()}
        if self.skip_nonfinite:
            known["skipped"] = torch.as_tensor(self.skipped).clone()
        return known


def _either(one: torch.Tensor | float, other: torch.Tensor | float) -> torch.Tensor | float:
    """Return a number that is not zero if one of two is not."""
    if not isinstance(one, torch.Tensor) and not isinstance(other, torch.Tensor):
        return float(bool(one) or bool(other))
    return (torch.as_tensor(one) != 0).logical_or(torch.as_tensor(other) != 0).double()
