"""Metrics of an optimizer under Lightning: one line in ``configure_optimizers``.

The loss comes with the closure that Lightning hands to the step. ``stepforge report run.jsonl``
shows the file. To have the numbers in Lightning's own logger instead, take
``to=self.logger.log_metrics``.

Run ``python examples/lightning_metrics.py``; it needs ``pip install lightning``.
"""

from __future__ import annotations

import lightning
import torch
from torch import Tensor

import stepforge


class Sine(lightning.LightningModule):
    """A small network that learns a sine."""

    def __init__(self, to: str) -> None:
        super().__init__()
        self.to_file = to
        self.net = torch.nn.Sequential(
            torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)
        )

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the mean squared error of a batch."""
        (inputs,) = batch
        return torch.nn.functional.mse_loss(self.net(inputs), torch.sin(2 * inputs))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer, with a logger that hangs on it."""
        optimizer = stepforge.AdamW(self.net.named_parameters(), lr=1e-2, telemetry=True)
        stepforge.MetricsLogger(optimizer, to=self.to_file, every=10)  # the one line
        return optimizer


def main(to: str = "run.jsonl", steps: int = 200) -> None:
    """Train on the CPU."""
    inputs = torch.utils.data.TensorDataset(torch.linspace(-2, 2, 512).unsqueeze(1))
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Sine(to), torch.utils.data.DataLoader(inputs, batch_size=32, shuffle=True))


if __name__ == "__main__":
    main()
