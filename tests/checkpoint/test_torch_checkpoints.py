"""A run saved by torch.optim continues here, and a run saved here continues in torch.optim.

Oracle from torch.optim to here: the twin's run without a break. Oracle from here to torch.optim:
the twin's own checkpoint, loaded in the same way, as torch loses something in loading (it casts
NAdam's ``mu_product`` to the parameter's dtype).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import stepforge
from tests.twins import (
    LR,
    OPTIMIZERS,
    assert_identical,
    assert_params_close,
    copy_params,
    each_optimizer,
    make_params,
    named_params,
    run,
    save_and_load,
    tolerance,
    twin_of,
)

BEFORE, AFTER = range(7), range(7, 15)
ADAMS = (stepforge.Adam, stepforge.AdamW)
BETAS = (stepforge.Adam, stepforge.AdamW, stepforge.NAdam, stepforge.RAdam)


class Case(NamedTuple):
    """A run that is saved and continued: an optimizer, its options, and its parameters' dtype."""

    cls: type
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32


VARIANTS: dict[str, tuple[tuple[type, ...], dict[str, Any]]] = {
    "plain": (OPTIMIZERS, {}),
    "weight decay": (OPTIMIZERS, {"weight_decay": 0.25}),
    "maximize": (OPTIMIZERS, {"maximize": True}),
    "tensor lr": (OPTIMIZERS, {"lr": torch.tensor(LR)}),
    "amsgrad": (ADAMS, {"amsgrad": True, "weight_decay": 0.25}),
    "betas": (BETAS, {"betas": (0.5, 0.75), "eps": 0.01}),
    "decoupled": (
        (stepforge.Adam, stepforge.NAdam, stepforge.RAdam),
        {"decoupled_weight_decay": True, "weight_decay": 0.25},
    ),
    "momentum_decay": ((stepforge.NAdam,), {"momentum_decay": 0.5}),
    "lr_decay": (
        (stepforge.Adagrad,),
        {"lr_decay": 0.5, "initial_accumulator_value": 0.25, "eps": 0.01},
    ),
}
DTYPES = (torch.float64, torch.bfloat16, torch.complex64, torch.complex128)
CASES = [
    pytest.param(Case(cls, options), id=f"{cls.__name__}-{name}")
    for name, (classes, options) in VARIANTS.items()
    for cls in classes
] + [
    pytest.param(
        Case(cls, {"weight_decay": 0.25}, dtype),
        id=f"{cls.__name__}-{str(dtype).removeprefix('torch.')}",
    )
    for dtype in DTYPES
    for cls in OPTIMIZERS
]
every_case = pytest.mark.parametrize("case", CASES)


def start(make: type, case: Case, params: list[torch.nn.Parameter]) -> Any:
    """Return a new optimizer of a case, of this library or its twin."""
    options = {"lr": LR} | case.options
    if isinstance(options["lr"], torch.Tensor):
        options["lr"] = options["lr"].clone()
    return make(params, **options)


def bounds(case: Case, steps: int) -> dict[str, float]:
    """Return how far two correct ways to compute a run may differ.

    In bfloat16 the twin also rounds every intermediate result, about a dozen in its longest chain.
    An update of about LR is wrong by a dozen half units in each step, and by twice that where
    decay is added to the gradient.
    """
    real = case.dtype.to_real()
    if real != torch.bfloat16:
        return tolerance(real, steps)
    return {"rtol": 0.0, "atol": steps * torch.finfo(real).eps * (1 + 12 * LR)}


def saved_run(make: type, case: Case) -> tuple[dict[str, Any], list[torch.nn.Parameter]]:
    """Return the checkpoint of a run, as loaded from a file, and the parameters."""
    params = make_params(dtype=case.dtype)
    optimizer = start(make, case, params)
    run(optimizer, params, BEFORE, uneven=True)
    return save_and_load(optimizer.state_dict()), params


def resumed(
    make: type, checkpoint: dict[str, Any], params: list[torch.nn.Parameter]
) -> tuple[Any, list[torch.nn.Parameter]]:
    """Return an optimizer that has loaded a checkpoint, and its copies of the parameters."""
    own = copy_params(params)
    # Another learning rate, so that the load has to replace it.
    optimizer = make(own, lr=LR * 3)
    optimizer.load_state_dict(checkpoint)
    return optimizer, own


