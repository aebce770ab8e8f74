"""Workloads: the built-in ones and those of ``--shapes``.

The oracle of the built-in ones is their description on the results' page.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from stepforge.cli import make_app
from stepforge.cli.bench.arrangements import (
    CAPTURED,
    CLIPPED,
    COMPILED,
    FUSED,
    MEASURED,
    PLAIN,
    SHARDED,
)
from stepforge.cli.bench.formats import has_int8_states
from stepforge.cli.bench.implementations import OURS
from stepforge.cli.bench.measure import make_gradients
from stepforge.cli.bench.targets import TARGETS
from stepforge.cli.bench.workloads import (
    DEFAULT_WORKLOADS,
    GPU_WORKLOADS,
    PARAM_SIZE,
    WORKLOADS,
    Workload,
    read_shapes,
)


def test_workloads_are_those_of_the_targets_and_those_of_a_gpu():
    with_targets = {workload for workload, _, _ in TARGETS}
    assert with_targets | set(GPU_WORKLOADS) == set(WORKLOADS)
    controlled = {"clipped", "clipped-large", "metrics", "metrics-large"}
    assert with_targets & set(GPU_WORKLOADS) == {*DEFAULT_WORKLOADS, *controlled}
    counts = {name: (len(w.shapes), w.elements) for name, w in WORKLOADS.items()}
    assert counts["large"] == (1, 50_000_000)
    assert counts["small"] == (1000, 1_000_000)
    assert counts["model"][0] == 148
    assert counts["model"][1] == pytest.approx(45e6, rel=0.01)
    assert counts["tiny"] == (8, 8 * 64 * 32)
    assert counts["groups"] == counts["small"]
    assert counts["sharded"] == (144, 599_808)
    assert counts["compiled"] == (148, 162_752)
    assert counts["bfloat16"] == counts["zeros"] == counts["denormals"] == counts["large"]
    assert counts["convolution"] == (1, 49_996_800)
    assert counts["fused"] == counts["captured"] == counts["clipped"] == counts["small"]
    assert counts["clipped-large"] == counts["metrics-large"] == counts["large"]
    assert counts["metrics"] == counts["small"]
    assert counts["metrics-tiny"] == counts["tiny"]


def test_workloads_are_stepped_as_described():
    plain = {name for name, workload in WORKLOADS.items() if workload.is_plain}
    assert plain == {*DEFAULT_WORKLOADS, "convolution"}
    forms = {name: w.form for name, w in WORKLOADS.items() if w.form is not PLAIN}
    assert forms == {
        "sharded": SHARDED,
        "compiled": COMPILED,
        "fused": FUSED,
        "captured": CAPTURED,
        "clipped": CLIPPED,
        "clipped-large": CLIPPED,
        "metrics": MEASURED,
        "metrics-large": MEASURED,
        "metrics-tiny": MEASURED,
    }
    assert {name for name, w in WORKLOADS.items() if w.is_arranged} == {"groups", *forms}
    dtypes = {name: w.dtype for name, w in WORKLOADS.items() if w.dtype != torch.float32}
    assert dtypes == {"bfloat16": torch.bfloat16}
    sizes = {n: w.gradient_size for n, w in WORKLOADS.items() if w.gradient_size != PARAM_SIZE}
    assert sizes == {"zeros": 0.0, "denormals": 1e-20}
    assert {name: w.threads for name, w in WORKLOADS.items() if w.threads} == {
        "tiny": 1,
        "metrics-tiny": 1,
    }
    assert WORKLOADS["tiny"].steps >= 50
    assert str(WORKLOADS["tiny"]) == "tiny: 8 tensors, 16,384 elements, on 1 thread"
    assert str(WORKLOADS["groups"]) == (
        "groups: 1,000 tensors, 1,000,000 elements, in 250 param groups"
    )
    assert str(WORKLOADS["large"]) == "large: 1 tensor, 50,000,000 elements"
    assert str(WORKLOADS["bfloat16"]) == "bfloat16: 1 tensor, 50,000,000 elements, bfloat16"
    assert str(WORKLOADS["denormals"]) == (
        "denormals: 1 tensor, 50,000,000 elements, gradients of size 1e-20"
    )
    assert str(WORKLOADS["fused"]) == "fused: 1,000 tensors, 1,000,000 elements, fused=True"


def test_a_convolutions_rows_are_no_multiple_of_128_and_have_int8_states():
    """Oracle: a convolution of 64 channels in windows of 3 x 3; the whole path of int8 kernels."""
    ((_, *row),) = WORKLOADS["convolution"].shapes
    assert math.prod(row) == 64 * 3 * 3
    assert math.prod(row) % 128
    assert has_int8_states(WORKLOADS["convolution"].scaled(0.001))


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
    small = Workload("own", ((10, 3), (4,)), 1, SHARDED, 3, 5, torch.bfloat16, 0.5)
    rest = small.form, small.threads, small.steps, small.dtype, small.gradient_size
    assert small.scaled(0.5) == Workload("own x 0.5", ((5, 3), (2,)), 1, *rest)
    assert small.split(2) == Workload("own in groups", small.shapes, 2, *rest)


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
