"""Train a small byte-level language model on the sources of Python's standard library.

The text is on every machine, so nothing has to be downloaded. Whole files are held out for
validation. After a few minutes on two cores, the model writes text that looks like Python.

    python examples/language_model.py
    python examples/language_model.py --optimizer RAdam --steps 300
    python examples/language_model.py --checkpoint run.pt             # stop it at any time, and
    python examples/language_model.py --checkpoint run.pt --resume    # continue bit for bit

The result of :func:`train` depends on its :class:`Config` alone, for scripts that compare
optimizers, seeds or formats.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import stepforge

#: Learning rates that suit the default model.
LEARNING_RATES = {"Adagrad": 2e-2, "Adam": 3e-3, "AdamW": 3e-3, "NAdam": 3e-3, "RAdam": 3e-3}
LIBRARIES = {"stepforge": stepforge, "torch": torch.optim}
BYTES = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of a run, which decides its result.

    Attributes:
        optimizer: the name of the optimizer's class.
        library: the library of that class: "stepforge", or "torch" for torch.optim.
        options: further keyword arguments of the optimizer.
        lr: the highest learning rate; None for one that suits the optimizer.
        weight_decay: the weight decay of matrices; nothing else decays.
        steps: the steps of the whole run.
        warmup: the first steps, in which the learning rate rises.
        clip: the largest norm of the gradients of all parameters together.
        seed: the seed of the initial parameters and of the order of the text.
        batch: sequences per step.
        context: bytes per sequence, which is how far back the model can see.
        width: the size of a position's vector; a multiple of ``heads``.
        depth: the number of blocks.
        heads: attention heads per block.
        validate_every: steps between validations; the last step is always validated.
        validation_batches: batches of held-out text per validation.
        device: the device to train on.
    """

    optimizer: str = "AdamW"
    library: str = "stepforge"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lr: float | None = None
    weight_decay: float = 0.1
    steps: int = 700
    warmup: int = 50
    clip: float = 1.0
    seed: int = 0
    batch: int = 16
    context: int = 128
    width: int = 128
    depth: int = 4
    heads: int = 4
    validate_every: int = 100
    validation_batches: int = 16
    device: str = "cpu"


@dataclasses.dataclass
class Curve:
    """The losses of a run, in bits per byte.

    Attributes:
        train: the loss of each step's batch, before the step.
        validation: pairs of a step count and the loss on held-out text after that step.
    """

    train: list[float] = dataclasses.field(default_factory=list)
    validation: list[tuple[int, float]] = dataclasses.field(default_factory=list)


# The text. ----------------------------------------------------------------------------------------

_SKIPPED = {"__pycache__", "idle_test", "site-packages", "test", "tests"}


@functools.cache
def corpus() -> tuple[Tensor, Tensor]:
    """Return the bytes of the standard library's modules, for training and for validation.

    About one in twenty files is held out for validation, depending on its name alone.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        here = Path(folder).relative_to(root)
        names += [here / name for name in files if name.endswith(".py")]
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for name in sorted(names):
        held_out = zlib.crc32(name.as_posix().encode()) % 20 == 0
        parts[held_out].append((root / name).read_bytes())
    train, validation = (bytearray(b"\n".join(part)) for part in parts)
    return torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(
        validation, dtype=torch.uint8
    )


def windows(text: Tensor, starts: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Return sequences of bytes and, for each byte, the next one; both (starts, context)."""
    positions = starts.unsqueeze(1) + torch.arange(config.context + 1)
    found = text[positions].to(config.device, torch.int64)
    return found[:, :-1], found[:, 1:]


# The model. ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer block: causal attention and an MLP, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.before_mlp = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform vectors of shape (batch, context, width)."""
        batch, context, width = x.shape
        projected = self.attention_in(self.before_attention(x))
        # (batch, context, 3 * width) -> three of (batch, heads, context, width / heads)
        q, k, v = projected.view(batch, context, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, context, width))
        hidden = F.gelu(self.mlp_in(self.before_mlp(x)), approximate="tanh")
        return x + Tensor(self.mlp_out(hidden))


