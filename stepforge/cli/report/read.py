"""Reading of the JSON lines that :class:`stepforge.logging.MetricsLogger` writes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepforge.cli.report.run import LAYER_METRICS, METRICS, Array, Run

__all__ = ["UnreadableError", "read", "read_lines"]


class UnreadableError(ValueError):
    """A file without a single line of metrics. The message is a sentence for the user."""


@dataclass
class _Line:
    """The numbers of one line. Those of layers are in the order in which layers first came up."""

    step: int
    lr: list[float]
    metrics: dict[str, float]
    by_layer: dict[str, Array]


def read(path: Path) -> Run:
    """Read a file.

    Args:
        path: the file.

    Raises:
        UnreadableError: it is empty, or has no line of metrics.
        OSError: it cannot be read.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        return read_lines(file, name=str(path))


def read_lines(lines: Iterable[str], *, name: str) -> Run:
    """Read JSON lines. Lines that cannot be read are left out, and named in the run's remarks.

    A step that is not above the one before continues an earlier state of the run: it and all that
    follows replace what came after that state.

    Args:
        lines: the lines.
        name: the name of the file for messages.

    Raises:
        UnreadableError: there is no line of metrics.

    Example:
        >>> run = read_lines(['{"step": 1, "loss": 2.5}', '{"step": 2, "loss": null}'], name="x")
        >>> run.steps.tolist(), run.metrics["loss"].tolist()
        ([1, 2], [2.5, inf])
    """
    kept: list[_Line] = []
    places: dict[str, int] = {}
    broken: list[tuple[int, str]] = []
    resumed: list[int] = []
    is_stochastic = False
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            record = _record(text)
            line = _line(record, places)
        except _BrokenLineError as error:
            broken.append((number, str(error)))
            continue
        is_stochastic |= record.get("stochastic_rounding") is True
        if kept and line.step <= kept[-1].step:
            resumed.append(line.step)
            while kept and kept[-1].step >= line.step:
                kept.pop()
        kept.append(line)
    if not kept:
        reason = f": {_what(broken, name)}" if broken else ", it is empty"
        raise UnreadableError(f"{name} has no metrics{reason}.")
    return Run(
        name=name,
        steps=np.array([line.step for line in kept], dtype=np.int64),
        lr=_stacked([line.lr for line in kept], max(len(line.lr) for line in kept)),
        metrics={
            metric: np.array([line.metrics.get(metric, math.nan) for line in kept])
            for metric in METRICS
            if any(metric in line.metrics for line in kept)
        },
        layers=tuple(places),
        by_layer={
            metric: _stacked(
                [line.by_layer.get(metric, ()) for line in kept], len(places), np.float32
            )
            for metric in LAYER_METRICS
            if any(metric in line.by_layer for line in kept)
        },
        is_stochastic=is_stochastic,
        resumed=tuple(resumed),
        remarks=tuple(_remarks(name, broken, resumed)),
    )


class _BrokenLineError(Exception):
    """The reason why a line cannot be read, as the end of a sentence on it."""


def _record(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError:
        raise _BrokenLineError("is not JSON") from None
    except RecursionError:
        raise _BrokenLineError("is nested too deeply") from None
    if not isinstance(record, dict):
        raise _BrokenLineError("is not a JSON object")
    return record


def _line(record: Mapping[str, Any], places: dict[str, int]) -> _Line:
    """Read a line, and give new layers the next places."""
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or abs(step) >= 2**63:
        raise _BrokenLineError("has no step")
    rates = record.get("lr", [])
    metrics = {name: _number(record[name], name) for name in METRICS if name in record}
    lr = [_number(rate, "lr") for rate in (rates if isinstance(rates, list) else [rates])]
    found: dict[str, dict[int, float]] = {}
    for layer, values in _object(record.get("parameters", {}), "parameters").items():
        place = places.setdefault(layer, len(places))
        of_layer = _object(values, layer)
        for name in LAYER_METRICS:
            if name in of_layer:
                found.setdefault(name, {})[place] = _number(of_layer[name], f"{name} of {layer}")
    by_layer = {}
    for name, numbers in found.items():
        row = np.full(len(places), math.nan, dtype=np.float32)
        with np.errstate(over="ignore"):  # a number that float32 cannot hold is infinite
            row[list(numbers)] = list(numbers.values())
        by_layer[name] = row
    return _Line(step, lr, metrics, by_layer)


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _BrokenLineError(f"has no object for {name}")
    return value


def _number(value: Any, name: str) -> float:
    """Return a number, infinity for each that is not finite."""
    if value is None:
        return math.inf
    if not isinstance(value, (int, float)):
        raise _BrokenLineError(f"has no number for {name}")
    try:
        return float(value) if math.isfinite(value) else math.inf
    except OverflowError:
        return math.inf


def _stacked(
    rows: Sequence[Sequence[float] | Array], width: int, dtype: type[np.floating[Any]] = np.float64
) -> Array:
    """Return a matrix of rows that may be too short. NaN fills the gaps."""
    matrix = np.full((len(rows), width), math.nan, dtype=dtype)
    for index, row in enumerate(rows):
        matrix[index, : len(row)] = row
    return matrix


def _remarks(name: str, broken: list[tuple[int, str]], resumed: list[int]) -> list[str]:
    remarks = []
    if broken:
        left_out = "it is" if len(broken) == 1 else f"{len(broken)} such lines are"
        remarks.append(f"L{_what(broken, name)[1:]}; {left_out} left out.")
    if resumed:
        steps = ", ".join(f"{step:,}" for step in resumed[:5])
        more = f" and {len(resumed) - 5} more" if len(resumed) > 5 else ""
        remarks.append(
            f"The run was resumed at step{'s' if len(resumed) > 1 else ''} {steps}{more}: of steps "
            "that were taken twice, the later lines count."
        )
    return remarks


def _what(broken: list[tuple[int, str]], name: str) -> str:
    number, reason = broken[0]
    return f"line {number} of {name} {reason}"
