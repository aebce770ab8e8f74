"""Plans: the parameters of a step, grouped into launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stepforge.rule import Rule
from stepforge.state.sharding import is_plain, is_sharded, local_part
from stepforge.step.guards import Groups, Guards, PythonGuards, Source, Watched, in_cpp, record
from stepforge.step.launch import BoundLaunch, Launch, StepTensors
from stepforge.step.params import ParamStep
from stepforge.step.scalar_states import ScalarVectors

__all__ = ["Plan", "can_be_kept"]


@dataclass(eq=False)
class Plan:
    """The launches of a step.

    Attributes:
        launches: the launches.
        guards: find the tensors of the next step; None if the plan serves one step only.
    """

    launches: tuple[Launch, ...]
    guards: Guards | None = None

    @classmethod
    def build(
        cls,
        rule: Rule,
        params: Sequence[ParamStep],
        groups: Groups,
        *,
        vectors: ScalarVectors | None = None,
    ) -> tuple[Plan, list[list[ParamStep]]]:
        """Group parameters into launches.

        Args:
            rule: the optimizer's rule.
            params: the parameters of the step.
            groups: all param groups of the optimizer.
            vectors: the vectors that hold the scalar states of kept plans; None if each parameter
                keeps its own.

        Returns:
            The plan, and the parameters of each launch.
        """
        together = _grouped(params)
        launches = tuple(Launch.of(rule, each, groups, vectors=vectors) for each in together)
        return cls(launches), together

    def guard(self, watched: Watched, groups: Groups, source: Source) -> None:
        """Record param groups and tensors as they are, so that further steps can keep the plan."""
        self.guards = record(watched, groups, source)

    def find(self, groups: Groups, source: Source) -> list[StepTensors] | str:
        """Return the tensors of each launch in the next step; or why the plan is stale.

        Args:
            groups: all param groups of the optimizer.
            source: the origin of the states.
        """
        if self.guards is None:
            return "the plan serves one step only"
        tensors = self.guards.find(groups, source)
        if isinstance(self.guards, PythonGuards) and not isinstance(tensors, str):
            # The extension may have been built meanwhile.
            self.guards = in_cpp(self.guards.watched, groups, source) or self.guards
        return tensors

    def bind(self, tensors: Sequence[StepTensors], groups: Groups) -> list[BoundLaunch]:
        """Bind each launch to its tensors in this step."""
        return [launch.bind(each, groups) for launch, each in zip(self.launches, tensors)]


def _grouped(params: Sequence[ParamStep]) -> list[list[ParamStep]]:
    """Group the parameters that one launch can step.

    They share a backend, a kernel, a device, and the dtypes of scalar states. Options that are not
    flags may differ, except where they are device tensors: those cannot be compared without
    synchronizing, so such a group has launches of its own. So has a differentiable one.
    """
    groups: dict[tuple[Any, ...], list[ParamStep]] = {}
    of_kind: dict[int, list[ParamStep]] = {}
    for param in params:
        launch = of_kind.get(id(param.kind))
        if launch is None:
            launch = of_kind[id(param.kind)] = groups.setdefault(_launch_key(param), [])
        launch.append(param)
    return list(groups.values())


def _launch_key(param: ParamStep) -> tuple[Any, ...]:
    """Return all that the parameters of a launch have in common."""
    alone = param.has_device_scalars or param.group["differentiable"]
    return (
        param.choice.backend.name,
        param.kernel,
        param.layout.keys,
        is_sharded(param.p),
        param.p.device,
        tuple(param.state[key].dtype for key in param.layout.scalars),
        id(param.group) if alone else None,
    )


def can_be_kept(params: Sequence[ParamStep], captured: ScalarVectors | None = None) -> bool:
    """Return True if a plan of these parameters may serve further steps.

    Args:
        params: the parameters of a step.
        captured: the vectors of scalar states once a CUDA graph holds the addresses of the step
            counters; None before. The counters of a capturable group must then stay where they are.
    """
    one_of_each = {id(param.kind): param for param in params}.values()
    if not params or not all(map(_has_plain_memory, one_of_each)):
        return False
    return captured is None or all(
        captured.hold(
            [param.p for param in launch],
            [param.state for param in launch],
            launch[0].layout.scalars,
        )
        for launch in _grouped(params)
        if launch[0].group["capturable"]
    )


def _has_plain_memory(param: ParamStep) -> bool:
    """Return True if all tensors are real memory, so that addresses and layouts tell all."""
    tensors = [x for x in param.state.values() if isinstance(x, torch.Tensor)]
    step = param.state["step"]
    return not (
        param.group["differentiable"]
        or param.p.is_complex()
        or param.g.is_sparse
        or step.dtype not in (torch.float32, torch.float64)
        or (param.has_device_scalars and step.device != param.p.device)
        or (is_sharded(param.p) and not _is_sharded_throughout(param))
        or not all(map(is_plain, map(local_part, [param.p, param.g, *tensors])))
    )


def _is_sharded_throughout(param: ParamStep) -> bool:
    """Return True if gradient and states are DTensors, and the gradient is the parameter's own.

    A gradient with other placements than its parameter is redistributed, into a new tensor.
    """
    states = (param.state[tensor.key] for tensor in param.layout.tensors)
    return param.g is param.p.grad and all(map(is_sharded, states))
