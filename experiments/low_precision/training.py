"""Real training: the language model of examples/ and the demo's digits, in several precisions.

Runs with the same seed begin with the same weights and see the same text, so that they can be
compared in pairs. Where weights have 16 bits, the model computes in float32 with the weights as
they are stored: nothing but storage differs between two runs.
"""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import json
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stepforge
from stepforge.cli.demo import digits, side_by_side

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import language_model

RESULTS = Path(__file__).with_name("results.json")

#: Adagrad begins with its largest steps; at the example's rate seeds differ by a tenth of the loss.
LEARNING_RATES = language_model.LEARNING_RATES | {"Adagrad": 1e-2}
OPTIMIZERS = tuple(LEARNING_RATES)
SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to store what training keeps.

    Attributes:
        name: for tables and legends.
        options: what the optimizer is given.
        weights: the dtype of the parameters.
    """

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weights: torch.dtype = torch.float32


#: With weights of 16 bits, moments are in float32 unless the name says otherwise.
_FULL_MOMENTS: dict[str, Any] = {"state_format": "float32"}
FLOAT32 = Arm("float32")
INT8 = Arm("int8 moments", {"state_format": "int8"})
BFLOAT16 = Arm("bfloat16 moments", {"state_format": "bfloat16"})
PLAIN = Arm("bfloat16 weights", _FULL_MOMENTS, torch.bfloat16)
AT_RANDOM = Arm(
    "bfloat16 weights, rounded at random",
    _FULL_MOMENTS | {"stochastic_rounding": True},
    torch.bfloat16,
)
BITS_24 = Arm(
    "bfloat16 weights + 24 bits", _FULL_MOMENTS | {"master_weight_bits": 24}, torch.bfloat16
)
BITS_32 = Arm(
    "bfloat16 weights + 32 bits", _FULL_MOMENTS | {"master_weight_bits": 32}, torch.bfloat16
)
SMALLEST = Arm(
    "bfloat16 weights + 24 bits, int8 moments",
    {"state_format": "int8", "master_weight_bits": 24},
    torch.bfloat16,
)
ARMS = (FLOAT32, INT8, BFLOAT16, BITS_32, BITS_24, SMALLEST, AT_RANDOM, PLAIN)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one run went.

    Attributes:
        experiment: the name of the experiment.
        optimizer: the name of the optimizer.
        arm: the name of the arm.
        seed: of the initial weights and of the order of what is learned.
        curve: pairs of a number of steps or epochs and what was measured after them.
    """

    experiment: str
    optimizer: str
    arm: str
    seed: int
    curve: tuple[tuple[int, float], ...]

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells it from other runs."""
        return self.experiment, self.optimizer, self.arm, self.seed

    @property
    def final(self) -> float:
        """What was measured in the end."""
        _, value = self.curve[-1]
        return value


# The language model. ------------------------------------------------------------------------------


class StoredRun(language_model.Run):
    """A run of the example, of which the optimizer keeps the weights in a dtype of its own."""

    def __init__(self, config: language_model.Config, dtype: torch.dtype) -> None:
        # Options for weights of 16 bits are refused for the float32 ones that the model has.
        super().__init__(dataclasses.replace(config, options={}))
        self.config = config
        self.stored = copy.deepcopy(self.model).to(dtype)
        self.optimizer = language_model.make_optimizer(self.stored, config)
        self.scheduler = language_model.make_scheduler(self.optimizer, config)
        self.optimizer.register_step_pre_hook(lambda *_: self._take_gradients())
        self.optimizer.register_step_post_hook(lambda *_: self._give_weights())
        self._give_weights()

    def _pairs(self) -> Iterable[tuple[Tensor, Tensor]]:
        return zip(self.stored.parameters(), self.model.parameters(), strict=True)

    def _take_gradients(self) -> None:
        for stored, p in self._pairs():
            stored.grad = p.grad.to(stored.dtype) if p.grad is not None else None
            p.grad = None

    @torch.no_grad()
    def _give_weights(self) -> None:
        for stored, p in self._pairs():
            p.copy_(stored)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Trains the example's model.

    Attributes:
        name: of the experiment.
        config: what all runs share.
        optimizers: the names of the optimizers.
        arms: the arms.
        seeds: the seeds.
    """

    name: str
    config: language_model.Config
    optimizers: Sequence[str] = OPTIMIZERS
    arms: Sequence[Arm] = ARMS
    seeds: Sequence[int] = SEEDS

    def expected(self) -> Iterator[tuple[str, str, str, int]]:
        """The runs there should be."""
        for seed in self.seeds:
            for optimizer in self.optimizers:
                for arm in self.arms:
                    yield self.name, optimizer, arm.name, seed

    def run(self, optimizer: str, arm: str, seed: int) -> list[Outcome]:
        """Trains once."""
        chosen = next(a for a in self.arms if a.name == arm)
        config = dataclasses.replace(
            self.config,
            optimizer=optimizer,
            options=dict(chosen.options),
            seed=seed,
            lr=self.config.lr or LEARNING_RATES[optimizer],
            # The others would add it to gradients, of which it then is the larger part.
            weight_decay=self.config.weight_decay if optimizer == "AdamW" else 0.0,
        )
        run = StoredRun(config, chosen.weights)
        for _ in range(config.steps):
            run.step()
        curve = tuple((step, round(loss, 5)) for step, loss in run.curve.validation)
        return [Outcome(self.name, optimizer, arm, seed, curve)]


