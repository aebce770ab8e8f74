"""The stepper: keeps plans from step to step, and runs the one that fits."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch

from stepforge.backends.batch import is_capturing
from stepforge.backends.grad_scale import GradScale
from stepforge.rule import Rule
from stepforge.step.control import Control
from stepforge.step.garbage import uncollected
from stepforge.step.guards import Groups, Watched
from stepforge.step.kept_plans import KeptPlans
from stepforge.step.launch import BoundLaunch, StepTensors
from stepforge.step.params import (
    ParamStep,
    WithGradient,
    check_params,
    enter_new_states,
    params_with_gradient,
)
from stepforge.step.passes import run
from stepforge.step.plan import Plan, can_be_kept
from stepforge.step.scalar_states import ScalarVectors
from stepforge.step.traced import TracedParams

__all__ = ["Stepper"]

_numbers = itertools.count()


class Stepper:
    """Owner of an optimizer's plans: steps by a kept one that fits, else by a new one.

    Args:
        optimizer: the optimizer; not kept alive.
        rule: its rule.
        sparse_problem: the error for a sparse gradient; None if the rule takes them.
        control: clips and skips steps.

    Attributes:
        number: identifies it to the operator of ``torch.compile``.
        plans: the kept plans.
        given_plans: the kept plans of steps whose tensors ``torch.compile`` gives.
        vectors: the vectors of the scalar states of parameters in kept plans.
        captured: True once a CUDA graph holds the addresses of the step counters.
        traced: the parameters that ``torch.compile`` has seen; None if it has seen none.
    """

    #: Prepares a stepper to be traced. Set by :mod:`stepforge.step.compiled`, since only users who
    #: compile should pay for importing torch._dynamo.
    make_traceable: ClassVar[Callable[[Stepper], bool]]

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rule: Rule,
        sparse_problem: str | None,
        control: Control,
    ) -> None:
        self.number = next(_numbers)
        self._optimizer = weakref.ref(optimizer)
        self.rule = rule
        self.sparse_problem = sparse_problem
        self.control = control
        self.plans = KeptPlans()
        self.given_plans = KeptPlans()
        self.vectors = ScalarVectors()
        self.captured = False
        # The plans that graphs were captured of, whose tables every replay reads.
        self._captured_plans: list[Plan] = []
        self.traced: TracedParams | None = None

    @property
    def groups(self) -> Groups:
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

    def step(
        self,
        groups: Groups,
        state: dict[Any, dict[str, Any]],
        grad_scale: GradScale | None = None,
    ) -> None:
        """Step every parameter that has a gradient.

        Args:
            groups: the param groups of the optimizer.
            state: the state of the optimizer.
            grad_scale: the scale of the gradients; None if they are not scaled.

        Raises:
            RuntimeError, TypeError, ValueError: the step is impossible. Nothing has changed.
        """
        capturing = is_capturing()
        self.captured |= capturing
        bound = self.plans.bind(groups, state) or self._bind_new(groups, state)
        self._run(bound, groups, grad_scale)
        if capturing and self.plans.latest is not None:
            self._captured_plans.append(self.plans.latest)

    def step_given(self, given: list[WithGradient]) -> None:
        """Step parameters, gradients and states that are given, as by ``torch.compile``.

        Raises:
            RuntimeError: a state is incomplete.
        """
        self.captured |= is_capturing()
        groups = self.groups
        bound = self.given_plans.bind(groups, given) or self._bind_given(groups, given)
        self._run(bound, groups, None)

    def _run(self, bound: list[BoundLaunch], groups: Groups, grad_scale: GradScale | None) -> None:
        if not bound:
            return  # no step: what is known of the last one stays
        control = self.control
        control.record(run(bound, groups, control.measured(bound, grad_scale)))

    def is_traceable(self) -> bool:
        """Prepare to be traced; return False if the step must run outside of the graph.

        The compiler calls it while it traces, not in the steps that follow.
        """
        return type(self).make_traceable(self)

    def forget(self) -> None:
        """Forget the plans, and the vectors of states that others have replaced."""
        self.plans.clear()
        self.vectors = ScalarVectors()

    def checked(self, params: Iterable[WithGradient]) -> list[ParamStep]:
        """Check parameters, as :func:`~stepforge.step.params.check_params` does."""
        return check_params(self.rule, params, sparse_problem=self.sparse_problem)

    @uncollected
    def _bind_new(self, groups: Groups, state: dict[Any, dict[str, Any]]) -> list[BoundLaunch]:
        """Build a plan, bind it, and keep it if it may serve further steps."""
        self.plans.latest = None
        params = self.checked(params_with_gradient(groups, state))
        if is_capturing() and any(not state.get(param.p) for param in params):
            raise RuntimeError(
                "the first step of a parameter cannot be captured, as every replay would set its "
                "states to zero: step once before the capture"
            )
        kept = can_be_kept(params, self.vectors if self.captured else None)
        # A compiler may not write to tensors that alias others, such as elements of a vector.
        vectors = self.vectors if kept and self.traced is None else None
        plan, launches = Plan.build(self.rule, params, groups, vectors=vectors)
        bound = plan.bind(list(map(StepTensors.of, launches)), groups)
        enter_new_states(params, state)
        if kept:
            members = itertools.chain.from_iterable(group["params"] for group in groups)
            plan.guard(Watched.by(self.rule, launches, members, state), groups, state)
            self.plans.keep(plan, groups, state)
        return bound

    @uncollected
    def _bind_given(self, groups: Groups, given: list[WithGradient]) -> list[BoundLaunch]:
        """Build a plan of given tensors, bind it, and keep it if it may serve further steps."""
        self.given_plans.latest = None
        params = self.checked(given)
        if any(param.state is not state for param, (*_, state) in zip(params, given)):
            raise RuntimeError(
                "the options of a param group ask for other states than when the step was "
                "compiled: call torch.compiler.reset()"
            )
        plan, launches = Plan.build(self.rule, params, groups)
        bound = plan.bind(list(map(StepTensors.of, launches)), groups)
        # Each parameter has a step count of its own, whose address no vector decides.
        if not self.captured and can_be_kept(params):
            members = [p for _, p, *_ in given]
            watched = Watched.by(self.rule, launches, members, members, is_given=True)
            plan.guard(watched, groups, given)
            self.given_plans.keep(plan, groups, given)
        return bound
