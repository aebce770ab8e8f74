"""Side-by-side training: the same network, initial weights and batches, with several optimizers."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

__all__ = [
    "WARM_UP_STEPS",
    "Comparison",
    "Task",
    "Trace",
    "Variant",
    "largest_difference",
    "one_step_difference",
    "train",
]

#: The first steps allocate state and fill caches, and are left out of medians.
WARM_UP_STEPS = 10


@dataclass(frozen=True)
class Variant:
    """A variant of an optimizer.

    Attributes:
        name: one word for column headings.
        description: text for a legend.
        make: makes the optimizer from its name, the parameters and the learning rate.
        timing_label: its label among the step times of torch.optim; empty if it is not shown there.
        only_timed: True to train no network and only be timed, on a copy of the twin's weights with
            the twin's gradients.
        nudged: True to start with every weight moved up to the next float32. This measures how far
            training amplifies the smallest of differences.
    """

    name: str
    description: str
    make: Callable[[str, Iterable[Tensor], float], torch.optim.Optimizer]
    timing_label: str = ""
    only_timed: bool = False
    nudged: bool = False


@dataclass(frozen=True)
class Task:
    """A classification task: images ``[n, channels, height, width]`` and their labels ``[n]``."""

    make_network: Callable[[], nn.Module]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches of an epoch; the last one may be smaller."""
        return math.ceil(len(self.train_images) / self.batch_size)


@dataclass
class Trace:
    """The measurements of one variant. One that is only timed has nothing but times.

    Attributes:
        optimizer: the optimizer after training.
        losses: the mean training loss of each epoch, in nats.
        accuracies: the share of correctly classified test images, after each epoch.
        differences: the largest difference of any parameter from the twin's, after each step.
        one_step: the largest difference that a single step from the twin's own state makes, over
            all epochs; None for the twin, and for variants that it does not apply to.
        step_seconds: the time of each ``step()``, without the warm-up.
    """

    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    one_step: float | None = None
    step_seconds: list[float] = field(default_factory=list)

    @property
    def median_step(self) -> float:
        """The median time of ``step()`` in seconds."""
        return statistics.median(self.step_seconds)

    @property
    def spread(self) -> float:
        """The distance between the quartiles of the step times over their median."""
        first, median, third = statistics.quantiles(self.step_seconds, n=4)
        return (third - first) / median


@dataclass(frozen=True)
class Comparison:
    """The results of all variants of one optimizer.

    Attributes:
        optimizer: the optimizer's name.
        lr: its learning rate.
        traces: the measurements, by the variant's name.
    """

    optimizer: str
    lr: float
    traces: dict[str, Trace]


