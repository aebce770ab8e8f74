"""The stepper: keeps a plan from step to step, and runs it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch

from stepforge.backends.batch import is_capturing
from stepforge.backends.grad_scale import GradScale
from stepforge.rule import Rule
from stepforge.step.garbage import uncollected
from stepforge.step.guards import GivenGuards, Guards
from stepforge.step.launch import BoundLaunch, StepTensors, run
from stepforge.step.params import (
    ParamStep,
    WithGradient,
    check_params,
    enter_new_states,
    params_with_gradient,
)
from stepforge.step.plan import Plan, can_be_kept
from stepforge.step.traced import TracedParams

__all__ = ["Stepper"]

_numbers = itertools.count()


class Stepper:
    """Owner of an optimizer's plan: steps by the kept one while it fits, else by a new one.

    Args:
        optimizer: the optimizer; not kept alive.
        rule: its rule.
        sparse_problem: the error for a sparse gradient; None if the rule takes them.

    Attributes:
        number: identifies it to the operator of ``torch.compile``.
        plan: the kept plan; None before the first step and when none can be kept.
        given_plan: the kept plan of steps whose tensors ``torch.compile`` gives.
        captured: True once a CUDA graph holds the addresses of the step counters.
        traced: the parameters that ``torch.compile`` has seen; None if it has seen none.
    """

    #: Prepares a stepper to be traced. Set by :mod:`stepforge.step.compiled`, since only users who
    #: compile should pay for importing torch._dynamo.
    make_traceable: ClassVar[Callable[[Stepper], bool]]

    def __init__(
        self, optimizer: torch.optim.Optimizer, rule: Rule, sparse_problem: str | None
    ) -> None:
        self.number = next(_numbers)
        self._optimizer = weakref.ref(optimizer)
        self.rule = rule
        self.sparse_problem = sparse_problem
        self.plan: Plan | None = None
        self.given_plan: Plan | None = None
        self.captured = False
        self.traced: TracedParams | None = None

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The param groups of the optimizer."""
        return self._alive().param_groups

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """The state of the optimizer."""
        return self._alive().state

    def _alive(self) -> torch.optim.Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None, "a stepper is used by its optimizer only"
        return optimizer

    def step(self, grad_scale: GradScale | None = None) -> None:
        """Step every parameter that has a gradient.

        Args:
            grad_scale: the scale of the gradients; None if they are not scaled.

        Raises:
            RuntimeError, TypeError, ValueError: the step is impossible. Nothing has changed.
        """
        self.captured |= is_capturing()
        run(self._bind_kept() or self._bind_new(), grad_scale)

    def step_given(self, given: list[WithGradient]) -> None:
        """Step parameters, gradients and states that are given, as by ``torch.compile``.

        Raises:
            RuntimeError: a state is incomplete.
        """
        self.captured |= is_capturing()
        run(self._bind_given_kept(given) or self._bind_given_new(given))

    def _bind_given_kept(self, given: list[WithGradient]) -> list[BoundLaunch] | None:
        """Bind the kept plan of given tensors to those of this step; None if it does not fit."""
        if self.given_plan is None or not isinstance(self.given_plan.guards, GivenGuards):
            return None
        tensors = self.given_plan.guards.find(self.groups, given)
        if isinstance(tensors, str):
            self.given_plan = None
            return None
        return self._bind(self.given_plan, tensors)

    @uncollected
    def _bind_given_new(self, given: list[WithGradient]) -> list[BoundLaunch]:
        """Build a plan of given tensors, bind it, and keep it if it may serve further steps."""
        params = self.checked(given)
        if any(param.state is not state for param, (*_, state) in zip(params, given)):
            raise RuntimeError(
                "the options of a param group ask for other states than when the step was "
                "compiled: call torch.compiler.reset()"
            )
        plan, launches = Plan.build(self.rule, params, self.groups)
        bound = self._bind(plan, [tensors for _, tensors in launches])
        # Each parameter has a step count of its own, whose address no vector decides.
        if not self.captured and can_be_kept(params, captured=False):
            guards = GivenGuards.record(self.rule, self.groups, given, launches)
            self.given_plan = Plan(plan.launches, guards)
        return bound

    def is_traceable(self) -> bool:
        """Prepare to be traced; return False if the step must run outside of the graph.

        The compiler calls it while it traces, not in the steps that follow.
        """
        return type(self).make_traceable(self)

    def checked(self, params: Iterable[WithGradient]) -> list[ParamStep]:
        """Check parameters, as :func:`~stepforge.step.params.check_params` does."""
        return check_params(self.rule, params, sparse_problem=self.sparse_problem)

    def _bind_kept(self) -> list[BoundLaunch] | None:
        """Bind the kept plan to the tensors of this step; None if there is none that fits."""
        if self.plan is None or not isinstance(self.plan.guards, Guards):
            return None
        tensors = self.plan.guards.find(self.groups, self.state)
        if isinstance(tensors, str):
            self.plan = None
            return None
        return self._bind(self.plan, tensors)

    @uncollected
    def _bind_new(self) -> list[BoundLaunch]:
        """Build a plan, bind it, and keep it if it may serve further steps."""
        groups, state = self.groups, self.state
        params = self.checked(params_with_gradient(groups, state))
        kept = can_be_kept(params, captured=self.captured)
        # A compiler may not write to tensors that alias others, such as elements of a vector.
        vectors = kept and self.traced is None
        plan, launches = Plan.build(self.rule, params, groups, vectors=vectors)
        bound = self._bind(plan, [tensors for _, tensors in launches])
        enter_new_states(params, state)
        if kept:
            guards = Guards.record(self.rule, groups, state, launches)
            self.plan = Plan(plan.launches, guards)
        return bound

    def _bind(self, plan: Plan, tensors: Sequence[StepTensors]) -> list[BoundLaunch]:
        """Bind each launch of a plan to its tensors in this step."""
        groups = self.groups
        return [launch.bind(each, groups) for launch, each in zip(plan.launches, tensors)]
