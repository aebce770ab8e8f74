"""Training the same network in lockstep: same start, same batches, another optimizer each."""

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
    "Arm",
    "Comparison",
    "Task",
    "Trace",
    "largest_difference",
    "one_step_difference",
    "train",
]

#: The first steps allocate state and fill caches; they are no part of a median.
WARM_UP_STEPS = 10


@dataclass(frozen=True)
class Arm:
    """One way to run an optimizer.

    Attributes:
        name: one word for column headings.
        what: what it is, for a legend.
        make: takes an optimizer's name, the parameters and the learning rate; makes the optimizer.
        way: what it is called among the ways of torch.optim to step; empty if it is none of them.
        follows: instead of training a network, step a copy of the twin's weights with the twin's
            gradients, only to be timed.
        nudged: start with every weight moved up to the next float32, to measure how much a
            training amplifies the smallest of differences.
    """

    name: str
    what: str
    make: Callable[[str, Iterable[Tensor], float], torch.optim.Optimizer]
    way: str = ""
    follows: bool = False
    nudged: bool = False


@dataclass(frozen=True)
class Task:
    """What there is to learn: images ``[n, channels, height, width]`` and their labels ``[n]``."""

    make_network: Callable[[], nn.Module]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has; the last one may be smaller."""
        return math.ceil(len(self.train_images) / self.batch_size)


@dataclass
class Trace:
    """What was measured of one arm; of one that follows the twin, only the times.

    Attributes:
        optimizer: the optimizer, as the training left it.
        losses: the mean training loss of each epoch, in nats.
        accuracies: the share of test images that are read correctly, after each epoch.
        differences: the largest difference of any parameter from the twin's, after each step.
        one_step: the largest difference that a single step from the twin's own state makes, over
            all epochs; None of the twin and where it does not apply.
        step_seconds: how long each ``step()`` took, without the warm-up.
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
        """From the first quartile of the times of ``step()`` to the third, over the median."""
        first, median, third = statistics.quantiles(self.step_seconds, n=4)
        return (third - first) / median


@dataclass(frozen=True)
class Comparison:
    """How the arms of one optimizer did.

    Attributes:
        optimizer: its name.
        lr: its learning rate.
        traces: what was measured, by the arm's name.
    """

    optimizer: str
    lr: float
    traces: dict[str, Trace]


def train(
    task: Task,
    optimizer: str,
    lr: float,
    arms: Sequence[Arm],
    twin: Arm,
    *,
    epochs: int,
    seed: int,
    on_epoch: Callable[[Comparison], None] = lambda _: None,
) -> Comparison:
    """Trains one network for each arm that follows no other, all in lockstep.

    Args:
        task: what to learn.
        optimizer: the optimizer's name, which every arm's ``make`` is given.
        lr: the learning rate.
        arms: the arms, among them ``twin``.
        twin: the arm that the others are compared with.
        epochs: how often to go through the training images.
        seed: determines the initial weights and the batches, which all arms share.
        on_epoch: is called after each epoch with what has been measured so far.
    """
    models = {arm.name: _network(task, seed, nudged=arm.nudged) for arm in arms}
    result = Comparison(
        optimizer,
        lr,
        {arm.name: Trace(arm.make(optimizer, models[arm.name].parameters(), lr)) for arm in arms},
    )
    shuffle = torch.Generator().manual_seed(seed)
    # Whoever steps first finds colder caches: all orders take turns. Nudged arms come last, for
    # they run the twin's code and would warm it up for the twin alone.
    trained = [arm for arm in arms if not arm.follows]
    followers = [arm for arm in arms if arm.follows]
    nudged = [arm for arm in arms if arm.nudged]
    timed = itertools.permutations(arm for arm in arms if not arm.nudged)
    orders = itertools.cycle([(*order, *nudged) for order in timed])
    steps = 0
    for _ in range(epochs):
        losses: dict[str, list[float]] = {arm.name: [] for arm in trained}
        for images, labels in _batches(task, shuffle):
            for arm in trained:
                result.traces[arm.name].optimizer.zero_grad()
                loss = nn.functional.cross_entropy(models[arm.name](images), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                losses[arm.name].append(loss.item() * len(labels))
            for arm in followers:
                _copy_gradients(models[twin.name], models[arm.name])
            steps += 1
            if steps % task.steps_per_epoch == 0:
                _probe(result, arms, twin)
            for arm in next(orders):
                trace = result.traces[arm.name]
                begin = time.perf_counter()
                trace.optimizer.step()
                seconds = time.perf_counter() - begin
                if steps > WARM_UP_STEPS:
                    trace.step_seconds.append(seconds)
            for arm in trained:
                result.traces[arm.name].differences.append(
                    largest_difference(
                        models[arm.name].parameters(), models[twin.name].parameters()
                    )
                )
        for arm in trained:
            trace = result.traces[arm.name]
            trace.losses.append(math.fsum(losses[arm.name]) / len(task.train_images))
            trace.accuracies.append(_accuracy(models[arm.name], task))
        on_epoch(result)
    return result


def largest_difference(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """The largest absolute difference of any element; NaN if there is a NaN.

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
    arm: Arm, twin: Arm, optimizer: str, lr: float, trained: torch.optim.Optimizer
) -> float:
    """The largest difference between a step of an arm and one of the twin from the same state.

    Both start from copies of the parameters, gradients and state dict of ``trained``, which is
    not changed.

    Args:
        arm: the arm.
        twin: what to compare it with.
        optimizer: the optimizer's name.
        lr: the learning rate.
        trained: an optimizer that has stepped before, and whose next gradients are there.
    """
    stepped = []
    for make in (arm.make, twin.make):
        params = [
            p.detach().clone().requires_grad_()
            for group in trained.param_groups
            for p in group["params"]
        ]
        for p, original in zip(params, trained.param_groups[0]["params"], strict=True):
            p.grad = original.grad.clone()
        one = make(optimizer, params, lr)
        # torch.optim keeps the tensors it is given, so that a step would change the original's.
        one.load_state_dict(copy.deepcopy(trained.state_dict()))
        one.step()
        stepped.append(params)
    return largest_difference(*stepped)


def _probe(result: Comparison, arms: Sequence[Arm], twin: Arm) -> None:
    """Updates ``one_step`` of every arm that it is defined for."""
    for arm in arms:
        if arm is twin or arm.follows or arm.nudged:
            continue
        difference = one_step_difference(
            arm, twin, result.optimizer, result.lr, result.traces[twin.name].optimizer
        )
        trace = result.traces[arm.name]
        trace.one_step = difference if trace.one_step is None else max(trace.one_step, difference)


def _copy_gradients(source: nn.Module, target: nn.Module) -> None:
    for p, original in zip(target.parameters(), source.parameters(), strict=True):
        p.grad = None if original.grad is None else original.grad.clone()


def _network(task: Task, seed: int, *, nudged: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
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
        right = model(task.test_images).argmax(dim=1) == task.test_labels
    return int(right.sum()) / len(right)
