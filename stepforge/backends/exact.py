"""Operations on tensors where torch's own round, or choose a dtype, differently."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from stepforge.ops import VOCABULARY


def correct_sqrt(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the correctly rounded square root of a float32 or float64 tensor.

    ``torch.sqrt`` on a CPU is not: 20% of float32 results and 1.4% of float64 results of a
    contiguous tensor are one unit off. numpy's root is the processor's own, which is.

    Args:
        x: any shape, on any device.
        out: the tensor to write, of the same shape and dtype; a new one if None.

    Returns:
        ``out``.
    """
    if type(x) is not torch.Tensor or x.device.type != "cpu":
        return torch.sqrt(x, out=out)
    if out is None:
        out = torch.empty_like(x)
    with np.errstate(invalid="ignore"):
        np.sqrt(x.detach().resolve_neg().numpy(), out=out.detach().numpy())
    return out


def divide(x: Any, y: torch.Tensor) -> torch.Tensor:
    """Divide a number or a tensor by a tensor, in one rounding.

    ``number / tensor`` is computed by torch as a reciprocal and a product.
    """
    if not isinstance(x, torch.Tensor):
        x = torch.full((), x, dtype=y.dtype, device=y.device)  # waits for no device
    return torch.div(x, y)


def choose(condition: Any, x: Any, y: Any, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``x`` where the condition holds, else ``y``; each a number or a tensor.

    Args:
        condition: a truth value or a tensor of them, or of numbers that stand for them.
        x: the result where it holds.
        y: the result elsewhere.
        like: a tensor of the shape of the result.
        dtype: the dtype of the result if both are numbers; torch would take its default.
    """
    if not isinstance(condition, torch.Tensor):
        chosen = x if condition else y
        return chosen if isinstance(chosen, torch.Tensor) else torch.full_like(like, chosen)
    if not isinstance(x, torch.Tensor):
        x = torch.full((), x, dtype=dtype, device=like.device)
    return torch.where(condition.to(torch.bool), x, y)


def _where(condition: Any, x: Any, y: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    like = next(operand for operand in (x, y, condition) if isinstance(operand, torch.Tensor))
    return choose(condition, x, y, like, dtype)


#: The torch function of each operation of the vocabulary.
OPERATIONS: dict[str, Callable[..., Any]] = VOCABULARY | {
    "div": divide,
    "sqrt": correct_sqrt,
    "where": _where,
}


@functools.cache
def operations_in(dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """Return the operations in a dtype, float32 or float64."""
    return OPERATIONS | {"where": functools.partial(_where, dtype=dtype)}
