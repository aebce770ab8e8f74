"""Declarations of an optimizer. Oracle: the class body."""

import inspect
from typing import Any

import pytest
import torch

import stepforge
from stepforge.declare import Betas, NonNegative, full, hyper, scalar, zeros


def plain(h: Any, t: Any, p: Any, g: Any) -> Any:
    return p - h.lr * g


def with_momentum(h: Any, t: Any, p: Any, g: Any, m: Any) -> Any:
    m = h.momentum * m + g
    return p - h.lr * m, m


class Momentum(stepforge.Optimizer, rule=with_momentum):
    """Heavy ball."""

    lr: NonNegative = 0.1
    momentum: NonNegative = 0.5
    m = zeros("momentum_buffer")


def parameter(*values: float) -> torch.Tensor:
    p = torch.nn.Parameter(torch.tensor(values))
    p.grad = torch.ones_like(p)
    return p


def test_the_constructor_has_the_declared_parameters() -> None:
    signature = inspect.signature(Momentum)
    assert list(signature.parameters) == [
        "params",
        "lr",
        "momentum",
        "maximize",
        "foreach",
        "capturable",
        "differentiable",
        "fused",
        "state_format",
        "master_weight_bits",
        "stochastic_rounding",
        "rounding_seed",
        "max_grad_norm",
        "skip_nonfinite",
        "telemetry",
    ]
    assert inspect.signature(Momentum.__init__).parameters["lr"].default == 0.1
    assert signature.parameters["maximize"].kind is inspect.Parameter.KEYWORD_ONLY


def test_a_custom_rule_has_the_whole_contract() -> None:
    p = parameter(1.0, 2.0)
    optimizer = Momentum([p], 0.25, momentum=0.5)
    optimizer.step()
    optimizer.step()
    assert p.tolist() == [1.0 - 0.25 - 0.375, 2.0 - 0.25 - 0.375]
    assert optimizer.state[p]["momentum_buffer"].tolist() == [1.5, 1.5]
    assert optimizer.state[p]["step"] == 2
    other = Momentum([parameter(0.0, 0.0)])
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.25


def test_a_subclass_changes_a_default_and_keeps_the_order() -> None:
    class Faster(Momentum):
        lr: NonNegative = 0.9

    assert list(inspect.signature(Faster).parameters)[:3] == ["params", "lr", "momentum"]
    assert Faster([parameter(1.0)]).defaults["lr"] == 0.9


def test_a_subclass_fixes_a_value() -> None:
    class Fixed(Momentum):
        momentum: NonNegative = hyper(default=0.0, init=False)

    assert "momentum" not in inspect.signature(Fixed).parameters
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentum'"):
        Fixed([parameter(1.0)], momentum=0.5)
    with pytest.raises(ValueError, match=r"momentum is always 0\.0 in Fixed"):
        Fixed([{"params": [parameter(1.0)], "momentum": 0.5}])


def test_a_subclass_without_declarations_is_left_alone() -> None:
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.wrapped = optimizer

    dynamic = type("FabricMomentum", (Wrapper, Momentum), {})
    assert dynamic(3).wrapped == 3


def test_state_of_every_kind() -> None:
    def rule(h: Any, t: Any, p: Any, g: Any, s: Any, n: Any) -> Any:
        return p, s + g, n * 0.5

    class Kinds(stepforge.Optimizer, rule=rule):
        start: NonNegative = 3.0
        s, n = full("sum", init="start"), scalar("halves", init=8.0)

    p = parameter(1.0)
    optimizer = Kinds([p])
    optimizer.step()
    assert optimizer.state[p]["sum"].tolist() == [4.0]
    assert optimizer.state[p]["halves"] == 4.0
    assert optimizer.state[p]["halves"].dtype == torch.float32


def test_a_state_that_a_flag_turns_on() -> None:
    def rule(h: Any, t: Any, p: Any, g: Any, extra: Any) -> Any:
        return p - g, (extra + 1 if h.counting else extra)

    class Counting(stepforge.Optimizer, rule=rule):
        counting: bool = False
        extra = zeros("extra", when="counting")

    p = parameter(1.0)
    off = Counting([p])
    off.step()
    assert set(off.state[p]) == {"step"}
    off.param_groups[0]["counting"] = True
    off.step()
    assert off.state[p]["extra"].tolist() == [1.0]


def test_an_optimizer_needs_a_rule() -> None:
    with pytest.raises(TypeError, match="Optimizer has no rule"):
        stepforge.Optimizer([parameter(1.0)])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda h, t, p, g: p, r"does not match its declared states"),
        (lambda h, t, p, g, v: (p, v), r"its arguments must be \(h, t, p, g, m\)"),
    ],
)
def test_a_rule_must_take_its_states(rule: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):

        class Broken(stepforge.Optimizer, rule=rule):
            m = zeros("exp_avg")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda h, t, p, g, m: p, "returned 1 values; it must return p, m"),
        (lambda h, t, p, g, m: (p, 0.0), "returned `0.0` for m, which has one value for every"),
        (lambda h, t, p, g, m: (h.lr, m), "returned `lr` for p"),
        (lambda h, t, p, g, m: (p > 0, m), "for p, which has one value for every element"),
        (
            lambda h, t, p, g, m: (p - h.rate * g, m),
            r"reads h\.rate, but declared are maximize, lr",
        ),
    ],
)
def test_a_rule_must_return_what_it_declares(rule: Any, message: str) -> None:
    class Broken(stepforge.Optimizer, rule=rule):
        lr: NonNegative = 1.0
        m = zeros("exp_avg")

    p = parameter(1.0)
    with pytest.raises((TypeError, AttributeError), match=message):
        Broken([p])
    assert p.tolist() == [1.0]


def test_a_method_of_tensors_is_not_one_of_symbols() -> None:
    def rule(h: Any, t: Any, p: Any, g: Any) -> Any:
        return p - g / g.norm()

    class Normed(stepforge.Optimizer, rule=rule):
        lr: NonNegative = 1.0

    with pytest.raises(AttributeError, match="`g` is a symbol, not a tensor, and has no `norm`"):
        Normed([parameter(1.0)])


def test_a_hyperparameter_needs_a_default_and_a_known_type() -> None:
    with pytest.raises(TypeError, match="hyperparameter lr of NoDefault has no default"):

        class NoDefault(stepforge.Optimizer, rule=plain):
            lr: NonNegative

    with pytest.raises(TypeError, match="hyperparameter lr is annotated with <class 'float'>"):

        class NoRange(stepforge.Optimizer, rule=plain):
            lr: float = 1.0


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), "0.1", None, True])
def test_a_range_is_checked(wrong: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"lr|learning rate"):
        Momentum([parameter(1.0)], lr=wrong)


@pytest.mark.parametrize("wrong", [(0.9,), 0.9, (0.9, 1.0), (-0.1, 0.5), "ab", (0.9, float("nan"))])
def test_a_tuple_is_checked(wrong: Any) -> None:
    def rule(h: Any, t: Any, p: Any, g: Any) -> Any:
        return p - h.betas[0] * g

    class Pair(stepforge.Optimizer, rule=rule):
        betas: Betas = (0.5, 0.5)

    assert Pair([parameter(1.0)], betas=[0.25, 0.5]).defaults["betas"] == (0.25, 0.5)
    with pytest.raises((ValueError, TypeError), match="beta"):
        Pair([parameter(1.0)], betas=wrong)
