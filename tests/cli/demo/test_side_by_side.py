"""Side-by-side training, the comparison behind the demo."""

from __future__ import annotations

import pytest
import torch

from stepforge.cli.demo.digits import LEARNING_RATES, load_digits
from stepforge.cli.demo.result_tables import tabulate
from stepforge.cli.demo.side_by_side import (
    Variant,
    largest_difference,
    one_step_difference,
    train,
)
from stepforge.cli.demo.variants import OURS, TWIN, VARIANTS
from stepforge.rules import ALL


@pytest.fixture(scope="module")
def against_itself():
    again = Variant("again", "the twin again", TWIN.make)
    return train(load_digits(), "RAdam", 3e-3, [TWIN, again], TWIN, epochs=1, seed=3)


def test_a_twin_does_not_differ_from_itself(against_itself):
    trace = against_itself.traces["again"]
    assert trace.one_step == 0
    assert set(trace.differences) == {0.0}
    assert trace.losses == against_itself.traces["twin"].losses


def test_the_comparison_sees_a_difference():
    """Oracle for zeros: another learning rate must make a difference."""
    faster = Variant("faster", "", lambda name, params, lr: TWIN.make(name, params, 2 * lr))
    result = train(load_digits(), "Adagrad", 1e-2, [TWIN, faster], TWIN, epochs=1, seed=0)
    assert result.traces["faster"].differences[0] > 5e-3


def test_every_optimizer_has_a_learning_rate():
    assert set(LEARNING_RATES) == set(ALL)


@pytest.mark.parametrize("optimizer", LEARNING_RATES)
def test_ours_stays_with_the_twin(optimizer):
    """Train one epoch. A step rounds by about 1e-7, and this network does not amplify it."""
    lr = LEARNING_RATES[optimizer]
    result = train(load_digits(), optimizer, lr, VARIANTS, TWIN, epochs=1, seed=0)
    ours, twin = result.traces[OURS.name], result.traces[TWIN.name]
    assert ours.one_step is not None
    assert ours.one_step < 2.5e-7  # two units of a weight near 1
    assert ours.differences[-1] < 1e-5
    assert ours.accuracies == pytest.approx(twin.accuracies, abs=1.5 / 360)
    assert ours.losses == pytest.approx(twin.losses, rel=1e-4)
    assert twin.one_step is None
    assert [len(table.rows[0]) for table in tabulate([result])] == [6, 6]


@pytest.mark.parametrize("optimizer", LEARNING_RATES)
def test_torch_s_fastest_way_is_its_fused_one_if_there_is_one(optimizer):
    """Oracle: torch.optim itself, which refuses ``fused`` if it has no such path."""
    try:
        getattr(torch.optim, optimizer)([torch.zeros(1)], fused=True)
        way = "fused"
    except TypeError:
        way = "foreach"
    (fastest,) = (variant for variant in VARIANTS if variant.only_timed)
    (group,) = fastest.make(optimizer, [torch.zeros(1)], 0.1).param_groups
    assert {flag for flag in ("fused", "foreach") if group.get(flag)} == {way}


def test_a_variant_that_is_only_timed_steps_as_the_twin_does():
    """No network is trained, and there are only times. Oracle: the twin's weights."""
    shadow = Variant("shadow", "", TWIN.make, only_timed=True)
    result = train(load_digits(), "Adam", 1e-2, [TWIN, shadow], TWIN, epochs=1, seed=0)
    theirs, own = (
        [*result.traces[name].optimizer.param_groups[0]["params"]] for name in ("twin", "shadow")
    )
    assert all(map(torch.equal, own, theirs))
    assert not {p.data_ptr() for p in own} & {p.data_ptr() for p in theirs}
    trace = result.traces["shadow"]
    assert len(trace.step_seconds) == len(result.traces["twin"].step_seconds) > 0
    assert trace.losses == trace.accuracies == trace.differences == []
    assert trace.one_step is None


def test_one_step_leaves_the_original_alone():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    trained = torch.optim.Adam([p], lr=0.1)
    p.grad = torch.tensor([0.3, -0.2])
    trained.step()
    before, moment = p.detach().clone(), trained.state[p]["exp_avg"].clone()
    assert one_step_difference(OURS, TWIN, "Adam", 0.1, trained) < 2.5e-7
    assert torch.equal(p, before)
    assert torch.equal(trained.state[p]["exp_avg"], moment)
    assert trained.state[p]["step"] == 1


def test_largest_difference_shows_nan():
    assert largest_difference([torch.ones(2), torch.ones(1)], [torch.ones(2), torch.zeros(1)]) == 1
    difference = largest_difference(
        [torch.ones(1), torch.ones(1)], [torch.full((1,), torch.nan), torch.ones(1)]
    )
    assert difference != difference
