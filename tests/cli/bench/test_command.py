"""The command: its report, its tables, and its sentences about bad input.

Measured times are never judged. They vary, so the tests of ratios use times by hand.
"""

from __future__ import annotations

import json
import math
import runpy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import stepforge
from stepforge.cli import make_app
from stepforge.cli.bench import command, fresh_process
from stepforge.cli.bench.arrangements import COMPILED
from stepforge.cli.bench.formats import STORAGE_FORMATS, has_int8_states
from stepforge.cli.bench.implementations import IMPLEMENTATIONS, LIMIT, PLAINLY
from stepforge.cli.bench.results import Result
from stepforge.cli.bench.targets import Ratios
from stepforge.cli.bench.workloads import WORKLOADS, read_shapes

ROOT = Path(__file__).parents[3]
NEEDS_PROC = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")


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


# Steps. -------------------------------------------------------------------------------------------


def test_report_and_table(tmp_path, few):
    names = ["--optimizer", "adam", "--optimizer", "NAdam"]
    output = tmp_path / "[" / "].json"  # "[/]" would end a style if it were taken for markup
    output.parent.mkdir()
    printed = run("--shapes", few, *names, "--rounds", 2, "--threads", 1, "--json", output)
    report = json.loads(output.read_text(encoding="utf-8"))
    assert {"stepforge", "torch", "Python", "numpy", "CPU"} <= set(report["machine"])
    assert report["machine"]["numpy"] == np.__version__
    assert report["settings"] == {"rounds": 2, "warm_ups": 2, "threads": 1, "scale": 1.0}
    assert report["workloads"] == [
        {
            "name": "few",
            "tensors": 3,
            "elements": 70_013,
            "groups": 1,
            "form": "",
            "threads": 1,
            "steps": 1,
            "dtype": "float32",
            "gradient_size": 0.01,
            "skipped": None,
        }
    ]
    assert len(report["load"]) == 2
    assert [step["optimizer"] for step in report["steps"]] == ["Adam", "NAdam"]
    for step in report["steps"]:
        expected = {i.name for i in IMPLEMENTATIONS if i.exists(step["optimizer"])}
        assert expected - set(step["arms"]) <= {LIMIT.name}  # the limit needs a compiler
        assert set(step["arms"]) <= expected
        assert step["bytes_per_element"] == 28
        assert step["backend"] in ("native", "foreach")
        result = Result(
            "few", step["optimizer"], {n: a["seconds"] for n, a in step["arms"].items()}
        )
        for name, arm in step["arms"].items():
            assert len(arm["seconds"]) == 2
            assert all(0 < seconds < math.inf for seconds in arm["seconds"])
            assert arm["median"] == pytest.approx(sum(arm["seconds"]) / 2)
            assert Ratios(*(arm[ratio] for ratio in vars(Ratios(0, 0, 0)))) == result.ratios(name)
            assert arm["target"] is None
            assert arm["reached"] == {}
            assert f"\n{'Adam':<11}{name}" in printed or f"{name} " in printed
    assert "few: 3 tensors, 70,013 elements" in printed
    assert f"\nAll times: {output}\n" in printed
    assert "…" not in printed  # nothing is cut off at 80 columns


def test_workloads_are_shrunk_and_then_have_no_target(tmp_path):
    chosen = ["--workload", "large", "--workload", "model", "--optimizer", "Adagrad"]
    report = report_of(tmp_path, *chosen, "--scale", 1e-4, "--rounds", 1)
    assert [w["tensors"] for w in report["workloads"]] == [1, 148]
    assert report["workloads"][0]["name"] == "large x 0.0001"
    assert report["workloads"][0]["elements"] == 16_000
    assert {arm["target"] for step in report["steps"] for arm in step["arms"].values()} == {None}


def test_the_script_is_the_command(monkeypatch, capsys):
    script = ROOT / "benchmarks" / "step.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--scale", "0"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 2
    assert "--scale" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"), [([], ("large", "model", "small")), (["--all"], tuple(WORKLOADS))]
)
def test_a_run_without_options_is_short(options, expected, tmp_path, monkeypatch):
    """Oracle: the workloads that the results' page names. Nothing is measured."""
    for section in ("steps", "formats", "first_steps", "memory"):
        monkeypatch.setattr(command.sections, section, lambda *_: [])
    monkeypatch.setattr(command, "_check_memory", lambda *_: None)
    report = report_of(tmp_path, *options)
    assert tuple(workload["name"] for workload in report["workloads"]) == expected


