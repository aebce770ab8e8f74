"""What a step would run, and why nothing faster does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from stepforge.backends import choose
from stepforge.declare import Rule
from stepforge.entries import kept

__all__ = ["Explanation", "Served", "explain"]


@dataclass(frozen=True)
class Served:
    """The parameters of one group that one backend serves for the same reasons.

    Attributes:
        group: the number of the param group.
        backend: the name of the backend.
        reasons: for each faster backend, its name and why it does not serve them.
        tensors: how many parameters they are.
        elements: how many elements they have together.
        dtypes: their dtypes.
        devices: the types of their devices.
    """

    group: int
    backend: str
    reasons: tuple[tuple[str, str], ...]
    tensors: int
    elements: int
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]

    def __str__(self) -> str:
        plural = "" if self.tensors == 1 else "s"
        what = f"{self.tensors} parameter{plural}, {self.elements:,} elements"
        kind = f"{'/'.join(self.dtypes)} on {'/'.join(self.devices)}"
        line = f"group {self.group}: {self.backend} ({what}, {kind})"
        return line + "".join(f"\n  not {name}: {why}" for name, why in self.reasons)


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`explain`; its ``str`` is for reading.

    Attributes:
        optimizer: the name of the optimizer's class.
        served: what runs, group by group.
    """

    optimizer: str
    served: tuple[Served, ...]

    def __str__(self) -> str:
        return "\n".join([self.optimizer, *map(str, self.served)])


def explain(optimizer: torch.optim.Optimizer) -> Explanation:
    """Says, group by group, which backend the next step would run and why nothing faster does.

    Args:
        optimizer: an optimizer of this library. Parameters without a gradient are judged as if
            they had an ordinary one.

    Raises:
        TypeError: the optimizer is not one of this library.
        RuntimeError: what ``fused=True`` or ``STEPFORGE_BACKEND`` asks for cannot be had.

    Example:
        >>> import torch, stepforge
        >>> optimizer = stepforge.Adam([torch.zeros(3, 2)], foreach=True)
        >>> print(explain(optimizer))
        Adam
        group 0: foreach (1 parameter, 6 elements, float32 on cpu)
    """
    # A rule is what tells an optimizer of this library; its class stands to the right of this file.
    if not hasattr(optimizer, "_rule"):
        raise TypeError(f"explain takes a stepforge optimizer, but got {type(optimizer).__name__}")
    return Explanation(type(optimizer).__name__, tuple(_served(optimizer, optimizer._rule)))


def _served(optimizer: torch.optim.Optimizer, rule: Rule) -> Iterator[Served]:
    for index, group in enumerate(optimizer.param_groups):
        graph = rule.graph(group)
        alike: dict[tuple[str, tuple[tuple[str, str], ...]], list[torch.Tensor]] = {}
        for p in group["params"]:
            choice = choose(p, p.grad, group, graph, kept(rule, group, p).storage)
            alike.setdefault((choice.backend.name, choice.reasons), []).append(p)
        for (backend, reasons), params in alike.items():
            yield Served(
                group=index,
                backend=backend,
                reasons=reasons,
                tensors=len(params),
                elements=sum(p.numel() for p in params),
                dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for p in params})),
                devices=tuple(sorted({p.device.type for p in params})),
            )
