"""The backend of each parameter, the reasons for it, and its memory."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from stepforge.accounting import Account, account
from stepforge.backends import ParamSpec, choose
from stepforge.extension import described, status
from stepforge.rule import Rule
from stepforge.state.layout import dtypes_after_step, state_layout
from stepforge.step.params import kernel_spec

__all__ = ["Counted", "Explanation", "Frozen", "InFull", "Served", "explain", "without_effect"]


#: The storage options, each with a phrase for its value.
_ASKED: Mapping[str, Callable[[Any], str]] = {
    "state_format": str,
    "master_weight_bits": "{} bits".format,
    "stochastic_rounding": lambda _: "rounded at random",
}


@dataclass(frozen=True)
class InFull:
    """Parameters that a storage option leaves alone, all for the same reason.

    Attributes:
        reason: the reason.
        tensors: the number of parameters.
        elements: the number of their elements.
        asked: the format that the option asks for.
    """

    reason: str
    tensors: int
    elements: int
    asked: str = "int8"

    def __str__(self) -> str:
        return f"not {self.asked} for {_counted(self.tensors, self.elements)}: {self.reason}"


@dataclass(frozen=True)
class Counted:
    """Some parameters of one group.

    Attributes:
        group: the index of the param group.
        tensors: the number of parameters.
        elements: the number of their elements.
        dtypes: their dtypes.
        devices: the types of their devices.
        account: the bytes that they, their gradients and their states take after the next step.
    """

    group: int
    tensors: int
    elements: int
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]
    account: Account

    def _lines(self, label: str, *more: str) -> str:
        kind = f"{'/'.join(self.dtypes)} on {'/'.join(self.devices)}"
        title = f"group {self.group}: {label} ({_counted(self.tensors, self.elements)}, {kind})"
        return "\n  ".join([title, *more])


@dataclass(frozen=True)
class Served(Counted):
    """The parameters of one group that one backend serves for the same reasons.

    Attributes:
        backend: the name of the backend.
        reasons: for each faster backend, its name and why it does not serve them.
        in_full: those that a storage option leaves alone, reason by reason.
    """

    backend: str
    reasons: tuple[tuple[str, str], ...]
    in_full: tuple[InFull, ...]

    def __str__(self) -> str:
        return self._lines(
            self.backend,
            *(f"not {name}: {why}" for name, why in self.reasons),
            *([str(self.account)] if self.elements else []),
            *map(str, self.in_full),
        )


@dataclass(frozen=True)
class Frozen(Counted):
    """The parameters of one group that are not trained.

    They have ``requires_grad=False`` and no gradient, and were never stepped. Their memory is that
    of their weights, and of states if the constructor makes those, as Adagrad's does.
    """

    def __str__(self) -> str:
        return self._lines("frozen", *([str(self.account)] if self.elements else []))


def _counted(tensors: int, elements: int) -> str:
    return f"{tensors} parameter{'' if tensors == 1 else 's'}, {elements:,} elements"


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`explain`; its ``str`` is for reading.

    Attributes:
        optimizer: the name of the optimizer's class.
        served: the parameters that backends step, group by group.
        frozen: the parameters that are not trained, group by group.
        guards: the language of the guards, which check in each step that the plan of the last one
            still fits: "C++", or "Python" and the reason.
    """

    optimizer: str
    served: tuple[Served, ...]
    frozen: tuple[Frozen, ...] = ()
    guards: str = "Python"

    @property
    def account(self) -> Account:
        """The bytes of all groups together."""
        return sum((part.account for part in self._parts), Account())

    @property
    def _parts(self) -> list[Counted]:
        return sorted([*self.served, *self.frozen], key=lambda part: part.group)

    def __str__(self) -> str:
        in_all = [f"in all {self.account}"] if len(self._parts) > 1 else []
        lines = [self.optimizer, *map(str, self._parts), *in_all, f"guards in {self.guards}"]
        return "\n".join(lines)


def explain(optimizer: torch.optim.Optimizer) -> Explanation:
    """Explain which backend the next step runs, group by group, and why none is faster.

    The explanation has the bytes per element of weights, gradients, states, int8 scales and low
    bits, and the parameters that a storage option leaves alone, with the reason. A frozen parameter
    counts with its weights alone: it has ``requires_grad=False`` and no gradient, and was never
    stepped.

    Args:
        optimizer: an optimizer of this library. Parameters without a gradient are judged as if
            they had an ordinary one, unless they are frozen.

    Raises:
        TypeError: the optimizer is not one of this library.
        RuntimeError: the backend of ``fused=True`` or ``STEPFORGE_BACKEND`` is not available.
        ValueError: ``STEPFORGE_BACKEND`` or ``STEPFORGE_GUARDS`` has a value that it cannot have.

    Example:
        >>> import torch, stepforge
        >>> model = torch.nn.Linear(128, 64)
        >>> optimizer = stepforge.Adam(model.parameters(), state_format="int8", foreach=True)
        >>> print(explain(optimizer))
        Adam
        group 0: foreach (2 parameters, 8,256 elements, float32 on cpu)
          10.11 bytes an element: weights 4, gradients 4, states 2.05, scales 0.06
          not int8 for 1 parameter, 64 elements: fewer than 4,096 elements
        guards in ...
    """
    # Optimizers of this library have a rule. Their class cannot be imported here.
    if not hasattr(optimizer, "rule"):
        raise TypeError(f"explain takes a stepforge optimizer, but got {type(optimizer).__name__}")
    return Explanation(
        type(optimizer).__name__,
        tuple(_served(optimizer, optimizer._stepper.rule)),  # type: ignore[attr-defined]
        tuple(_frozen(optimizer, optimizer.rule)),
        described(status()),
    )