def train(
    task: Task,
    optimizer: str,
    lr: float,
    variants: Sequence[Variant],
    twin: Variant,
    *,
    epochs: int,
    seed: int,
    on_epoch: Callable[[Comparison], None] = lambda _: None,
) -> Comparison:
    """Train a network with each variant, in lockstep.

    Args:
        task: the task.
        optimizer: the optimizer's name for every variant's ``make``.
        lr: the learning rate.
        variants: the variants, ``twin`` included.
        twin: the variant that the others are compared with.
        epochs: the number of passes over the training images.
        seed: determines the initial weights and the batches, which all variants share.
        on_epoch: called after each epoch with the measurements so far.
    """
    models = {variant.name: _network(task, seed, nudged=variant.nudged) for variant in variants}
    traces = {
        variant.name: Trace(variant.make(optimizer, models[variant.name].parameters(), lr))
        for variant in variants
    }
    comparison = Comparison(optimizer, lr, traces)
    shuffle = torch.Generator().manual_seed(seed)
    # The first to step finds colder caches, so all orders take turns. Nudged variants come last:
    # they run the twin's code and would warm it up for the twin alone.
    trained = [variant for variant in variants if not variant.only_timed]
    only_timed = [variant for variant in variants if variant.only_timed]
    nudged = [variant for variant in variants if variant.nudged]
    others = itertools.permutations(variant for variant in variants if not variant.nudged)
    orders = itertools.cycle([(*order, *nudged) for order in others])
    steps = 0
    for _ in range(epochs):
        losses: dict[str, list[float]] = {variant.name: [] for variant in trained}
        for images, labels in _batches(task, shuffle):
            for variant in trained:
                traces[variant.name].optimizer.zero_grad()
                loss = nn.functional.cross_entropy(models[variant.name](images), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                losses[variant.name].append(loss.item() * len(labels))
            for variant in only_timed:
                _copy_gradients(models[twin.name], models[variant.name])
            steps += 1
            if steps % task.steps_per_epoch == 0:
                _update_one_step(comparison, variants, twin)
            for variant in next(orders):
                trace = traces[variant.name]
                begin = time.perf_counter()
                trace.optimizer.step()
                seconds = time.perf_counter() - begin
                if steps > WARM_UP_STEPS:
                    trace.step_seconds.append(seconds)
            for variant in trained:
                traces[variant.name].differences.append(
                    largest_difference(
                        models[variant.name].parameters(), models[twin.name].parameters()
                    )
                )
        for variant in trained:
            trace = traces[variant.name]
            trace.losses.append(math.fsum(losses[variant.name]) / len(task.train_images))
            trace.accuracies.append(_accuracy(models[variant.name], task))
        on_epoch(comparison)
    return comparison


def largest_difference(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """Return the largest absolute difference of any element; NaN if there is a NaN.

    Args:
        ours: tensors.
        theirs: as many tensors, of the same shapes.

    Example:
        >>> largest_difference([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 1.5])])
        0.5
    """
    with torch.no_grad():
        pairs = zip(ours, theirs, strict=True)
        return torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()


def one_step_difference(
    variant: Variant, twin: Variant, optimizer: str, lr: float, trained: torch.optim.Optimizer
) -> float:
    """Return the largest difference after one step of a variant and of the twin from one state.

    Both start from copies of the parameters, gradients and state dict of ``trained``, which is
    not changed.

    Args:
        variant: the variant.
        twin: the variant to compare it with.
        optimizer: the optimizer's name.
        lr: the learning rate.
        trained: an optimizer after some steps, with the gradients of its next step.
    """
    stepped = []
    for make in (variant.make, twin.make):
        params = [
            p.detach().clone().requires_grad_()
            for group in trained.param_groups
            for p in group["params"]
        ]
        for p, original in zip(params, trained.param_groups[0]["params"], strict=True):
            p.grad = original.grad.clone()
        instance = make(optimizer, params, lr)
        # torch.optim uses the loaded tensors themselves, so a step would change the original's.
        instance.load_state_dict(copy.deepcopy(trained.state_dict()))
        instance.step()
        stepped.append(params)
    return largest_difference(*stepped)


def _update_one_step(comparison: Comparison, variants: Sequence[Variant], twin: Variant) -> None:
    """Update ``one_step`` of every variant that it applies to."""
    trained = comparison.traces[twin.name].optimizer
    for variant in variants:
        if variant is twin or variant.only_timed or variant.nudged:
            continue
        difference = one_step_difference(
            variant, twin, comparison.optimizer, comparison.lr, trained
        )
        trace = comparison.traces[variant.name]
        trace.one_step = difference if trace.one_step is None else max(trace.one_step, difference)


def _copy_gradients(source: nn.Module, target: nn.Module) -> None:
    for p, original in zip(target.parameters(), source.parameters(), strict=True):
        p.grad = None if original.grad is None else original.grad.clone()


def _network(task: Task, seed: int, *, nudged: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # keeps the caller's random state
        torch.manual_seed(seed)
        model = task.make_network()
    if nudged:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.nextafter(p, torch.full_like(p, math.inf)))
    return model


def _batches(task: Task, shuffle: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(task.train_images), generator=shuffle)
    for begin in range(0, len(order), task.batch_size):
        chosen = order[begin : begin + task.batch_size]
        yield task.train_images[chosen], task.train_labels[chosen]


def _accuracy(model: nn.Module, task: Task) -> float:
    with torch.no_grad():
        correct = model(task.test_images).argmax(dim=1) == task.test_labels
    return int(correct.sum()) / len(correct)
