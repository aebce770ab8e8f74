"""Elements of a vector: the scalar states of parameters that do not follow each other in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Elements"]


@dataclass(frozen=True)
class Elements:
    """Some elements of a vector, each once, in any order.

    Attributes:
        vector: the vector.
        index: their positions, on the device of the vector.
    """

    vector: torch.Tensor
    index: torch.Tensor

    def __len__(self) -> int:
        return len(self.index)

    def read(self) -> torch.Tensor:
        """Return their values in a new vector."""
        return self.vector.index_select(0, self.index)

    def write(self, values: torch.Tensor) -> None:
        """Write a value of the vector's dtype to each."""
        self.vector.index_copy_(0, self.index, values)
