"""The benchmark on a GPU.

Without one, a device of the tests takes its place: a queue whose time is counted, not measured, so
that the oracle of every time is a sum by hand. The tests at the end need a real one.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import stepforge
from stepforge.cli import bench, clock, device, make_app, measure, probe
from stepforge.cli.bounds import Copy, bytes_per_element
from stepforge.cli.clock import EventClock, HostClock, Lap
from stepforge.cli.measure import ARMS, GPU_ARMS, OPTIMIZERS, OURS, Arm
from stepforge.cli.place import Place, place_of
from stepforge.cli.scores import GPU_TARGETS, TARGETS, Ratios, Result

LEAD = 1.0


class Device:
    """A host that works and queues, and a device that does what is queued; in counted seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.busy_until = 0.0
        self.log: list[str] = []
        log, device = self.log, self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                log.append("event")
                self.at = max(device.now, device.busy_until)

            def elapsed_time(self, later: Event) -> float:
                assert device.now >= later.at  # otherwise it has not happened yet
                return 1e3 * (later.at - self.at)

        self.Event = Event

    def synchronize(self) -> None:
        self.log.append("wait")
        self.now = max(self.now, self.busy_until)

    def queue(self, seconds: float) -> None:
        self.busy_until = max(self.now, self.busy_until) + seconds

    def lead(self) -> None:
        self.log.append("lead")
        self.queue(LEAD)

    def work(self, host: float, on_device: float) -> None:
        self.log.append("step")
        self.now += host
        self.queue(on_device)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(
        clock, "time", types.SimpleNamespace(perf_counter=lambda: made.now), raising=True
    )
    return made


def time_of(fake: Device, step: Callable[[], object]) -> Lap:
    return EventClock(fake, fake.lead).time(step)


# The clock. ---------------------------------------------------------------------------------------


def test_the_clock_of_a_cpu_takes_the_hosts_time(fake):
    lap = HostClock().time(lambda: fake.work(0.5, 9.0))
    assert lap == Lap(host=0.5, device=None)
    assert lap.seconds == 0.5


@pytest.mark.parametrize(
    ("host", "on_device", "seconds"),
    [
        (0.25, 0.5, 0.5),  # bound by the device, which the host runs ahead of
        (0.5, 0.25, 0.5),  # bound by the host, though it returns before the device begins
        (0.75, 0.0, 0.75),  # nothing for the device to do
    ],
)
def test_a_step_costs_the_longer_of_host_and_device(fake, host, on_device, seconds):
    lap = time_of(fake, lambda: fake.work(host, on_device))
    assert lap == Lap(host, on_device)
    assert lap.seconds == seconds


def test_a_step_that_outlasts_the_work_ahead_never_looks_faster(fake):
    """The device waits for the host between its two pieces of work: 1.5 + 0.5 - 1 seconds."""

    def step() -> None:
        fake.work(0.0, 0.125)
        fake.work(1.5, 0.5)

    lap = time_of(fake, step)
    assert lap == Lap(host=1.5, device=1.0)
    assert lap.seconds == 1.5


def test_a_step_that_waits_for_the_device_pays_for_it(fake):
    def step() -> None:
        fake.work(0.25, 0.5)
        fake.synchronize()

    assert time_of(fake, step) == Lap(host=LEAD + 0.5, device=0.5)


def test_what_fed_the_step_is_not_counted(fake):
    fake.queue(100.0)
    assert time_of(fake, lambda: fake.work(0.25, 0.5)) == Lap(0.25, 0.5)
    assert fake.log == ["wait", "lead", "event", "step", "event", "wait"]


def test_all_arms_are_timed_by_the_clock(fake):
    class Stepper:
        def __init__(self, host: float, on_device: float) -> None:
            self.times = host, on_device

        def feed(self, gradients):
            fake.queue(3.0)

        def step(self):
            fake.work(*self.times)

    arms = {"a": Stepper(0.25, 0.5), "b": Stepper(0.5, 0.25)}
    laps = measure.measure(arms, [], rounds=3, clock=EventClock(fake, fake.lead))
    assert laps == {"a": 3 * [Lap(0.25, 0.5)], "b": 3 * [Lap(0.5, 0.25)]}


