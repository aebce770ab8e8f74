"""Bytes: the memory of parameters and their states, and the traffic of a step.

All of it follows from what decides it in a run: the tensors that an entry of ``optimizer.state``
holds, and the inputs and results of the rule's graph. No table of bytes stands anywhere else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stepforge.formats import tensor_names
from stepforge.rule import Rule
from stepforge.state.layout import dtypes_after_step, state_layout

__all__ = ["Account", "account"]


@dataclass(frozen=True)
class Account:
    """Bytes of some parameters; accounts add up.

    Of a parameter that is sharded they are those on all devices together.

    Attributes:
        elements: the elements of the parameters.
        weights: the parameters themselves.
        gradients: their gradients.
        states: the states, int8 codes included.
        scales: the scales of int8 codes.
        low_bits: the low bits of 16-bit weights.
        numbers: the scalar states and step counts. They depend on the number of tensors, not on
            their size, and no sum includes them.
        read: the bytes that a step reads if no gradient is sparse.
        written: the bytes that such a step writes.

    Example:
        >>> Account(elements=2, weights=8) + Account(elements=1, weights=4, gradients=4)
        Account(elements=3, weights=12, gradients=4, states=0, scales=0, low_bits=0, ...)
    """

    elements: int = 0
    weights: int = 0
    gradients: int = 0
    states: int = 0
    scales: int = 0
    low_bits: int = 0
    numbers: int = 0
    read: int = 0
    written: int = 0

    def __add__(self, other: Account) -> Account:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))
        return Account(*(one + another for one, another in pairs))

    @property
    def memory(self) -> dict[str, int]:
        """The memory between steps, by kind; gradients included."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "states": self.states,
            "scales": self.scales,
            "low bits": self.low_bits,
        }

    @property
    def total(self) -> int:
        """The sum of :attr:`memory`."""
        return sum(self.memory.values())

    @property
    def checkpoint(self) -> int:
        """The bytes of a checkpoint: all but the gradients."""
        return self.total - self.gradients

    @property
    def moved(self) -> int:
        """The bytes that a step reads and writes; the bandwidth of memory bounds its speed."""
        return self.read + self.written

    def __str__(self) -> str:
        each = {name: size / max(self.elements, 1) for name, size in self.memory.items()}
        shown = ", ".join(f"{name} {_short(size)}" for name, size in each.items() if size)
        return f"{_short(sum(each.values()))} bytes an element: {shown}"


def account(
    rule: Rule,
    group: Mapping[str, Any],
    p: torch.Tensor,
    g: torch.Tensor | None = None,
    param_state: Mapping[str, Any] | None = None,
) -> Account:
    """Return the account of one parameter, as it is after its next step.

    Args:
        rule: the rule that steps it.
        group: the options of its param group.
        p: the parameter; one on the device ``meta`` will do.
        g: its gradient. None counts one in the parameter's dtype.
        param_state: its state, if it was stepped before.

    Example:
        >>> import stepforge
        >>> p = torch.empty(1024, 1024, dtype=torch.bfloat16, device="meta")
        >>> optimizer = stepforge.AdamW([p], state_format="int8", master_weight_bits=24)
        >>> print(account(optimizer.rule, optimizer.param_groups[0], p))
        7.06 bytes an element: weights 2, gradients 2, states 2, scales 0.06, low bits 1
    """
    layout, graph = state_layout(rule, group, p), rule.graph(group)
    dtypes = dtypes_after_step(layout, group, param_state or {})
    states = {x: math.prod(x.shape) * dtypes[x.key].itemsize for x in layout.tensors}
    sizes = {"p": _size(p), "g": _size(p if g is None else g)}
    sizes |= {x.name: size for x, size in states.items()}

    def of(columns: Iterable[str]) -> int:
        names = [name for column in columns for name in tensor_names(column, layout.formats)]
        return sum(sizes[name] for name in names)

    low_bits = sum(size for x, size in states.items() if x.column == "p")
    scales = sum(size for x, size in states.items() if x.part.of_block)
    return Account(
        elements=p.numel(),
        weights=sizes["p"],
        gradients=sizes["g"],
        states=sum(states.values()) - scales - low_bits,
        scales=scales,
        low_bits=low_bits,
        numbers=sum(dtypes[key].itemsize for key in layout.scalars),
        read=of(graph.varying.inputs),
        written=of(graph.results),
    )


def _size(x: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements; of the stored ones if it is sparse."""
    if x.is_sparse:
        return _size(x._indices()) + _size(x._values())
    return x.numel() * x.element_size()


def _short(size: float) -> str:
    """Format a number with at most two decimals.

    Example:
        >>> _short(2.0), _short(2.0625), _short(12.5)
        ('2', '2.06', '12.5')
    """
    return f"{size:.2f}".rstrip("0").rstrip(".")