@pytest.mark.parametrize(
    ("name", "size"), [("bfloat16", 14), ("convolution", 28), ("zeros", 28), ("denormals", 28)]
)
def test_workloads_of_a_gpu_are_measured_on_a_cpu_by_name(name, size, tmp_path):
    """Oracle: the bytes of an element that Adam moves, and the implementations on a CPU."""
    chosen = ["--workload", name, "--optimizer", "Adam", "--scale", 1e-4, "--rounds", 1]
    report = report_of(tmp_path, *chosen)
    ((step,), (workload,)) = report["steps"], report["workloads"]
    assert step["bytes_per_element"] == size
    assert {i.name for i in IMPLEMENTATIONS} - set(step["arms"]) <= {LIMIT.name}
    assert workload["dtype"] == ("bfloat16" if name == "bfloat16" else "float32")
    assert workload["gradient_size"] == {"zeros": 0.0, "denormals": 1e-20}.get(name, 0.01)


def test_groups(tmp_path):
    few = tmp_path / "few.json"
    few.write_text("[[64, 128], [7], [3]]")
    chosen = ["--shapes", few, "--optimizer", "AdamW", "--rounds", 1, "--formats"]
    report = report_of(tmp_path, *chosen, "--groups", 3)
    assert [entry["workload"] for entry in report["formats"]] == ["few"]  # in one group
    assert [(w["name"], w["groups"]) for w in report["workloads"]] == [("few in groups", 3)]
    ((arms),) = [step["arms"] for step in report["steps"]]
    assert {"torch", "stepforge", PLAINLY.name} <= set(arms)
    plain = arms[PLAINLY.name]["median"]
    assert arms["stepforge"]["of_plain"] == pytest.approx(plain / arms["stepforge"]["median"])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_arranged_workloads_are_in_the_report_and_the_table(tmp_path, monkeypatch):
    """Oracle: the workloads themselves, ``compiled`` with few tensors: torch compiles slowly."""
    few = replace(WORKLOADS["compiled"], shapes=((4, 3), (4,)))
    monkeypatch.setitem(WORKLOADS, "compiled", few)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    output = tmp_path / "bench.json"
    chosen = [x for name in ("tiny", "groups", "sharded", "compiled") for x in ("--workload", name)]
    chosen += ["--optimizer", "Adam", "--scale", 0.02, "--rounds", 1, "--json", output]
    printed = run(*chosen, "--threads", 2)
    report = json.loads(output.read_text(encoding="utf-8"))
    assert [
        (w["name"], w["tensors"], w["groups"], w["form"], w["threads"], w["steps"], w["skipped"])
        for w in report["workloads"]
    ] == [
        ("tiny x 0.02", 8, 1, "", 1, 100, None),
        ("groups x 0.02", 1000, 250, "", 2, 1, None),
        ("sharded x 0.02", 144, 1, "DTensors, Shard(0) on a mesh of one process", 2, 1, None),
        ("compiled x 0.02", 2, 1, "torch.compile(step)", 2, 10, None),
    ]
    for step, workload in zip(report["steps"], report["workloads"], strict=True):
        assert step["workload"] == workload["name"]
        arms = step["arms"]
        assert (PLAINLY.name in arms) == ("tiny" not in step["workload"])
        for arm in arms.values():
            assert len(arm["seconds"]) == 1
            assert (arm["of_plain"] is None) == (PLAINLY.name not in arms)
    assert printed.count("plain\n") == 3  # the heading of a column
    assert PLAINLY.description in printed
    assert "…" not in printed


