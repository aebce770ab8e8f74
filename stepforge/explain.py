"""What a step would run, why nothing faster does, and what it takes in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stepforge.accounting import Account, account
from stepforge.backends import choose
from stepforge.declare import Rule
from stepforge.entries import kept

__all__ = ["Explanation", "InFull", "Served", "explain"]


@dataclass(frozen=True)
class InFull:
    """Parameters that keep their states in full precision though int8 was asked for.

    Attributes:
        reason: why.
        tensors: how many parameters they are.
        elements: how many elements they have together.
    """

    reason: str
    tensors: int
    elements: int

    def __str__(self) -> str:
        return f"not int8 for {_counted(self.tensors, self.elements)}: {self.reason}"


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
        account: the bytes that they, their gradients and their states take after the next step.
        in_full: those of them that keep their states in full precision though int8 was asked for,
            reason by reason.
    """

    group: int
    backend: str
    reasons: tuple[tuple[str, str], ...]
    tensors: int
    elements: int
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]
    account: Account
    in_full: tuple[InFull, ...]

    def __str__(self) -> str:
        what = _counted(self.tensors, self.elements)
        kind = f"{'/'.join(self.dtypes)} on {'/'.join(self.devices)}"
        lines = [
            f"group {self.group}: {self.backend} ({what}, {kind})",
            *(f"not {name}: {why}" for name, why in self.reasons),
            *([str(self.account)] if self.elements else []),
            *map(str, self.in_full),
        ]
        return "\n  ".join(lines)


def _counted(tensors: int, elements: int) -> str:
    return f"{tensors} parameter{'' if tensors == 1 else 's'}, {elements:,} elements"


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`explain`; its ``str`` is for reading.

    Attributes:
        optimizer: the name of the optimizer's class.
        served: what runs, group by group.
    """

    optimizer: str
    served: tuple[Served, ...]

    @property
    def account(self) -> Account:
        """The bytes of all groups together."""
        return sum((served.account for served in self.served), Account())

    def __str__(self) -> str:
        lines = [self.optimizer, *map(str, self.served)]
        return "\n".join([*lines, f"in all {self.account}"] if len(self.served) > 1 else lines)


def explain(optimizer: torch.optim.Optimizer) -> Explanation:
    """Says, group by group, which backend the next step would run and why nothing faster does.

    And how many bytes an element takes for weights, gradients, states, scales of states in 8 bits
    and low bits of weights; and which parameters keep their states in full precision though int8
    was asked for.

    Args:
        optimizer: an optimizer of this library. Parameters without a gradient are judged as if
            they had an ordinary one.

    Raises:
        TypeError: the optimizer is not one of this library.
        RuntimeError: what ``fused=True`` or ``STEPFORGE_BACKEND`` asks for cannot be had.

    Example:
        >>> import torch, stepforge
        >>> params = [torch.zeros(64, 128), torch.zeros(64)]
        >>> optimizer = stepforge.Adam(params, state_format="int8", foreach=True)
        >>> print(explain(optimizer))
        Adam
        group 0: foreach (2 parameters, 8,256 elements, float32 on cpu)
          10.11 bytes an element: weights 4, gradients 4, states 2.05, scales 0.06
          not int8 for 1 parameter, 64 elements: fewer than 4,096 elements
    """
    # A rule is what tells an optimizer of this library; its class stands to the right of this file.
    if not hasattr(optimizer, "_rule"):
        raise TypeError(f"explain takes a stepforge optimizer, but got {type(optimizer).__name__}")
    return Explanation(type(optimizer).__name__, tuple(_served(optimizer, optimizer._rule)))


def _served(optimizer: torch.optim.Optimizer, rule: Rule) -> Iterator[Served]:
    for index, group in enumerate(optimizer.param_groups):
        graph = rule.graph(group)
        alike: dict[tuple[str, tuple[tuple[str, str], ...]], list[torch.Tensor]] = {}
        for p in dict.fromkeys(group["params"]):  # one that is listed twice is stepped once
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
                account=sum(
                    (account(rule, group, p, p.grad, optimizer.state.get(p)) for p in params),
                    Account(),
                ),
                in_full=tuple(_in_full(rule, group, params)),
            )


def _in_full(
    rule: Rule, group: Mapping[str, Any], params: Iterable[torch.Tensor]
) -> Iterator[InFull]:
    tensors: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    for p in params:
        reason = kept(rule, group, p).full
        if reason is not None:
            tensors[reason] += 1
            elements[reason] += p.numel()
    for reason, count in tensors.items():
        yield InFull(reason, count, elements[reason])
