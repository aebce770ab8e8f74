"""The command on a GPU.

In most tests the parameters are on a CPU, and the timer believes in a simulated device. The last
test needs a GPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import stepforge
from stepforge.cli import devices, make_app
from stepforge.cli.bench import command
from stepforge.cli.bench.device_settings import DeviceSettings
from stepforge.cli.bench.implementations import GPU_IMPLEMENTATIONS
from stepforge.cli.bench.targets import GPU_TARGETS
from stepforge.cli.bench.workloads import GPU_WORKLOADS
from stepforge.cli.timing.timers import EventTimer, StepTime
from stepforge.rules import ALL
from tests.cli.timing.simulated_device import SimulatedDevice

PAGE = Path(__file__).parents[3] / "docs" / "gpus.md"


@pytest.fixture
def simulated_gpu(simulated: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes 1 ms on the host and 2 ms on the device."""

    class SimulatedTimer(EventTimer):
        def time(self, step: Callable[[], object]) -> StepTime:
            step()
            return super().time(lambda: simulated.work(1e-3, 2e-3))

    timer = SimulatedTimer(simulated, simulated.lead)
    settings = DeviceSettings(
        *(devices.CPU, timer, GPU_IMPLEMENTATIONS, 16, GPU_TARGETS),
        default_workloads=GPU_WORKLOADS,
    )
    monkeypatch.setattr(command, "settings_for", lambda _: settings)


@pytest.fixture
def few(tmp_path: Path) -> Path:
    path = tmp_path / "few.json"
    path.write_text("[[4, 3], [], [70]]")
    return path


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(make_app(), ["bench", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.output


@pytest.mark.usefixtures("simulated_gpu")
def test_report_and_table(few, tmp_path):
    output = tmp_path / "bench.json"
    chosen = ["--shapes", few, "--optimizer", "AdamW", "--rounds", 2]
    code, printed = run(*chosen, "--json", output)
    assert code == 0, printed
    report = json.loads(output.read_text(encoding="utf-8"))
    (step,) = report["steps"]
    assert list(step["arms"]) == [i.name for i in GPU_IMPLEMENTATIONS]
    for arm in step["arms"].values():
        assert arm["host_seconds"] == pytest.approx([1e-3, 1e-3])
        assert arm["device_seconds"] == pytest.approx([2e-3, 2e-3])
        assert arm["seconds"] == pytest.approx([2e-3, 2e-3])
    speed = 28 * 83 / 2e-3  # bytes per second
    assert step["limit_bytes_per_second"] == pytest.approx(speed)
    assert f"copy moved {speed / 1e9:.3g} GB/s" in printed
    assert "GPU ms" in printed
    assert GPU_IMPLEMENTATIONS[0].description in printed
    assert "…" not in printed  # nothing is cut off at 80 columns


@pytest.mark.usefixtures("simulated_gpu")
def test_a_run_without_options_has_what_takes_another_path_there(tmp_path):
    """Oracle: the list of docs/gpus.md. The parameters are on a CPU, which captures nothing."""
    output = tmp_path / "bench.json"
    code, printed = run(*("--optimizer", "AdamW", "--scale", 1e-5, "--rounds", 1, "--json", output))
    assert code == 0, printed
    report = json.loads(output.read_text(encoding="utf-8"))
    named = [workload["name"].removesuffix(" x 1e-05") for workload in report["workloads"]]
    assert named[:3] == ["large", "model", "small"]
    (line,) = [x for x in PAGE.read_text().splitlines() if x.startswith("| `bfloat16`")]
    rows = PAGE.read_text().split(line)[1].split("\n\n")[0].splitlines()
    assert named[3:] == [x.split("`")[1] for x in (line, *rows) if x]
    stepped = [step["workload"].split()[0] for step in report["steps"]]
    assert stepped == [name for name in named if name != "captured"]
    assert "captured x 1e-05 is skipped" in printed


@pytest.mark.usefixtures("simulated_gpu")
def test_the_marks_are_those_of_a_gpus_targets(monkeypatch):
    """The times are all the same: parity is reached, three times the best is not."""
    small = replace(command.WORKLOADS["large"], shapes=((50,),))
    monkeypatch.setitem(command.WORKLOADS, "large", small)
    code, printed = run("--workload", "large", "--optimizer", "AdamW", "--optimizer", "NAdam")
    assert code == 0
    ours = [line for line in printed.splitlines() if line.startswith(" " * 11 + "stepforge  ")]
    assert [line.split()[1:] for line in ours] == [
        ["2", "2", "0%", "1", "✓", "1", "✓"],
        ["2", "2", "0%", "1", "1", "✗"],
    ]


@pytest.mark.usefixtures("simulated_gpu")
def test_groups_have_no_target_there(few):
    code, printed = run("--shapes", few, "--optimizer", "Adam", "--groups", 3)
    assert code == 0
    start = " " * 11 + "stepforge  "
    (ours,) = [line.split() for line in printed.splitlines() if line.startswith(start)]
    assert ours == ["stepforge", "2", "2", "0%", "1", "1", "1"]


@pytest.mark.usefixtures("simulated_gpu")
def test_more_than_fits_into_its_memory_is_said_before_measuring(monkeypatch):
    monkeypatch.setattr(devices, "free_memory", lambda _: 10**9)
    code, output = run("--workload", "large")
    assert code == 2
    assert "large needs about 8" in output.splitlines()[-1]
    assert "1.0 GB are free on the GPU; a smaller one will do." in output.splitlines()[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not devices.accelerators(), reason="needs a GPU")
def test_the_command_on_a_gpu(gpu, few, tmp_path):
    output = tmp_path / "bench.json"
    chosen = ["--device", gpu, "--shapes", few, "--groups", 3, "--all", "--rounds", 2]
    names = [x for name in ALL for x in ("--optimizer", name)]
    code, printed = run(*chosen, *names, "--json", output)
    assert code == 0, printed
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["device"] == str(gpu)
    assert {"GPU", "platform", "triton"} <= set(report["machine"])
    assert [step["optimizer"] for step in report["steps"]] == list(ALL)
    for step in report["steps"]:
        assert {"limit", "torch", "stepforge", "stepforge foreach"} <= set(step["arms"])
        p = torch.zeros(1, device=gpu, requires_grad=True)
        optimizer = getattr(stepforge, step["optimizer"])([p])
        assert step["backend"] == stepforge.explain(optimizer).served[0].backend
        for arm in step["arms"].values():
            for host, on_device, both in zip(
                arm["host_seconds"], arm["device_seconds"], arm["seconds"]
            ):
                assert both == max(host, on_device)
                assert 0 < both < math.inf
    assert {w["groups"] for w in report["workloads"]} == {3}
    assert len(report["first_step"]) == len(report["memory"]) == 5
