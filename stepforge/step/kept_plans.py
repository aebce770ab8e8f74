"""Kept plans: one for each set of parameters that have a gradient, a few of them."""

from __future__ import annotations

from collections.abc import Hashable

from stepforge.step.guards import Groups, Source, gradient_pattern
from stepforge.step.launch import BoundLaunch
from stepforge.step.plan import Plan

__all__ = ["KeptPlans"]

#: The number of plans that are kept. Eight serve parts of a model that are trained in turn, and
#: steps that each go to one of eight experts. Each plan takes about 400 bytes per parameter. Some
#: mixtures have hundreds of sets, of which no small number of plans would find one again.
_MOST = 8


class KeptPlans:
    """The plans of the last steps, by the set of parameters that had a gradient.

    Each has guards of its own, which decide whether it fits; the set only says which one to ask.

    Attributes:
        latest: the plan of the last step; None before the first step, and if it was not kept.
    """

    def __init__(self) -> None:
        self.latest: Plan | None = None
        self._plans: dict[Hashable, Plan] = {}  # the least recently used first

    def bind(self, groups: Groups, source: Source) -> list[BoundLaunch] | None:
        """Bind the plan that fits to the tensors of a step; return None if none fits.

        Args:
            groups: all param groups of the optimizer.
            source: the origin of the states.
        """
        # The set is only read where the plan of the last step does not fit: it takes a while.
        bound = _bind(self.latest, groups, source)
        if bound is not None or not self._plans:
            return bound
        pattern = gradient_pattern(groups, source)
        plan = self._plans.pop(pattern, None)
        if plan is None or plan is self.latest:
            return None
        bound = _bind(plan, groups, source)
        if bound is not None:
            self._plans[pattern] = self.latest = plan
        return bound

    def keep(self, plan: Plan, groups: Groups, source: Source) -> None:
        """Keep the plan of a step instead of the one of the same set.

        Args:
            plan: the plan.
            groups: all param groups of the optimizer.
            source: the origin of the states.
        """
        pattern = gradient_pattern(groups, source)
        self._plans.pop(pattern, None)
        self._plans[pattern] = self.latest = plan
        if len(self._plans) > _MOST:
            del self._plans[next(iter(self._plans))]

    def clear(self) -> None:
        """Forget all plans."""
        self.latest = None
        self._plans.clear()


def _bind(plan: Plan | None, groups: Groups, source: Source) -> list[BoundLaunch] | None:
    """Bind a plan to the tensors of a step; return None if it does not fit."""
    if plan is None:
        return None
    tensors = plan.find(groups, source)
    return None if isinstance(tensors, str) else plan.bind(tensors, groups)
