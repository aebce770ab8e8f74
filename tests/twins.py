"""The built-in optimizers and their torch.optim twins, and helpers that step and compare both."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch

from stepforge.rules import ALL

OPTIMIZERS = tuple(ALL.values())
SHAPES = ((3, 4), (5,), ())
LR = 0.1

each_optimizer = pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)


def twin_of(cls: type) -> type[torch.optim.Optimizer]:
    """Return the class of the same name in torch.optim."""
    return getattr(torch.optim, cls.__name__)


def tolerance(dtype: torch.dtype, steps: int) -> dict[str, float]:
    """Return how far two correct ways to compute the same steps may differ.

    Each way rounds a parameter once a step, by half a unit in the last place of a magnitude below
    4: half of ``4 * eps``. The rounding errors of an update are far smaller, as updates are about
    ``LR`` in size.
    """
    return {"rtol": 0.0, "atol": 4 * steps * torch.finfo(dtype).eps}


def make_params(
    shapes: Iterable[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[torch.nn.Parameter]:
    """Return new parameters, with the same values at every call."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes
    ]


def copy_params(params: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Return new parameters with the same values as these, and no gradients."""
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def named_params(
    params: list[torch.nn.Parameter], order: Iterable[int] | None = None
) -> list[tuple[str, torch.nn.Parameter]]:
    """Return pairs of a name and a parameter.

    Args:
        params: the parameters.
        order: the positions of the parameters to return. A name follows from the position in
            ``params``, so it does not depend on the order. By default all, in order.
    """
    order = range(len(params)) if order is None else order
    return [(f"layer{index}", params[index]) for index in order]


def give_gradients(params: list[torch.nn.Parameter], step: int, *, uneven: bool = False) -> None:
    """Set gradients that depend on the step and the parameter's position only.

    Args:
        params: the parameters.
        step: the step.
        uneven: leave every parameter without a gradient in some steps, so that their step counts
            differ.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    for index, p in enumerate(params):
        gradient = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = None if uneven and (step + index) % (index + 2) == 0 else gradient


def run(
    optimizer: torch.optim.Optimizer,
    params: list[torch.nn.Parameter],
    steps: range,
    *,
    uneven: bool = False,
) -> None:
    """Step an optimizer over a range of steps, with the gradients of :func:`give_gradients`."""
    for step in steps:
        give_gradients(params, step, uneven=uneven)
        optimizer.step()


def save_and_load(value: Any) -> Any:
    """Return a value after ``torch.save`` and a safe ``torch.load``."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a deep copy of an optimizer's parameters, gradients, state and options."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    positions = {p: index for index, p in enumerate(params) if isinstance(p, torch.Tensor)}
    return {
        "params": [_copy(p) for p in params],
        "grads": [_copy(p.grad) for p in params],
        "state": {positions.get(key, key): _copy(value) for key, value in optimizer.state.items()},
        "groups": [
            {name: _copy(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ],
        "defaults": _copy(optimizer.defaults),
    }


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return copy.deepcopy(value)


def assert_identical(actual: Any, expected: Any, path: str = "") -> None:
    """Assert that two nested values are equal bit for bit, types and dtypes included.

    A NaN equals any other NaN.
    """
    if isinstance(expected, torch.Tensor):
        assert isinstance(actual, torch.Tensor), path
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{path}: {m}"
        )
    elif isinstance(expected, Mapping):
        assert set(actual) == set(expected), path
        for key in expected:
            assert_identical(actual[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert type(actual) is type(expected), path
        assert len(actual) == len(expected), path
        for index, pair in enumerate(zip(actual, expected)):
            assert_identical(*pair, f"{path}[{index}]")
    else:
        assert type(actual) is type(expected), path
        assert actual == expected, path


def assert_unchanged(optimizer: torch.optim.Optimizer, before: dict[str, Any]) -> None:
    """Assert that an optimizer is exactly as it was when :func:`snapshot` returned ``before``."""
    assert_identical(snapshot(optimizer), before)


def assert_params_close(
    actual: list[torch.nn.Parameter], expected: list[torch.nn.Parameter], **bounds: float
) -> None:
    """Assert that parameters are close, within the bounds of ``torch.testing.assert_close``."""
    for index, pair in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(*pair, **bounds, msg=lambda m, i=index: f"parameter {i}: {m}")
