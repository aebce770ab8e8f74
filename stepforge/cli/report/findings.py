"""Findings: what looks wrong in a run, in words.

Each search is a pure function of a :class:`Run`. Its thresholds stand above it with their reasons;
``docs/report.md`` has them as a table. They are meant to stay silent about a healthy run, warm-up
and final decay included, rather than to find every fault.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

import numpy as np

from stepforge.cli.report.run import Array, Mask, Run

__all__ = [
    "Finding",
    "Severity",
    "always_clipped",
    "exploding",
    "find",
    "lost_to_rounding",
    "not_finite",
    "skipped_lines",
    "stalled",
]

#: Lines that a median needs before anything is said of it. Fewer say little.
MIN_LINES = 10

#: Share of the highest learning rate below which lines are not judged. At the ends of a schedule
#: steps are meant to be small, and rounding may swallow them.
JUDGED_LR = 0.2

#: Share of elements kept by rounding above which a layer stands still. Full precision is below
#: 0.01, since a step of 1e-3 of a weight is 10,000 roundings of float32.
FROZEN_LOST = 0.95
#: Share of judged lines that must be above it. A few may be so where a layer's gradients vanish.
FROZEN_LINES = 0.25
#: Median share above which much of the training is lost, though the layer still moves.
MUCH_LOST = 0.5

#: Update-to-weight ratio over that of the median layer, per learning rate, below which a layer
#: stalls. In healthy networks layers are within a factor of about 100: normalization, embeddings.
STALLED_RATIO = 1e-3
#: Layers that a median layer needs.
MIN_LAYERS = 3

#: Update-to-weight ratio from which a layer can explode: ten such steps replace its weights. Usual
#: ratios are near 1e-3.
EXPLODING_RATIO = 0.1
#: Growth over a low quartile of the layer's own earlier ratios. The highest one must be above all
#: earlier ones, too: biases that start from zero begin with large ratios.
EXPLODING_GROWTH = 30.0
#: Growth of the update itself. Where a weight passes zero, its ratio grows and its update does not.
EXPLODING_UPDATE = 5.0
#: Lines from which an explosion is an error.
EXPLODING_LINES = 3
#: Growth of the weights that makes it an error in fewer lines. Otherwise it is a warning of a jump.
EXPLODING_WEIGHTS = 10.0
#: Ratio whose median over the second half is an explosion without growth: steps exceed weights.
REPLACING_RATIO = 1.0

#: Factor below which gradients count as clipped, so that rounding does not.
CLIPPED_FACTOR = 0.999
#: Share of clipped lines in the second half. In the first half gradients are often larger.
ALWAYS_CLIPPED = 0.95

#: Share of skipped steps that is an error. Gradient scalers skip some at the start, and one in
#: thousands later.
MANY_SKIPPED = 0.05

#: Layers with the same finding that get a sentence each. More get one sentence together.
_TOLD_APART = 3


class Severity(StrEnum):
    """Rank of a finding: an error spoils the training, a warning may."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong.

    Attributes:
        severity: an error or a warning.
        kind: a few words that name it.
        sentence: what was measured, with numbers.
        advice: what to try.
        layers: the layers; empty if it is about the whole run.
        steps: ranges of steps, first and last.
    """

    severity: Severity
    kind: str
    sentence: str
    advice: str
    layers: tuple[str, ...] = ()
    steps: tuple[tuple[int, int], ...] = ()

    @property
    def where(self) -> str:
        """The steps in words."""
        return _in_words(self.steps)


def find(run: Run) -> list[Finding]:
    """Return everything that looks wrong in a run, errors first."""
    found = [
        *not_finite(run),
        *exploding(run),
        *lost_to_rounding(run),
        *stalled(run),
        *always_clipped(run),
    ]
    return sorted(found, key=lambda finding: list(Severity).index(finding.severity))


# Gradients, losses and weights that are not finite.


def skipped_lines(run: Run) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return how many steps were skipped between each line and the one before, ``[lines]``.

    The metric counts from the start. Where it falls, the count began again.
    """
    counts = run.metrics.get("skipped")
    if counts is None:
        return np.zeros(len(run), dtype=np.int64)
    rises = np.zeros(len(run), dtype=np.int64)
    told = np.flatnonzero(np.isfinite(counts))
    known = counts[told].astype(np.int64)
    before = np.concatenate([[0], known[:-1]])
    rises[told] = np.where(known < before, known, known - before)
    return rises


