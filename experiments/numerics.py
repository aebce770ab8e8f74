"""Measure the rounding errors of training in float32 and write docs/numerics.md.

    python -m experiments.numerics

Each algorithm is transcribed here from its paper, in float64 and without this library. The
transcription, stepforge and torch.optim get the same float32 gradients; then the float32 results of
the two libraries are compared with the transcription's.

The script is deterministic, uses one thread and takes less than a minute.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

import stepforge

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
State: TypeAlias = dict[str, Any]
#: ``transcription(options, t, p, g, state) -> p``; writes the new moments into ``state``.
Transcription: TypeAlias = Callable[[Mapping[str, Any], int, Array, Array, State], Array]

SEED = 20240229


# The published algorithms, with torch.optim's deviations. ----------------------------------------


def _moments(h: Mapping[str, Any], p: Array, g: Array, state: State) -> tuple[Array, Array, Array]:
    """Apply L2 decay, update both averages, and return them and the decoupled decay of p."""
    beta1, beta2 = h["betas"]
    shrink = np.zeros_like(p)
    if h.get("decoupled_weight_decay"):
        shrink = h["lr"] * h["weight_decay"] * p
    else:
        g = g + h.get("weight_decay", 0.0) * p
    state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * g**2
    return state["m"], state["v"], shrink


def adam(h: Mapping[str, Any], t: int, p: Array, g: Array, state: State) -> Array:
    """Step by Kingma and Ba 2015, Algorithm 1; amsgrad as in torch.optim (Reddi et al. 2018)."""
    beta1, beta2 = h["betas"]
    m, v, shrink = _moments(h, p, g, state)
    if h.get("amsgrad"):
        v = state["v_max"] = np.maximum(state.get("v_max", 0.0), v)
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    step: Array = h["lr"] * m_hat / (np.sqrt(v_hat) + h["eps"])
    return p - shrink - step


def nadam(h: Mapping[str, Any], t: int, p: Array, g: Array, state: State) -> Array:
    """Step by Dozat 2016, Algorithm 2; torch.optim averages m with beta1 instead of mu_t."""
    beta1, beta2 = h["betas"]
    m, v, shrink = _moments(h, p, g, state)
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (s * h["momentum_decay"])) for s in (t, t + 1))
    product = state["mu_product"] = state.get("mu_product", 1.0) * mu
    if not h.get("decoupled_weight_decay"):
        g = g + h.get("weight_decay", 0.0) * p
    m_hat = mu_next * m / (1 - product * mu_next) + (1 - mu) * g / (1 - product)
    step: Array = h["lr"] * m_hat / (np.sqrt(v / (1 - beta2**t)) + h["eps"])
    return p - shrink - step


def radam(h: Mapping[str, Any], t: int, p: Array, g: Array, state: State) -> Array:
    """Step by Liu et al. 2020, Algorithm 2; torch.optim rectifies if rho_t > 5, and adds eps."""
    beta1, beta2 = h["betas"]
    m, v, shrink = _moments(h, p, g, state)
    m_hat = m / (1 - beta1**t)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    step: Array = h["lr"] * m_hat
    if rho <= 5:
        return p - shrink - step
    r2 = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    adaptive: Array = r2**0.5 * np.sqrt(1 - beta2**t) / (np.sqrt(v) + h["eps"])
    return p - shrink - step * adaptive


def adagrad(h: Mapping[str, Any], t: int, p: Array, g: Array, state: State) -> Array:
    """Step by Duchi, Hazan and Singer 2011, Figure 1, diagonal; torch.optim decays the rate."""
    g = g + h.get("weight_decay", 0.0) * p
    state["v"] = state.get("v", 0.0) + g**2
    step: Array = h["lr"] / (1 + (t - 1) * h["lr_decay"]) * g / (np.sqrt(state["v"]) + h["eps"])
    return p - step


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """An algorithm to measure.

    Attributes:
        label: its name in the tables.
        name: the class in stepforge and in torch.optim.
        transcription: the algorithm in float64.
        options: the options that are not defaults.
        second: the key of the second moment in ``optimizer.state``.
    """

    label: str
    name: str
    transcription: Transcription
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    second: str = "exp_avg_sq"


DECOUPLED = {"weight_decay": 0.01, "decoupled_weight_decay": True}
ALGORITHMS = (
    Algorithm("Adagrad", "Adagrad", adagrad, second="sum"),
    Algorithm("Adam", "Adam", adam),
    Algorithm("Adam, amsgrad", "Adam", adam, {"amsgrad": True}),
    Algorithm("AdamW", "AdamW", adam),
    Algorithm("NAdam", "NAdam", nadam),
    Algorithm("NAdam, decoupled", "NAdam", nadam, DECOUPLED),
    Algorithm("RAdam", "RAdam", radam),
    Algorithm("RAdam, decoupled", "RAdam", radam, DECOUPLED),
)


# The gradients. -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stream:
    """A kind of gradients: ``draw(rng, scale, progress)``, where progress runs from 0 to 1."""

    label: str
    meaning: str
    draw: Callable[[np.random.Generator, Array, float], Array]


def _rare(rng: np.random.Generator, scale: Array, _: float) -> Array:
    present = rng.random(scale.shape) < 0.02
    return np.where(present, scale * rng.standard_normal(scale.shape), 0.0)


STREAMS = (
    Stream("noise", "Gaussian around 0", lambda r, s, _: s * r.standard_normal(s.shape)),
    Stream(
        "signal",
        "Gaussian around half its standard deviation, so that p travels",
        lambda r, s, _: s * (0.5 + r.standard_normal(s.shape)),
    ),
    Stream(
        "heavy",
        "Student's t with 2 degrees of freedom: its variance is infinite",
        lambda r, s, _: s * r.standard_t(2, s.shape),
    ),
    Stream("rare", "exactly 0 in 98 of 100 steps, as for the rows of an embedding", _rare),
    Stream(
        "fading",
        "Gaussian, shrinking a thousandfold over the run, as training converges",
        lambda r, s, x: s * 10 ** (-3 * x) * r.standard_normal(s.shape),
    ),
)
#: The sizes of the initial parameters.
SIZES = (1.0, 0.01)
#: Gradients of different elements are up to this many powers of ten apart.
DECADES = 6


def gradients(steps: int, elements: int, seed: int) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the gradients of every step: float32, of shape (streams, sizes, elements).

    Initial parameters of every size get the same gradients.
    """
    rng = np.random.default_rng(seed)
    scale = 10 ** rng.uniform(-DECADES, 0, (len(STREAMS), elements))
    for step in range(steps):
        progress = step / max(steps - 1, 1)
        drawn = [s.draw(rng, scales, progress) for s, scales in zip(STREAMS, scale, strict=True)]
        g = np.stack(drawn).astype(np.float32)
        yield np.repeat(g[:, None, :], len(SIZES), axis=1)


