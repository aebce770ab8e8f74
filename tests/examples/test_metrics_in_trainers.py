"""examples/lightning_metrics.py and examples/trainer_metrics.py, a few steps each.

Oracle: the number of steps that the trainer was asked for.
"""

from __future__ import annotations

import importlib
import json
import math
import warnings
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("library", "example"),
    [("lightning", "lightning_metrics"), ("transformers", "trainer_metrics")],
)
def test_one_line_logs_a_training(tmp_path: Path, library: str, example: str) -> None:
    # Their imports warn of what is not ours.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(library)
        if library == "transformers":
            pytest.importorskip("accelerate")
        importlib.import_module(example).main(str(tmp_path / "run.jsonl"), steps=20)

    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    for line in lines:
        assert 0 < line["loss"] < math.inf
        assert set(line["parameters"]) == {
            f"{prefix}{index}.{kind}"
            for prefix in ("" if library == "lightning" else "net.",)
            for index in (0, 2)
            for kind in ("weight", "bias")
        }
    assert lines[0]["param_norm"] != lines[1]["param_norm"]
