"""Training in several precisions: the language model of examples/ and the demo's digits.

Runs with the same seed start from the same weights and see the same text, so they can be compared
in pairs. With 16-bit weights the model still computes in float32, on the rounded weights: two runs
differ in storage alone.
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

#: Adagrad starts with its largest steps: at the example's rate, seeds differ by 10% of the loss.
LEARNING_RATES = language_model.LEARNING_RATES | {"Adagrad": 1e-2}
OPTIMIZERS = tuple(LEARNING_RATES)
SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Precision:
    """The dtypes and formats of weights and moments.

    Attributes:
        name: its name in tables and legends.
        options: the options of the optimizer.
        weights: the dtype of the parameters.
    """

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weights: torch.dtype = torch.float32


#: With 16-bit weights, moments are in float32 unless the name says otherwise.
_FULL_MOMENTS: dict[str, Any] = {"state_format": "float32"}
FLOAT32 = Precision("float32")
INT8 = Precision("int8 moments", {"state_format": "int8"})
BFLOAT16 = Precision("bfloat16 moments", {"state_format": "bfloat16"})
PLAIN = Precision("bfloat16 weights", _FULL_MOMENTS, torch.bfloat16)
AT_RANDOM = Precision(
    "bfloat16 weights, rounded at random",
    _FULL_MOMENTS | {"stochastic_rounding": True},
    torch.bfloat16,
)
BITS_24 = Precision(
    "bfloat16 weights + 24 bits", _FULL_MOMENTS | {"master_weight_bits": 24}, torch.bfloat16
)
BITS_32 = Precision(
    "bfloat16 weights + 32 bits", _FULL_MOMENTS | {"master_weight_bits": 32}, torch.bfloat16
)
SMALLEST = Precision(
    "bfloat16 weights + 24 bits, int8 moments",
    {"state_format": "int8", "master_weight_bits": 24},
    torch.bfloat16,
)
PRECISIONS = (FLOAT32, INT8, BFLOAT16, BITS_32, BITS_24, SMALLEST, AT_RANDOM, PLAIN)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of one run.

    Attributes:
        experiment: the name of the experiment.
        optimizer: the name of the optimizer.
        precision: the name of the precision.
        seed: the seed of the initial weights and of the order of the data.
        curve: pairs of a step or epoch and the loss or accuracy after it.
    """

    experiment: str
    optimizer: str
    precision: str
    seed: int
    curve: tuple[tuple[int, float], ...]

    @property
    def key(self) -> tuple[str, str, str, int]:
        """The four values that identify the run."""
        return self.experiment, self.optimizer, self.precision, self.seed

    @property
    def final(self) -> float:
        """The last loss or accuracy."""
        _, value = self.curve[-1]
        return value


# The language model. ------------------------------------------------------------------------------


class LowPrecisionRun(language_model.Run):
    """A run of the example whose optimizer steps a copy of the weights in another dtype."""

    def __init__(self, config: language_model.Config, dtype: torch.dtype) -> None:
        # Options for 16-bit weights are refused for the model's own weights, which are float32.
        super().__init__(dataclasses.replace(config, options={}))
        self.config = config
        self.low_precision = copy.deepcopy(self.model).to(dtype)
        self.optimizer = language_model.make_optimizer(self.low_precision, config)
        self.scheduler = language_model.make_scheduler(self.optimizer, config)
        self.optimizer.register_step_pre_hook(lambda *_: self._round_gradients())
        self.optimizer.register_step_post_hook(lambda *_: self._copy_weights_back())
        self._copy_weights_back()

    def _pairs(self) -> Iterable[tuple[Tensor, Tensor]]:
        return zip(self.low_precision.parameters(), self.model.parameters(), strict=True)

    def _round_gradients(self) -> None:
        for low, p in self._pairs():
            low.grad = p.grad.to(low.dtype) if p.grad is not None else None
            p.grad = None

    @torch.no_grad()
    def _copy_weights_back(self) -> None:
        for low, p in self._pairs():
            p.copy_(low)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """An experiment that trains the example's model.

    Attributes:
        name: the name of the experiment.
        config: the configuration that all runs share.
        optimizers: the names of the optimizers.
        precisions: the precisions.
        seeds: the seeds.
    """

    name: str
    config: language_model.Config
    optimizers: Sequence[str] = OPTIMIZERS
    precisions: Sequence[Precision] = PRECISIONS
    seeds: Sequence[int] = SEEDS

    def expected(self) -> Iterator[tuple[str, str, str, int]]:
        """Yield the key of every run."""
        for seed in self.seeds:
            for optimizer in self.optimizers:
                for precision in self.precisions:
                    yield self.name, optimizer, precision.name, seed

    def run(self, optimizer: str, precision: str, seed: int) -> list[Outcome]:
        """Train once."""
        chosen = next(a for a in self.precisions if a.name == precision)
        config = dataclasses.replace(
            self.config,
            optimizer=optimizer,
            options=dict(chosen.options),
            seed=seed,
            lr=self.config.lr or LEARNING_RATES[optimizer],
            # The others would add it to the gradients, where it would dominate.
            weight_decay=self.config.weight_decay if optimizer == "AdamW" else 0.0,
        )
        run = LowPrecisionRun(config, chosen.weights)
        for _ in range(config.steps):
            run.step()
        curve = tuple((step, round(loss, 5)) for step, loss in run.curve.validation)
        return [Outcome(self.name, optimizer, precision, seed, curve)]


