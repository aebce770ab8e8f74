"""The pictures of docs/low-precision.md, with a background of their own to suit any page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from experiments.low_precision.candidates import (
    BFLOAT16,
    CHOSEN,
    NEAREST,
    RANDOM,
    Candidate,
    candidates,
)
from experiments.low_precision.tracking import Track
from experiments.low_precision.training import (
    AT_RANDOM,
    BITS_24,
    FLOAT32,
    INT8,
    PLAIN,
    SMALLEST,
    LanguageModel,
    Outcome,
)
from stepforge.formats import BLOCK, random_uint32

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = Path(__file__).parents[2] / "docs" / "pictures"

_PAPER, _INK, _GRID = "#fbfbf9", "#3d4248", "#dcdcd6"
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#1f5fa8", "#d9730d", "#2a8c5a", "#b3262e", "#8a8f96"
_PARAMETERS: dict[Any, Any] = {
    "font.size": 9,
    "figure.facecolor": _PAPER,
    "axes.facecolor": _PAPER,
    "savefig.facecolor": _PAPER,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def _draw(name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> Path:
    import matplotlib
    from matplotlib.figure import Figure

    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.png"
    with matplotlib.rc_context(_PARAMETERS):
        figure = Figure(figsize=size)
        draw(figure)
        figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


# Storing once. ------------------------------------------------------------------------------------

_CURVES = {"linear": _GREY, "fourth root": _GREEN, "dynamic map": _ORANGE, CHOSEN: _BLUE}


def round_trip() -> Path:
    """Draw the error of values by their distance below the largest of their block."""
    octaves = torch.linspace(0, 40, 4000, dtype=torch.float64)

    def panel(axes: Axes, unsigned: bool) -> None:
        for curve, color in _CURVES.items():
            candidate = _candidate(unsigned, curve)
            axes.plot(octaves, _envelope(_errors(candidate, octaves)), color=color, label=curve)
        axes.set_title("second moments" if unsigned else "first moments")
        axes.set_yscale("log")
        axes.set_ylim(1e-3, 1.5)
        axes.set_xlim(0, 40 if unsigned else 20)
        axes.set_xticks(range(0, 41 if unsigned else 21, 10 if unsigned else 5))
        axes.set_xlabel("octaves below the largest of the block")

    def draw(figure: Figure) -> None:
        signed, unsigned = figure.subplots(1, 2, sharey=True)
        panel(signed, unsigned=False)
        panel(unsigned, unsigned=True)
        signed.set_ylabel("largest relative error of the number")
        signed.legend(loc="lower right")

    return _draw("low-precision-round-trip", (8.4, 3.1), draw)


def _candidate(unsigned: bool, curve: str) -> Candidate:
    """Return the library's candidate for a curve, or else the one that rounds to nearest."""
    found = [c for c in candidates(unsigned) if c.curve == curve]
    return next((c for c in found if c.chosen), found[0])


def _errors(candidate: Candidate, octaves: Tensor) -> Tensor:
    """Return the relative error of single values, each in a block with a 1."""
    blocks = torch.zeros(len(octaves), BLOCK, dtype=torch.float64)
    blocks[:, 0], blocks[:, 1] = 1.0, 2.0**-octaves
    random_bits = random_uint32(blocks.shape, 0, 1, torch.device("cpu"))
    return (candidate.store(blocks, random_bits)[:, 1] / blocks[:, 1] - 1).abs()


def _envelope(errors: Tensor, width: int = 120) -> Tensor:
    """Return the largest error nearby."""
    padded = torch.nn.functional.pad(errors, (width, width))
    return padded.unfold(0, 2 * width + 1, 1).amax(1)


# Storing after every step. ------------------------------------------------------------------------

_TRACKED = {
    f"{BFLOAT16}, {NEAREST}": (_GREY, "--"),
    f"fourth root, {NEAREST}": (_GREEN, "--"),
    f"dynamic map, {NEAREST}": (_ORANGE, "--"),
    f"{CHOSEN}, {NEAREST}": (_BLUE, "--"),
    f"{CHOSEN}, {RANDOM}": (_BLUE, "-"),
    f"{BFLOAT16}, {RANDOM}": (_GREY, "-"),
}