class LanguageModel(nn.Module):
    """A transformer over bytes, with tied input and output embeddings."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, config.width)
        self.position = nn.Parameter(torch.empty(config.context, config.width))
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.last = nn.LayerNorm(config.width)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # Additions to the residual stream start smaller the more of them there are.
                residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.depth) if residual else 0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Return logits of the next byte, (batch, context, 256), for bytes, (batch, context)."""
        x = self.embedding(text) + self.position[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.last(x), self.embedding.weight)

    def loss(self, text: Tensor, following: Tensor) -> Tensor:
        """Return the mean cross entropy in bits per byte."""
        return F.cross_entropy(self(text).flatten(0, 1), following.flatten()) / math.log(2)

    @torch.no_grad()
    def continued(self, prompt: bytes, length: int, *, temperature: float, seed: int) -> bytes:
        """Return the prompt and ``length`` more bytes, sampled one by one."""
        generator = torch.Generator().manual_seed(seed)
        text = list(prompt)
        for _ in range(length):
            seen = torch.tensor([text[-len(self.position) :]], device=self.position.device)
            logits = self(seen)[0, -1].double().cpu() / temperature
            text.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
        return bytes(text)


# Training. ----------------------------------------------------------------------------------------


class Run:
    """A model in training, and everything that decides how the run continues."""

    def __init__(self, config: Config) -> None:
        self.config = config
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.model = LanguageModel(config).to(config.device)
        self.optimizer = make_optimizer(self.model, config)
        self.scheduler = make_scheduler(self.optimizer, config)
        self.order = torch.Generator().manual_seed(config.seed)  # chooses the text of each step
        self.curve = Curve()

    def step(self) -> None:
        """Take one step, and validate if one is due."""
        config, text = self.config, corpus()[0]
        starts = torch.randint(len(text) - config.context, (config.batch,), generator=self.order)
        self.optimizer.zero_grad()
        loss = self.model.loss(*windows(text, starts, config))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.scheduler.step()
        self.curve.train.append(loss.item())
        done = len(self.curve.train)
        if done % config.validate_every == 0 or done == config.steps:
            self.curve.validation.append((done, self.validation_loss()))

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Return the loss in bits per byte on sequences spread evenly over the held-out text."""
        config, text = self.config, corpus()[1]
        count = config.batch * config.validation_batches
        starts = torch.linspace(0, len(text) - config.context - 1, count).long()
        losses = [
            self.model.loss(*windows(text, part, config)).item()
            for part in starts.split(config.batch)
        ]
        return sum(losses) / len(losses)

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically: after an interruption, the file is the old or the new."""
        checkpoint = {
            "config": dataclasses.asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "order": self.order.get_state(),
            "curve": dataclasses.asdict(self.curve),
        }
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=path.name, suffix=".tmp", delete=False
        ) as file:
            try:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the checkpoint is from a run with another configuration.
        """
        checkpoint = torch.load(path, weights_only=True, map_location=self.config.device)
        own = dataclasses.asdict(self.config)
        different = [
            f"{name}: {saved!r} there, {own.get(name)!r} here"
            for name, saved in checkpoint["config"].items()
            if saved != own.get(name)
        ]
        if different:
            raise ValueError(f"{path} is of another run ({'; '.join(different)})")
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        self.order.set_state(checkpoint["order"].cpu())
        self.curve = Curve(**checkpoint["curve"])


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Make the optimizer of a run, with two groups: matrices, which decay, and the rest."""
    named = list(model.named_parameters())
    groups = [
        {
            "params": [(name, p) for name, p in named if p.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [(name, p) for name, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    lr = LEARNING_RATES.get(config.optimizer, 1e-3) if config.lr is None else config.lr
    kind = getattr(LIBRARIES[config.library], config.optimizer)
    optimizer: torch.optim.Optimizer = kind(groups, lr=lr, **config.options)
    return optimizer


def make_scheduler(optimizer: torch.optim.Optimizer, config: Config) -> SequentialLR:
    """Make a scheduler: a linear rise to the learning rate, then half a cosine to a tenth of it."""
    warmup = min(config.warmup, config.steps // 2)
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    lr = optimizer.param_groups[0]["initial_lr"]
    fall = CosineAnnealingLR(optimizer, T_max=config.steps - warmup, eta_min=0.1 * lr)
    return SequentialLR(optimizer, [rise, fall], milestones=[warmup])


def train(
    config: Config,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 100,
    until: int | None = None,
    after_step: Callable[[Run], None] | None = None,
) -> Run:
    """Train a model.

    The result depends on ``config`` alone: neither resuming nor any other argument changes a bit of
    it, as long as machine, thread count and library versions stay the same.

    Args:
        config: the configuration of the run.
        checkpoint: a file to write now and then, and at the end.
        resume: True to continue from that file.
        checkpoint_every: steps between two writes.
        until: the step after which to stop; None for the last.
        after_step: called with the run after each step.

    Returns:
        The run; ``run.curve`` holds its losses.

    Raises:
        FileNotFoundError: there is no checkpoint to resume.
        ValueError: the checkpoint is from a run with another configuration.
    """
    run = Run(config)
    if resume:
        if checkpoint is None:
            raise ValueError("there is nothing to resume without a checkpoint")
        run.load(checkpoint)
    end = config.steps if until is None else min(until, config.steps)
    while len(run.curve.train) < end:
        run.step()
        done = len(run.curve.train)
        if checkpoint is not None and (done % checkpoint_every == 0 or done == end):
            run.save(checkpoint)
        if after_step is not None:
            after_step(run)
    return run


# The command line. --------------------------------------------------------------------------------


def main(
    optimizer: Annotated[str, typer.Option(help="One of " + ", ".join(LEARNING_RATES))] = "AdamW",
    library: Annotated[str, typer.Option(help="stepforge, or torch for torch.optim")] = "stepforge",
    steps: Annotated[int, typer.Option(min=1)] = Config.steps,
    lr: Annotated[float | None, typer.Option(help="None: one that suits the optimizer")] = None,
    weight_decay: float = Config.weight_decay,
    warmup: Annotated[int, typer.Option(min=0)] = Config.warmup,
    batch: Annotated[int, typer.Option(min=1)] = Config.batch,
    context: Annotated[int, typer.Option(min=2)] = Config.context,
    width: Annotated[int, typer.Option(min=8)] = Config.width,
    depth: Annotated[int, typer.Option(min=1)] = Config.depth,
    seed: int = Config.seed,
    device: str = Config.device,
    checkpoint: Annotated[Path | None, typer.Option(help="A file to write now and then")] = None,
    resume: Annotated[bool, typer.Option(help="Continue from that file")] = False,
    sample: Annotated[int, typer.Option(help="Bytes of text to sample at the end")] = 400,
) -> None:
    """Train a byte-level language model on the sources of Python's standard library."""
    console = Console()
    if optimizer not in LEARNING_RATES:
        raise typer.BadParameter(f"{optimizer} is not one of {', '.join(LEARNING_RATES)}")
    if library not in LIBRARIES:
        raise typer.BadParameter(f"{library} is not one of {', '.join(LIBRARIES)}")
    if resume and (checkpoint is None or not checkpoint.exists()):
        raise typer.BadParameter(f"there is no checkpoint {checkpoint or ''} to resume")
    config = Config(
        optimizer=optimizer,
        library=library,
        lr=lr,
        weight_decay=weight_decay,
        steps=steps,
        warmup=warmup,
        seed=seed,
        batch=batch,
        context=context,
        width=width,
        depth=depth,
        device=device,
    )
    size = sum(p.numel() for p in LanguageModel(config).parameters())
    text = " and ".join(f"{len(part) / 1e6:.1f} MB" for part in corpus())
    console.print(f"{size:,} parameters, {text} of text to train and to validate")
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps)
        shown = 0

        def report(run: Run) -> None:
            nonlocal shown
            recent = run.curve.train[-20:]
            description = f"train {sum(recent) / len(recent):.3f} bits per byte"
            progress.update(task, completed=len(run.curve.train), description=description)
            for step, loss in run.curve.validation[shown:]:
                progress.print(f"step {step:5}  validation {loss:.4f} bits per byte")
            shown = len(run.curve.validation)

        try:
            run = train(config, checkpoint=checkpoint, resume=resume, after_step=report)
            report(run)  # a finished run takes no step
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    if sample:
        drawn = run.model.continued(b"\ndef ", sample, temperature=0.7, seed=seed)
        console.rule("a sample")
        console.print(drawn.decode(errors="replace").strip(), markup=False, highlight=False)


if __name__ == "__main__":
    typer.run(main)
