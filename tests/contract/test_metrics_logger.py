"""Metrics as they are logged.

Oracles: the numbers that an optimizer says, read back by Python's json. Where they do not matter, a
fake one makes them up.
"""

from __future__ import annotations

import errno
import gc
import io
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import stepforge
from stepforge.logging import MetricsLogger, tensorboard
from stepforge.ops import total


class Fake(torch.optim.SGD):
    """SGD with metrics that are made up, and a count of who asked for them."""

    def __init__(self, *params: Any, **options: Any) -> None:
        super().__init__(*(params or ([torch.zeros(2), torch.zeros(3)],)), **{"lr": 0.5} | options)
        self.values: dict[str, Any] = {"grad_norm": torch.tensor(0.1), "skipped": torch.tensor(3)}
        self.asked: list[str | None] = []

    def metrics(self, by: str | None = None) -> Any:
        self.asked.append(by)
        if by == "group":
            return [dict(self.values) for _ in self.param_groups]
        if by == "parameter":
            count = sum(len(group["params"]) for group in self.param_groups)
            return {i: {"lost": torch.tensor(i / 4)} for i in range(count)}
        return dict(self.values)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Parse JSON lines strictly: Python's parser would take NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


def measuring(weight: torch.Tensor | None = None, **options: Any) -> stepforge.Adam:
    """Return an optimizer of one parameter that measures its steps."""
    p = torch.nn.Parameter(torch.ones(3) if weight is None else weight)
    return stepforge.Adam([("w", p)], **{"lr": 0.01, "telemetry": True} | options)


def trained(optimizer: torch.optim.Optimizer, *gradients: float) -> None:
    """Take a step for each gradient, whose elements are alike."""
    for gradient in gradients:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, gradient)
        optimizer.step()


def test_a_line_holds_what_was_measured(path: Path) -> None:
    optimizer = Fake()
    log = stepforge.MetricsLogger(optimizer, to=path, by=("group", "parameter"))
    log.note(loss=torch.tensor(2.0, dtype=torch.bfloat16), tokens=2**60 + 1)
    optimizer.step()

    (line,) = lines_of(path)
    assert line.pop("time") > 1.7e9
    assert line == {
        "step": 1,
        "lr": [0.5],
        "grad_norm": 0.1,  # and not 0.10000000149, the float32 next to it
        "skipped": 3,
        "loss": 2.0,
        "tokens": 2**60 + 1,
        "groups": [{"grad_norm": 0.1, "skipped": 3}],
        "parameters": {"0": {"lost": 0.0}, "1": {"lost": 0.25}},
    }
    assert isinstance(line["skipped"], int)


def test_what_telemetry_measures_is_written(path: Path) -> None:
    """A metric of one's own too. Oracle: ``metrics()``, to seven digits."""
    own = {"mean": lambda g, size: total(g) / size}
    optimizer = measuring(telemetry=own, max_grad_norm=1.0)
    with MetricsLogger(optimizer, to=path, by=("group", "parameter")):
        trained(optimizer, 1.0, 0.1)
    line = lines_of(path)[-1]
    for written, measured in (
        (line, optimizer.metrics()),
        (line["groups"][0], optimizer.metrics(by="group")[0]),
        (line["parameters"]["w"], optimizer.metrics(by="parameter")["w"]),
    ):
        expected = {name: float(f"{value.item():.7g}") for name, value in measured.items()}
        assert {"lost", "mean"} < set(expected)
        assert {name: written[name] for name in expected} == expected


def test_without_telemetry_totals_are_written(path: Path) -> None:
    optimizer = measuring(telemetry=False, max_grad_norm=1.0)
    with MetricsLogger(optimizer, to=path, by=()):
        trained(optimizer, 4.0)
    (line,) = lines_of(path)
    assert line.keys() == {"step", "time", "lr", "grad_norm", "clip_factor"}


def test_a_ratio_over_weights_of_zero_is_null(path: Path) -> None:
    optimizer = measuring(torch.zeros(3))
    MetricsLogger(optimizer, to=path)
    trained(optimizer, 0.0)
    (line,) = lines_of(path)
    assert line["parameters"]["w"]["update_ratio"] is line["update_ratio"] is None