def assert_same_progress(
    first: Any, params: list[torch.nn.Parameter], second: Any, others: Any, allowed: Any
) -> None:
    """Assert that two optimizers have equal step counts and close parameters."""
    for p, q in zip(params, others, strict=True):
        assert float(first.state[p]["step"]) == float(second.state[q]["step"])
    assert_params_close(params, others, **allowed)


@every_case
def test_a_checkpoint_of_torch_optim_is_continued_as_torch_does(case: Case) -> None:
    twin_params = make_params(dtype=case.dtype)
    twin = start(twin_of(case.cls), case, twin_params)
    run(twin, twin_params, BEFORE, uneven=True)
    assert len({float(param_state["step"]) for param_state in twin.state.values()}) > 1
    checkpoint = save_and_load(twin.state_dict())
    ours, params = resumed(case.cls, checkpoint, twin_params)
    run(ours, params, AFTER, uneven=True)
    run(twin, twin_params, AFTER, uneven=True)
    assert_same_progress(ours, params, twin, twin_params, bounds(case, len(AFTER)))


@every_case
def test_torch_optim_continues_a_checkpoint_of_this_library(case: Case) -> None:
    (ours, our_params), (theirs, their_params) = (
        resumed(twin_of(case.cls), *saved_run(make, case)) for make in (case.cls, twin_of(case.cls))
    )
    run(ours, our_params, AFTER, uneven=True)
    run(theirs, their_params, AFTER, uneven=True)
    allowed = bounds(case, len(BEFORE) + len(AFTER))
    assert_same_progress(ours, our_params, theirs, their_params, allowed)


@every_case
def test_every_state_of_torch_optim_arrives_bit_for_bit(case: Case) -> None:
    checkpoint, params = saved_run(twin_of(case.cls), case)
    optimizer, own = resumed(case.cls, checkpoint, params)
    for index, p in enumerate(own):
        assert_identical(dict(optimizer.state[p]), checkpoint["state"][index])


@every_case
def test_a_state_moved_to_torch_optim_and_back_is_the_same(case: Case) -> None:
    checkpoint, params = saved_run(case.cls, case)
    theirs, _ = resumed(twin_of(case.cls), checkpoint, params)
    back, _ = resumed(case.cls, save_and_load(theirs.state_dict()), params)
    if case.cls is stepforge.NAdam and case.dtype.is_floating_point:
        for param_state in checkpoint["state"].values():  # torch.optim casts it as it loads
            param_state["mu_product"] = param_state["mu_product"].to(case.dtype)
    assert_identical(back.state_dict()["state"], checkpoint["state"])


@every_case
def test_both_write_the_options_that_the_other_reads(case: Case) -> None:
    ours, _ = saved_run(case.cls, case)
    theirs, _ = saved_run(twin_of(case.cls), case)
    (our_group,), (their_group,) = ours["param_groups"], theirs["param_groups"]
    assert_identical({name: our_group[name] for name in their_group}, their_group)
    # A distributed checkpoint must have every option of the optimizer that loads it.
    assert set(our_group) == set(their_group)
    for index, their_state in theirs["state"].items():
        described = {key: (x.dtype, x.shape) for key, x in their_state.items()}
        assert {key: (x.dtype, x.shape) for key, x in ours["state"][index].items()} == described


def _split(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2], "lr": 0.3, "weight_decay": 0.5}, {"params": params[2:]}]


@pytest.mark.parametrize("form", [_split, named_params], ids=["groups", "names"])
@pytest.mark.parametrize("direction", ["to torch", "from torch"])
@each_optimizer
def test_groups_and_names_arrive_on_the_other_side(
    cls: type, direction: str, form: Callable[..., Any]
) -> None:
    source, target = (cls, twin_of(cls)) if direction == "to torch" else (twin_of(cls), cls)
    params, own, control = make_params(), make_params(), make_params()
    saved = source(form(params), lr=LR)
    moved, expected = target(form(own), lr=0.7), twin_of(cls)(form(control), lr=LR)
    run(saved, params, BEFORE)
    run(expected, control, BEFORE)
    moved.load_state_dict(save_and_load(saved.state_dict()))
    for p, q in zip(own, params, strict=True):
        p.data.copy_(q.data)
    run(moved, own, AFTER)
    run(expected, control, AFTER)
    assert_params_close(own, control, **tolerance(torch.float32, len(BEFORE) + len(AFTER)))
    for key in ("lr", "weight_decay", "param_names"):
        assert [group.get(key) for group in moved.param_groups] == [
            group.get(key) for group in expected.param_groups
        ]
