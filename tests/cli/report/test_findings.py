"""Findings of runs that are made up, each with one thing wrong. Oracle: what was put into them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepforge.cli.report import findings
from stepforge.cli.report.findings import Finding, Severity, find, skipped_lines
from stepforge.cli.report.run import Run

LINES = 200
LAYERS = ("embed", "block.0", "block.1", "norm", "head")
DOCS = Path(__file__).parents[3] / "docs" / "report.md"


def schedule(lines: int = LINES) -> np.ndarray:
    """Return a warm-up over a tenth of the lines, and a cosine to zero."""
    rise = lines // 10
    position = np.arange(lines)
    falling = 0.5 + 0.5 * np.cos(np.pi * (position - rise) / (lines - 1 - rise))
    return 1e-3 * np.where(position < rise, (position + 1) / rise, falling)


def healthy(every: int = 1, **changes: Any) -> Run:
    """Return a run in which layers differ by a factor of 100, with noise and a schedule."""
    noise = np.exp(np.random.default_rng(0).normal(0, 0.3, (LINES, len(LAYERS))))
    scale = np.array([0.03, 1, 1, 3, 1])
    lr = schedule()
    ratios = lr[:, None] * scale * noise
    # Rounding swallows updates at both ends of the schedule.
    lost = np.clip(1e-3 / (lr[:, None] * 1e3 + 1e-9) * noise, 0, 1)
    parts: dict[str, Any] = {
        "name": "run.jsonl",
        "steps": every * np.arange(1, LINES + 1),
        "lr": lr[:, None],
        "metrics": {
            "loss": 2 / np.sqrt(np.arange(1, LINES + 1)),
            "grad_norm": noise[:, 0],
            "clip_factor": np.minimum(1, 1 / noise[:, 0]),
            "nonfinite": np.zeros(LINES),
            "skipped": np.zeros(LINES),
            "update_ratio": ratios.mean(axis=1),
            "lost": lost.mean(axis=1),
        },
        "layers": LAYERS,
        "by_layer": {
            "update_ratio": ratios,
            "update_norm": ratios * 30,
            "param_norm": np.full_like(ratios, 30.0),
            "lost": lost,
            "nonfinite": np.zeros_like(ratios),
        },
    }
    for name, change in changes.items():
        change(parts["metrics"] if name == "metrics" else parts["by_layer"])
    return Run(**parts)


def of_layers(change: Any, **options: Any) -> Run:
    return healthy(layers=change, **options)


def of_run(change: Any, **options: Any) -> Run:
    return healthy(metrics=change, **options)


def only(found: list[Finding]) -> Finding:
    assert len(found) == 1, found
    return found[0]


def test_nothing_is_said_of_a_healthy_run() -> None:
    assert find(healthy()) == []


def test_nothing_is_said_of_a_few_lines() -> None:
    run = Run("x", np.array([1]), np.array([[0.1]]), {"lost": np.array([1.0])})
    assert find(run) == []
    assert find(Run("x", np.array([1]), np.zeros((1, 0)))) == []


def test_a_layer_that_rounding_freezes() -> None:
    def freeze(layers: dict[str, np.ndarray]) -> None:
        layers["lost"][:, 2] = 0.998
        layers["update_ratio"][:, 2] = 0  # and it is not said to stall, too

    finding = only(find(of_layers(freeze)))
    assert (finding.severity, finding.kind) == (Severity.ERROR, "frozen by rounding")
    assert finding.layers == ("block.1",)
    assert "block.1 is frozen by rounding" in finding.sentence
    assert "99.8 %" in finding.sentence
    ((first, last),) = finding.steps
    assert 1 <= first < 10  # from a fifth of the highest rate on, in warm-up
    assert 140 < last < 170  # and in the decay


def test_a_model_that_rounding_freezes_without_layers() -> None:
    run = healthy()
    run = Run("x", run.steps, run.lr, {"lost": np.full(LINES, 0.97)})
    finding = only(find(run))
    assert finding.layers == ()
    assert finding.sentence.startswith("The model is frozen by rounding")


def test_updates_that_are_lost_while_a_layer_moves() -> None:
    finding = only(find(of_layers(lambda layers: layers["lost"][:, 1].fill(0.7))))
    assert (finding.severity, finding.layers) == (Severity.WARNING, ("block.0",))
    assert "70 %" in finding.sentence


def test_random_rounding_may_lose_most_updates() -> None:
    run = of_layers(lambda layers: layers["lost"].fill(0.97))
    assert len(find(run)) == 1
    assert find(Run(**{**vars(run), "is_stochastic": True})) == []


def test_many_layers_share_a_sentence() -> None:
    finding = only(find(of_layers(lambda layers: layers["lost"][:, :4].fill(0.99))))
    assert finding.layers == LAYERS[:4]
    assert finding.sentence.startswith("4 of 5 layers are frozen by rounding")


def test_a_layer_that_stalls() -> None:
    def stall(layers: dict[str, np.ndarray]) -> None:
        layers["update_ratio"][:, 3] *= 1e-5

    finding = only(find(of_layers(stall)))
    assert (finding.severity, finding.kind) == (Severity.WARNING, "stalled layer")
    assert finding.layers == ("norm",)
    (times,) = re.findall(r"1/([\d,]+) of the median layer's", finding.sentence)
    assert 20_000 < int(times.replace(",", "")) < 50_000  # it was three times the median


def test_a_layer_without_gradient() -> None:
    def cut_off(layers: dict[str, np.ndarray]) -> None:
        layers["grad_norm"] = np.ones((LINES, len(LAYERS)))
        layers["grad_norm"][:, 3] = layers["update_ratio"][:, 3] = 0

    finding = only(find(of_layers(cut_off)))
    assert "norm hardly moves: an update of 0, as its gradient is 0" in finding.sentence


def test_a_layer_with_a_small_learning_rate_does_not_stall() -> None:
    def slow(layers: dict[str, np.ndarray]) -> None:
        layers["lr"] = np.repeat(schedule()[:, None], len(LAYERS), axis=1)
        for name in ("update_ratio", "lr"):
            layers[name][:, 0] *= 1e-5

    assert find(of_layers(slow)) == []


def test_an_expert_that_steps_rarely_does_not_stall() -> None:
    def rarely(layers: dict[str, np.ndarray]) -> None:
        layers["update_ratio"][np.arange(LINES) % 5 > 0, 1] = 0

    assert find(of_layers(rarely)) == []


@pytest.mark.parametrize("every", [1, 10])
def test_a_layer_that_explodes(every: int) -> None:
    def explode(layers: dict[str, np.ndarray]) -> None:
        for name in ("update_ratio", "update_norm"):
            layers[name][120:130, 4] = 900 * layers[name][119, 4]

    finding = only(find(of_layers(explode, every=every)))
    assert (finding.severity, finding.kind) == (Severity.ERROR, "exploding ratio")
    assert finding.layers == ("head",)
    assert finding.steps == ((121 * every, 130 * every),)
    assert "head is exploding" in finding.sentence


def test_one_jump_is_a_warning_unless_weights_stay_large() -> None:
    def jump(layers: dict[str, np.ndarray]) -> None:
        for name in ("update_ratio", "update_norm"):
            layers[name][120, 4] *= 900

    def grow(layers: dict[str, np.ndarray]) -> None:
        jump(layers)
        layers["param_norm"][120:, 4] *= 20

    assert only(find(of_layers(jump))).severity is Severity.WARNING
    assert only(find(of_layers(grow))).severity is Severity.ERROR


def test_weights_that_pass_zero_do_not_explode() -> None:
    def pass_zero(layers: dict[str, np.ndarray]) -> None:
        layers["update_ratio"][120:130, 4] *= 900
        layers["param_norm"][120:130, 4] /= 900

    assert find(of_layers(pass_zero)) == []


def test_biases_that_begin_with_zero_do_not_explode() -> None:
    def from_zero(layers: dict[str, np.ndarray]) -> None:
        layers["update_ratio"][:, 1] = 1 / np.arange(1, LINES + 1)
        layers["update_ratio"][0, 1] = np.inf  # over a norm of zero
        layers["update_norm"][:, 1] = 1e-3
        layers["update_ratio"][60:63, 1] = 0.6  # high, but not higher than at the start
        layers["update_norm"][60:63, 1] = 0.1

    assert find(of_layers(from_zero)) == []


def test_skipped_steps_are_no_small_ones() -> None:
    """Or what follows them would be large beside them."""

    def skip(layers: dict[str, np.ndarray]) -> None:
        layers["update_ratio"][:, 4] = layers["update_norm"][:, 4] = 0.02
        layers["update_ratio"][60:64, 4] = layers["update_norm"][60:64, 4] = 0.17
        layers["lost"][:, 2] = 0.998
        for name in ("update_ratio", "update_norm", "lost"):
            layers[name][20:32] = 0

    def count(values: dict[str, np.ndarray]) -> None:
        values["skipped"][:] = np.clip(np.arange(LINES) - 19, 0, 12)

    frozen, skipped = sorted(find(of_layers(skip, metrics=count)), key=lambda found: found.kind)
    assert skipped.kind == "skipped steps"
    assert re.search(r"in (\d+) lines of \1,", frozen.sentence)


def test_updates_larger_than_weights_explode_without_growth() -> None:
    finding = only(find(of_layers(lambda layers: layers["update_ratio"][:, 4].fill(1.5))))
    assert "1.5 times its weight" in finding.sentence
    assert finding.severity is Severity.ERROR


def test_a_threshold_that_always_clips() -> None:
    finding = only(find(of_run(lambda values: values["clip_factor"].fill(0.04))))
    assert finding.kind == "clipped at every step"
    assert "100 of the last 100 lines, by a median factor of 0.04" in finding.sentence
    assert "25 times" in finding.advice
    assert find(of_run(lambda values: values["clip_factor"][:110].fill(0.04))) == []


def test_a_skipped_step_is_named_exactly_if_its_line_is_there() -> None:
    def nan_batch(values: dict[str, np.ndarray]) -> None:
        values["skipped"][49:] = 1
        values["nonfinite"][49] = 640
        values["loss"][49] = np.inf

    for every in (1, 10):
        finding = only(find(of_run(nan_batch, every=every)))
        assert finding.kind == "skipped steps"
        assert finding.steps == ((50 * every, 50 * every),)
        assert finding.severity is Severity.WARNING
        assert finding.sentence == (
            "1 step was skipped because gradients were not finite in 640 elements, and the loss "
            "was not finite either."
        )


def test_skipped_steps_between_lines_have_a_range() -> None:
    def some(values: dict[str, np.ndarray]) -> None:
        values["skipped"][49:] += 2
        values["skipped"][120:] += 1

    finding = only(find(of_run(some, every=10)))
    assert finding.steps == ((491, 500), (1201, 1210))
    assert finding.sentence.startswith("3 steps were skipped")


def test_many_skipped_steps_are_an_error() -> None:
    def many(values: dict[str, np.ndarray]) -> None:
        values["skipped"][:] = np.arange(LINES) // 5

    assert only(find(of_run(many))).severity is Severity.ERROR


def test_a_count_of_skipped_steps_may_begin_again() -> None:
    run = Run(
        "x",
        np.arange(6),
        np.zeros((6, 0)),
        {"skipped": np.array([2.0, 3, np.nan, 3, 1, 1])},
    )
    assert skipped_lines(run).tolist() == [2, 1, 0, 0, 1, 0]


def test_gradients_that_are_stepped_with_nan() -> None:
    def poison(values: dict[str, np.ndarray]) -> None:
        values["nonfinite"][50:] = 7
        values["param_norm"] = np.where(np.arange(LINES) > 50, np.inf, 1.0)

    found = find(of_run(poison))
    assert [finding.kind for finding in found] == ["gradients not finite", "weights not finite"]
    assert found[0].steps == ((51, 200),)
    assert found[1].steps == ((52, 200),)
    assert {finding.severity for finding in found} == {Severity.ERROR}


def test_errors_come_first() -> None:
    def both(layers: dict[str, np.ndarray]) -> None:
        layers["lost"][:, 0] = 0.7
        layers["lost"][:, 2] = 1

    assert [finding.severity for finding in find(of_layers(both))] == ["error", "warning"]


def test_the_page_of_docs_has_every_threshold() -> None:
    """Oracle: the module's constants."""
    text = DOCS.read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([A-Z_]+)` \| ([\d.e-]+) \|", text, re.MULTILINE))
    values = {
        name: value
        for name, value in vars(findings).items()
        if name.isupper() and not name.startswith("_")
    }
    assert {name: float(value) for name, value in told.items()} == values
