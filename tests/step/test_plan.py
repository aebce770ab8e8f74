"""The plan of a step. Oracle: the same rows stepped by themselves."""

from typing import Any

import pytest
import torch

import stepforge
from stepforge.declare import NonNegative
from stepforge.ops import minimum, where
from stepforge.step.params import check_params, params_with_gradient

OPTIMIZERS = [
    stepforge.Adagrad,
    stepforge.Adam,
    stepforge.AdamW,
    stepforge.NAdam,
    stepforge.RAdam,
]


def train(
    cls: Any, groups: list[dict[str, Any]], steps: int = 7, **options: Any
) -> list[torch.Tensor]:
    """Steps fresh parameters of the groups' shapes; each group's gradients have their own seed."""
    made = []
    for number, group in enumerate(groups):
        generator = torch.Generator().manual_seed(number)
        p = torch.nn.Parameter(torch.randn(5, generator=generator))
        made.append(({**group, "params": [p]}, p, generator))
    optimizer = cls([group for group, _, _ in made], **options)
    for _ in range(steps):
        for _, p, generator in made:
            p.grad = torch.randn(5, generator=generator)
        optimizer.step()
    return [p.detach() for _, p, _ in made]


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_groups_that_run_together_do_not_mix(cls: Any) -> None:
    groups = [{"lr": 0.1}, {"lr": 0.01, "weight_decay": 0.3}, {"lr": torch.tensor(0.02)}, {}]
    together = train(cls, groups)
    for number in range(len(groups)):
        padding = [{} for _ in range(number)]
        alone = train(cls, [*padding, groups[number]])[-1]
        assert torch.equal(together[number], alone)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("foreach", [None, False, True])
def test_values_on_the_device_agree_with_those_of_the_host(cls: Any, foreach: bool | None) -> None:
    on_host = train(cls, [{}, {"lr": 0.05}], foreach=foreach)
    on_device = train(cls, [{}, {"lr": torch.tensor(0.05)}], foreach=foreach, capturable=True)
    for host, device in zip(on_host, on_device):
        # torch's pow and numpy's round float64 differently in the last place, which moves a
        # float32 coefficient by one unit at most, in the few that lie at a tie; lr as a float32
        # tensor is another number than 0.05 by 1.5e-8 of it.
        torch.testing.assert_close(device, host, rtol=1e-6, atol=1e-7)


def test_a_part_of_a_batch_is_no_other_computation() -> None:
    torch.manual_seed(0)
    big = torch.randn(700, 401)
    layouts = [big.clone(), big.t(), big[:, ::2], big.flatten(), big[None, :, None, :]]
    for foreach in (False, True):
        for layout in layouts:
            whole = torch.nn.Parameter(layout.detach().clone())
            cut = torch.nn.Parameter(layout.detach())
            assert whole.numel() > 2**17
            piecewise = [
                torch.nn.Parameter(row.clone()) for row in whole.detach().flatten().split(1000)
            ]
            gradient = torch.randn(layout.shape)
            whole.grad, cut.grad = gradient.contiguous(), gradient
            for p, g in zip(piecewise, gradient.flatten().split(1000)):
                p.grad = g
            for params in ([whole], [cut], piecewise):
                stepforge.AdamW(params, foreach=foreach).step()
            expected = torch.cat([p.detach() for p in piecewise])
            assert torch.equal(whole.detach().flatten(), expected)
            assert torch.equal(cut.detach().flatten(), expected)


def test_a_step_that_fails_its_checks_changes_nothing() -> None:
    good, bad = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    good.grad, bad.grad = torch.ones(2), torch.ones(2).to_sparse()
    optimizer = stepforge.Adam([good, bad])
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert good.tolist() == [1.0, 1.0]
    assert len(optimizer.state) == 0


def test_nothing_is_traced_on_the_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from stepforge import expr

    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = stepforge.RAdam([p])
    optimizer.step()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("traced again")

    monkeypatch.setattr(expr.Trace, "apply", refuse)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()


class Logged(torch.Tensor):
    """A gradient that may have no memory of its own, as far as anyone can tell."""


def test_a_gradient_of_another_class_is_asked_about_by_itself() -> None:
    plain, special = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    plain.grad, special.grad = torch.ones(3), torch.ones(3).as_subclass(Logged)
    optimizer = stepforge.Adam([plain, special])
    found = params_with_gradient(optimizer.param_groups, optimizer.state)
    params = check_params(optimizer.rule, found, sparse_problem=None)
    assert [param.choice.backend.name for param in params] == ["native", "foreach"]


def test_a_rule_may_hold_an_infinite_number() -> None:
    def rule(h: Any, t: Any, p: Any, g: Any) -> Any:
        return p - minimum(h.lr, float("inf")) * g * where(t > float("-inf"), 1.0, float("nan"))

    class Bounded(stepforge.Optimizer, rule=rule):
        lr: NonNegative = 0.5

    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    Bounded([p]).step()
    assert p.tolist() == [0.5, 0.5, 0.5]
