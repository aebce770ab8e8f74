"""Small trainings with stepforge's Adam and its telemetry, logged by MetricsLogger."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import torch
from torch import nn

import stepforge

STEPS = 300


@dataclass(frozen=True)
class Trouble:
    """Faults of a training, and when they begin.

    Attributes:
        frozen: True to keep the layer ``net.4.weight`` in bfloat16 near 1, with a small step.
        nan_step: the step whose batch has a NaN; 0 for none.
        exploding_step: the step from which ``net.2`` has 3,000 times its learning rate; 0 for none.
        clip: the largest norm of the gradients; None for any.
        is_detached: True to leave ``net.4`` out of the loss.
        bits: the bits of the layer in bfloat16; None for the 16 that it has.
    """

    frozen: bool = False
    nan_step: int = 0
    exploding_step: int = 0
    clip: float | None = None
    is_detached: bool = False
    bits: int | None = None


class HalfLinear(nn.Linear):
    """A linear layer with weights in bfloat16 and arithmetic in float32."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.weight.float(), self.bias)


class Net(nn.Module):
    """A network of three hidden layers with layer norm, zero biases included."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__()
        kind = HalfLinear if trouble.frozen else nn.Linear
        self.net = nn.Sequential(
            nn.Linear(8, 48),
            nn.GELU(),
            nn.Linear(48, 48),
            nn.LayerNorm(48),
            kind(48, 48),
            nn.GELU(),
            nn.Linear(48, 1),
        )
        with torch.no_grad():
            for module in self.net:
                if isinstance(module, nn.Linear):
                    module.bias.zero_()
            if trouble.frozen:
                self.net[4].weight = nn.Parameter((self.net[4].weight + 1).bfloat16())
        self.is_detached = trouble.is_detached

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.net[3](self.net[2](self.net[1](self.net[0](inputs))))
        inner = self.net[5](self.net[4](hidden))
        return self.net[6](hidden + (0 * inner if self.is_detached else inner))


def train(
    trouble: Trouble | None = None,
    *,
    lr: float = 2e-3,
    every: int = 1,
    warm_up: int = 30,
    steps: int = STEPS,
) -> str:
    """Train with warm-up and a cosine to zero, and return the JSON lines."""
    trouble = trouble or Trouble()
    torch.manual_seed(0)
    model = Net(trouble)
    names = {"net.2.weight", "net.2.bias"}
    parameters = list(model.named_parameters())
    optimizer = stepforge.Adam(
        [
            {"params": [x for x in parameters if x[0] not in names]},
            {"params": [x for x in parameters if x[0] in names]},
        ],
        lr=lr,
        master_weight_bits=trouble.bits,
        max_grad_norm=trouble.clip,
        skip_nonfinite=True,
        telemetry=True,
    )
    file = io.StringIO()
    log = stepforge.MetricsLogger(optimizer, to=file, every=every)
    data = torch.randn(1024, 8)
    targets = torch.sin(data.sum(1, keepdim=True)) + 0.1 * torch.randn(1024, 1)
    for step in range(1, steps + 1):
        rate = min(1.0, step / warm_up) if warm_up else 1.0
        if step > warm_up:
            rate = 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / (steps - warm_up))
        exploding = bool(trouble.exploding_step) and step >= trouble.exploding_step
        optimizer.param_groups[0]["lr"] = lr * rate
        optimizer.param_groups[1]["lr"] = lr * rate * (3000 if exploding else 1)
        batch = torch.randint(1024, (64,))
        inputs = data[batch]
        if step == trouble.nan_step:
            inputs = torch.where(torch.arange(64)[:, None] == 3, math.nan, inputs)
        model.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets[batch])
        loss.backward()
        log.note(loss=loss)
        optimizer.step()
    log.close()
    return file.getvalue()