def coded_share(config: language_model.Config) -> float:
    """The share of the model's elements whose moments have 8 bits if the group asks for int8."""
    run = language_model.Run(dataclasses.replace(config, options=dict(INT8.options)))
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    run.optimizer.step()
    coded = [p for p, s in run.optimizer.state.items() if "exp_avg_codes" in s]
    return sum(p.numel() for p in coded) / sum(p.numel() for p in run.model.parameters())


# The digits. --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Digits:
    """Trains the demo's network, all arms of an optimizer in lockstep.

    Attributes:
        name: of the experiment.
        epochs: how often to go through the training images.
        optimizers: the names of the optimizers.
        arms: the arms, with weights in float32.
        seeds: the seeds.
    """

    name: str = "digits"
    epochs: int = 15
    optimizers: Sequence[str] = OPTIMIZERS
    arms: Sequence[Arm] = (FLOAT32, INT8)
    seeds: Sequence[int] = (0, 1, 2, 3, 4)

    def expected(self) -> Iterator[tuple[str, str, str, int]]:
        """The runs there should be, one for all arms of an optimizer and a seed."""
        for seed in self.seeds:
            for optimizer in self.optimizers:
                yield self.name, optimizer, self.arms[0].name, seed

    def run(self, optimizer: str, _: str, seed: int) -> list[Outcome]:
        """Trains all arms."""
        variants = [
            side_by_side.Variant(arm.name, arm.name, partial(_make, arm)) for arm in self.arms
        ]
        result = side_by_side.train(
            digits.load_digits(), optimizer, digits.LEARNING_RATES[optimizer],
            variants, variants[0], epochs=self.epochs, seed=seed,
        )  # fmt: skip
        return [
            Outcome(self.name, optimizer, name, seed, tuple(enumerate(trace.accuracies, 1)))
            for name, trace in result.traces.items()
        ]


def _make(arm: Arm, name: str, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(stepforge, name)(params, lr=lr, **arm.options)
    return optimizer


# All of it. ---------------------------------------------------------------------------------------

LANGUAGE = LanguageModel(
    "language model",
    language_model.Config(
        steps=1000, width=64, depth=2, heads=2, batch=8, context=64,
        validate_every=50, validation_batches=32,
    ),
)  # fmt: skip
#: The weights of the layer norms are 1, and most others about 0.02.
SMALL_RATE = LanguageModel(
    "small learning rate",
    dataclasses.replace(LANGUAGE.config, lr=3e-5),
    optimizers=("AdamW",),
    arms=(FLOAT32, BITS_24, AT_RANDOM, PLAIN),
)
DIGITS = Digits()
EXPERIMENTS: Mapping[str, LanguageModel | Digits] = {
    e.name: e for e in (SMALL_RATE, DIGITS, LANGUAGE)
}


def machine() -> dict[str, str]:
    """What the numbers depend on beside the code."""
    return {
        "stepforge": stepforge.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def load(path: Path = RESULTS) -> dict[tuple[str, str, str, int], Outcome]:
    """The runs that a file holds; none if there is no file."""
    if not path.exists():
        return {}
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    outcomes = [Outcome(**run | {"curve": tuple(map(tuple, run["curve"]))}) for run in runs]
    return {outcome.key: outcome for outcome in outcomes}


def save(outcomes: Mapping[Any, Outcome], path: Path = RESULTS) -> None:
    """Writes runs, one a line."""
    ordered = sorted(outcomes.values(), key=lambda outcome: outcome.key)
    lines = ",\n".join(json.dumps(dataclasses.asdict(outcome)) for outcome in ordered)
    text = f'{{"machine": {json.dumps(machine())},\n"runs": [\n{lines}\n]}}\n'
    path.write_text(text, encoding="utf-8")


def _outcomes_of(
    experiment: LanguageModel | Digits, key: tuple[str, str, str, int]
) -> list[Outcome]:
    _, optimizer, arm, seed = key
    return experiment.run(optimizer, arm, seed)


def train_missing(
    processes: int,
    experiments: Mapping[str, LanguageModel | Digits] = EXPERIMENTS,
    path: Path = RESULTS,
    report: Callable[[str], None] = lambda _: None,
) -> dict[tuple[str, str, str, int], Outcome]:
    """Trains what a file does not hold yet, and adds it.

    Args:
        processes: how many runs at a time, each on one thread.
        experiments: what there should be.
        path: the file.
        report: is told of each run that is done.

    Returns:
        All runs.
    """
    outcomes = load(path)
    missing = [key for e in experiments.values() for key in e.expected() if key not in outcomes]
    if not missing:
        return outcomes
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        pending = {pool.submit(_outcomes_of, experiments[key[0]], key): key for key in missing}
        for done, future in enumerate(concurrent.futures.as_completed(pending), 1):
            outcomes |= {outcome.key: outcome for outcome in future.result()}
            save(outcomes, path)
            seconds = time.perf_counter() - start
            what = ", ".join(map(str, pending[future]))
            report(f"{done} of {len(missing)} after {seconds:.0f} s: {what}")
    return outcomes
