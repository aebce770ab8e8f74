"""Parameters stepped together have the same results as each of them stepped alone.

Oracle: the reference on contiguous copies, one parameter at a time. No tolerance: equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conformance.table import (
    DTYPES,
    FAST,
    GRADIENT_LAYOUTS,
    LAYOUTS,
    OPTIMIZERS,
    alone,
    assert_same_bits,
    contiguous,
    extreme,
    forced,
    normal,
    outcome,
    parameter,
    run,
)

EXAMPLES = 60

#: Values of the numeric options: usual ones, and the ends of their ranges.
NUMBERS: dict[str, st.SearchStrategy[Any]] = {
    "lr": st.sampled_from([0.0, 1e-3, 0.1, 1e10]) | st.floats(0, 1),
    "betas": st.tuples(*[st.sampled_from([0.0, 0.5, 0.9, 0.9999]) | st.floats(0, 0.9999)] * 2),
    "eps": st.sampled_from([0.0, 1e-8, 1.0, 1e-45]),
    "weight_decay": st.sampled_from([0.0, 0.1, 10.0]) | st.floats(0, 1),
    "momentum_decay": st.sampled_from([0.0, 4e-3, 1.0]),
    "lr_decay": st.sampled_from([0.0, 0.5]),
    "initial_accumulator_value": st.sampled_from([0.0, 0.1]),
}


@dataclass(frozen=True)
class ParamCase:
    """A parameter and its gradients, None in steps without one.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        layout: the name of its memory layout.
        extreme_gradients: True for gradients of every magnitude, False for normal ones.
        seed: the seed of its values and its gradients.
        gradient_layouts: the name of the layout of each step's gradient.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    extreme_gradients: bool
    seed: int
    gradient_layouts: tuple[str | None, ...]

    def values(self) -> torch.Tensor:
        return normal(self.shape, self.dtype, self.seed)

    def gradients(self) -> list[torch.Tensor | None]:
        draw = extreme if self.extreme_gradients else normal
        return [
            None
            if layout is None
            else GRADIENT_LAYOUTS[layout](draw(self.shape, self.dtype, self.seed + step + 1))
            for step, layout in enumerate(self.gradient_layouts)
        ]


def options(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Draw the options of an optimizer, all of them."""
    accepted = OPTIMIZERS[name].theirs([torch.ones(())]).defaults
    numbers = {option: values for option, values in NUMBERS.items() if option in accepted}
    return st.fixed_dictionaries(numbers | {flag: st.booleans() for flag in OPTIMIZERS[name].flags})


def param_cases(steps: int) -> st.SearchStrategy[ParamCase]:
    return st.builds(
        ParamCase,
        shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
        dtype=st.sampled_from(list(DTYPES.values())),
        layout=st.sampled_from(list(LAYOUTS)),
        extreme_gradients=st.booleans(),
        seed=st.integers(0, 10_000),
        gradient_layouts=st.tuples(*[st.none() | st.sampled_from(list(GRADIENT_LAYOUTS))] * steps),
    )


def groups(name: str) -> st.SearchStrategy[list[tuple[dict[str, Any], list[ParamCase]]]]:
    """Draw the options and the parameters of each param group."""
    return st.integers(1, 7).flatmap(
        lambda steps: st.lists(
            st.tuples(options(name), st.lists(param_cases(steps), min_size=1, max_size=4)),
            min_size=1,
            max_size=3,
        )
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_together_is_as_alone(name: str, backend: str) -> None:
    cls = OPTIMIZERS[name].ours

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(groups(name))
    def check(drawn: list[tuple[dict[str, Any], list[ParamCase]]]) -> None:
        described = [
            {"params": [parameter(x.values(), x.layout) for x in cases], **group_options}
            for group_options, cases in drawn
        ]
        parameters = [p for group in described for p in group["params"]]
        gradients = [x.gradients() for _, cases in drawn for x in cases]
        originals = [[None if g is None else contiguous(g) for g in of_p] for of_p in gradients]
        param_options = [group_options for group_options, cases in drawn for _ in cases]
        values = [contiguous(p) for p in parameters]
        with forced(backend):
            optimizer = cls(described)
            run(optimizer, parameters, list(zip(*gradients, strict=True)))
        for p, initial, of_p, own in zip(parameters, values, originals, param_options, strict=True):
            wanted = alone(cls, own, initial, of_p)
            assert_same_bits(outcome(optimizer, p), wanted, f"{tuple(p.shape)}, {p.dtype}:")
        for of_p, originals_of_p in zip(gradients, originals, strict=True):
            for g, original in zip(of_p, originals_of_p, strict=True):
                assert g is None or torch.equal(g, original)

    check()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "Adagrad"])
@given(betas=NUMBERS["betas"], eighths=st.lists(st.integers(-99, 99), min_size=1, max_size=9))
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
def test_an_average_of_equal_numbers_is_that_number(
    name: str, backend: str, betas: tuple[float, float], eighths: list[int]
) -> None:
    """The rounding of the weights must not matter. The squares of these gradients are exact."""
    g = torch.tensor(eighths, dtype=torch.float32) / 8
    p = parameter(torch.zeros_like(g))
    with forced(backend):
        optimizer = OPTIMIZERS[name].ours([p], betas=betas)
        run(optimizer, [p], [[g]])
        optimizer.state[p]["exp_avg"].copy_(g)
        optimizer.state[p]["exp_avg_sq"].copy_(g * g)
        run(optimizer, [p], [[g]])
    assert torch.equal(optimizer.state[p]["exp_avg"], g)
    assert torch.equal(optimizer.state[p]["exp_avg_sq"], g * g)