def initial_parameters(elements: int, seed: int) -> np.ndarray[Any, Any]:
    """Return Gaussian values: float32, of shape (streams, sizes, elements)."""
    rng = np.random.default_rng((seed, 1))
    p = rng.standard_normal((len(STREAMS), len(SIZES), elements))
    scaled: np.ndarray[Any, Any] = p * np.array(SIZES)[None, :, None]
    return scaled.astype(np.float32)


# The measurement. ---------------------------------------------------------------------------------

STORAGE, OURS, THEIRS = "float32 storage", "stepforge", "torch.optim"
CONTESTANTS = (STORAGE, OURS, THEIRS)
#: The unit roundoff of float32: the largest relative error of one correctly rounded operation.
UNIT = 2.0**-24


@dataclasses.dataclass(frozen=True)
class Errors:
    """The errors of one algorithm's three float32 runs, each of shape (streams, sizes, elements).

    Attributes:
        parameter: by contestant, ``|p - p64|`` in units of 2**-24 of the largest magnitude that the
            element's ``p64`` has reached.
        second: by contestant, ``(v - v64) / v64`` with its sign; 0 where ``v64`` is 0.
    """

    parameter: Mapping[str, Array]
    second: Mapping[str, Array]


class _Run:
    """Four runs of an algorithm: float64, float64 rounded when stored, stepforge, torch.optim."""

    def __init__(self, algorithm: Algorithm, initial: np.ndarray[Any, Any]) -> None:
        self.algorithm = algorithm
        self.exact, self.exact_state = initial.astype(np.float64), dict[str, Any]()
        self.rounded, self.rounded_state = initial.astype(np.float64), dict[str, Any]()
        self.largest = np.abs(self.exact)
        self.trained: dict[str, tuple[torch.Tensor, torch.optim.Optimizer]] = {}
        for contestant, library in ((OURS, stepforge), (THEIRS, torch.optim)):
            p = torch.nn.Parameter(torch.tensor(initial))
            optimizer = getattr(library, algorithm.name)([p], **algorithm.options)
            self.trained[contestant] = p, optimizer
        self.options = self.trained[THEIRS][1].defaults

    def step(self, t: int, g: np.ndarray[Any, Any]) -> None:
        transcription, wide = self.algorithm.transcription, g.astype(np.float64)
        self.exact = transcription(self.options, t, self.exact, wide, self.exact_state)
        self.largest = np.maximum(self.largest, np.abs(self.exact))
        rounded = transcription(self.options, t, self.rounded, wide, self.rounded_state)
        self.rounded = _to_float32(rounded)
        self.rounded_state = {k: _to_float32(x) for k, x in self.rounded_state.items()}
        for p, optimizer in self.trained.values():
            p.grad = torch.from_numpy(g)
            optimizer.step()

    def errors(self) -> Errors:
        parameters = {STORAGE: self.rounded}
        seconds = {STORAGE: self.rounded_state["v"]}
        for contestant, (p, optimizer) in self.trained.items():
            parameters[contestant] = p.detach().double().numpy()
            v = optimizer.state[p][self.algorithm.second]
            seconds[contestant] = v.double().numpy()
        v64 = self.exact_state["v"]
        scale = np.where(v64 > 0, v64, 1.0)
        return Errors(
            {c: np.abs(p - self.exact) / (UNIT * self.largest) for c, p in parameters.items()},
            {c: (v - v64) / scale for c, v in seconds.items()},
        )


