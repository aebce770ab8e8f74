"""Correctly rounded roots for torch tensors."""

from __future__ import annotations

import numpy as np
import torch


def correct_sqrt(x: torch.Tensor) -> torch.Tensor:
    """The square root of a float32 or float64 tensor, correctly rounded.

    ``torch.sqrt`` on a CPU is not: 20% of float32 results and 1.4% of float64 results of a
    contiguous tensor are one unit off. numpy's root is the processor's own, which is.

    Args:
        x: any shape, on any device.

    Returns:
        A new tensor of the same shape and dtype.
    """
    if type(x) is not torch.Tensor or x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.sqrt(x)
    if x.numel() == 0:
        return x.clone()
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.sqrt(x.detach().numpy())))
