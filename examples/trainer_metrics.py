"""Metrics of an optimizer under Hugging Face's Trainer: one line, and one more for the loss.

``stepforge report run.jsonl`` shows the file. To have the numbers in the Trainer's own logs instead
(Weights & Biases, TensorBoard and so on), take ``to=lambda values, step: trainer.log(values)``.

Run ``python examples/trainer_metrics.py``; it needs ``pip install transformers accelerate``.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import stepforge


class Sine(torch.nn.Module):
    """A small network that learns a sine, and returns its loss as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)
        )

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the mean squared error and the outputs."""
        outputs = self.net(inputs)
        return {"loss": torch.nn.functional.mse_loss(outputs, labels), "logits": outputs}


def main(to: str = "run.jsonl", steps: int = 200) -> None:
    """Train on the CPU."""
    model = Sine()
    optimizer = stepforge.AdamW(model.named_parameters(), lr=1e-2, telemetry=True)
    log = stepforge.MetricsLogger(optimizer, to=to, every=10)  # the one line

    def note_loss(_: torch.nn.Module, __: Any, output: dict[str, Tensor]) -> None:
        log.note(loss=output["loss"])

    model.register_forward_hook(note_loss)  # and one for the loss

    data = [
        {"inputs": torch.tensor([x]), "labels": torch.tensor([x]).mul(2).sin()}
        for x in torch.linspace(-2, 2, 512).tolist()
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()


if __name__ == "__main__":
    main()