def _to_float32(x: Any) -> Any:
    return np.asarray(x).astype(np.float32).astype(np.float64)


def measure(
    steps: int,
    elements: int,
    seed: int = SEED,
    algorithms: Sequence[Algorithm] = ALGORITHMS,
) -> dict[str, Errors]:
    """Train with every algorithm on the same gradients.

    Args:
        steps: how many steps.
        elements: how many elements per stream of gradients and initial size.
        seed: the seed of the gradients and the initial parameters.
        algorithms: the algorithms to measure.

    Returns:
        The errors by the algorithm's label.
    """
    initial = initial_parameters(elements, seed)
    runs = [_Run(algorithm, initial) for algorithm in algorithms]
    for t, g in enumerate(gradients(steps, elements, seed), 1):
        for run in runs:
            run.step(t, g)
    return {run.algorithm.label: run.errors() for run in runs}


def deviations(ours: Array, theirs: Array) -> float:
    """Return how far the mean of ``ours`` exceeds that of ``theirs``, in standard deviations.

    Two runs that round equally well differ by chance. Their elements are pairs with the same
    gradients, so the spread of the differences tells by how much. Above 3 is more than chance.
    """
    difference = ours - theirs
    spread = difference.std() / np.sqrt(difference.size)
    return float(difference.mean() / spread) if spread else 0.0


# The page. ----------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "numerics.md"
STEPS, ELEMENTS = 1000, 4000


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def _pooled(errors: Mapping[str, Errors], summary: Callable[[Array], Any]) -> str:
    rows = []
    for label, e in errors.items():
        for index, size in enumerate(SIZES):
            values = {c: float(summary(e.parameter[c][:, index])) for c in CONTESTANTS}
            ratio = values[THEIRS] / values[OURS]
            cells = [f"{values[c]:.2f}" for c in CONTESTANTS]
            rows.append([label, f"{size:g}", *cells, f"{ratio:.2f}"])
    return _table(["", "size of p", *CONTESTANTS, f"{THEIRS} / {OURS}"], rows)


