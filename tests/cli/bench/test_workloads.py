"""Workloads: the built-in ones and those of ``--shapes``."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from stepforge.cli import make_app
from stepforge.cli.bench.targets import TARGETS
from stepforge.cli.bench.workloads import WORKLOADS, read_shapes


def test_workloads_are_those_of_the_targets():
    assert {workload for workload, _ in TARGETS} == set(WORKLOADS)
    counts = {name: (len(w.shapes), w.elements) for name, w in WORKLOADS.items()}
    assert counts["large"] == (1, 50_000_000)
    assert counts["small"] == (1000, 1_000_000)
    assert counts["model"][0] == 148
    assert counts["model"][1] == pytest.approx(45e6, rel=0.01)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([[2, 3], []], {"own": ((2, 3), ())}),
        ({"layer.weight": [4, 2], "layer.bias": [4], "scale": []}, {"own": ((4, 2), (4,), ())}),
        ({"one": [[2]], "two": [[3], [4]]}, {"one": ((2,),), "two": ((3,), (4,))}),
    ],
)
def test_shapes_files(tmp_path, content, expected):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    assert {w.name: w.shapes for w in read_shapes(path)} == expected


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[[2, 3", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ("[]", "own is []; it must be a list of shapes such as [[512, 64], [64]]"),
        ("{}", "own is {}; it must be a list of shapes"),
        ("7", "own is 7; it must be a list of shapes"),
        ('{"a": [[2]], "b": 3}', "b is 3; it must be a list of shapes"),
        ("[[2], [0]]", "own has the shape [0]; a shape is a list of whole numbers from 1 up"),
        ("[[2], [-1]]", "own has the shape [-1]"),
        ("[[2.5]]", "own has the shape [2.5]"),
        ("[[true]]", "own has the shape [true]"),
        ('["4x4"]', 'own has the shape "4x4"'),
        ("[4, 4]", "own has the shape 4; a shape is a list"),
        ('{"small": [[2]]}', "small is the name of a workload of this program"),
        (None, "cannot be read"),
    ],
)
def test_bad_shapes_files_get_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "own.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = CliRunner().invoke(make_app(), ["bench", "--shapes", str(path)])
    assert result.exit_code == 2
    last = result.output.splitlines()[-1]
    assert "--shapes" in last
    assert sentence in last
    assert last.endswith(".")