def without_effect(rule: Rule, groups: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a sentence for each storage option that has no effect on any parameter.

    Args:
        rule: the optimizer's rule.
        groups: its param groups.
    """
    for option in _ASKED:
        asking = [
            (group, p) for group in groups if group[option] for p in dict.fromkeys(group["params"])
        ]
        if not asking or any(is_lazy(p) for _, p in asking):
            continue
        in_full = list(_in_full(rule, asking, option))
        if sum(some.tensors for some in in_full) == len(asking):
            values = dict.fromkeys(repr(group[option]) for group, _ in asking)
            yield f"{option}={'/'.join(values)} has no effect: {'; '.join(map(str, in_full))}"


def _served(optimizer: torch.optim.Optimizer, rule: Rule) -> Iterator[Served]:
    for index, group in enumerate(optimizer.param_groups):
        graph = rule.graph(group)
        alike: dict[tuple[str, tuple[tuple[str, str], ...]], list[torch.Tensor]] = {}
        for p in dict.fromkeys(group["params"]):  # one that is listed twice is stepped once
            if _is_frozen(p, optimizer.state.get(p)):
                continue
            layout = state_layout(rule, group, p)
            dtypes = dtypes_after_step(layout, group, optimizer.state.get(p, {}))
            spec = kernel_spec(graph, layout, p, p.grad, dtypes)
            choice = choose(ParamSpec(p, p.grad, group, spec))
            alike.setdefault((choice.backend.name, choice.reasons), []).append(p)
        for (backend, reasons), params in alike.items():
            accounts = (account(rule, group, p, p.grad, optimizer.state.get(p)) for p in params)
            yield Served(
                **_counts(index, params),
                account=sum(accounts, Account()),
                backend=backend,
                reasons=reasons,
                in_full=tuple(
                    some
                    for option in _ASKED
                    for some in _in_full(rule, [(group, p) for p in params], option)
                ),
            )


def _frozen(optimizer: torch.optim.Optimizer, rule: Rule) -> Iterator[Frozen]:
    for index, group in enumerate(optimizer.param_groups):
        state = optimizer.state
        params = [p for p in dict.fromkeys(group["params"]) if _is_frozen(p, state.get(p))]
        if params:
            accounts = (_at_rest(rule, group, p, state.get(p)) for p in params)
            yield Frozen(**_counts(index, params), account=sum(accounts, Account()))


def _is_frozen(p: torch.Tensor, entry: Mapping[str, Any] | None) -> bool:
    """Return True if no step is expected of a parameter. Some get gradients by hand."""
    return not p.requires_grad and p.grad is None and not (entry or {}).get("step")


def _at_rest(
    rule: Rule, group: Mapping[str, Any], p: torch.Tensor, entry: Mapping[str, Any] | None
) -> Account:
    """Return the account of a parameter that is not stepped."""
    stepped = account(rule, group, p, None, entry)
    if entry:
        return dataclasses.replace(stepped, gradients=0, read=0, written=0)
    return Account(elements=stepped.elements, weights=stepped.weights)


def _counts(group: int, params: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return the fields of :class:`Counted` except the account."""
    return {
        "group": group,
        "tensors": len(params),
        "elements": sum(p.numel() for p in params),
        "dtypes": tuple(sorted({str(p.dtype).removeprefix("torch.") for p in params})),
        "devices": tuple(sorted({p.device.type for p in params})),
    }


def _in_full(
    rule: Rule, members: Iterable[tuple[Mapping[str, Any], torch.Tensor]], option: str
) -> Iterator[InFull]:
    """Yield the parameters that one storage option leaves alone, reason by reason."""
    tensors: Counter[tuple[str, str]] = Counter()
    elements: Counter[tuple[str, str]] = Counter()
    for group, p in members:
        reason = state_layout(rule, group, p).unmet.get(option)
        if reason is not None:
            case = reason, _ASKED[option](group[option])
            tensors[case] += 1
            elements[case] += p.numel()
    for case, count in tensors.items():
        reason, asked = case
        yield InFull(reason, count, elements[case], asked)