def _by_stream(errors: Mapping[str, Errors]) -> str:
    rows = []
    for label, e in errors.items():
        for index, size in enumerate(SIZES):
            cells = [
                " / ".join(f"{e.parameter[c][s, index].mean():.2f}" for c in (OURS, THEIRS))
                for s in range(len(STREAMS))
            ]
            rows.append([label, f"{size:g}", *cells])
    return _table(["", "size of p", *(s.label for s in STREAMS)], rows)


def _second_moments(errors: Mapping[str, Errors]) -> str:
    rows = []
    for label, e in errors.items():
        row = [label]
        for summary in (lambda x: np.abs(x).mean(), lambda x: np.abs(x).max(), np.mean):
            row += [f"{summary(e.second[c]):.1e}" for c in (OURS, THEIRS)]
        rows.append(row)
    header = [f"{name}, {c}" for name in ("mean", "largest", "bias") for c in (OURS, THEIRS)]
    return _table(["", *header], rows)


def _comparison(errors: Mapping[str, Errors]) -> str:
    """Say where stepforge has the larger error, and whether by more than chance."""
    cells = [
        [e.parameter[c][s, index] for c in CONTESTANTS]
        for e in errors.values()
        for s in range(len(STREAMS))
        for index in range(len(SIZES))
    ]
    larger = [
        (ours.mean() / theirs.mean() - 1, deviations(ours, theirs))
        for _, ours, theirs in cells
        if ours.mean() > theirs.mean()
    ]
    by, sigmas = (max(column, default=0.0) for column in zip(*larger)) if larger else (0.0, 0.0)
    above = max(ours.mean() / storage.mean() - 1 for storage, ours, _ in cells)
    peaks = [
        [e.parameter[c][:, index].max() for c in CONTESTANTS]
        for e in errors.values()
        for index in range(len(SIZES))
    ]
    excess = [(ours / theirs - 1, ours / storage - 1) for storage, ours, theirs in peaks]
    lost = [pair for pair in excess if pair[0] > 0]
    text = (
        f"{len(larger)} of these {len(cells)} means are larger for {OURS}, by at most {by:.1%} "
        f"and {sigmas:.1f} standard deviations of the paired difference. (By chance alone, the "
        f"largest of {len(cells)} draws is usually between 2 and 3.) None is more than "
        f"{above:.0%} above {STORAGE}. Of the {len(peaks)} largest errors in the previous table, "
        f"{OURS} has the larger one in {len(lost)}"
    )
    if lost:
        text += (
            f", by at most {max(x for x, _ in lost):.1%}, where {OURS} is at most "
            f"{max(max(x, 0.0) for _, x in lost):.1%} above {STORAGE}"
        )
    return textwrap.fill(text + ".", 100)


def _decay_table() -> str:
    rows = []
    for lr, weight_decay in ((1e-3, 0.01), (3e-4, 0.01), (3e-5, 0.1), (3e-5, 0.01), (2e-6, 0.01)):
        wanted = lr * weight_decay
        in_product = 1 - float(np.float32(1 - wanted))
        in_difference = float(np.float32(wanted))
        errors = [f"{x / wanted - 1:+.1e}" for x in (in_difference, in_product)]
        rows.append([f"{lr:g}", f"{weight_decay:g}", *errors])
    return _table(["lr", "weight_decay", "as a difference", "as a factor of p"], rows)


