"""experiments/low_precision in miniature, and the figures of docs/low-precision.md.

Oracles: averages in float64; the example's own run; errors derived from the spacing of codes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import stepforge
from experiments.low_precision import __main__ as script
from experiments.low_precision import memory, page, pictures, stall, tracking, training
from experiments.low_precision.candidates import (
    BFLOAT16,
    CHOSEN,
    NEAREST,
    RANDOM,
    SIGNED,
    UNSIGNED,
    Candidate,
    candidates,
)
from experiments.low_precision.errors import KINDS, measure, moments
from experiments.low_precision.tracking import Track
from experiments.low_precision.training import (
    AT_RANDOM,
    BITS_24,
    BITS_32,
    DIGITS,
    EXPERIMENTS,
    FLOAT32,
    INT8,
    LANGUAGE,
    OPTIMIZERS,
    PLAIN,
    SMALL_RATE,
    SMALLEST,
    Digits,
    LanguageModel,
    LowPrecisionRun,
    Precision,
    language_model,
    load,
)
from stepforge.accounting import account
from stepforge.formats import BLOCK, random_uint32


def named(unsigned: bool, *names: str) -> list[Candidate]:
    by_name = {candidate.name: candidate for candidate in candidates(unsigned)}
    return [by_name[name] for name in names]


def random_u32(shape: torch.Size) -> torch.Tensor:
    return random_uint32(shape, 0, 12345, torch.device("cpu"))


# Storing once. ------------------------------------------------------------------------------------


@pytest.mark.parametrize("decades", [1, 6, 30])
def test_a_second_moment_never_becomes_zero(decades: int) -> None:
    generator = torch.Generator().manual_seed(decades)
    v = 10 ** (-decades * torch.rand(50, BLOCK, generator=generator, dtype=torch.float64))
    ours = [c for c in candidates(unsigned=True) if c.chosen]

    assert len(ours) == 2
    assert all((c.store(v, random_u32(v.shape)) > 0).all() for c in ours)


def test_rounding_alone_would_make_second_moments_zero() -> None:
    found = {c.name: e for c, e in measure(True, 20)}
    extreme = [kind.name for kind in KINDS].index("extreme")

    assert found[f"linear, {NEAREST}"][extreme].lost > 0.5
    assert found[f"dynamic map, {NEAREST}"][extreme].lost > 0.2
    assert found[f"{CHOSEN}, {RANDOM}"][extreme].lost == 0


@pytest.mark.parametrize("kind", KINDS[:2], ids=lambda kind: kind.name)
def test_errors_are_those_of_the_width_of_codes(kind: object) -> None:
    (signed,) = named(False, f"{CHOSEN}, {NEAREST}")
    (unsigned,) = named(True, f"{CHOSEN}, {RANDOM}")
    m, v = moments(kind, (100, BLOCK), 0)  # type: ignore[arg-type]
    reached = m.abs() > 2.0**-13 * m.abs().amax(1, keepdim=True)

    # Three bits of fraction: neighboring codes differ by an eighth at most.
    of_m = (signed.store(m, random_u32(m.shape)) / m - 1).abs()[reached]
    of_v = (unsigned.store(v, random_u32(v.shape)) / v - 1).abs()
    assert of_m.max() <= 1 / 16
    assert of_v.max() <= 1 / 8


@pytest.mark.parametrize("curve", [*SIGNED.values(), *UNSIGNED.values()])
def test_a_candidate_has_as_many_codes_as_a_byte(curve: torch.Tensor) -> None:
    assert len(curve) in (128, 129, 256)  # 129: this dynamic map has a -1 too
    assert (curve.diff() > 0).all()
    assert (curve[0], curve[-1]) == (0, 1)


# Storing after every step. ------------------------------------------------------------------------

ELEMENTS = 256


def stream_named(name: str) -> tracking.Stream:
    return next(stream for stream in tracking.STREAMS if stream.name == name)


def tracked(stream: str, steps: int, only: list[Candidate]) -> dict[str, Track]:
    """Return the tracks of second moments, by candidate."""
    tracks = tracking.measure(stream_named(stream), steps, ELEMENTS, unsigned=True, only=only)
    return {track.candidate.name: track for track in tracks}


def last(track: Track) -> float:
    """Return the final root mean square error."""
    return track.errors[-1][1]


def test_no_curve_of_8_bits_follows_when_rounded_to_nearest() -> None:
    others = [c for c in candidates(unsigned=True) if c.rounding == NEAREST and c.curve != BFLOAT16]
    tracks = tracked("drifting", 700, [*others, *named(True, f"{CHOSEN}, {RANDOM}")])
    ours = last(tracks.pop(f"{CHOSEN}, {RANDOM}"))

    # 0.11 follows from the spacing of its codes.
    assert ours < 0.16
    assert len(tracks) == len(UNSIGNED) + 1
    assert all(last(track) > 3 * ours for track in tracks.values())


def test_bfloat16_follows_only_when_rounded_at_random() -> None:
    names = f"{BFLOAT16}, {NEAREST}", f"{BFLOAT16}, {RANDOM}"
    nearest, at_random = tracked("fading", 1200, named(True, *names)).values()

    # Squares shrink a hundredfold in 720 steps, in which an average can lose half of its value: an
    # error of log(2) / 2, which is 0.35.
    assert nearest.biases[-1][1] > 0.15
    assert abs(at_random.biases[-1][1]) < 0.01
    assert 5 * last(at_random) < last(nearest)


def test_noise_is_what_the_width_of_steps_says() -> None:
    steady = tracking.STREAMS[0]
    (track,) = tracking.measure(
        steady, 2000, 512, unsigned=True, only=named(True, f"{CHOSEN}, {RANDOM}")
    )

    # Codes are a 16th to an 8th apart, so the derivation on the page gives 0.09 to 0.125.
    assert 0.07 < last(track) < 0.14


@pytest.mark.parametrize(
    ("stream", "other"),
    [("extreme", f"{CHOSEN}, {RANDOM}"), ("drifting", f"linear, {NEAREST}")],
)
def test_a_first_moment_follows_when_rounded_to_nearest(stream: str, other: str) -> None:
    pair = named(False, f"{CHOSEN}, {NEAREST}", other)

    ours, theirs = tracking.measure(stream_named(stream), 600, ELEMENTS, unsigned=False, only=pair)

    assert 2 * ours.error < theirs.error


# Weights. -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stalled() -> dict[str, dict[str, float]]:
    return stall.measure(100)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_plain_bfloat16_weights_do_not_move(
    stalled: dict[str, dict[str, float]], optimizer: str
) -> None:
    assert stalled[PLAIN.name][optimizer] == 1.0
    assert stalled[stall.TORCH.name][optimizer] == 1.0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "precision", [BITS_24, BITS_32, AT_RANDOM], ids=lambda precision: precision.name
)
def test_other_weights_of_16_bits_do(
    stalled: dict[str, dict[str, float]], precision: Precision, optimizer: str
) -> None:
    reference = stalled[FLOAT32.name][optimizer]

    assert reference < 0.99
    # Weights are rounded to bfloat16: half of 2**-8, its spacing below 1.
    assert stalled[precision.name][optimizer] == pytest.approx(reference, abs=2.0**-9)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bytes_are_those_that_the_guide_gives(optimizer: str) -> None:
    moments_of_rule = 1 if optimizer == "Adagrad" else 2

    int8, smallest = (
        memory.measure(optimizer, precision, (256, 256)) for precision in (INT8, SMALLEST)
    )

    # One byte per code, four per scale of 128. Scalar states such as the step count add 4 or 8
    # bytes in all, which the tolerance allows for.
    assert int8["state"] == pytest.approx(moments_of_rule * (1 + 4 / 128), abs=1e-3)
    assert smallest["total"] == pytest.approx(int8["state"] + 5, abs=1e-3)
    assert smallest["total"] < 7.1


def jobs() -> list[tuple[str, float]]:
    """Return the options and the bytes of each row of the guide's table of jobs."""
    text = page.PAGE.read_text(encoding="utf-8")
    (table,) = re.findall(r"\| job \| options \| bytes \|\n.*\n((?:\|.*\n)+)", text)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    return [(options, float(size)) for _, options, size in rows]


