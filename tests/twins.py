"""The five optimizers beside their torch.optim twins, and how the tests here drive them."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch

import stepforge

OPTIMIZERS = (
    stepforge.Adagrad,
    stepforge.Adam,
    stepforge.AdamW,
    stepforge.NAdam,
    stepforge.RAdam,
)
SHAPES = ((3, 4), (5,), ())
LR = 0.1

each_optimizer = pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)


def twin_of(cls: type) -> type[torch.optim.Optimizer]:
    return getattr(torch.optim, cls.__name__)


def tolerance(dtype: torch.dtype, steps: int) -> dict[str, float]:
    """How far two right ways to compute a trajectory may lie apart.

    Each way rounds a parameter once a step, by half a unit in the last place of a magnitude below
    4: half of ``4 * eps``. The rounding errors of an update are far smaller, as updates are about
    ``LR`` in size.
    """
    return {"rtol": 0.0, "atol": 4 * steps * torch.finfo(dtype).eps}


def make_params(
    shapes: Iterable[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[torch.nn.Parameter]:
    """Parameters that are the same at every call."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes
    ]


def give_gradients(params: list[torch.nn.Parameter], step: int, *, uneven: bool = False) -> None:
    """Gradients that follow from the number of the step and the parameter's position alone.

    Args:
        params: the parameters.
        step: the number of the step.
        uneven: leave every parameter without a gradient at some step or other, so that their
            step counts come to differ.
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
    """Steps an optimizer over a range of the gradients of :func:`give_gradients`."""
    for step in steps:
        give_gradients(params, step, uneven=uneven)
        optimizer.step()


def through_a_file(value: Any) -> Any:
    """What arrives when a value is saved and loaded safely."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def frozen(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A deep copy of all that an optimizer holds: parameters, gradients, state and options."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    names = {p: number for number, p in enumerate(params) if isinstance(p, torch.Tensor)}
    return {
        "params": [_copied(p) for p in params],
        "grads": [_copied(p.grad) for p in params],
        "state": {names.get(key, key): _copied(entry) for key, entry in optimizer.state.items()},
        "groups": [
            {name: _copied(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ],
        "defaults": _copied(optimizer.defaults),
    }


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return copy.deepcopy(value)


def assert_identical(actual: Any, expected: Any, path: str = "") -> None:
    """Asserts that two nested values are the same bit for bit: types, dtypes and NaN too."""
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
    """Asserts that an optimizer holds exactly what it held at :func:`frozen`."""
    assert_identical(frozen(optimizer), before)


def assert_params_close(
    actual: list[torch.nn.Parameter], expected: list[torch.nn.Parameter], **bounds: float
) -> None:
    for index, pair in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(*pair, **bounds, msg=lambda m, i=index: f"parameter {i}: {m}")