# The arms. ----------------------------------------------------------------------------------------


def test_arms_have_the_names_of_those_on_a_cpu():
    """Without the reference, whose launches nobody wants to wait for."""
    names = [arm.name for arm in ARMS]
    assert [arm.name for arm in GPU_ARMS] == [n for n in names if n != "stepforge reference"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_limit_copies_half_of_what_a_step_moves(name):
    """A copy reads each byte and writes it. Oracle: the bytes that the targets are stated for."""
    gradients = [torch.ones(5), torch.ones(2, 3), torch.ones(())]
    limit = GPU_ARMS[0].start(name, gradients)
    assert isinstance(limit, Copy)
    assert 2 * limit.source.nbytes == 12 * bytes_per_element(name)
    limit.source.random_()
    limit.feed(gradients)
    limit.step()
    assert torch.equal(limit.target, limit.source)
    assert limit.target.data_ptr() != limit.source.data_ptr()


class Lacking(torch.optim.Adam):
    """Says at its first step only that this device has no such kernel, as torch does."""

    def step(self, closure=None):
        raise NotImplementedError("Could not run 'aten::_fused_adam_'")


def test_a_kernel_that_the_device_lacks_is_left_out():
    library = types.SimpleNamespace(Adam=Lacking)
    arm = replace(GPU_ARMS[4], library=library)
    assert arm.name == "torch fused"
    gradients = measure.make_gradients([(2,)])
    assert measure.started(arm, "Adam", gradients) is None
    laps = measure.measure_arms("Adam", gradients, rounds=1, arms=[arm, OURS])
    assert list(laps) == [OURS.name]
    with pytest.raises(NotImplementedError):  # of any other arm it is an error
        measure.measure_arms("Adam", gradients, rounds=1, arms=[Arm("x", "", library)])


def test_gradients_are_the_same_on_each_device():
    (here,), (there,) = (measure.make_gradients([(4, 2)], where) for where in ("cpu", "meta"))
    assert there.device.type == "meta"
    assert (there.shape, there.dtype) == (here.shape, here.dtype)


# What is concluded. -------------------------------------------------------------------------------


def test_targets():
    """Oracle: what docs and the results' page state."""
    assert GPU_TARGETS["large", "AdamW"] == Ratios(0.85, 1.0, None)
    for name in ("Adagrad", "NAdam", "RAdam"):
        assert GPU_TARGETS["large", name] == Ratios(None, 3.0, None)
    for name in OPTIMIZERS:
        assert GPU_TARGETS["small", name] == Ratios(None, 2.0, None)
    assert set(GPU_TARGETS) < set(TARGETS)


def test_ratios_are_of_the_longer_times():
    laps = {
        "limit": [Lap(0.5, 3.0)],
        "torch": [Lap(6.0, 5.0)],
        "torch fused": [Lap(5.0, 2.0)],
        "stepforge": [Lap(1.0, 4.0)],
    }
    result = Result.of("large", "AdamW", laps, GPU_TARGETS)
    assert result.ratios("stepforge") == Ratios(0.75, 1.25, 1.5)
    assert result.median_on_device("torch fused") == 2.0
    assert result.median_on_device("missing") is None
    assert result.reached == {
        "of_limit": False,
        "against_best": True,
        "against_default": None,
    }


def test_a_cpu_is_the_place_that_it_was():
    place = place_of(device.CPU)
    assert (place.arms, place.targets, place.queues) == (ARMS, TARGETS, False)
    assert (place.groups_target, place.first_step_target) == (1.3, 0.2)


# The command, with parameters on a CPU and a clock that believes that they are not. ---------------


@pytest.fixture
def pretended(fake: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    """Each step takes the host 1 ms and the device 1 ms more."""

    class Pretending(EventClock):
        def time(self, step: Callable[[], object]) -> Lap:
            step()
            return super().time(lambda: fake.work(1e-3, 2e-3))

    place = Place(device.CPU, Pretending(fake, fake.lead), GPU_ARMS, 16, GPU_TARGETS)
    monkeypatch.setattr(bench, "place_of", lambda _: place)
    monkeypatch.delenv("STEPFORGE_BACKEND", raising=False)
    return fake


@pytest.fixture
def few(tmp_path: Path) -> Path:
    path = tmp_path / "few.json"
    path.write_text("[[4, 3], [], [70]]")
    return path


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(make_app(), ["bench", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.output


def test_report_and_table(pretended, few, tmp_path):
    output = tmp_path / "bench.json"
    chosen = ["--shapes", few, "--optimizer", "AdamW", "--rounds", 2]
    code, printed = run(*chosen, "--json", output)
    assert code == 0, printed
    report = json.loads(output.read_text(encoding="utf-8"))
    (step,) = report["steps"]
    assert list(step["arms"]) == [arm.name for arm in GPU_ARMS]
    for arm in step["arms"].values():
        assert arm["host_seconds"] == pytest.approx([1e-3, 1e-3])
        assert arm["device_seconds"] == pytest.approx([2e-3, 2e-3])
        assert arm["seconds"] == pytest.approx([2e-3, 2e-3])
    speed = 28 * 83 / 2e-3  # bytes in a second
    assert step["limit_bytes_per_second"] == pytest.approx(speed)
    assert f"copy moved {speed / 1e9:.3g} GB/s" in printed
    assert "GPU ms" in printed
    assert GPU_ARMS[0].what in printed
    assert "…" not in printed  # nothing is cut off on 80 columns


def test_the_marks_are_those_of_a_gpus_targets(pretended, monkeypatch):
    """All arms take the same time: parity is reached, and three times the best is not."""
    small = replace(bench.WORKLOADS["large"], shapes=((50,),))
    monkeypatch.setitem(bench.WORKLOADS, "large", small)
    code, printed = run("--workload", "large", "--optimizer", "AdamW", "--optimizer", "NAdam")
    assert code == 0
    ours = [line for line in printed.splitlines() if line.startswith(" " * 11 + "stepforge  ")]
    assert [line.split()[1:] for line in ours] == [
        ["2", "2", "0%", "1", "✓", "1", "✓"],
        ["2", "2", "0%", "1", "1", "✗"],
    ]


def test_groups_have_no_target_there(pretended, few):
    code, printed = run("--shapes", few, "--optimizer", "Adam", "--groups", 3)
    assert code == 0
    (ours,) = [line.split() for line in printed.splitlines() if "stepforge  " in line]
    assert ours == ["stepforge", "2", "2", "1"]


def test_more_than_fits_into_its_memory_is_said_before_measuring(pretended, monkeypatch):
    monkeypatch.setattr(device, "free_memory", lambda _: 10**9)
    code, output = run("--workload", "large")
    assert code == 2
    assert "large needs about 8" in output.splitlines()[-1]
    assert "1.0 GB are free on the GPU; a smaller one will do." in output.splitlines()[-1]


# Devices. -----------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuple(torch.device("cuda", index) for index in range(2))
    monkeypatch.setattr(device, "accelerators", lambda: found)


@pytest.mark.usefixtures("two_gpus")
def test_devices_by_name():
    assert device.find("cpu") == device.find("cpu:0") == torch.device("cpu")
    assert device.find("cuda") == torch.device("cuda:0")
    assert device.find("cuda:1") == torch.device("cuda:1")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["cuda:2", "xpu", "meta"])
def test_a_device_that_is_not_here(name):
    with pytest.raises(ValueError, match=rf"finds no {name} here, only cpu, cuda:0, cuda:1\.$"):
        device.find(name)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "cuda:-1", "nvidia"])
def test_what_is_no_device(name):
    with pytest.raises(ValueError, match=r"is no device of torch; it must be cpu, or such as"):
        device.find(name)


@pytest.mark.usefixtures("two_gpus")
def test_a_device_without_events(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda _: types.SimpleNamespace())
    with pytest.raises(ValueError, match=r"^torch has no events on cuda:1, so a step there cannot"):
        device.find("cuda:1")


def test_the_peak_of_a_device_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda _: types.SimpleNamespace())
    with pytest.raises(probe.ProbeError, match="does not tell the peak of memory on cuda:0"):
        probe.extra_memory("Adam", bench.WORKLOADS["small"], torch.device("cuda:0"))