def not_finite(run: Run) -> Iterator[Finding]:
    """Find skipped steps, and losses, gradients and weights with NaN or infinity."""
    skipped = skipped_lines(run)
    bad = run.metrics.get("nonfinite", np.zeros(len(run)))
    has_bad = np.isinf(bad) | (np.nan_to_num(bad) > 0)
    total = int(skipped.sum())
    if total:
        lines = skipped > 0
        steps = _ranges_between(run, skipped, has_bad)
        share = total / max(1, int(run.steps[-1] - run.steps[0]) + 1)
        plural = "s were" if total > 1 else " was"
        loss = _infinite(run, "loss")
        yield Finding(
            Severity.ERROR if share > MANY_SKIPPED else Severity.WARNING,
            "skipped steps",
            f"{total:,} step{plural} skipped because gradients were not finite"
            f"{_bad_elements(run, lines & has_bad)}"
            f"{', and the loss was not finite either' if (loss & lines).any() else ''}.",
            "Look at those batches for NaN or overflow. A gradient scaler skips a few steps by "
            "design, mostly at the start.",
            layers=tuple(_bad_layers(run, lines & has_bad)),
            steps=steps,
        )
    stepped = has_bad & (skipped == 0)
    if stepped.any():
        steps = _ranges(run, stepped)
        yield Finding(
            Severity.ERROR,
            "gradients not finite",
            f"Gradients were not finite{_bad_elements(run, stepped)}, and the step was taken "
            "nevertheless.",
            "Skip such steps (skip_nonfinite=True), or find the operation that overflows.",
            layers=tuple(_bad_layers(run, stepped)),
            steps=steps,
        )
    for metric, kind, things in (
        ("loss", "loss not finite", "The loss was"),
        ("param_norm", "weights not finite", "The norm of the weights was"),
    ):
        lines = _infinite(run, metric) & (skipped == 0)
        if lines.any():
            steps = _ranges(run, lines)
            yield Finding(
                Severity.ERROR if lines[-1] or metric == "param_norm" else Severity.WARNING,
                kind,
                f"{things} NaN or infinite in {_counted(int(lines.sum()), 'line')}.",
                "What comes after weights that are not finite is worthless: go back to a "
                "checkpoint before."
                if metric == "param_norm"
                else "Look at those batches, and at the learning rate before them.",
                steps=steps,
            )


def _infinite(run: Run, metric: str) -> Mask:
    return np.isinf(run.metrics.get(metric, np.zeros(len(run))))


def _bad_elements(run: Run, lines: Mask) -> str:
    bad = run.metrics.get("nonfinite")
    if bad is None or not lines.any():
        return ""
    most = np.max(np.nan_to_num(bad[lines], posinf=0))
    upto = "up to " if lines.sum() > 1 else ""
    return f" in {upto}{_counted(int(most), 'element')}" if most else ""


def _bad_layers(run: Run, lines: Mask) -> list[str]:
    bad = run.by_layer.get("nonfinite")
    if bad is None:
        return []
    some = (np.nan_to_num(bad[lines]) > 0).any(axis=0)
    return [] if some.all() else [run.layers[index] for index in np.flatnonzero(some)]


def _ranges_between(
    run: Run, counts: np.ndarray[Any, np.dtype[np.int64]], is_exact: Mask
) -> tuple[tuple[int, int], ...]:
    """Return the steps in which a count rose: exact ones, or all since the line before."""
    ranges: list[tuple[int, int]] = []
    for index in np.flatnonzero(counts):
        last = int(run.steps[index])
        first = int(run.steps[index - 1]) + 1 if index else min(1, last)
        if is_exact[index] and counts[index] == 1:
            first = last
        if ranges and ranges[-1][1] >= first - 1 and counts[index] == last - first + 1:
            first = ranges.pop()[0]
        ranges.append((first, last))
    return tuple(ranges)


# Rounding.