def coded_share(config: language_model.Config) -> float:
    """Return the share of the model's elements with 8-bit moments under ``state_format="int8"``."""
    run = language_model.Run(dataclasses.replace(config, options=dict(INT8.options)))
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    run.optimizer.step()
    coded = [p for p, s in run.optimizer.state.items() if "exp_avg_codes" in s]
    return sum(p.numel() for p in coded) / sum(p.numel() for p in run.model.parameters())


# The digits. --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Digits:
    """An experiment that trains the demo's network, all precisions of an optimizer in lockstep.

    Attributes:
        name: the name of the experiment.
        epochs: passes over the training images.
        optimizers: the names of the optimizers.
        precisions: the precisions, with weights in float32.
        seeds: the seeds.
    """

    name: str = "digits"
    epochs: int = 15
    optimizers: Sequence[str] = OPTIMIZERS
    precisions: Sequence[Precision] = (FLOAT32, INT8)
    seeds: Sequence[int] = (0, 1, 2, 3, 4)

    def expected(self) -> Iterator[tuple[str, str, str, int]]:
        """Yield the key of every run; one run trains all precisions of an optimizer and seed."""
        for seed in self.seeds:
            for optimizer in self.optimizers:
                yield self.name, optimizer, self.precisions[0].name, seed

    def run(self, optimizer: str, _: str, seed: int) -> list[Outcome]:
        """Train with all precisions."""
        variants = [
            side_by_side.Variant(each.name, each.name, partial(_make, each))
            for each in self.precisions
        ]
        result = side_by_side.train(
            digits.load_digits(), optimizer, digits.LEARNING_RATES[optimizer],
            variants, variants[0], epochs=self.epochs, seed=seed,
        )  # fmt: skip
        return [
            Outcome(self.name, optimizer, name, seed, tuple(enumerate(trace.accuracies, 1)))
            for name, trace in result.traces.items()
        ]


def _make(
    precision: Precision, name: str, params: Iterable[Tensor], lr: float
) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(stepforge, name)(params, lr=lr, **precision.options)
    return optimizer


# All experiments. ---------------------------------------------------------------------------------

LANGUAGE = LanguageModel(
    "language model",
    language_model.Config(
        steps=1000, width=64, depth=2, heads=2, batch=8, context=64,
        validate_every=50, validation_batches=32,
    ),
)  # fmt: skip
#: The weights of layer norms are 1, most others about 0.02.
SMALL_RATE = LanguageModel(
    "small learning rate",
    dataclasses.replace(LANGUAGE.config, lr=3e-5),
    optimizers=("AdamW",),
    precisions=(FLOAT32, BITS_24, AT_RANDOM, PLAIN),
)
DIGITS = Digits()
EXPERIMENTS: Mapping[str, LanguageModel | Digits] = {
    e.name: e for e in (SMALL_RATE, DIGITS, LANGUAGE)
}


def machine() -> dict[str, str]:
    """Return what results depend on besides the code."""
    return {
        "stepforge": stepforge.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def load(path: Path = RESULTS) -> dict[tuple[str, str, str, int], Outcome]:
    """Return the runs in a file; none if it does not exist."""
    if not path.exists():
        return {}
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    outcomes = [Outcome(**run | {"curve": tuple(map(tuple, run["curve"]))}) for run in runs]
    return {outcome.key: outcome for outcome in outcomes}


def save(outcomes: Mapping[Any, Outcome], path: Path = RESULTS) -> None:
    """Write runs to a file, one per line."""
    ordered = sorted(outcomes.values(), key=lambda outcome: outcome.key)
    lines = ",\n".join(json.dumps(dataclasses.asdict(outcome)) for outcome in ordered)
    text = f'{{"machine": {json.dumps(machine())},\n"runs": [\n{lines}\n]}}\n'
    path.write_text(text, encoding="utf-8")


def _outcomes_of(
    experiment: LanguageModel | Digits, key: tuple[str, str, str, int]
) -> list[Outcome]:
    _, optimizer, precision, seed = key
    return experiment.run(optimizer, precision, seed)


def train_missing(
    processes: int,
    experiments: Mapping[str, LanguageModel | Digits] = EXPERIMENTS,
    path: Path = RESULTS,
    report: Callable[[str], None] = lambda _: None,
) -> dict[tuple[str, str, str, int], Outcome]:
    """Train the runs that a file lacks, and add them to it.

    Args:
        processes: how many runs at a time, each on one thread.
        experiments: the experiments whose runs the file should have.
        path: the file.
        report: called with a line of text after each run.

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
            name = ", ".join(map(str, pending[future]))
            report(f"{done} of {len(missing)} after {seconds:.0f} s: {name}")
    return outcomes