def tracking(tracks: Mapping[str, Sequence[Track]]) -> Path:
    """Draw the error of the root of a second moment over a run.

    Args:
        tracks: the tracks of all candidates, by the name of the stream.
    """

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(tracks), sharey=True)
        for axes, (stream, found) in zip(panels, tracks.items(), strict=True):
            by_name = {track.candidate.name: track for track in found}
            for name, (color, style) in _TRACKED.items():
                steps, errors = zip(*by_name[name].errors)
                axes.plot(steps, errors, color=color, linestyle=style, label=name)
            axes.set_title(stream)
            axes.set_yscale("log")
            axes.set_ylim(5e-3, 3)
            axes.set_xlabel("steps")
        panels[0].set_ylabel("error of log √v (root mean square)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)

    return _draw("low-precision-tracking", (8.4, 3.8), draw)


# Training. ----------------------------------------------------------------------------------------

_SHOWN = {
    FLOAT32.name: ("#000000", "-"),
    INT8.name: (_BLUE, "-"),
    SMALLEST.name: (_ORANGE, "-"),
    PLAIN.name: (_RED, ":"),
}


def training(outcomes: Mapping[Any, Outcome], experiment: LanguageModel) -> Path:
    """Draw the loss of each optimizer, and below it the difference from the run in float32."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(
            2, len(experiment.optimizers), sharex=True, sharey="row", height_ratios=(3, 2)
        )
        for (loss, difference), optimizer in zip(panels.T, experiment.optimizers, strict=True):
            reference = _losses(outcomes, experiment, optimizer, FLOAT32.name)
            steps = _steps(outcomes, experiment, optimizer)
            mean = reference.mean(0)
            spread = reference - mean
            difference.fill_between(
                steps, spread.amin(0), spread.amax(0), color=_GRID, label="seeds of float32"
            )
            for precision, (color, style) in _SHOWN.items():
                losses = _losses(outcomes, experiment, optimizer, precision)
                line = {"color": color, "linestyle": style, "linewidth": 1.2}
                loss.plot(steps, losses.mean(0), label=precision, **line)
                if precision != FLOAT32.name:
                    difference.plot(steps, (losses - reference).mean(0), **line)
            loss.set_title(optimizer)
            difference.set_xlabel("steps")
            difference.set_ylim(-0.06, 0.06)
        panels[0, 0].set_ylabel("validation loss\n(bits per byte)")
        panels[1, 0].set_ylabel("difference\nfrom float32")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        band, name = panels[1, 0].get_legend_handles_labels()
        figure.legend(handles + band, labels + name, loc="outside lower center", ncols=3)

    return _draw("low-precision-training", (9.6, 4.4), draw)


_AT_SMALL_RATE = {
    FLOAT32.name: ("#000000", "-"),
    BITS_24.name: (_BLUE, "--"),
    AT_RANDOM.name: (_GREEN, ":"),
    PLAIN.name: (_RED, "-"),
}


def small_rate(outcomes: Mapping[Any, Outcome], experiment: LanguageModel) -> Path:
    """Draw the loss with a learning rate that is small next to a bfloat16's last bit."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for precision, (color, style) in _AT_SMALL_RATE.items():
            for index, seed in enumerate(experiment.seeds):
                curve = outcomes[experiment.name, experiment.optimizers[0], precision, seed].curve
                axes.plot(
                    *zip(*curve), color=color, linestyle=style, linewidth=1.3,
                    label=None if index else precision,
                )  # fmt: skip
        axes.set_xlabel("steps")
        axes.set_ylabel("validation loss (bits per byte)")
        axes.legend()

    return _draw("low-precision-small-rate", (6.2, 3.2), draw)


def _losses(
    outcomes: Mapping[Any, Outcome], experiment: LanguageModel, optimizer: str, precision: str
) -> Tensor:
    """Return the validation losses, of shape (seeds, validations)."""
    curves = [
        [value for _, value in outcomes[experiment.name, optimizer, precision, seed].curve]
        for seed in experiment.seeds
    ]
    return torch.tensor(curves, dtype=torch.float64)


def _steps(outcomes: Mapping[Any, Outcome], experiment: LanguageModel, optimizer: str) -> list[int]:
    first = outcomes[experiment.name, optimizer, FLOAT32.name, experiment.seeds[0]]
    return [step for step, _ in first.curve]