def lost_to_rounding(run: Run) -> Iterator[Finding]:
    """Find layers whose steps are smaller than the rounding of their weights.

    Weights that are rounded at random may keep their value in most steps and still be right on
    average, so nothing is said of them.
    """
    if run.is_stochastic:
        return
    layers, lost = _layers_or_total(run, "lost")
    judged = _judged(run, len(layers)) & np.isfinite(lost) & _stepped(run)
    frozen_lines = judged & (lost >= FROZEN_LOST)
    count = judged.sum(axis=0)
    enough = count >= MIN_LINES
    is_frozen = enough & (frozen_lines.sum(axis=0) >= FROZEN_LINES * np.maximum(count, 1))
    middle = _medians(np.where(judged, lost, np.nan))
    is_losing = enough & ~is_frozen & (middle >= MUCH_LOST)
    advice = "Keep more bits of these weights: master_weight_bits=24, or stochastic_rounding=True."
    yield from _by_layer(
        layers,
        is_frozen,
        _medians(np.where(frozen_lines, lost, np.nan)),
        lambda index: Finding(
            Severity.ERROR,
            "frozen by rounding",
            f"{_subject(layers[index])} frozen by rounding: in "
            f"{_counted(int(frozen_lines[:, index].sum()), 'line')} of {count[index]:,}, at least "
            f"{FROZEN_LOST:.0%} of the elements kept their value, though their step was not zero "
            f"(median {_percent(np.median(lost[frozen_lines[:, index], index]))}).",
            advice,
            steps=_ranges(run, frozen_lines[:, index]),
        ),
        "frozen by rounding: steps moved almost no element",
    )
    yield from _by_layer(
        layers,
        is_losing,
        middle,
        lambda index: Finding(
            Severity.WARNING,
            "updates lost to rounding",
            f"{_subject(layers[index])} losing updates to rounding: in the median of "
            f"{count[index]:,} lines, {_percent(middle[index])} of the elements kept their value, "
            "though their step was not zero.",
            advice,
            steps=_ranges(run, judged[:, index]),
        ),
        "losing more than half of their updates to rounding",
    )


# Stalled layers.


def stalled(run: Run) -> Iterator[Finding]:
    """Find layers that move far less than the others, and not because of rounding.

    A ratio is divided by the learning rate of its layer, if that is known: small rates for early
    layers are meant so.
    """
    ratios = run.by_layer.get("update_ratio")
    if ratios is None or len(run.layers) < MIN_LAYERS:
        return
    judged = _last_half(_judged(run, len(run.layers)) & np.isfinite(ratios) & _stepped(run))
    lr = run.by_layer.get("lr", np.ones_like(ratios))
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(judged & (lr > 0), ratios / lr, np.nan)
    count = np.isfinite(relative).sum(axis=0)
    middle = _medians(relative)
    moving = middle[np.isfinite(middle) & (middle > 0)]
    if len(moving) < MIN_LAYERS - 1:
        return
    typical = np.median(moving)
    highest = _quantiles(relative, 0.9)
    _, lost = _layers_or_total(run, "lost")
    frozen = np.zeros(len(run.layers), dtype=bool)
    if not run.is_stochastic and lost.shape == ratios.shape:
        frozen = _medians(np.where(judged, lost, np.nan)) >= MUCH_LOST
    with np.errstate(invalid="ignore"):
        is_stalled = (count >= MIN_LINES) & (highest < STALLED_RATIO * typical) & ~frozen

    def finding(index: int) -> Finding:
        ratio = np.median(ratios[judged[:, index], index])
        if middle[index] == 0:
            what = "an update of 0"
            if _gets_no_gradient(run, judged[:, index], index):
                what += ", as its gradient is 0"
        else:
            what = (
                f"an update of {ratio:.1e} of its weight, "
                f"1/{typical / middle[index]:,.0f} of the median layer's"
            )
        also = " per learning rate" if "lr" in run.by_layer and middle[index] else ""
        return Finding(
            Severity.WARNING,
            "stalled layer",
            f"{run.layers[index]} hardly moves: {what}{also} (median of {count[index]:,} lines).",
            "Check that the layer takes part in the loss, its learning rate, and its "
            "initialization.",
            steps=_ranges(run, judged[:, index]),
        )

    yield from _by_layer(
        run.layers,
        is_stalled,
        -highest,
        finding,
        f"stalled: they move less than {STALLED_RATIO:g} times as far as the median layer",
    )


def _gets_no_gradient(run: Run, lines: Mask, index: int) -> bool:
    norms = run.by_layer.get("grad_norm")
    return norms is not None and bool((norms[lines, index] == 0).all())


# Exploding layers.


