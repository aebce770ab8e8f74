"""Tensors that share memory: every backend gives the result of one parameter after another.

Oracles: the reference backend, bit for bit, which steps one parameter after another; and the
for-loop of torch.optim, within the rounding of a few float64 operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import stepforge
from tests.conformance.table import (
    BACKENDS,
    FORMATS,
    OPTIMIZERS,
    assert_same_bits,
    forced,
    normal,
    outcome,
)

STEPS = 3
SHAPE = (64, 65)  # large enough for int8 states
SOME_FORMATS = {"float32": (torch.float32, {})} | {
    name: FORMATS[name]
    for name in (
        "float32, int8 states",
        "bfloat16, 24 bits, int8 states",
        "float16 at random",
        "bfloat16, 32 bits, float32 states",
    )
}

Params = list[torch.nn.Parameter]


def tied_parameters(params: Params, optimizer: torch.optim.Optimizer) -> None:
    """Give two parameters the same memory."""
    params[1].data = params[0].data


def overlapping_parameters(params: Params, optimizer: torch.optim.Optimizer) -> None:
    """Make the second half of one parameter the first half of another."""
    buffer = torch.cat([params[0].data, params[1].data[32:]])
    params[0].data, params[1].data = buffer[:64], buffer[32:]


def transposed_tie(params: Params, optimizer: torch.optim.Optimizer) -> None:
    """Give two square parameters the same memory, one as the transpose of the other."""
    square = params[0].data[:, :64].contiguous()
    params[0].data, params[1].data = square, square.t()


def shared_states(params: Params, optimizer: torch.optim.Optimizer) -> None:
    """Give two parameters the same moments, and each its own step count."""
    first, second = (optimizer.state[p] for p in params[:2])
    second.update({key: x for key, x in first.items() if key not in ("step", "mu_product")})


def gradient_is_a_parameter(params: Params, optimizer: torch.optim.Optimizer) -> None:
    """Make one parameter the gradient of another, with its values at the time of that step."""
    params[1].grad = params[0].detach()


def gradient_is_its_own_parameter(params: Params, optimizer: torch.optim.Optimizer) -> None:
    """Make a parameter its own gradient, as weight decay would."""
    params[0].grad = params[0].detach()


def gradient_is_a_state(params: Params, optimizer: torch.optim.Optimizer) -> None:
    """Make a state of one parameter the gradient of another."""
    states = optimizer.state[params[0]].values()
    shared = [x for x in states if x.shape == params[1].shape and x.dtype == params[1].dtype]
    if shared:
        params[1].grad = shared[0]


TIES: list[Callable[[Params, torch.optim.Optimizer], None]] = [
    tied_parameters,
    overlapping_parameters,
    transposed_tie,
    shared_states,
    gradient_is_a_parameter,
    gradient_is_its_own_parameter,
    gradient_is_a_state,
]
#: The ties that last for all later steps. A gradient is tied in each step.
LASTING = TIES[:4]


def trained(
    cls: Any,
    tie: Callable[[Params, torch.optim.Optimizer], None],
    dtype: torch.dtype,
    **options: Any,
) -> list[dict[str, torch.Tensor]]:
    """Return the outcomes of three parameters. The first two are tied after a first step."""
    params = [torch.nn.Parameter(normal(SHAPE, dtype, seed)) for seed in range(3)]
    optimizer = cls(params, lr=0.05, **options)
    for step in range(STEPS):
        for seed, p in enumerate(params):
            p.grad = normal(p.shape, p.dtype, 10 * step + seed)
        if step == 1 or (step and tie not in LASTING):
            tie(params, optimizer)
            for p in params:
                if p.grad is not None and p.grad.shape != p.shape:
                    p.grad = normal(p.shape, p.dtype, step)
            if tie is transposed_tie:
                for p in params[:2]:
                    optimizer.state.pop(p)
        optimizer.step()
    return [outcome(optimizer, p) for p in params]


@pytest.mark.parametrize("format_", SOME_FORMATS)
@pytest.mark.parametrize("tie", TIES, ids=lambda tie: tie.__name__)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_shared_memory_gives_the_same_bits_on_every_backend(
    backend: str, tie: Any, format_: str
) -> None:
    dtype, options = SOME_FORMATS[format_]
    # NAdam has scalar states; other than that, what is shared does not depend on the rule.
    rules = (stepforge.AdamW, stepforge.NAdam) if format_ == "float32" else (stepforge.AdamW,)
    for cls in rules:
        with forced(backend):
            got = trained(cls, tie, dtype, **options)
        with forced("reference"):
            wanted = trained(cls, tie, dtype, **options)
        for ours, reference in zip(got, wanted):
            assert_same_bits(ours, reference, f"{cls.__name__}, {tie.__name__}, {format_}")


@pytest.mark.parametrize("tie", TIES, ids=lambda tie: tie.__name__)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shared_memory_is_stepped_as_by_torchs_for_loop(name: str, tie: Any) -> None:
    twins = OPTIMIZERS[name]
    # With decay torch's AdamW writes to a parameter before it reads a gradient in the same memory.
    got = trained(twins.ours, tie, torch.float64, weight_decay=0)
    wanted = trained(twins.theirs, tie, torch.float64, weight_decay=0, foreach=False)
    for ours, theirs in zip(got, wanted):
        # A lost update would be 0.05. Roundings of 1e-16 grow where an element crosses 0, to less
        # than 1e-10.
        torch.testing.assert_close(ours["p"], theirs["p"], rtol=1e-9, atol=1e-9)