@pytest.mark.parametrize("every", [1, 3])
def test_metrics_are_asked_for_and_read_in_due_steps_only(path, monkeypatch, every) -> None:
    optimizer = Fake()
    log = MetricsLogger(optimizer, to=path, every=every)
    reads = []
    for name in ("tolist", "item", "__float__", "__int__", "__bool__"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda t, plain=plain: (reads.append(t.dtype), plain(t))[1]
        )
    for _ in range(7):
        log.note(loss=torch.tensor(1.0))
        optimizer.step()

    assert [line["step"] for line in lines_of(path)] == [*range(every, 8, every)]
    assert optimizer.asked == [None, "parameter"] * (7 // every)
    # One for all floats and one for all integers.
    assert sorted(map(str, reads)) == sorted(["torch.float32", "torch.int64"] * (7 // every))


def test_an_explicit_call_writes_due_steps(path: Path) -> None:
    optimizer = Fake()
    log = MetricsLogger(optimizer, to=path, every=5, by=(), hook=False)
    for step in range(11):
        optimizer.step()
        log(step, loss=step / 2)

    assert [(line["step"], line["loss"]) for line in lines_of(path)] == [(0, 0), (5, 2.5), (10, 5)]
    assert "parameters" not in lines_of(path)[0]


def test_a_value_is_of_its_own_step(path: Path) -> None:
    optimizer = Fake()
    log = MetricsLogger(optimizer, to=path)
    log.note(loss=1.0, accuracy=0.5)
    log.note(loss=2.0)
    optimizer.step()
    optimizer.step()

    first, second = lines_of(path)
    assert (first["loss"], first["accuracy"]) == (2.0, 0.5)
    assert "loss" not in second


def test_a_noted_loss_keeps_no_graph(path: Path) -> None:
    optimizer = Fake()
    log = MetricsLogger(optimizer, to=path, every=100)
    weight = torch.ones(2, requires_grad=True)
    log.note(loss=(weight * weight).sum())
    assert all(not value.requires_grad for value in log._noted.values())


@pytest.mark.parametrize("by_keyword", [False, True])
def test_the_loss_of_a_closure_is_noted(path: Path, by_keyword: bool) -> None:
    optimizer = Fake()
    MetricsLogger(optimizer, to=path)

    def closure() -> torch.Tensor:
        return torch.tensor(0.25)

    returned = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
    assert returned == 0.25
    assert lines_of(path)[0]["loss"] == 0.25


def test_a_closure_without_a_loss_is_left_alone(path: Path) -> None:
    optimizer = Fake()
    MetricsLogger(optimizer, to=path)
    assert optimizer.step(lambda: None) is None
    assert "loss" not in lines_of(path)[0]


def test_fractions_have_seven_digits_and_counts_all_of_theirs(path: Path) -> None:
    optimizer = Fake()
    optimizer.values = {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in {
            "nonfinite": 123_456_789.0,
            "lost": 1 / 3,
            "grad_norm": 1e300 / 3,
        }.items()
    }
    MetricsLogger(optimizer, to=path)
    optimizer.step()
    (line,) = lines_of(path)
    assert line["nonfinite"] == 123_456_789
    assert (line["lost"], line["grad_norm"]) == (0.3333333, 3.333333e299)


def test_numbers_that_are_not_finite_are_null(path: Path) -> None:
    optimizer = Fake()
    optimizer.values = {"grad_norm": torch.tensor(math.nan), "grad_max": torch.tensor(-math.inf)}
    log = MetricsLogger(optimizer, to=path)
    log.note(loss=math.inf)
    optimizer.step()
    (line,) = lines_of(path)
    assert [line[name] for name in ("grad_norm", "grad_max", "loss")] == [None, None, None]


def test_learning_rates_are_listed_by_group_and_told_of_parameters(path: Path) -> None:
    weights = [("a", torch.zeros(1)), ("b", torch.zeros(1)), ("c", torch.zeros(1))]
    groups = [{"params": weights[:1]}, {"params": weights[1:], "lr": torch.tensor(0.125)}]
    optimizer = stepforge.Adam(groups, lr=0.5, telemetry=True)
    MetricsLogger(optimizer, to=path)
    trained(optimizer, 1.0)
    (line,) = lines_of(path)
    assert line["lr"] == [0.5, 0.125]
    assert {name: own["lr"] for name, own in line["parameters"].items()} == {
        "a": 0.5,
        "b": 0.125,
        "c": 0.125,
    }


def test_parameters_without_names_are_numbered_across_groups(path: Path) -> None:
    optimizer = Fake([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 0.25}])
    MetricsLogger(optimizer, to=path)
    optimizer.step()
    assert lines_of(path)[0]["parameters"] == {
        "0": {"lost": 0.0, "lr": 0.5},
        "1": {"lost": 0.25, "lr": 0.25},
    }


# Steps and resuming.


def test_a_resumed_run_continues_its_file_and_its_steps(path: Path) -> None:
    """Oracle: an uninterrupted run."""
    gradients = (1.0, 2.0, 3.0, 4.0, 5.0)
    whole, whole_path = measuring(), path.with_name("whole.jsonl")
    with MetricsLogger(whole, to=whole_path):
        trained(whole, *gradients)

    first = measuring()
    with MetricsLogger(first, to=path):
        trained(first, *gradients[:3])
    second = measuring(first.param_groups[0]["params"][0].detach())
    with MetricsLogger(second, to=path):
        second.load_state_dict(first.state_dict())
        trained(second, *gradients[3:])

    def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: line[name] for name in line if name != "time"} for line in lines]

    assert without_time(lines_of(path)) == without_time(lines_of(whole_path))
    assert [line["step"] for line in lines_of(path)] == [1, 2, 3, 4, 5]


