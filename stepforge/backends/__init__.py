"""The ways to run a step, and the choice between them.

A backend is a module with a ``name``, ``OPERATIONS`` by name, ``refuses(p, g, group, graph,
storage)``, which says why it cannot serve a parameter, ``prepare(batch)`` and ``run(batch)``, and
``asynchronous``, whether it takes all numbers on the device and waits for none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from stepforge.backends import foreach, native, reference, triton
from stepforge.backends.batch import Batch, Prepared
from stepforge.expr import Graph
from stepforge.formats import Storage

__all__ = ["BACKENDS", "Backend", "Batch", "Choice", "choose"]


class Backend(Protocol):
    """What the rest of the library knows of a backend."""

    name: str
    asynchronous: bool
    OPERATIONS: Mapping[str, Any]

    def refuses(
        self,
        p: torch.Tensor,
        g: torch.Tensor | None,
        group: Mapping[str, Any],
        graph: Graph,
        storage: Storage,
    ) -> str | None:
        """Why it cannot serve a parameter with that gradient and options; None if it can."""

    def prepare(self, batch: Batch) -> Prepared | None:
        """What can be kept of a batch for the next step of the same tensors; None if nothing."""

    def run(self, batch: Batch) -> None:
        """Computes a batch and stores its results."""


#: Every backend.
BACKENDS: dict[str, Backend] = {
    module.name: module for module in (native, triton, foreach, reference)
}
#: By the type of a device the backend that ``fused=True`` asks for: it runs a kernel that is
#: generated from the whole graph. Triton's "cuda" is also what torch calls AMD's GPUs.
FUSED = {"cpu": "native", "cuda": "triton", "xpu": "triton"}


@dataclass(frozen=True)
class Choice:
    """The backend that serves a parameter, and why none that is faster does.

    Attributes:
        backend: the backend.
        reasons: for each that was passed over, its name and why, in one clause.
    """

    backend: Backend
    reasons: tuple[tuple[str, str], ...] = ()


def choose(
    p: torch.Tensor,
    g: torch.Tensor | None,
    group: Mapping[str, Any],
    graph: Graph,
    storage: Storage,
) -> Choice:
    """The backend for a parameter, by its group's ``fused`` and ``foreach``.

    ``fused=True`` asks for a generated kernel and ``foreach=True`` for the foreach path; with
    either False and the other unset, or both False, the reference runs; with both unset the
    fastest that can. The environment variable ``STEPFORGE_BACKEND`` overrides them.

    Args:
        p: the parameter.
        g: its gradient, if it has one.
        group: the options of its param group.
        graph: what is to be computed.
        storage: how it and its states are stored.

    Raises:
        ValueError: ``STEPFORGE_BACKEND`` names no backend.
        RuntimeError: what was asked for cannot serve this parameter.
    """
    reasons: list[tuple[str, str]] = []
    for candidate, asked_for in _candidates(group, p.device):
        backend = BACKENDS.get(candidate)
        if backend is None:
            why_not: str | None = f"there are no kernels for {p.device.type} devices"
        else:
            why_not = backend.refuses(p, g, group, graph, storage)
            if why_not is None:
                return Choice(backend, tuple(reasons))
        reasons.append((candidate, str(why_not)))
        if asked_for:
            raise RuntimeError(
                f"{asked_for} cannot serve a parameter of shape {tuple(p.shape)}, {p.dtype} on "
                f"{p.device.type}: {why_not}"
            )
    raise AssertionError("the reference refuses nothing")


def _candidates(group: Mapping[str, Any], device: torch.device) -> Iterator[tuple[str, str]]:
    """Backends to try in turn, each with the words that ask for it and no other, if any do."""
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
