"""A copy within the memory of a device: the time in which a step could move its bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Copy"]


class Copy:
    """A copy that moves a number of bytes: it reads half of them and writes half.

    Args:
        moved: the bytes.
        device: the device whose memory it is.

    Example:
        >>> copy = Copy(28, torch.device("cpu"))
        >>> copy.step()
        >>> copy.source.nbytes + copy.target.nbytes
        28
    """

    def __init__(self, moved: int, device: torch.device) -> None:
        self.source = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)

    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Do nothing: the copy is always the same."""

    def step(self) -> None:
        """Copy."""
        self.target.copy_(self.source)
