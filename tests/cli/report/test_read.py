"""Files of metrics as they come. Oracle: the numbers written into them by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from stepforge.cli.report.read import UnreadableError, read, read_lines


def lines(*records: object) -> list[str]:
    return [json.dumps(record) for record in records]


def test_numbers_come_in_their_places() -> None:
    run = read_lines(
        lines(
            {"step": 1, "loss": 2, "lr": [0.1], "parameters": {"a": {"lost": 0.5}}},
            {"step": 3, "lr": [0.2, 0.3], "parameters": {"b": {"lost": 1, "update_ratio": 0.25}}},
            {"step": 5, "loss": None, "mine": "text", "parameters": {}},
        ),
        name="x",
    )
    assert run.steps.tolist() == [1, 3, 5]
    nan = math.nan
    np.testing.assert_array_equal(run.metrics["loss"], [2, nan, math.inf])
    np.testing.assert_array_equal(run.lr, [[0.1, nan], [0.2, 0.3], [nan, nan]])
    assert run.layers == ("a", "b")
    np.testing.assert_array_equal(run.by_layer["lost"], [[0.5, nan], [nan, 1], [nan, nan]])
    np.testing.assert_array_equal(
        run.by_layer["update_ratio"], [[nan, nan], [nan, 0.25], [nan] * 2]
    )
    assert run.metrics.keys() == {"loss"}
    assert run.remarks == ()


def test_later_lines_count_after_a_resume() -> None:
    records = [{"step": step, "loss": i} for i, step in enumerate([1, 2, 3, 4, 3, 4, 5])]
    run = read_lines(lines(*records), name="x")
    assert run.steps.tolist() == [1, 2, 3, 4, 5]
    assert run.metrics["loss"].tolist() == [0, 1, 4, 5, 6]
    assert run.resumed == (3,)
    assert run.remarks == (
        "The run was resumed at step 3: of steps that were taken twice, the later lines count.",
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"step": 2, "lo', "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"loss": 1}', "has no step"),
        ('{"step": true}', "has no step"),
        ('{"step": 1e400}', "has no step"),
        ('{"step": 2, "loss": "low"}', "has no number for loss"),
        ('{"step": 2, "lr": ["x"]}', "has no number for lr"),
        ('{"step": 2, "parameters": [1]}', "has no object for parameters"),
        ('{"step": 2, "parameters": {"w": 1}}', "has no object for w"),
        ('{"step": 2, "parameters": {"w": {"lost": []}}}', "has no number for lost of w"),
        ("[" * 100_000, "is nested too deeply"),
    ],
)
def test_a_broken_line_is_named_and_left_out(text: str, reason: str) -> None:
    good = '{"step": 1, "parameters": {"w": {"lost": 0}}}'
    run = read_lines([good, "", text, '{"step": 9}'], name="run.jsonl")
    assert run.steps.tolist() == [1, 9]
    assert run.remarks == (f"Line 3 of run.jsonl {reason}; it is left out.",)
    with pytest.raises(UnreadableError, match=f"x has no metrics: line 1 of x {reason}"):
        read_lines([text], name="x")


def test_many_broken_lines_get_one_sentence() -> None:
    run = read_lines(['{"step": 1}', "?", "?", "?"], name="x")
    assert run.remarks == ("Line 2 of x is not JSON; 3 such lines are left out.",)


def test_an_empty_file_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("\n")
    with pytest.raises(UnreadableError, match=r"run.jsonl has no metrics, it is empty\.$"):
        read(path)


def test_bytes_that_are_no_text_are_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\x00\n')
    assert read(path).remarks == (f"Line 2 of {path} is not JSON; it is left out.",)
