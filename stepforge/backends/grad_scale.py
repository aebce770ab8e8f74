"""The scale of gradients: of ``torch.amp.GradScaler``, and of clipping by their norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stepforge.ops import to_float32

__all__ = ["GradScale"]


@dataclass(frozen=True)
class GradScale:
    """The scale of a step's gradients.

    Attributes:
        scale: the factor of the loss; None if the gradients are divided by it already.
        found_inf: not zero if a gradient is not finite, and the step is to be skipped.
        clip: what unscaled gradients are multiplied by so that their norm is not too large.
    """

    scale: torch.Tensor | float | None = None
    found_inf: torch.Tensor | float = 0.0
    clip: torch.Tensor | float = 1.0

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
        """True if all numbers can be read without synchronizing a device."""
        return all(
            not isinstance(x, torch.Tensor) or x.device.type == "cpu"
            for x in (self.scale, self.found_inf, self.clip)
        )

    def read(self) -> GradScale:
        """Return the same scale in Python floats; synchronizes the device that holds it."""
        scale = None if self.scale is None else float(self.scale)
        return GradScale(scale, float(self.found_inf), float(self.clip))

    def on_device(
        self, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factor of gradients and ``found_inf``, one element each, asynchronously."""
        found_inf = self.found_inf_on(device)
        factor = _moved(self.clip, device).double()
        if self.scale is not None:
            factor = factor * _moved(self.scale, device).double().reciprocal()
        return factor.to(dtype), found_inf

    def found_inf_on(self, device: torch.device) -> torch.Tensor:
        """Return ``found_inf`` as one element on a device, asynchronously."""
        return _moved(self.found_inf, device)

    def factor(self, dtype: torch.dtype) -> float:
        """Return the factor of gradients, rounded to the dtype of the arithmetic."""
        factor = float(self.clip)
        if self.scale is not None:
            factor *= 1.0 / float(self.scale)
        return factor if dtype == torch.float64 else to_float32(factor)


def _moved(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    return torch.full((), value, dtype=torch.float64, device=device)
