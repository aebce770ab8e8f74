"""Checkpoints of torch.optim and of this library continue each other's runs.

The oracle is the torch.optim twin: its run without a break where its checkpoint is loaded here, and
its own checkpoint where one of this library is loaded there, as torch loses something in loading
(it casts NAdam's ``mu_product`` to the parameter's dtype).
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
    each_optimizer,
    make_params,
    run,
    through_a_file,
    tolerance,
    twin_of,
)

BEFORE, AFTER = range(7), range(7, 15)
ADAMS = (stepforge.Adam, stepforge.AdamW)
BETAS = (stepforge.Adam, stepforge.AdamW, stepforge.NAdam, stepforge.RAdam)


class Case(NamedTuple):
    """A run that is interrupted."""

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
    options = {"lr": LR} | case.options
    if isinstance(options["lr"], torch.Tensor):
        options["lr"] = options["lr"].clone()
    return make(params, **options)


def bounds(case: Case, steps: int) -> dict[str, float]:
    """How far two ways to compute a run may lie apart.

    In bfloat16 the twin also rounds every intermediate result, of which its longest chain has
    about a dozen: an update of about LR is wrong by a dozen half units in each step, and twice
    that where decay is added to the gradient.
    """
    real = case.dtype.to_real()
    if real != torch.bfloat16:
        return tolerance(real, steps)
    return {"rtol": 0.0, "atol": steps * torch.finfo(real).eps * (1 + 12 * LR)}


def copies(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def interrupted(make: type, case: Case) -> tuple[dict[str, Any], list[torch.nn.Parameter]]:
    """The checkpoint of a run, as it comes out of a file, and the parameters."""
    params = make_params(dtype=case.dtype)
    optimizer = start(make, case, params)
    run(optimizer, params, BEFORE, uneven=True)
    return through_a_file(optimizer.state_dict()), params


def resumed(
    make: type, checkpoint: dict[str, Any], params: list[torch.nn.Parameter]
) -> tuple[Any, list[torch.nn.Parameter]]:
    own = copies(params)
    # Another learning rate, so that the checkpoint's has to be loaded.
    optimizer = make(own, lr=LR * 3)
    optimizer.load_state_dict(checkpoint)
    return optimizer, own


def assert_same_place(
    first: Any, params: list[torch.nn.Parameter], second: Any, others: Any, allowed: Any
) -> None:
    """Asserts that two optimizers have the same step counts and about the same parameters."""
    for p, q in zip(params, others, strict=True):
        assert float(first.state[p]["step"]) == float(second.state[q]["step"])
    assert_params_close(params, others, **allowed)


@every_case
def test_a_checkpoint_of_torch_optim_is_continued_as_torch_does(case: Case) -> None:
    twin_params = make_params(dtype=case.dtype)
    twin = start(twin_of(case.cls), case, twin_params)
    run(twin, twin_params, BEFORE, uneven=True)
    assert len({float(entry["step"]) for entry in twin.state.values()}) > 1
    checkpoint = through_a_file(twin.state_dict())
    ours, params = resumed(case.cls, checkpoint, twin_params)
    run(ours, params, AFTER, uneven=True)
    run(twin, twin_params, AFTER, uneven=True)
    assert_same_place(ours, params, twin, twin_params, bounds(case, len(AFTER)))


@every_case
def test_torch_optim_continues_a_checkpoint_of_this_library(case: Case) -> None:
    (ours, our_params), (theirs, their_params) = (
        resumed(twin_of(case.cls), *interrupted(make, case))
        for make in (case.cls, twin_of(case.cls))
    )
    run(ours, our_params, AFTER, uneven=True)
    run(theirs, their_params, AFTER, uneven=True)
    allowed = bounds(case, len(BEFORE) + len(AFTER))
    assert_same_place(ours, our_params, theirs, their_params, allowed)


@every_case
def test_every_state_of_torch_optim_arrives_bit_for_bit(case: Case) -> None:
    checkpoint, params = interrupted(twin_of(case.cls), case)
    optimizer, own = resumed(case.cls, checkpoint, params)
    for number, p in enumerate(own):
        assert_identical(dict(optimizer.state[p]), checkpoint["state"][number])


@every_case
def test_what_was_moved_there_and_back_is_the_same(case: Case) -> None:
    checkpoint, params = interrupted(case.cls, case)
    theirs, _ = resumed(twin_of(case.cls), checkpoint, params)
    back, _ = resumed(case.cls, through_a_file(theirs.state_dict()), params)
    if case.cls is stepforge.NAdam and case.dtype.is_floating_point:
        for entry in checkpoint["state"].values():  # torch.optim casts it as it loads
            entry["mu_product"] = entry["mu_product"].to(case.dtype)
    assert_identical(back.state_dict()["state"], checkpoint["state"])


@every_case
def test_both_write_the_options_that_the_other_reads(case: Case) -> None:
    ours, _ = interrupted(case.cls, case)
    theirs, _ = interrupted(twin_of(case.cls), case)
    (our_group,), (their_group,) = ours["param_groups"], theirs["param_groups"]
    assert_identical({name: our_group[name] for name in their_group}, their_group)
    # Distributed checkpoints have to have every option that the other asks for.
    assert set(our_group) == set(their_group)
    for number, entry in theirs["state"].items():
        described = {key: (x.dtype, x.shape) for key, x in entry.items()}
        assert {key: (x.dtype, x.shape) for key, x in ours["state"][number].items()} == described


def _split(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2], "lr": 0.3, "weight_decay": 0.5}, {"params": params[2:]}]


def _named(params: list[torch.nn.Parameter]) -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"layer{index}", p) for index, p in enumerate(params)]


@pytest.mark.parametrize("form", [_split, _named], ids=["groups", "names"])
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
    moved.load_state_dict(through_a_file(saved.state_dict()))
    for p, q in zip(own, params, strict=True):
        p.data.copy_(q.data)
    run(moved, own, AFTER)
    run(expected, control, AFTER)
    assert_params_close(own, control, **tolerance(torch.float32, len(BEFORE) + len(AFTER)))
    for key in ("lr", "weight_decay", "param_names"):
        assert [group.get(key) for group in moved.param_groups] == [
            group.get(key) for group in expected.param_groups
        ]
