"""experiments/host_time.py: launches do nothing, and nothing else is left out.

Oracles: parameters, which only a launch changes; tables by hand. Times are never judged.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import stepforge
from experiments.gpu_report import with_table
from experiments.host_time import (
    COUNTS,
    DEFAULT,
    PAGE,
    TORCH,
    WAYS,
    Way,
    measured,
    page_table,
    without_launches,
)
from experiments.host_time import _Operations as Operations
from experiments.host_time import _Runner as Runner

pytest.importorskip("triton")

GRADIENTS = [torch.full((1,), 2.0) for _ in range(3)]


def stepped(way: Way, operations: Operations) -> Runner:
    """Return a runner after two steps, of which the second is a kept one."""
    runner = Runner(way, 3, operations)
    for _ in range(2):
        runner.set_gradients(GRADIENTS)
        runner.step()
    return runner


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_only_torchs_own_operations_change_parameters(way: Way) -> None:
    """Ours are served by the backend of a GPU, which launches nothing."""
    operations = Operations()
    with without_launches(), operations.switched():
        runner = stepped(way, operations)
        if way.library is stepforge:
            served = stepforge.explain(runner.optimizer).served
            assert [each.backend for each in served] == ["triton"]
    changed = [not torch.equal(p, torch.ones(1)) for p in runner.params]
    assert changed == 3 * [way is TORCH]


@pytest.mark.parametrize("way", WAYS[:3], ids=lambda way: way.name)
def test_scalars_are_where_they_are_on_a_gpu(way: Way) -> None:
    """Oracle: the options of which PyTorch says that they keep steps on the device."""
    with without_launches():
        runner = stepped(way, Operations())
    plan = runner.optimizer._stepper.plans.latest
    assert plan is not None, "a step is kept"
    assert [launch.uniform.on_device for launch in plan.launches] == [bool(way.options)]


def test_everything_is_put_back() -> None:
    p = torch.ones(1, requires_grad=True)
    p.grad = torch.ones(1)
    originals = torch._fused_adamw_, torch._foreach_add_
    with without_launches(), Operations().switched():
        assert torch._fused_adamw_ is not originals[0]
    assert (torch._fused_adamw_, torch._foreach_add_) == originals
    stepforge.AdamW([p]).step()
    assert not torch.equal(p, torch.ones(1))


def test_all_ways_are_timed() -> None:
    found = measured(2, rounds=1, steps=1)
    assert tuple(found) == WAYS
    assert all(seconds > 0 for seconds in found.values())


def test_the_table_has_ratios_to_the_default_and_to_torch() -> None:
    times = (0.002, 0.003, 0.001, 0.004, 0.0025)
    lines = page_table({7: dict(zip(WAYS, times, strict=True))}).splitlines()
    assert lines[0] == "| AdamW | 7 tensors, ms | of the default | of torch's |"
    assert lines[2] == f"| {DEFAULT.name} | 2.00 | 1.00 | 0.50 |"
    assert lines[3] == "| `fused=True` | 3.00 | 1.50 | 0.75 |"
    assert lines[5] == f"| {TORCH.name} | 4.00 | 2.00 | 1.00 |"


def test_the_page_has_a_table_of_all_ways() -> None:
    """Oracle: the ways of the script. Its figures are those of one machine."""
    page = Path(PAGE).read_text(encoding="utf-8")
    section = page.split("<!-- host time -->\n")[1].split("\n<!-- end of host time -->")[0]
    assert [line.split(" | ")[0] for line in section.splitlines()[2:]] == [
        f"| {way.name}" for way in WAYS
    ]
    assert all(f"{count} tensors" in section for count in COUNTS)
    assert with_table(page, section, "host time") == page
    replaced = with_table(page, "new", "host time")
    assert replaced == page.replace(section, "new")