@pytest.mark.parametrize(("options", "size"), jobs(), ids=lambda x: str(x))
def test_the_guide_has_the_bytes_of_the_options_that_it_recommends(
    options: str, size: float
) -> None:
    """Oracle: the account of a large matrix; the guide rounds to two decimals."""
    given = {
        name: int(value) if value.isdigit() else value == "True" or value.strip('"')
        for name, value in re.findall(r"`(\w+)=([^`]+)`", options)
    }
    dtype = torch.float32 if "weights in float32" in options else torch.bfloat16
    p = torch.empty(4096, 4096, dtype=dtype, device="meta")
    optimizer = stepforge.AdamW([p], **given)

    counted = account(optimizer.rule, optimizer.param_groups[0], p)

    assert counted.total / counted.elements == pytest.approx(size, abs=0.005)


# Training. ----------------------------------------------------------------------------------------

TINY = language_model.Config(
    steps=60, warmup=6, batch=4, context=16, width=64, depth=1, heads=2, lr=1e-4,
    validate_every=30, validation_batches=4,
)  # fmt: skip


def test_a_run_that_stores_float32_is_the_examples_own() -> None:
    config = dataclasses.replace(TINY, steps=5)
    run = LowPrecisionRun(config, torch.float32)
    for _ in range(config.steps):
        run.step()

    assert run.curve == language_model.train(config).curve


