"""Plans: parameters that run in one launch. Oracle: the same parameters stepped alone."""

from typing import Any

import pytest
import torch

import stepforge
from stepforge.declare import NonNegative
from stepforge.ops import minimum, where
from stepforge.rules import ALL
from stepforge.step.params import check_params, params_with_gradient

every_optimizer = pytest.mark.parametrize("cls", ALL.values())


def train(
    cls: Any, groups: list[dict[str, Any]], steps: int = 7, **options: Any
) -> list[torch.Tensor]:
    """Step one new parameter per group; the index of a group is the seed of its values."""
    params, generators = [], []
    for index in range(len(groups)):
        generator = torch.Generator().manual_seed(index)
        params.append(torch.nn.Parameter(torch.randn(5, generator=generator)))
        generators.append(generator)
    optimizer = cls([{**group, "params": [p]} for group, p in zip(groups, params)], **options)
    for _ in range(steps):
        for p, generator in zip(params, generators):
            p.grad = torch.randn(5, generator=generator)
        optimizer.step()
    return [p.detach() for p in params]


@every_optimizer
def test_groups_that_run_together_do_not_mix(cls: Any) -> None:
    groups = [{"lr": 0.1}, {"lr": 0.01, "weight_decay": 0.3}, {"lr": torch.tensor(0.02)}, {}]
    together = train(cls, groups)
    for index in range(len(groups)):
        padding = [{} for _ in range(index)]
        alone = train(cls, [*padding, groups[index]])[-1]
        assert torch.equal(together[index], alone)


@every_optimizer
@pytest.mark.parametrize("foreach", [None, False, True])
def test_scalars_on_the_device_agree_with_scalars_on_the_host(
    cls: Any, foreach: bool | None
) -> None:
    on_host = train(cls, [{}, {"lr": 0.05}], foreach=foreach)
    on_device = train(cls, [{}, {"lr": torch.tensor(0.05)}], foreach=foreach, capturable=True)
    for host, device in zip(on_host, on_device):
        # The pow of torch and numpy differ in the last place of a float64. That changes a float32
        # coefficient by one unit at most, in the rare case of a tie. lr as a float32 tensor differs
        # from 0.05 by a relative 1.5e-8.
        torch.testing.assert_close(device, host, rtol=1e-6, atol=1e-7)


def test_a_part_of_a_batch_computes_the_same() -> None:
    torch.manual_seed(0)
    big = torch.randn(700, 401)
    layouts = [big.clone(), big.t(), big[:, ::2], big.flatten(), big[None, :, None, :]]
    for foreach in (False, True):
        for layout in layouts:
            whole = torch.nn.Parameter(layout.detach().clone())
            cut = torch.nn.Parameter(layout.detach())
            assert whole.numel() > 2**17
            piecewise = [
                torch.nn.Parameter(piece.clone()) for piece in whole.detach().flatten().split(1000)
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
    """A subclass of Tensor, which may have no memory of its own."""


def test_a_gradient_of_another_class_is_checked_by_itself() -> None:
    plain, special = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    plain.grad, special.grad = torch.ones(3), torch.ones(3).as_subclass(Logged)
    optimizer = stepforge.Adam([plain, special])
    found = params_with_gradient(optimizer.param_groups, optimizer.state)
    params = check_params(optimizer.rule, found, sparse_problem=None)
    assert [param.choice.backend.name for param in params] == ["native", "foreach"]


def test_a_rule_may_contain_infinite_constants() -> None:
    def rule(h: Any, t: Any, p: Any, g: Any) -> Any:
        return p - minimum(h.lr, float("inf")) * g * where(t > float("-inf"), 1.0, float("nan"))

    class Bounded(stepforge.Optimizer, rule=rule):
        lr: NonNegative = 0.5

    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    Bounded([p]).step()
    assert p.tolist() == [0.5, 0.5, 0.5]


def test_a_step_that_fails_for_one_option_leaves_no_other_behind() -> None:
    """Oracle: an optimizer whose options never changed. The first option converts, the last not."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    tried, steady = (stepforge.AdamW([p], lr=0.5) for p in params)
    (group,) = tried.param_groups
    for step in range(4):
        for p in params:
            p.grad = torch.full((3,), step + 1.0)
        if step == 2:
            known = group["lr"], group["eps"]
            group["lr"], group["eps"] = 0.125, "much"
            with pytest.raises((TypeError, ValueError)):
                tried.step()
            group["lr"], group["eps"] = known
        tried.step()
        steady.step()
        assert torch.equal(*params), f"step {step}"
