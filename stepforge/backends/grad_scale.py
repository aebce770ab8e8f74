"""The scale of gradients, as ``torch.amp.GradScaler`` passes it to an optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["GradScale"]


@dataclass(frozen=True)
class GradScale:
    """The scale of a step's gradients.

    Attributes:
        scale: the factor of the loss; None if the gradients are divided by it already.
        found_inf: not zero if a gradient is not finite, and the step is to be skipped.
    """

    scale: torch.Tensor | float | None
    found_inf: torch.Tensor | float

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> GradScale | None:
        """Return the scale that a gradient scaler has set on an optimizer; None without one."""
        scale = getattr(optimizer, "grad_scale", None)
        found_inf = getattr(optimizer, "found_inf", None)
        if scale is None and found_inf is None:
            return None
        return cls(scale, 0.0 if found_inf is None else found_inf)

    @property
    def on_host(self) -> bool:
        """True if both numbers can be read without synchronizing a device."""
        return all(
            not isinstance(x, torch.Tensor) or x.device.type == "cpu"
            for x in (self.scale, self.found_inf)
        )

    def read(self) -> GradScale:
        """Return the same scale in Python floats; synchronizes the device that holds it."""
        return GradScale(None if self.scale is None else float(self.scale), float(self.found_inf))

    def on_device(
        self, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factor of gradients and ``found_inf``, one element each, asynchronously."""
        found_inf = self.found_inf_on(device)
        if self.scale is None:
            return torch.ones((), dtype=dtype, device=device), found_inf
        return _moved(self.scale, device).double().reciprocal().to(dtype), found_inf

    def found_inf_on(self, device: torch.device) -> torch.Tensor:
        """Return ``found_inf`` as one element on a device, asynchronously."""
        return _moved(self.found_inf, device)

    def factor(self, dtype: torch.dtype) -> float:
        """Return the factor of gradients, rounded to the dtype of the arithmetic."""
        if self.scale is None:
            return 1.0
        wide = torch.tensor(1.0 / float(self.scale), dtype=torch.float64, device="cpu")
        return float(wide.to(dtype))


def _moved(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    return torch.full((), value, dtype=torch.float64, device=device)