def test_plain_bfloat16_stalls_at_a_small_learning_rate_and_24_bits_do_not() -> None:
    experiment = LanguageModel("", dataclasses.replace(TINY, lr=3e-5))
    final = {
        precision.name: experiment.run("AdamW", precision.name, 0)[0].final
        for precision in (FLOAT32, BITS_24, PLAIN)
    }
    learned = 8 - final[FLOAT32.name]  # in bits; an untrained model needs 8 per byte

    assert learned > 0.2
    assert abs(final[BITS_24.name] - final[FLOAT32.name]) < 0.02 * learned
    assert final[PLAIN.name] - final[FLOAT32.name] > 0.2 * learned


def test_int8_learns_as_float32_does() -> None:
    experiment = LanguageModel("", dataclasses.replace(TINY, lr=3e-3))
    final = {
        precision.name: experiment.run("AdamW", precision.name, 0)[0].final
        for precision in (FLOAT32, INT8)
    }

    assert final[FLOAT32.name] < 6
    # Seeds differ by 0.1 bits after so few steps.
    assert final[INT8.name] == pytest.approx(final[FLOAT32.name], abs=0.1)


def test_most_of_the_model_has_codes() -> None:
    assert training.coded_share(LANGUAGE.config) > 0.98


def test_missing_runs_are_trained_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    one = Digits(epochs=1, optimizers=("Adam",), seeds=(0,))
    known = {key: run for key, run in load().items() if key[0] == SMALL_RATE.name}
    training.save(known, path)

    trained = training.train_missing(1, {"digits": one, SMALL_RATE.name: SMALL_RATE}, path)

    assert trained.keys() - known.keys() == {("digits", "Adam", a.name, 0) for a in one.precisions}
    assert load(path) == trained


# The page. ----------------------------------------------------------------------------------------


def test_the_results_are_complete_and_as_long_as_the_page_says() -> None:
    outcomes = load()
    expected = {key for e in EXPERIMENTS.values() for key in e.expected()}

    assert expected <= outcomes.keys()
    for key, outcome in outcomes.items():
        experiment = EXPERIMENTS[key[0]]
        end = experiment.epochs if isinstance(experiment, Digits) else experiment.config.steps
        assert outcome.curve[-1][0] == end
        assert all(math.isfinite(value) for _, value in outcome.curve)


@pytest.mark.parametrize("experiment", [LANGUAGE, DIGITS], ids=lambda e: e.name)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_int8_moments_are_within_the_spread_of_float32(
    experiment: LanguageModel | Digits, optimizer: str
) -> None:
    outcomes = load()
    mean = torch.tensor(page.differences(outcomes, experiment, optimizer, INT8)).mean()

    assert abs(mean) <= page.spread(outcomes, experiment, optimizer)


@pytest.fixture(scope="module")
def tracks() -> tuple[dict[str, Sequence[Track]], dict[str, Sequence[Track]]]:
    first, second = (script.tracks(unsigned, 350, BLOCK) for unsigned in (False, True))
    return first, second


def test_the_page_can_be_written_and_has_the_results(
    tracks: tuple[dict[str, Sequence[Track]], dict[str, Sequence[Track]]],
) -> None:
    made = script.tables(*tracks, load(), blocks=2, stall_steps=2)
    text = page.PAGE.read_text(encoding="utf-8")
    written = page.filled(text, made)

    assert not any(re.search(r"\b(nan|inf)\b", table) for table in made.values())
    assert all(table in written for table in made.values())
    # These parts do not depend on the sizes of the measurements.
    for name in ("memory", "language model", "verdict", "digits", "small learning rate"):
        assert made[name] in text


def test_a_table_without_a_place_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"places for \['memory'\], not for \['other'\]"):
        page.filled("<!-- memory -->\n<!-- end of memory -->", {"other": ""})


def test_pictures_can_be_drawn(
    tracks: tuple[dict[str, Sequence[Track]], dict[str, Sequence[Track]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    drawn = [
        pictures.round_trip(),
        pictures.tracking(tracks[1]),
        pictures.training(load(), LANGUAGE),
        pictures.small_rate(load(), SMALL_RATE),
    ]
    text = page.PAGE.read_text(encoding="utf-8")

    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"pictures/{path.name}" in text