def test_fused_is_measured_beside_the_default_and_a_captured_step_is_skipped(tmp_path):
    chosen = ["--workload", "fused", "--workload", "captured", "--optimizer", "AdamW"]
    output = tmp_path / "bench.json"
    printed = run(*chosen, "--scale", 0.01, "--rounds", 1, "--json", output)
    report = json.loads(output.read_text(encoding="utf-8"))
    (step,) = report["steps"]
    assert set(step["arms"]) - {LIMIT.name} == {
        *("access", "torch fused", "stepforge", "stepforge plainly"),
    }
    assert [w["skipped"] for w in report["workloads"]] == [None, "a CPU has no graphs to replay"]
    assert "\ncaptured x 0.01 is skipped: a CPU has no graphs to replay.\n" in printed


def test_a_workload_that_the_machine_lacks_is_skipped_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    sentence = COMPILED.missing(torch.device("cpu"))
    output = tmp_path / "bench.json"
    printed = run("--workload", "compiled", "--json", output)
    assert f"\ncompiled is skipped: {sentence}.\n" in printed
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["steps"] == []
    assert [w["skipped"] for w in report["workloads"]] == [sentence]


# Other sections. ----------------------------------------------------------------------------------


def test_formats(tmp_path):
    """Oracle: the list of storage formats."""
    shapes = tmp_path / "wide.json"
    shapes.write_text("[[64, 128], [7]]")
    chosen = ["--shapes", shapes, "--optimizer", "AdamW", "--rounds", 1]
    report = report_of(tmp_path, *chosen, "--formats")
    (entry,) = report["formats"]
    assert list(entry["ways"]) == [storage.name for storage in STORAGE_FORMATS]
    assert entry["ways"]["float32"]["ratio"] == 1
    assert all(way["seconds"][0] > 0 for way in entry["ways"].values())
    assert has_int8_states(WORKLOADS["large"])
    assert not has_int8_states(WORKLOADS["small"])


def test_formats_need_a_parameter_that_is_large_enough(few):
    result = CliRunner().invoke(make_app(), ["bench", "--shapes", str(few), "--formats"])
    assert result.exit_code == 2
    assert "no workload has a parameter that is large" in result.output


def test_first_step_is_measured_in_fresh_processes(tmp_path, few, monkeypatch):
    seconds = fresh_process._run("first step", "RAdam", read_shapes(few)[0].shapes)
    assert len(seconds) == 2
    assert all(0 < x < math.inf for x in seconds)
    # A process takes seconds to import torch.
    monkeypatch.setattr(fresh_process, "_run", lambda *_: seconds)
    report = report_of(tmp_path, "--shapes", few, "--optimizer", "RAdam", "--first-step")
    assert report["first_step"] == [
        {"workload": "few", "optimizer": "RAdam", "seconds": seconds[0] - seconds[1]}
    ]
    assert "steps" not in report


@NEEDS_PROC
def test_memory_sees_a_temporary_and_finds_none_of_ours(tmp_path):
    """Oracle: torch's foreach path, whose temporaries are as large as the parameters."""
    shapes = tmp_path / "one.json"
    shapes.write_text("[[4000000]]")
    report = report_of(tmp_path, "--shapes", shapes, "--optimizer", "Adam", "--memory")
    (memory,) = report["memory"]
    assert memory["largest_parameter"] == 16_000_000
    extra = memory["extra_bytes"]
    assert set(extra) == {i.name for i in IMPLEMENTATIONS if i.bound is None}
    assert extra["torch foreach"] > 15_000_000
    for implementation in IMPLEMENTATIONS:
        if implementation.library is stepforge:
            assert extra[implementation.name] < 6_000_000


def test_memory_that_cannot_be_measured_gets_one_sentence(few, monkeypatch, tmp_path):
    monkeypatch.setattr(fresh_process, "_STATUS", tmp_path / "missing")
    result = CliRunner().invoke(make_app(), ["bench", "--shapes", str(few), "--memory"])
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == (
        "stepforge: the peak of memory can be measured on Linux only"
    )


# Bad input. ---------------------------------------------------------------------------------------


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
    # typer quotes the option only in its own messages.
    assert f"Invalid value for {option}" in result.output.splitlines()[-1].replace("'", "")


@pytest.mark.parametrize("option", ["--formats", "--first-step", "--memory"])
def test_other_sections_step_shapes_only(option):
    result = CliRunner().invoke(make_app(), ["bench", "--workload", "sharded", option])
    assert result.exit_code == 2
    assert f"Invalid value for {option}: no workload has" in result.output.splitlines()[-1]


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