def test_a_peak_is_what_a_step_adds(monkeypatch):
    """Oracle: an allocator that is written out."""
    memory = types.SimpleNamespace(now=100, peak=900)

    def step() -> None:
        memory.peak = max(memory.peak, memory.now + 30)

    module = types.SimpleNamespace(
        reset_peak_memory_stats=lambda _: setattr(memory, "peak", memory.now),
        memory_allocated=lambda _: memory.now,
        max_memory_allocated=lambda _: memory.peak,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    assert probe._device_peak(step, torch.device("cuda:0")) == 30


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module", name="triton"), "not installed: pip install 'stepforge["),
        (ModuleNotFoundError("No module 'x'", name="x"), "cannot be imported: No module 'x'"),
        (ImportError("libcuda"), "cannot be imported: libcuda"),
    ],
)
def test_why_there_is_no_triton(monkeypatch, error, said):
    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr(device.importlib, "import_module", fail)
    assert device.triton_version().startswith(said)


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"hip": None, "cuda": "12.8"}, "CUDA 12.8, driver 570.1"),
        ({"hip": "6.4", "cuda": None}, "ROCm 6.4, driver "),
    ],
)
def test_a_gpu_in_words(monkeypatch, versions, words):
    properties = types.SimpleNamespace(name="GPU Y", total_memory=8 * 10**9)
    module = types.SimpleNamespace(get_device_properties=lambda _: properties)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    monkeypatch.setattr(device, "_nvidia_driver", lambda: "570.1")
    for name, value in versions.items():
        monkeypatch.setattr(torch.version, name, value)
    described = device.describe(torch.device("cuda:1"))
    assert described["GPU"] == "cuda:1 GPU Y, 8.0 GB"
    assert described["platform"].startswith(words)
    assert described["triton"] == device.triton_version()


