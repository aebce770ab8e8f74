"""The ways to run a step, and the choice between them.

A backend is a module with the members of :class:`Backend`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from stepforge.backends import foreach, native, reference, triton
from stepforge.backends.batch import Batch, KernelTable, Scalars, Seeds, UniformKernel
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.reduction import PassTable, Totals
from stepforge.backends.spec import KernelSpec, ParamSpec

__all__ = ["BACKENDS", "FUSED", "Backend", "Batch", "Choice", "KernelSpec", "ParamSpec", "choose"]


class Backend(Protocol):
    """A way to run a step.

    Attributes:
        name: its name in ``STEPFORGE_BACKEND`` and in :func:`stepforge.explain`.
        device_scalars: True if it takes all numbers of a step as device tensors and never
            synchronizes; False if it needs Python numbers.
        OPERATIONS: its form of each operation of the vocabulary.
    """

    name: str
    device_scalars: bool
    OPERATIONS: Mapping[str, Any]

    def unsupported_reason(self, param: ParamSpec) -> str | None:
        """Say why it cannot step a parameter; None if it can."""

    def prepare(self, batch: Batch) -> KernelTable | None:
        """Return what a batch's tensors need in every step; None if nothing can be kept.

        Raises:
            RuntimeError: a tensor has no memory.
        """

    def uniform_kernel(
        self, spec: KernelSpec, scalars: Mapping[str, Scalars], seeds: Seeds | None
    ) -> UniformKernel | None:
        """Return a kernel for the uniform values of a launch whose scalars are on its device.

        Args:
            spec: the kernel of the launch.
            scalars: the step counts, named ``t``, and the scalar states, by letter.
            seeds: the seed of each parameter; None if nothing is rounded at random.

        Returns:
            The kernel; None if torch's operations must compute the values.
        """

    def prepare_pass(self, batch: Batch) -> PassTable | None:
        """Return what is kept for further passes over the same parameters; None if nothing is.

        Args:
            batch: the parameters, with the graph of the pass.
        """

    def reduce(
        self,
        batch: Batch,
        table: PassTable | None = None,
        grad_scale: GradScale | None = None,
    ) -> Totals:
        """Return the reductions of a pass. Changes nothing.

        Args:
            batch: the parameters, with the graph of the pass and its coefficients.
            table: the result of :meth:`prepare_pass`, to which the gradients of the step are bound.
            grad_scale: the scale of the gradients.
        """

    def run(
        self,
        batch: Batch,
        table: KernelTable | None = None,
        grad_scale: GradScale | None = None,
    ) -> Totals | None:
        """Step a batch in place.

        Args:
            batch: the tensors and values of one step.
            table: the result of :meth:`prepare` for the same tensors, with this step's gradients
                bound to it.
            grad_scale: the scale of the gradients; None if they are not scaled.

        Returns:
            The reductions of what is stored then; None if the graph has none. They may be
            overwritten by the next step.
        """


#: Every backend, by name.
BACKENDS: dict[str, Backend] = {
    module.name: module for module in (native, triton, foreach, reference)
}
#: The backend of ``fused=True``, by the type of device: it runs a kernel that is generated from the
#: whole graph. torch's "cuda" includes AMD's GPUs.
FUSED = {"cpu": "native", "cuda": "triton", "xpu": "triton"}


@dataclass(frozen=True)
class Choice:
    """The backend of a parameter, and why no faster one serves it.

    Attributes:
        backend: the backend.
        reasons: for each backend that was passed over, its name and the reason, in one clause.
    """

    backend: Backend
    reasons: tuple[tuple[str, str], ...] = ()


def choose(param: ParamSpec) -> Choice:
    """Choose the backend of a parameter, by its group's ``fused`` and ``foreach``.

    ``fused=True`` asks for a generated kernel, ``foreach=True`` for the foreach path. With both
    unset, the fastest backend that can serve the parameter runs. In all other cases the reference
    runs. The environment variable ``STEPFORGE_BACKEND`` overrides the options.

    Raises:
        ValueError: ``STEPFORGE_BACKEND`` names no backend.
        RuntimeError: the backend that was asked for cannot serve this parameter.
    """
    reasons: list[tuple[str, str]] = []
    p = param.p
    for candidate, asked_for in _candidates(param.group, p.device):
        backend = BACKENDS.get(candidate)
        if backend is None:
            why_not: str | None = f"there are no kernels for {p.device.type} devices"
        else:
            why_not = backend.unsupported_reason(param)
            if why_not is None:
                return Choice(backend, tuple(reasons))
        reasons.append((candidate, str(why_not)))
        if asked_for:
            raise RuntimeError(
                f"{asked_for} cannot serve a parameter of shape {tuple(p.shape)}, {p.dtype} on "
                f"{p.device.type}: {why_not}"
            )
    raise AssertionError("the reference supports every parameter")


def _candidates(group: Mapping[str, Any], device: torch.device) -> Iterator[tuple[str, str]]:
    """Yield backends to try in turn, each with the option that demands it, or ``""``."""
    forced = os.environ.get("STEPFORGE_BACKEND")
    fused, wants_foreach = group["fused"], group["foreach"]
    generated = FUSED.get(device.type, "")
    if forced:
        if forced not in BACKENDS:
            raise ValueError(
                f"STEPFORGE_BACKEND is {forced!r}; it must be one of {', '.join(BACKENDS)}"
            )
        yield forced, f"STEPFORGE_BACKEND={forced}"
    elif fused:
        yield generated, "fused=True"
    elif wants_foreach:
        yield "foreach", ""
        yield "reference", ""
    elif fused is None and wants_foreach is None:
        for backend in filter(None, (generated, "foreach", "reference")):
            yield backend, ""
    else:
        yield "reference", ""
