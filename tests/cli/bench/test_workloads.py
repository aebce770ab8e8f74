"""Workloads: the built-in ones and those of ``--shapes``.

The oracle of the built-in ones is their description on the results' page.
"""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from stepforge.cli import make_app
from stepforge.cli.bench.arrangements import COMPILED, PLAIN, SHARDED
from stepforge.cli.bench.implementations import OURS
from stepforge.cli.bench.measure import make_gradients
from stepforge.cli.bench.targets import TARGETS
from stepforge.cli.bench.workloads import DEFAULT_WORKLOADS, WORKLOADS, Workload, read_shapes


def test_workloads_are_those_of_the_targets():
    assert {workload for workload, _, _ in TARGETS} == set(WORKLOADS)
    counts = {name: (len(w.shapes), w.elements) for name, w in WORKLOADS.items()}
    assert counts["large"] == (1, 50_000_000)
    assert counts["small"] == (1000, 1_000_000)
    assert counts["model"][0] == 148
    assert counts["model"][1] == pytest.approx(45e6, rel=0.01)
    assert counts["tiny"] == (8, 8 * 64 * 32)
    assert counts["groups"] == counts["small"]
    assert counts["sharded"] == (144, 599_808)
    assert counts["compiled"] == (148, 162_752)


def test_workloads_are_stepped_as_described():
    plain = {name for name, workload in WORKLOADS.items() if workload.is_plain}
    assert plain == set(DEFAULT_WORKLOADS)
    forms = {name: workload.form for name, workload in WORKLOADS.items()}
    assert {name for name, form in forms.items() if form is not PLAIN} == {"sharded", "compiled"}
    assert (forms["sharded"], forms["compiled"]) == (SHARDED, COMPILED)
    assert [name for name, w in WORKLOADS.items() if w.is_arranged] == [
        "groups",
        "sharded",
        "compiled",
    ]
    assert {name: w.threads for name, w in WORKLOADS.items() if w.threads} == {"tiny": 1}
    assert WORKLOADS["tiny"].steps >= 50
    assert str(WORKLOADS["tiny"]) == "tiny: 8 tensors, 16,384 elements, on 1 thread"
    assert str(WORKLOADS["groups"]) == (
        "groups: 1,000 tensors, 1,000,000 elements, in 250 param groups"
    )
    assert str(WORKLOADS["large"]) == "large: 1 tensor, 50,000,000 elements"


def test_groups_of_four():
    workload = WORKLOADS["groups"].scaled(0.001)
    with workload.arranged() as arrangement:
        runner = OURS.start("Adam", make_gradients(workload.shapes), arrangement)
    groups = runner.optimizer.param_groups
    assert [len(group["params"]) for group in groups] == 250 * [4]
    assert len({group["lr"] for group in groups}) == 250


def test_threads_are_set_and_restored():
    torch.set_num_threads(2)
    with WORKLOADS["tiny"].arranged():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyboardInterrupt), WORKLOADS["tiny"].arranged():
        raise KeyboardInterrupt
    assert torch.get_num_threads() == 2
    with WORKLOADS["small"].arranged():
        assert torch.get_num_threads() == 2


def test_a_scaled_or_split_workload_is_stepped_alike():
    small = Workload("own", ((10, 3), (4,)), form=SHARDED, threads=3, steps=5)
    scaled = small.scaled(0.5)
    assert scaled == Workload("own x 0.5", ((5, 3), (2,)), form=SHARDED, threads=3, steps=5)
    split = small.split(2)
    assert split == Workload("own in groups", small.shapes, 2, SHARDED, 3, 5)


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