def exploding(run: Run) -> Iterator[Finding]:
    """Find layers whose update-to-weight ratio has grown beyond all that went before."""
    layers, ratios = _layers_or_total(run, "update_ratio")
    _, updates = _layers_or_total(run, "update_norm")
    ratios = np.where(np.isfinite(ratios) & _stepped(run), ratios, np.nan)
    lines = np.arange(len(run))[:, None] >= _warm_up(run)
    past = _past(np.where(lines, ratios, np.nan))
    with np.errstate(invalid="ignore"):
        hits = (ratios >= EXPLODING_RATIO) & (past > 0) & (ratios >= EXPLODING_GROWTH * past)
        if updates.shape == ratios.shape:
            past_update = _past(np.where(lines & np.isfinite(updates), updates, np.nan))
            hits &= ~(updates < EXPLODING_UPDATE * past_update)
        before = np.where(hits.cumsum(axis=0) == 0, ratios, np.nan)
        highest_before = _quantiles(before, 1.0)
        hits &= ~(_quantiles(np.where(hits, ratios, np.nan), 1.0) <= highest_before)
    second_half = _last_half(_judged(run, len(layers)) & np.isfinite(ratios))
    middle = _medians(np.where(second_half, ratios, np.nan))
    grows = hits.any(axis=0)
    replaces = (second_half.sum(axis=0) >= MIN_LINES) & (middle >= REPLACING_RATIO) & ~grows

    def finding(index: int) -> Finding:
        if replaces[index]:
            where = second_half[:, index]
            return Finding(
                Severity.ERROR,
                "exploding ratio",
                f"{_subject(layers[index])} replaced by its own updates: in the median of "
                f"{int(where.sum()):,} lines an update is {middle[index]:.2g} times its weight.",
                "Lower its learning rate.",
                steps=_ranges(run, where),
            )
        where = hits[:, index]
        peak = int(np.nanargmax(np.where(where, ratios[:, index], np.nan)))
        is_error = int(where.sum()) >= EXPLODING_LINES or _grew(run, index, peak)
        return Finding(
            Severity.ERROR if is_error else Severity.WARNING,
            "exploding ratio",
            f"{_subject(layers[index])} exploding: its update reached {ratios[peak, index]:.2g} of "
            f"its weight at step {run.steps[peak]:,}, "
            f"{ratios[peak, index] / past[peak, index]:,.0f} times its ratio before.",
            "Look at its learning rate and gradients from the first of these steps on; clip "
            "gradients (max_grad_norm), or warm up longer.",
            steps=_ranges(run, where),
        )

    worst = np.where(grows, np.nanmax(np.where(hits, ratios, 0), axis=0, initial=0), middle)
    yield from _by_layer(
        layers, grows | replaces, worst, finding, "exploding: their updates outgrew their weights"
    )


def _grew(run: Run, index: int, line: int) -> bool:
    """Return True if weights after a line are far larger than before."""
    _, norms = _layers_or_total(run, "param_norm")
    if index >= norms.shape[1]:
        return False
    before, after = _medians(norms[:line, [index]])[0], _medians(norms[line:, [index]])[0]
    return bool(after >= EXPLODING_WEIGHTS * before)


def _warm_up(run: Run) -> int:
    """Return the number of lines in which the learning rate rises from the start."""
    lr = run.lr
    if len(lr) < 2 or lr.shape[1] == 0:
        return 0
    with np.errstate(invalid="ignore"):
        rises = (lr[1:] >= lr[:-1]).all(axis=1) & (lr[1:] > lr[:-1]).any(axis=1)
    return int(np.argmin(rises)) + 1 if not rises.all() else len(lr)