def test_a_step_that_is_skipped_counts(path: Path) -> None:
    """The first step of a run, and the first one after loading."""
    optimizer = measuring(skip_nonfinite=True)
    MetricsLogger(optimizer, to=path)
    trained(optimizer, math.nan, 1.0, 1.0)  # two of them stepped
    optimizer.load_state_dict(optimizer.state_dict())
    trained(optimizer, math.inf)
    lines = lines_of(path)
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert [line["skipped"] for line in lines] == [1, 1, 1, 2]
    layers = [line["parameters"]["w"] for line in lines]
    assert [layer["nonfinite"] for layer in layers] == [3, 0, 0, 3]
    assert [layer["update_norm"] > 0 for layer in layers] == [False, True, True, False]
    assert [layer["lost"] for layer in layers] == [0, 0, 0, 0]


def test_steps_are_numbered_from_the_attribute(path: Path) -> None:
    optimizer = Fake()
    log = MetricsLogger(optimizer, to=path)
    log.step = 41
    optimizer.step()
    assert lines_of(path)[0]["step"] == 42


def test_a_line_that_a_killed_run_left_is_ended_first(path: Path) -> None:
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    optimizer = Fake()
    MetricsLogger(optimizer, to=path)
    optimizer.step()
    lines = path.read_text().splitlines()
    assert lines[:2] == ['{"step": 1}', '{"step": 2, "lo']
    assert json.loads(lines[2])["step"] == 1


# Files and other destinations.


def test_each_line_is_in_the_file_at_once_and_the_end_closes_it(path: Path) -> None:
    optimizer = Fake()
    with MetricsLogger(optimizer, to=str(path)) as log:
        optimizer.step()
        assert len(lines_of(path)) == 1
    optimizer.step()  # without hooks
    assert len(lines_of(path)) == 1
    log.close()  # once more does nothing
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_a_logger_dies_with_its_optimizer_and_leaves_no_open_file(path: Path) -> None:
    """Oracle: Python, which warns of files that are collected open."""
    optimizer = Fake()
    MetricsLogger(optimizer, to=path)
    gc.collect()
    optimizer.step()  # the optimizer has kept it
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        del optimizer
        gc.collect()
    assert not warned
    assert len(lines_of(path)) == 1


def test_a_given_file_stays_open() -> None:
    file = io.StringIO()
    optimizer = Fake()
    with MetricsLogger(optimizer, to=file):
        optimizer.step()
    assert json.loads(file.getvalue())["step"] == 1


class Writer:
    """The two methods of a SummaryWriter that are called."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}
        self.flushed = 0

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag, step] = value

    def flush(self) -> None:
        self.flushed += 1


def test_a_summary_writer_and_a_callable_get_flat_names(path: Path) -> None:
    optimizer = Fake()
    optimizer.values["grad_norm"] = torch.tensor(math.inf)
    writer, called = Writer(), []
    log = MetricsLogger(
        optimizer,
        to=[writer, lambda values, step: called.append((values, step)), path],
        by=["group", "parameter"],
    )
    log.note(loss=4)
    optimizer.step()
    log.close()

    expected = {
        "lr": 0.5,
        "loss": 4.0,
        "grad_norm": math.inf,
        "skipped": 3.0,
        "grad_norm/group_0": math.inf,
        "skipped/group_0": 3.0,
        "lost/0": 0.0,
        "lost/1": 0.25,
    }
    assert writer.scalars == {(name, 1): value for name, value in expected.items()}
    assert called == [(expected, 1)]
    assert len(lines_of(path)) == 1
    assert writer.flushed == 1


def test_tensorboard_writes_what_it_is_told(tmp_path: Path) -> None:
    """Oracle: TensorBoard's own reader."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    optimizer = Fake()
    writer = tensorboard(tmp_path / "runs")
    with MetricsLogger(optimizer, to=writer):
        optimizer.step()
        optimizer.step()
    events = reader.EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("lost/1")] == [(1, 0.25), (2, 0.25)]
    writer.close()


def test_without_tensorboard_one_sentence_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ModuleNotFoundError) as refused:
        tensorboard()
    assert str(refused.value) == (
        "stepforge.logging.tensorboard needs tensorboard: pip install tensorboard"
    )


# Errors.


