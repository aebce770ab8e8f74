"""Launches: parameters that one backend steps together, bound to the tensors of a step and run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from stepforge.backends import Backend
from stepforge.backends.aliasing import addresses
from stepforge.backends.batch import (
    Batch,
    Coefficient,
    KernelTable,
    LazyColumns,
    Seeds,
    UniformKernel,
)
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.reduction import PassTable, Totals, totals_at_rest
from stepforge.backends.spec import KernelSpec
from stepforge.program import Graph
from stepforge.rule import Rule
from stepforge.state.layout import StateLayout
from stepforge.state.sharding import first_index, is_sharded, local, local_part, shard_groups
from stepforge.step.params import ParamStep
from stepforge.step.scalar_states import ScalarStates, ScalarVectors
from stepforge.step.uniform import (
    UniformProgram,
    param_seeds,
    round_coefficients,
    step_seeds,
)

__all__ = ["BoundLaunch", "Launch", "StepTensors"]


@dataclass(frozen=True)
class StepTensors:
    """The tensors of a launch in one step: real and local.

    Attributes:
        params: the parameters.
        gradients: the gradient of each.
        states: the state of each, in the order of its layout's keys, one parameter's after the
            other's.
        keys: the number of those keys.
        scalars: the number of them, at the front, that are scalars.
        sharded: the DTensors among parameters and states. Autograd looks at their versions, and a
            kernel writes to their local parts.
    """

    params: list[torch.Tensor]
    gradients: list[torch.Tensor]
    states: list[torch.Tensor]
    keys: int
    scalars: int
    sharded: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, params: Sequence[ParamStep]) -> StepTensors:
        """Return the tensors of some parameters with the same layout keys."""
        written = [
            x
            for param in params
            for x in (param.p, *(param.state[tensor.key] for tensor in param.layout.tensors))
        ]
        # Autograd sees through the one, and kernels want the memory of the other.
        part = local if params[0].group["differentiable"] else local_part
        return cls(
            [_real(part(param.p)) for param in params],
            [_real(part(param.g.resolve_conj())) for param in params],
            [_real(part(param.state[key])) for param in params for key in param.layout.keys],
            len(params[0].layout.keys),
            len(params[0].layout.scalars),
            [x for x in written if is_sharded(x)],
        )

    @property
    def disjoint(self) -> bool:
        """False: whether all have memory, and memory overlaps, is not known."""
        return False

    def write_addresses(self, out: np.ndarray[Any, Any]) -> None:
        """Write the address of each gradient into an array of uint64."""
        out[:] = addresses(self.gradients)

    def increment_versions(self) -> None:
        """Tell autograd that a kernel has written to parameters and states."""
        states = [x for i, x in enumerate(self.states) if i % self.keys >= self.scalars]
        torch.autograd.graph.increment_version([*self.params, *states])

    def increment_sharded_versions(self) -> None:
        """Tell autograd that a step has written to the local parts of DTensors."""
        torch.autograd.graph.increment_version(self.sharded)


@dataclass(frozen=True)
class Pass:
    """A pass over the parameters of a launch that makes reductions.

    Attributes:
        spec: the kernel of the pass.
        table: the part of a batch that the backend keeps; None if it keeps nothing.
    """

    spec: KernelSpec
    table: PassTable | None


@dataclass
class Launch:
    """Parameters that one backend steps together: all about them but their tensors.

    It is kept from step to step, and owns no parameter, gradient or state.

    Attributes:
        backend: the backend.
        kernel: the kernel.
        layout: the keys of the parameters' states, and the tensors among them.
        uniform: computes the values that are one number per parameter.
        seeds: the seed of each parameter; None if nothing is rounded at random.
        first_indices: the flat index of each parameter's first local element; None likewise.
        scalars: the step counts and scalar states in vectors; None if each parameter has its own.
        uniform_kernel: computes the uniform values and advances the scalars on the device; None if
            torch's operations do, or the host.
        indices: the index of each parameter in the optimizer.
        shard_groups: for each parameter, the process groups over which it is cut.
        table: the part of a batch that the backend keeps, made at the first bind; None if it keeps
            nothing.
        passes: what the backend keeps of passes over the parameters, by their graph.
    """

    backend: Backend
    kernel: KernelSpec
    layout: StateLayout
    uniform: UniformProgram
    seeds: Seeds | None
    first_indices: np.ndarray[Any, Any] | None
    scalars: ScalarStates | None
    indices: np.ndarray[Any, Any]
    shard_groups: list[tuple[Any, ...]]
    uniform_kernel: UniformKernel | None = None
    table: KernelTable | None = None
    passes: dict[Graph, Pass] = field(default_factory=dict)
    _is_prepared: bool = False

    @classmethod
    def of(
        cls,
        rule: Rule,
        params: Sequence[ParamStep],
        groups: Sequence[Mapping[str, Any]],
        *,
        vectors: ScalarVectors | None,
    ) -> Launch:
        """Return the launch of some parameters.

        Args:
            rule: the optimizer's rule.
            params: parameters with the same backend, kernel, layout keys and device.
            groups: all param groups of the optimizer.
            vectors: the vectors whose elements then replace the scalar states of the parameters;
                None if each parameter keeps its own.
        """
        first = params[0]
        positions = {id(group): index for index, group in reversed(list(enumerate(groups)))}
        of_params = [positions[id(param.group)] for param in params]
        distinct = tuple(dict.fromkeys(of_params))
        seeds, first_indices = None, None
        if first.kernel.is_random:
            device = first.p.device if first.has_device_scalars else torch.device("cpu")
            of_groups = np.array([int(param.group["rounding_seed"]) for param in params])
            seeds = param_seeds(of_groups, np.array([param.index for param in params]), device)
            first_indices = np.array([first_index(param.p) for param in params])
        scalars = None
        if vectors is not None:
            scalars = vectors.scalar_states(
                [param.p for param in params],
                [param.state for param in params],
                first.layout.scalars,
                room=sum(len(group["params"]) for group in groups),
            )
        uniform = UniformProgram(
            rule,
            first.kernel.graph,
            distinct,
            np.array([distinct.index(index) for index in of_params]),
            on_device=first.has_device_scalars,
            differentiable=first.group["differentiable"],
        )
        uniform_kernel = None
        if scalars is not None and uniform.on_device and not first.kernel.graph.before:
            on_device = uniform.scalars_on_device(scalars)
            uniform_kernel = first.choice.backend.uniform_kernel(first.kernel, on_device, seeds)
        return cls(
            first.choice.backend,
            first.kernel,
            first.layout,
            uniform,
            seeds,
            first_indices,
            scalars,
            np.array([param.index for param in params]),
            [shard_groups(param.p) for param in params] if is_sharded(first.p) else [],
            uniform_kernel,
        )

    @functools.cached_property
    def is_in_order(self) -> bool:
        """True if the parameters are in the order of the optimizer."""
        return bool((np.diff(self.indices) > 0).all())

    def bind(self, tensors: StepTensors, groups: Sequence[Mapping[str, Any]]) -> BoundLaunch:
        """Bind the tensors of a step, and compute its uniform values. Changes nothing.

        Args:
            tensors: the tensors.
            groups: all param groups of the optimizer.

        Raises:
            RuntimeError: a tensor has no memory.
            TypeError, ValueError: an option was set by hand to something that is no number.
        """
        scalars = self.scalars
        if scalars is None:
            scalars = ScalarStates({k: self._states(tensors, k) for k in self.layout.scalars})
        columns = LazyColumns(
            self._columns, functools.partial(self._column, tensors), tensors.increment_versions
        )
        if self.uniform_kernel is not None:
            values = self.uniform_kernel.bind(self.uniform.options(groups))
            batch = Batch(
                self.kernel,
                columns,
                values.coefficients,
                values.step_seeds,
                self.first_indices,
                matrix=values.matrix,
            )
            bound = BoundLaunch(self, batch, scalars, [], tensors, values.advance)
        else:
            coefficients: list[Coefficient] = []
            scalar_values: list[Any] = []
            if not self.kernel.graph.before:  # else they follow from what passes will find
                coefficients, scalar_values = self.values(self.uniform, groups, scalars)
            batch = Batch(
                self.kernel,
                columns,
                coefficients,
                None if self.seeds is None else step_seeds(self.seeds, scalars),
                self.first_indices,
                self.uniform.differentiable,
            )
            bound = BoundLaunch(self, batch, scalars, scalar_values, tensors)
        if not self._is_prepared:
            self.table = self.backend.prepare(batch)
            self._is_prepared = True
        elif self.table is not None:
            self.table.bind_gradients(tensors)
        return bound

    def values(
        self,
        uniform: UniformProgram,
        groups: Sequence[Mapping[str, Any]],
        scalars: ScalarStates,
        reduced: Sequence[Any] = (),
    ) -> tuple[list[Coefficient], list[Any]]:
        """Return the coefficients of a pass or of the step, and new values of scalar states.

        Args:
            uniform: the uniform program of the pass or of the step.
            groups: all param groups of the optimizer.
            scalars: the step counts and scalar states.
            reduced: the reductions of the passes before.
        """
        coefficients, scalar_values = uniform.run(groups, scalars, reduced)
        count = len(uniform.group_of)
        return round_coefficients(coefficients, count, self.kernel.arithmetic), scalar_values

    @functools.cached_property
    def _columns(self) -> tuple[str, ...]:
        """The names of the columns of a batch."""
        return "p", "g", *(x.name for x in self.layout.tensors)

    def _column(self, tensors: StepTensors, name: str) -> list[torch.Tensor]:
        """Return the tensors of a column of a batch."""
        if name == "p":
            return tensors.params
        if name == "g":
            return tensors.gradients
        return self._states(tensors, next(x.key for x in self.layout.tensors if x.name == name))

    def _states(self, tensors: StepTensors, key: str) -> list[torch.Tensor]:
        """Return the tensors of one key of the states."""
        keys = self.layout.keys
        return tensors.states[keys.index(key) :: len(keys)]


@dataclass(eq=False)
class BoundLaunch:
    """A launch with the tensors and values of one step.

    Attributes:
        launch: the launch.
        batch: the tensors and values that the backend is given.
        scalars: the step counts and scalar states.
        scalar_values: the new values of the graph's scalar states, in its order.
        tensors: the tensors of the step.
        advance: writes the coefficients and advances the scalars on the device, unless the number
            on the device that it is given is not zero; None if coefficients are known already.
    """

    launch: Launch
    batch: Batch
    scalars: ScalarStates
    scalar_values: list[Any]
    tensors: StepTensors
    advance: Callable[[torch.Tensor | None], None] | None = None

    def reduced(
        self,
        graph: Graph,
        grad_scale: GradScale | None,
        coefficients: Sequence[Coefficient] = (),
    ) -> Totals:
        """Return the reductions of a pass. Changes nothing.

        Args:
            graph: the graph of the pass.
            grad_scale: the scale of the gradients.
            coefficients: the values of its coefficients.
        """
        given = list(coefficients)
        launch, known = self.launch, self.launch.passes.get(graph)
        if known is None:
            own = self.batch.spec
            spec = KernelSpec.of(graph, own.dtype_of, own.formats, own.arithmetic)
            batch = replace(self.batch, spec=spec, coefficients=given)
            known = launch.passes[graph] = Pass(spec, launch.backend.prepare_pass(batch))
        elif known.table is not None:
            known.table.bind_gradients(self.tensors)
        batch = replace(self.batch, spec=known.spec, coefficients=given)
        return launch.backend.reduce(batch, known.table, grad_scale)

    def run(self, grad_scale: GradScale | None) -> Totals | None:
        """Step the parameters: their tensors, then scalar states and step counts.

        Returns:
            The reductions of what is stored then; None if the graph has none.
        """
        if grad_scale is not None:
            # Synchronous backends and step counts on the host need Python numbers.
            if not self.launch.backend.device_scalars or self.scalars.device != self.batch.device:
                grad_scale = grad_scale.read()
            if grad_scale.on_host and grad_scale.found_inf:
                return totals_at_rest(self.batch, grad_scale)
        found_inf = self._found_inf(grad_scale)
        if self.advance is not None:
            self.advance(found_inf)
        totals = self.launch.backend.run(self.batch, self.launch.table, grad_scale)
        self.tensors.increment_sharded_versions()
        if self.advance is not None:
            return totals
        skipped = None if found_inf is None else found_inf.reshape(()) != 0
        if torch.is_grad_enabled() == self.batch.differentiable:  # the usual case
            self._store_scalars(skipped)
        else:
            with torch.set_grad_enabled(self.batch.differentiable):
                self._store_scalars(skipped)
        return totals

    def _store_scalars(self, skipped: torch.Tensor | None) -> None:
        """Store the new scalar states and step counts."""
        if self.scalar_values:
            states = self.launch.uniform.rule.states
            for letter, values in zip(self.batch.spec.graph.scalars, self.scalar_values):
                self.scalars.store(states[letter].key, values, skipped)
        self.scalars.count_step(skipped)

    def _found_inf(self, grad_scale: GradScale | None) -> torch.Tensor | None:
        """Return a device number, not zero if the step is skipped; None if the host knows."""
        if grad_scale is None or grad_scale.on_host:
            return None
        return grad_scale.found_inf_on(self.batch.device)


def _real(x: torch.Tensor) -> torch.Tensor:
    """Return the real view of a complex tensor; any other tensor itself."""
    if not x.is_complex():
        return x
    if x.is_sparse:
        values = torch.view_as_real(x._values())
        return torch.sparse_coo_tensor(
            x._indices(), values, (*x.shape, 2), is_coalesced=True, check_invariants=False
        )
    return torch.view_as_real(x)
