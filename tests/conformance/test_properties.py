"""Whatever is stepped together, each parameter comes out as it would alone.

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

#: Values of the options that are numbers: usual ones, and the ends of their ranges.
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
class Member:
    """A parameter and the gradients that it meets; None in steps in which it has none."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    wild: bool
    seed: int
    gradient_layouts: tuple[str | None, ...]

    def values(self) -> torch.Tensor:
        return normal(self.shape, self.dtype, self.seed)

    def gradients(self) -> list[torch.Tensor | None]:
        draw = extreme if self.wild else normal
        return [
            None
            if layout is None
            else GRADIENT_LAYOUTS[layout](draw(self.shape, self.dtype, self.seed + step + 1))
            for step, layout in enumerate(self.gradient_layouts)
        ]


def options(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Options of one optimizer; all are set."""
    taken = OPTIMIZERS[name].theirs([torch.ones(())]).defaults
    numbers = {option: values for option, values in NUMBERS.items() if option in taken}
    return st.fixed_dictionaries(numbers | {flag: st.booleans() for flag in OPTIMIZERS[name].flags})


def members(steps: int) -> st.SearchStrategy[Member]:
    return st.builds(
        Member,
        shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
        dtype=st.sampled_from(list(DTYPES.values())),
        layout=st.sampled_from(list(LAYOUTS)),
        wild=st.booleans(),
        seed=st.integers(0, 10_000),
        gradient_layouts=st.tuples(*[st.none() | st.sampled_from(list(GRADIENT_LAYOUTS))] * steps),
    )


def groups(name: str) -> st.SearchStrategy[list[tuple[dict[str, Any], list[Member]]]]:
    """Options and members of each param group. One group at least has a parameter."""
    return st.integers(1, 7).flatmap(
        lambda steps: st.lists(
            st.tuples(options(name), st.lists(members(steps), min_size=1, max_size=4)),
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
    def check(drawn: list[tuple[dict[str, Any], list[Member]]]) -> None:
        described = [
            {"params": [parameter(m.values(), m.layout) for m in members], **chosen}
            for chosen, members in drawn
        ]
        parameters = [p for group in described for p in group["params"]]
        gradients = [m.gradients() for _, members in drawn for m in members]
        originals = [[None if g is None else contiguous(g) for g in row] for row in gradients]
        chosen = [chosen for chosen, members in drawn for _ in members]
        values = [contiguous(p) for p in parameters]
        with forced(backend):
            optimizer = cls(described)
            run(optimizer, parameters, list(zip(*gradients, strict=True)))
        for p, initial, row, own in zip(parameters, values, originals, chosen, strict=True):
            wanted = alone(cls, own, initial, row)
            assert_same_bits(outcome(optimizer, p), wanted, f"{tuple(p.shape)}, {p.dtype}:")
        for row, untouched in zip(gradients, originals, strict=True):
            for g, original in zip(row, untouched, strict=True):
                assert g is None or torch.equal(g, original)

    check()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "Adagrad"])
@given(betas=NUMBERS["betas"], eighths=st.lists(st.integers(-99, 99), min_size=1, max_size=9))
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
def test_an_average_of_equal_numbers_is_that_number(
    name: str, backend: str, betas: tuple[float, float], eighths: list[int]
) -> None:
    """Whatever the weights round to. The gradients have so few digits that squares are exact."""
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