class Full(io.StringIO):
    """A file on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_does_not_end_the_training() -> None:
    optimizer = measuring()
    log = MetricsLogger(optimizer, to=Full())
    with pytest.warns(RuntimeWarning, match="stops at step 1, .*No space left on device"):
        trained(optimizer, 1.0)
    trained(optimizer, 1.0, 1.0)  # without a warning
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 3
    assert log.step == 1


def test_a_full_disk_is_an_error_of_an_explicit_call() -> None:
    with pytest.raises(OSError, match="No space left"):
        MetricsLogger(Fake(), to=Full(), hook=False)(1)


def test_a_mistake_in_a_callable_is_raised() -> None:
    optimizer = Fake()
    MetricsLogger(optimizer, to=lambda values: None)
    with pytest.raises(TypeError, match="positional argument"):
        optimizer.step()


def test_bad_arguments_are_refused(path: Path) -> None:
    with pytest.raises(TypeError, match=r"needs an optimizer with metrics\(\).*SGD has none"):
        MetricsLogger(torch.optim.SGD([torch.zeros(1)]), to=path)
    with pytest.raises(ValueError, match="every must be an integer >= 1, but got 0"):
        MetricsLogger(Fake(), to=path, every=0)
    with pytest.raises(ValueError, match="by takes 'group' and 'parameter', but got 'layer'"):
        MetricsLogger(Fake(), to=path, by="layer")
    with pytest.raises(ValueError, match=r"by parameter, which Adam .* with telemetry=True; by="):
        MetricsLogger(measuring(telemetry=False, max_grad_norm=1.0), to=path)
    with pytest.raises(ValueError, match="'lr' is written by the logger: choose another name"):
        MetricsLogger(measuring(telemetry={"lr": lambda g: total(g)}), to=path, by=())
    with pytest.raises(TypeError, match=r"writes to a path.*got 3"):
        MetricsLogger(Fake(), to=3)
    with path.with_name("bytes").open("wb") as file, pytest.raises(TypeError, match="for text"):
        MetricsLogger(Fake(), to=file)
    with pytest.raises(FileNotFoundError):
        MetricsLogger(Fake(), to=path.parent / "no" / "run.jsonl")
    assert not path.exists()


def test_a_refused_destination_closes_the_others(path: Path) -> None:
    """Oracle: Python, which warns of files that are collected open."""
    optimizer = Fake()
    with pytest.raises(TypeError, match="got None"):
        MetricsLogger(optimizer, to=[path, None])
    gc.collect()
    assert not optimizer._optimizer_step_post_hooks


def test_bad_values_are_refused(path: Path) -> None:
    log = MetricsLogger(Fake(), to=path)
    with pytest.raises(TypeError, match=r"loss must be .* one element, but got shape \(2,\)"):
        log.note(loss=torch.ones(2))
    with pytest.raises(TypeError, match=r"loss must be .* but got 'low'"):
        log.note(loss="low")
    with pytest.raises(ValueError, match="'lr' is written by the logger"):
        log.note(lr=0.1)
    with pytest.raises(RuntimeError, match=r"by itself: hand values to note"):
        log(1, loss=2.0)


# Processes and compilers.


@pytest.mark.parametrize(("rank", "writes"), [("0", True), ("3", False)])
def test_only_rank_0_writes_and_all_measure(path: Path, monkeypatch, rank, writes) -> None:
    """All processes put a sharded value together, whether an optimizer's or a noted one."""
    monkeypatch.setenv("RANK", rank)
    optimizer = Fake()
    MetricsLogger(optimizer, to=path)
    optimizer.step()
    assert path.exists() == writes
    assert optimizer.asked == [None, "parameter"]


def test_sharded_values_are_put_together(path: Path, mesh) -> None:
    from torch.distributed.tensor import DTensor, Replicate

    optimizer = Fake()
    log = MetricsLogger(optimizer, to=path)
    log.note(loss=DTensor.from_local(torch.tensor(2.0), mesh, [Replicate()]))
    optimizer.step()
    assert lines_of(path)[0]["loss"] == 2.0


def test_a_compiled_step_is_logged_too(path: Path) -> None:
    """Oracle: the plain step."""
    for file, compiled in ((path, True), (path.with_name("plain.jsonl"), False)):
        optimizer = measuring()
        MetricsLogger(optimizer, to=file)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for gradient in (1.0, 2.0, 3.0):
            optimizer.param_groups[0]["params"][0].grad = torch.full((3,), gradient)
            step()
    norms = [
        [(line["step"], line["parameters"]["w"]["param_norm"]) for line in lines_of(file)]
        for file in (path, path.with_name("plain.jsonl"))
    ]
    assert norms[0] == norms[1]
    assert [step for step, _ in norms[0]] == [1, 2, 3]
