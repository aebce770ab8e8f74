"""The benchmark: what it measures, what it concludes, and what it says of bad input.

Its times are never judged here; ratios are, of times made by hand.
"""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import stepforge
from stepforge.backends.native.build import BuildError
from stepforge.cli import bounds, make_app, measure, probe
from stepforge.cli.measure import ACCESS, ARMS, LIMIT, OPTIMIZERS, OURS, TORCH
from stepforge.cli.scores import TARGETS, Ratios, Result
from stepforge.cli.stored import STORED, has_codes
from stepforge.cli.workloads import WORKLOADS, read_shapes

WITHOUT_FUSED = [arm.name for arm in ARMS if arm.name != "torch fused"]
NEEDS_PROC = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """The command sets the process's number of threads; the tests ask for no backend."""
    monkeypatch.delenv("STEPFORGE_BACKEND", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(make_app(), ["bench", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def report_of(tmp_path: Path, *arguments: object) -> dict:
    output = tmp_path / "bench.json"
    run(*arguments, "--threads", 1, "--json", output)
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.fixture
def few(tmp_path: Path) -> Path:
    path = tmp_path / "few.json"
    path.write_text("[[4, 3], [], [70000]]")
    return path


# What is measured. --------------------------------------------------------------------------------


def test_workloads_are_those_of_the_targets():
    assert {workload for workload, _ in TARGETS} == set(WORKLOADS)
    counts = {name: (len(w.shapes), w.elements) for name, w in WORKLOADS.items()}
    assert counts["large"] == (1, 50_000_000)
    assert counts["small"] == (1000, 1_000_000)
    assert counts["model"][0] == 148
    assert counts["model"][1] == pytest.approx(45e6, rel=0.01)


def test_every_arm_of_every_optimizer_that_has_it():
    assert len({arm.name for arm in ARMS}) == len(ARMS)
    for name in OPTIMIZERS:
        arms = {arm.name for arm in ARMS if arm.exists(name)}
        assert arms - {"torch fused"} == set(WITHOUT_FUSED)
        assert ("torch fused" in arms) == (name in ("Adagrad", "Adam", "AdamW"))


@pytest.mark.parametrize(
    "arm", [arm for arm in ARMS if arm.bound is None], ids=lambda arm: arm.name
)
def test_an_arm_steps_its_own_copies_on_fresh_gradients(arm):
    """Oracle: the same optimizer, written out."""
    gradients = measure.make_gradients([(3, 2), (4,)])
    before = [gradient.clone() for gradient in gradients]
    stepper = arm.start("Adam", gradients)
    params = [gradient.clone() for gradient in gradients]
    optimizer = torch.optim.Adam(params)
    seen = set()
    for _ in range(2):
        stepper.feed(gradients)
        stepper.step()
        seen |= {id(p.grad) for p in stepper.params} | {p.grad.data_ptr() for p in stepper.params}
        for p, gradient in zip(params, gradients):
            p.grad = gradient.clone()
        optimizer.step()
    for ours, p, gradient, original in zip(stepper.params, params, gradients, before):
        torch.testing.assert_close(ours, p)
        assert torch.equal(gradient, original)
        assert gradient.data_ptr() not in seen


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_limit_moves_what_a_step_moves(name):
    """Oracle: the bytes that the targets are stated for, and arrays of ones."""
    assert bounds.bytes_per_element(name) == (20 if name == "Adagrad" else 28)
    ones = [torch.ones(5), torch.ones(70_000), torch.ones(2, 3)]
    try:
        limit = LIMIT.start(name, ones)
    except BuildError as error:
        pytest.skip(str(error))
    limit.feed(ones)
    limit.step()
    moments = 1 if name == "Adagrad" else 2
    assert len(limit.tensors) == 2 + moments
    values = {n: {float(t.min()) for t in ts} | {float(t.max()) for t in ts}
              for n, ts in limit.tensors.items()}  # fmt: skip
    assert values.pop("g") == {1.0}
    assert values.pop("p") == {2.0}
    assert list(values.values()) == moments * [{1.0}]  # from zero


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_access_arm_touches_what_a_step_keeps_and_changes_nothing(name):
    """Oracle: autograd's version counters, and arrays of ones."""
    ones = [torch.ones(5), torch.ones(2, 3)]
    access = ACCESS.start(name, ones)
    access.feed(ones)
    before = [x._version for x in access.kept]
    access.step()
    assert len(access.kept) == 2 * (2 if name == "Adagrad" else 3)
    assert [x._version for x in access.kept] == [version + 1 for version in before]
    assert all(torch.equal(p, one) for p, one in zip(access.params, ones))


class Recorder:
    def __init__(self, name: str, log: list[tuple[str, str]]) -> None:
        self.name, self.log = name, log

    def feed(self, gradients):
        self.log.append(("feed", self.name))

    def step(self):
        self.log.append(("step", self.name))


def test_arms_take_turns_and_warm_ups_do_not_count():
    log: list[tuple[str, str]] = []
    ticks = []
    times = measure.measure(
        {name: Recorder(name, log) for name in "abc"},
        [],
        rounds=3,
        warm_ups=2,
        tick=lambda: ticks.append(len(log)),
    )
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys("abc", 3)
    assert [kind for kind, _ in log] == 15 * ["feed", "step"]
    assert [name for _, name in log[::2]] == [name for _, name in log[1::2]]
    assert ticks == [6, 12, 18, 24, 30]
    rounds = [tuple(name for _, name in log[i : i + 6 : 2]) for i in range(0, 30, 6)]
    assert all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) > 1


def test_the_limit_is_left_out_without_a_compiler(monkeypatch):
    def no_kernel(*_):
        raise BuildError("no C compiler is on the PATH")

    monkeypatch.setattr(bounds, "Kernel", no_kernel)
    times = measure.measure_arms("NAdam", measure.make_gradients([(2,)]), rounds=1)
    assert list(times) == [name for name in WITHOUT_FUSED if name != LIMIT.name]


@pytest.mark.parametrize("arm", [TORCH, OURS], ids=lambda arm: arm.name)
def test_groups_hold_all_parameters_with_rates_of_their_own(arm):
    stepper = arm.start("RAdam", measure.make_gradients(5 * [(2,)]), groups=3)
    groups = stepper.optimizer.param_groups
    assert [len(group["params"]) for group in groups] == [2, 2, 1]
    assert {id(p) for group in groups for p in group["params"]} == set(map(id, stepper.params))
    assert len({group["lr"] for group in groups}) == 3


# What is concluded. -------------------------------------------------------------------------------

TIMES = {
    "limit": [3.0, 2.0, 100.0],
    "torch": [24.0, 24.0, 23.0],
    "torch foreach": [12.0, 1.0, 13.0],
    "torch fused": [6.0, 6.0, 7.0],
    "stepforge": [4.0, 5.0, 4.0],
}


def test_ratios_are_of_medians():
    result = Result("large", "Adam", TIMES)
    assert result.median("limit") == 3
    assert result.ratios("stepforge") == Ratios(0.75, 1.5, 6.0)
    assert result.ratios("torch fused") == Ratios(0.5, 1.0, 4.0)
    assert result.ratios("torch") == Ratios(0.125, 0.25, 1.0)
    assert result.spread("torch foreach") == pytest.approx((12.5 - 6.5) / 12)


def test_ratios_to_what_was_not_measured_are_unknown():
    result = Result("large", "Adam", {"stepforge": [4.0]})
    assert result.ratios("stepforge") == Ratios(None, None, None)
    assert result.median("torch") is None
    assert result.spread("stepforge") is None
    assert set(result.reached.values()) == {None}


def test_reached_is_judged_ratio_by_ratio():
    assert Ratios(0.88, 0.99, 5.0).reached(Ratios(0.88, 1.0, None)) == {
        "of_limit": True,
        "against_best": False,
        "against_default": None,
    }
    # Of the limit 0.75 < 0.88; against the best 1.5 of 1; against the default 6 of 4.
    assert list(Result("large", "Adam", TIMES).reached.values()) == [False, True, True]
    # The same times against NAdam's targets: 4 times the best are wanted, and 4 the default.
    assert list(Result("large", "NAdam", TIMES).reached.values()) == [False, False, True]
    assert Result("mine", "Adam", TIMES).reached == {}


def test_targets_of_every_workload_and_optimizer():
    assert set(TARGETS) == {(workload, name) for workload in WORKLOADS for name in OPTIMIZERS}
    assert TARGETS["large", "RAdam"] == Ratios(0.88, 4.0, 4.0)
    assert TARGETS["model", "AdamW"] == Ratios(0.80, 1.0, 2.5)
    assert TARGETS["small", "Adagrad"] == Ratios(None, 8.0, 12.0)
    assert TARGETS["small", "Adam"] == Ratios(None, 8.0, 20.0)


# The command. -------------------------------------------------------------------------------------


def test_report_and_table(tmp_path, few):
    names = ["--optimizer", "adam", "--optimizer", "NAdam"]
    output = tmp_path / "[" / "].json"  # "[/]" ends a style where it is taken for markup
    output.parent.mkdir()
    printed = run("--shapes", few, *names, "--rounds", 2, "--threads", 1, "--json", output)
    report = json.loads(output.read_text(encoding="utf-8"))
    assert {"stepforge", "torch", "Python", "numpy", "CPU"} <= set(report["machine"])
    assert report["machine"]["numpy"] == np.__version__
    assert report["settings"] == {"rounds": 2, "warm_ups": 2, "threads": 1, "scale": 1.0}
    assert report["workloads"] == [{"name": "few", "tensors": 3, "elements": 70_013}]
    assert len(report["load"]) == 2
    assert [step["optimizer"] for step in report["steps"]] == ["Adam", "NAdam"]
    for step in report["steps"]:
        expected = {arm.name for arm in ARMS if arm.exists(step["optimizer"])}
        assert expected - set(step["arms"]) <= {LIMIT.name}  # which needs a compiler
        assert set(step["arms"]) <= expected
        assert step["bytes_per_element"] == 28
        assert step["target"] is None
        assert step["reached"] == {}
        assert step["backend"] in ("native", "foreach")
        result = Result(
            "few", step["optimizer"], {n: a["seconds"] for n, a in step["arms"].items()}
        )
        for name, arm in step["arms"].items():
            assert len(arm["seconds"]) == 2
            assert all(0 < seconds < math.inf for seconds in arm["seconds"])
            assert arm["median"] == pytest.approx(sum(arm["seconds"]) / 2)
            assert Ratios(arm["of_limit"], arm["against_best"], arm["against_default"]) == (
                result.ratios(name)
            )
            assert f"\n{'Adam':<11}{name}" in printed or f"{name} " in printed
    assert "few: 3 tensors, 70,013 elements" in printed
    assert f"\nAll times: {output}\n" in printed
    assert "…" not in printed  # nothing is cut off on 80 columns


def test_workloads_are_shrunk_and_then_have_no_target(tmp_path):
    chosen = ["--workload", "large", "--workload", "model", "--optimizer", "Adagrad"]
    report = report_of(tmp_path, *chosen, "--scale", 1e-4, "--rounds", 1)
    assert [w["tensors"] for w in report["workloads"]] == [1, 148]
    assert report["workloads"][0] == {"name": "large x 0.0001", "tensors": 1, "elements": 16_000}
    assert [step["target"] for step in report["steps"]] == [None, None]


def test_groups(tmp_path, few):
    chosen = ["--shapes", few, "--optimizer", "AdamW", "--rounds", 1]
    report = report_of(tmp_path, *chosen, "--groups", 3)
    assert "steps" not in report
    (groups,) = report["groups"]
    assert set(groups["arms"]) == {"torch", "stepforge"}
    for arm in groups["arms"].values():
        assert set(arm["seconds"]) == {"1", "3"}
        assert arm["ratio"] == pytest.approx(arm["seconds"]["3"][0] / arm["seconds"]["1"][0])


def test_first_step_is_asked_of_fresh_processes(tmp_path, few, monkeypatch):
    asked = probe._ask("first step", "RAdam", read_shapes(few)[0].shapes)
    assert len(asked) == 2
    assert all(0 < seconds < math.inf for seconds in asked)
    monkeypatch.setattr(probe, "_ask", lambda *_: asked)  # a process takes seconds to import torch
    report = report_of(tmp_path, "--shapes", few, "--optimizer", "RAdam", "--first-step")
    assert report["first_step"] == [
        {"workload": "few", "optimizer": "RAdam", "seconds": asked[0] - asked[1]}
    ]
    assert "steps" not in report


def test_first_step_is_the_median_without_the_process_that_compiles(monkeypatch):
    answers = iter([(9.0, 1.0), (0.5, 0.25), (0.75, 0.25), (3.0, 2.0)])
    monkeypatch.setattr(probe, "_ask", lambda *_: next(answers))
    assert probe.time_first_step("Adam", WORKLOADS["small"]) == 0.5


@NEEDS_PROC
def test_memory_sees_a_temporary_and_finds_none_of_ours(tmp_path):
    """Oracle: torch's foreach path, whose temporaries are as large as the parameters."""
    shapes = tmp_path / "one.json"
    shapes.write_text("[[4000000]]")
    report = report_of(tmp_path, "--shapes", shapes, "--optimizer", "Adam", "--memory")
    (memory,) = report["memory"]
    assert memory["largest_parameter"] == 16_000_000
    extra = memory["extra_bytes"]
    assert set(extra) == {arm.name for arm in ARMS if arm.bound is None}
    assert extra["torch foreach"] > 15_000_000
    for arm in ARMS:
        if arm.library is stepforge:
            assert extra[arm.name] < 6_000_000


def test_memory_that_cannot_be_measured_gets_one_sentence(few, monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "_STATUS", tmp_path / "missing")
    result = CliRunner().invoke(make_app(), ["bench", "--shapes", str(few), "--memory"])
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == (
        "stepforge: the peak of memory can be measured on Linux only"
    )


def test_a_process_that_fails_gets_one_sentence(monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", "Traceback ...\n  ...\nMemoryError: too large\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    sentence = "the process that measures the first step failed: MemoryError: too large"
    with pytest.raises(probe.ProbeError, match=sentence):
        probe.time_first_step("Adam", WORKLOADS["small"])


def test_the_script_is_the_command(monkeypatch, capsys):
    script = Path(__file__).parents[2] / "benchmarks" / "step.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--scale", "0"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 2
    assert "--scale" in capsys.readouterr().err


# Shapes and other input. --------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--workload", "huge"),
        ("--optimizer", "SGD"),
        ("--rounds", "0"),
        ("--threads", "0"),
        ("--scale", "0"),
        ("--scale", "nan"),
        ("--groups", "1"),
        ("--groups", "1001"),
        ("--device", "gpu"),
        ("--device", "meta"),
        ("--device", "cuda:99"),
    ],
)
def test_bad_values_get_one_sentence(option, value):
    result = CliRunner().invoke(make_app(), ["bench", option, value])
    assert result.exit_code == 2
    # typer names an option of our own complaint without quotes.
    assert f"Invalid value for {option}" in result.output.splitlines()[-1].replace("'", "")


def test_a_report_that_cannot_be_written_is_said_before_measuring(tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file" / "bench.json"):
        result = CliRunner().invoke(make_app(), ["bench", "--json", str(output)])
        assert result.exit_code == 2
        assert "--json" in result.output


def test_a_bad_scale_is_named():
    result = CliRunner().invoke(make_app(), ["bench", "--scale", "1001"])
    sentence = "1001 is no factor; it must be above 0 and at most 1000."
    assert result.output.splitlines()[-1] == f"Error: Invalid value for --scale: {sentence}"


@NEEDS_PROC
def test_more_than_fits_into_memory_is_said_before_measuring():
    result = CliRunner().invoke(make_app(), ["bench", "--workload", "large", "--scale", "1000"])
    assert result.exit_code == 2
    assert "large x 1000 needs about" in result.output.splitlines()[-1]


def test_ways_to_store(tmp_path):
    """Oracle: what each way's optimizer keeps."""
    shapes = tmp_path / "wide.json"
    shapes.write_text("[[64, 128], [7]]")
    chosen = ["--shapes", shapes, "--optimizer", "AdamW", "--rounds", 1]
    report = report_of(tmp_path, *chosen, "--formats")
    (kept,) = report["formats"]
    assert list(kept["ways"]) == [way.name for way in STORED]
    assert kept["ways"]["float32"]["ratio"] == 1
    assert all(way["seconds"][0] > 0 for way in kept["ways"].values())
    assert has_codes(WORKLOADS["large"])
    assert not has_codes(WORKLOADS["small"])


def test_ways_to_store_need_a_parameter_that_is_large_enough(few):
    result = CliRunner().invoke(make_app(), ["bench", "--shapes", str(few), "--formats"])
    assert result.exit_code == 2
    assert "no workload has a parameter that is large" in result.output