def _past(values: Array) -> Array:
    """Return a low quartile of each column's earlier values, NaN where they are too few.

    The quartile stays with the values before an explosion while that lasts. It is taken over
    medians of blocks of lines, as thousands of lines would take long.
    """
    lines = len(values)
    block = max(1, -(-lines // 64))
    starts = range(0, lines, block)
    middles = np.array([_medians(values[start : start + block]) for start in starts])
    past = np.full(values.shape, np.nan)
    known = np.isfinite(values).cumsum(axis=0)
    for number, start in enumerate(starts):
        if number:
            enough = known[start - 1] >= MIN_LINES
            past[start : start + block] = np.where(
                enough, _quantiles(middles[:number], 0.25), np.nan
            )
    return past


# Clipping.


def always_clipped(run: Run) -> Iterator[Finding]:
    """Find a clipping threshold that acts in every step, and so sets the step by itself."""
    factors = run.metrics.get("clip_factor")
    if factors is None:
        return
    known = _last_half(np.isfinite(factors)[:, None] & _stepped(run))[:, 0]
    clipped = known & (factors < CLIPPED_FACTOR)
    if known.sum() >= MIN_LINES and clipped.sum() >= ALWAYS_CLIPPED * known.sum():
        middle = np.median(factors[clipped])
        yield Finding(
            Severity.WARNING,
            "clipped at every step",
            f"Gradients were clipped in {int(clipped.sum()):,} of the last {int(known.sum()):,} "
            f"lines, by a median factor of {middle:.2g}.",
            "A threshold that always acts hides large gradients among usual ones: raise it to "
            f"about {1 / middle:.2g} times its value.",
            steps=_ranges(run, clipped),
        )


# Shared by the searches.


def _layers_or_total(run: Run, metric: str) -> tuple[tuple[str, ...], Array]:
    """Return a metric of all layers; else of the whole model, whose name is empty."""
    if metric in run.by_layer:
        return run.layers, run.by_layer[metric]
    if metric in run.metrics:
        return ("",), run.metrics[metric][:, None]
    return (), np.zeros((len(run), 0))


def _judged(run: Run, columns: int) -> Mask:
    """Return the lines whose learning rate is not near the ends of its schedule."""
    lr = run.by_layer.get("lr")
    if lr is None or lr.shape[1] != columns:
        return np.repeat(_high(run.lr).any(axis=1, keepdims=True), columns, axis=1)
    judged: Mask = _high(lr) | ~np.isfinite(lr)
    return judged


def _stepped(run: Run) -> Mask:
    """Return the lines without a skipped step, which would have moved nothing, ``[lines, 1]``."""
    stepped: Mask = (skipped_lines(run) == 0)[:, None]
    return stepped


def _high(lr: Array) -> Mask:
    """Return where rates are at least JUDGED_LR of the highest. Without rates, everywhere."""
    if lr.shape[1] == 0 or not np.isfinite(lr).any():
        return np.ones((len(lr), 1), dtype=bool)
    finite = np.where(np.isfinite(lr), lr, 0)
    high: Mask = (finite >= JUDGED_LR * finite.max(axis=0)) & (finite > 0)
    return high


def _last_half(lines: Mask) -> Mask:
    """Return the second half of the lines that each column has."""
    late: Mask = lines & (lines.cumsum(axis=0) * 2 > lines.sum(axis=0))
    return late


def _medians(values: Array) -> Array:
    """Return the median of each column's finite values, NaN for a column without any."""
    return _quantiles(values, 0.5)


def _quantiles(values: Array, share: float) -> Array:
    """Return a quantile of each column's finite values, NaN for a column without any."""
    if not len(values):
        return np.full(values.shape[1], np.nan)
    ordered = np.sort(np.where(np.isfinite(values), values, np.nan), axis=0)  # NaN comes last
    last = np.maximum(np.isfinite(ordered).sum(axis=0) - 1, 0)
    position = share * last
    below = np.floor(position).astype(np.int64)
    columns = np.arange(values.shape[1])
    low, high = ordered[below, columns], ordered[np.minimum(below + 1, last), columns]
    quantiles: Array = low + (position - below) * (high - low)
    return quantiles


_Make: TypeAlias = Callable[[int], Finding]


def _by_layer(
    layers: Sequence[str], which: Mask, badness: Array, make: _Make, together: str
) -> Iterator[Finding]:
    """Yield a finding for each layer, or one for all of them if they are many."""
    order = np.argsort(-np.nan_to_num(badness), kind="stable")
    chosen = [int(index) for index in order if which[index]]
    names = [layers[index] for index in chosen]
    if len(chosen) <= _TOLD_APART:
        for index, name in zip(chosen, names):
            finding = make(index)
            yield dataclasses.replace(finding, layers=(name,) if name else ())
        return
    worst = make(chosen[0])
    yield dataclasses.replace(
        worst,
        sentence=f"{len(chosen):,} of {len(layers):,} layers are {together}. "
        f"The worst: {worst.sentence}",
        layers=tuple(names),
    )


def _subject(layer: str) -> str:
    return f"{layer} is" if layer else "The model is"


def _ranges(run: Run, lines: Mask) -> tuple[tuple[int, int], ...]:
    """Return the steps of lines, neighbours as one range."""
    indices = np.flatnonzero(lines)
    breaks = np.flatnonzero(np.diff(indices) > 1)
    firsts = indices[np.concatenate([[0], breaks + 1]).astype(int)] if len(indices) else []
    lasts = (
        indices[np.concatenate([breaks, [len(indices) - 1]]).astype(int)] if len(indices) else []
    )
    return tuple((int(run.steps[a]), int(run.steps[b])) for a, b in zip(firsts, lasts))


def _in_words(steps: Sequence[tuple[int, int]]) -> str:
    """Return ranges of steps in words.

    Example:
        >>> _in_words([(3, 3), (10, 1200)])
        'step 3, steps 10 to 1,200'
    """
    words = [
        f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
        for first, last in steps[:4]
    ]
    if len(steps) > 4:
        words.append(f"and {len(steps) - 4:,} more until step {steps[-1][1]:,}")
    return ", ".join(words)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