def page(errors: Mapping[str, Errors], steps: int, elements: int) -> str:
    """Return the text of docs/numerics.md."""
    streams = "\n".join(f"- **{s.label}**: {s.meaning}" for s in STREAMS)
    total = elements * len(STREAMS) * len(SIZES)
    factor = float(np.float32(0.999)), float(np.float32(0.001))
    limit = factor[1] / (1 - factor[0]) - 1
    cpu = torch.backends.cpu.get_cpu_capability()
    return f"""# Rounding errors

The rounding errors of training in float32, measured: {OURS} and {THEIRS}, both against a float64
transcription of each published algorithm. The transcriptions include {THEIRS}'s deviations from
the papers, which `experiments/numerics.py` notes. This page is written by

    python -m experiments.numerics

with seed {SEED}, on stepforge {stepforge.__version__}, torch {torch.__version__},
numpy {np.__version__} and Python {platform.python_version()}, on a CPU
({platform.machine()}, {cpu}). Both libraries run with their defaults. The choice of backend makes
no difference to {OURS}, because all of its backends produce the same bits.

## What is measured

{steps:,} steps on {total:,} elements. All runs get the same float32 gradients, which do not depend
on the parameters, so errors do not feed back. The gradients of each element have a scale of their
own, drawn log-uniformly over {DECADES} powers of ten. There are {len(STREAMS)} kinds of gradients:

{streams}

Initial parameters are Gaussian with a standard deviation of {SIZES[0]:g} or {SIZES[1]:g}, the "size
of p" in the tables. Options are the defaults, and the decoupled variants of NAdam and RAdam have a
`weight_decay` of {DECOUPLED["weight_decay"]:g}.

- The **error of a parameter** is |p - p64| in units of 2^-24 of the largest magnitude that the
  element's p64 has reached during the run. In this unit, one rounding of p costs up to 1, and the
  error is not inflated where p crosses zero.
- The **error of a second moment** is (v - v64) / v64. Its signed mean is the **bias**.
- **{STORAGE}** is the transcription with p and its states rounded to float32 once per step, and
  everything in between computed in float64. It is the cost of float32 storage alone: arithmetic
  cannot go below it, except by chance.

## Parameters

The mean error:

{_pooled(errors, np.mean)}

The largest error:

{_pooled(errors, np.max)}

The mean error by kind of gradient, {OURS} / {THEIRS}:

{_by_stream(errors)}

{_comparison(errors)}

## Second moments

{_second_moments(errors)}

## Where the difference comes from

**The two weights of a moving average.** {THEIRS} computes `v * 0.999 + g * g * 0.001`, with each
weight rounded to float32: {factor[0]:.10f} and {factor[1]:.13f}. Their sum exceeds one, so v ends
up too large, by {limit:.1e} in the long run; the bias above is on its way there. {OURS} computes
`v + (g * g - v) * 0.001`, whose weights sum to one no matter how 0.001 is rounded; see `ema` in
`stepforge/ops.py`. ({THEIRS} does the same, but for m only.) Every step is divided by the root of
v, so all steps are too small by half of that factor, in the same direction. The effect grows with
the distance that p travels relative to its size. Adagrad has no such weights, and no such
difference.

**Decoupled weight decay.** {THEIRS} multiplies p by `1 - lr * weight_decay` before the step. Near
1, float32 has a resolution of 6e-8, and the decay itself is about 1e-5. So few digits of the decay
survive, and the error is the same in every step. {OURS} subtracts `lr * weight_decay * p` from p
together with the step, as in the AdamW paper (Algorithm 2, line 12). The coefficient keeps all its
digits, and p is rounded once per step instead of twice. The relative error of the decay's
coefficient in the two forms (-1 means no decay at all):

{_decay_table()}

An exact coefficient does not protect a decay from storage. Where no gradient moves p, a decay below
half a unit of p is rounded away, and a larger one is rounded to whole units. AdamW's "rare" column
shows this: {STORAGE} has the same error as {OURS} there.

**Roots and fused products.** `torch.sqrt` on a CPU is not correctly rounded. {OURS} uses correctly
rounded roots, so that all backends produce equal bits. For the same reason, {OURS} rounds Adagrad's
`sum + g * g` twice, while {THEIRS} rounds it once. Neither effect is large enough to show in p.

**The rest** is storage. Where nothing above applies (Adagrad), or where p is large relative to its
steps, both libraries are as good as float32 storage allows: their errors are two draws of the same
rounding noise, and the larger of the two changes with the seed. A smaller error needs more bits
for p.
"""


def main() -> None:
    """Measure, and write the page."""
    start = time.perf_counter()
    # Torch's division of work among threads decides which elements its vector loops leave over.
    torch.set_num_threads(1)
    PAGE.write_text(page(measure(STEPS, ELEMENTS), STEPS, ELEMENTS), encoding="utf-8")
    print(f"wrote {PAGE} in {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