# On a real one. -----------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not device.accelerators(), reason="needs a GPU")


@pytest.fixture
def gpu() -> torch.device:
    found = device.find(str(device.accelerators()[0]))
    device.use(found)
    return found


@pytest.mark.gpu
@needs_gpu
def test_events_see_what_the_host_does_not(gpu):
    """Forty copies take the device longer than one, and the host next to nothing of either."""
    source = torch.zeros(2**26, device=gpu)
    target = torch.empty_like(source)

    def copies(count: int) -> None:
        for _ in range(count):
            target.copy_(source)

    timer = clock.clock_of(gpu)
    timer.time(lambda: copies(1))
    one, forty = (timer.time(lambda n=n: copies(n)).device for n in (1, 40))
    assert 10 < forty / one < 160  # 40, with room for clocks that change


@pytest.mark.gpu
@needs_gpu
def test_the_command_on_a_gpu(gpu, few, tmp_path, monkeypatch):
    monkeypatch.delenv("STEPFORGE_BACKEND", raising=False)
    output = tmp_path / "bench.json"
    chosen = ["--device", gpu, "--shapes", few, "--groups", 3, "--all", "--rounds", 2]
    names = [x for name in OPTIMIZERS for x in ("--optimizer", name)]
    code, printed = run(*chosen, *names, "--json", output)
    assert code == 0, printed
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["device"] == str(gpu)
    assert {"GPU", "platform", "triton"} <= set(report["machine"])
    assert [step["optimizer"] for step in report["steps"]] == list(OPTIMIZERS)
    for step in report["steps"]:
        assert {"limit", "torch", "stepforge", "stepforge foreach"} <= set(step["arms"])
        assert (
            step["backend"]
            == stepforge.explain(
                getattr(stepforge, step["optimizer"])(
                    [torch.zeros(1, device=gpu, requires_grad=True)]
                )
            )
            .served[0]
            .backend
        )
        for arm in step["arms"].values():
            for host, on_device, both in zip(
                arm["host_seconds"], arm["device_seconds"], arm["seconds"]
            ):
                assert both == max(host, on_device)
                assert 0 < both < math.inf
    assert len(report["groups"]) == len(report["first_step"]) == len(report["memory"]) == 5
