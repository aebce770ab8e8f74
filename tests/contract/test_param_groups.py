"""Param groups: arguments that the constructor and ``add_param_group`` accept, keep and refuse.

Oracle: the torch.optim twin, its signature, its groups, and its parameters after steps.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import stepforge
from tests.old_torch import adagrad_takes_later_groups
from tests.twins import (
    LR,
    OPTIMIZERS,
    assert_identical,
    assert_params_close,
    assert_unchanged,
    each_optimizer,
    give_gradients,
    make_params,
    named_params,
    run,
    snapshot,
    tolerance,
    twin_of,
)

STEPS = 6


def _arguments(cls: type, kind: Any) -> list[tuple[str, Any]]:
    """Return the names and defaults of the constructor's arguments of a kind of ``inspect``."""
    parameters = inspect.signature(cls).parameters.values()
    return [(p.name, p.default) for p in parameters if p.kind is kind]


@each_optimizer
def test_positional_arguments_are_the_twins(cls: type) -> None:
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert _arguments(cls, positional) == _arguments(twin_of(cls), positional)


@each_optimizer
def test_keyword_only_arguments_include_the_twins(cls: type) -> None:
    keyword = inspect.Parameter.KEYWORD_ONLY
    assert dict(_arguments(twin_of(cls), keyword)).items() <= dict(_arguments(cls, keyword)).items()


@each_optimizer
def test_every_argument_can_be_given_by_position(cls: type) -> None:
    values: dict[str, Any] = {
        "lr": 0.25,
        "lr_decay": 0.5,
        "betas": (0.5, 0.75),
        "eps": 0.125,
        "weight_decay": 0.0625,
        "initial_accumulator_value": 2.0,
        "momentum_decay": 0.375,
        "amsgrad": True,
        "decoupled_weight_decay": True,
        "foreach": True,
    }
    names = [name for name, _ in _arguments(twin_of(cls), inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    (group,) = cls(make_params(), *(values[name] for name in names[1:])).param_groups
    assert {name: group[name] for name in names[1:]} == {name: values[name] for name in names[1:]}


def test_foreach_is_the_seventh_positional_argument_of_adagrad() -> None:
    optimizer = stepforge.Adagrad(make_params(), 0.1, 0, 0, 0, 1e-10, True)
    assert optimizer.param_groups[0]["foreach"] is True


@each_optimizer
def test_groups_and_defaults_hold_the_twins(cls: type) -> None:
    ours, theirs = cls(make_params()), twin_of(cls)(make_params())
    assert ours.defaults.items() >= theirs.defaults.items()
    assert ours.param_groups[0].keys() >= theirs.param_groups[0].keys()
    assert ours.param_groups[0].keys() == {*ours.defaults, "params"}


@each_optimizer
def test_repr_has_every_line_of_the_twins(cls: type) -> None:
    ours, theirs = repr(cls(make_params())).split("\n"), repr(twin_of(cls)(make_params()))
    assert [line for line in ours if line in theirs.split("\n")] == theirs.split("\n")
    assert ours[1:-1] == [ours[1], *sorted(ours[2:-1])]


@each_optimizer
def test_unknown_arguments_are_refused_by_name(cls: type) -> None:
    with pytest.raises(TypeError, match=rf"{cls.__name__}\(\).*'learning_rate'"):
        cls(make_params(), learning_rate=0.1)


def test_adamw_does_not_take_what_it_fixes() -> None:
    with pytest.raises(TypeError, match="decoupled_weight_decay"):
        stepforge.AdamW(make_params(), decoupled_weight_decay=True)
    with pytest.raises(ValueError, match="decoupled_weight_decay is always True in AdamW"):
        stepforge.AdamW([{"params": make_params(), "decoupled_weight_decay": False}])


FORMS: dict[str, Callable[[list[torch.nn.Parameter]], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda params: (p for p in params),
    "dict values": lambda params: dict(enumerate(params)).values(),
    "dict keys": lambda params: dict.fromkeys(params).keys(),  # an ordered set
    "ParameterList": torch.nn.ParameterList,
    "one group": lambda params: [{"params": params}],
    "a group with a generator": lambda params: [{"params": (p for p in params)}],
    "a group a tensor": lambda params: [{"params": p} for p in params],
    "generator of groups": lambda params: ({"params": [p]} for p in params),
    "named": named_params,
    "named generator": lambda params: (pair for pair in named_params(params)),
    "named groups": lambda params: [{"params": [pair]} for pair in named_params(params)],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@each_optimizer
def test_parameters_in_every_form(cls: type, form: Callable[..., Any]) -> None:
    params, twins = make_params(), make_params()
    optimizer, twin = cls(form(params), lr=LR), twin_of(cls)(form(twins), lr=LR)
    assert [len(group["params"]) for group in optimizer.param_groups] == [
        len(group["params"]) for group in twin.param_groups
    ]
    listed = itertools.chain(*(group["params"] for group in optimizer.param_groups))
    assert all(p is q for p, q in zip(listed, params, strict=True))
    assert [group.get("param_names") for group in optimizer.param_groups] == [
        group.get("param_names") for group in twin.param_groups
    ]
    run(optimizer, params, range(STEPS))
    run(twin, twins, range(STEPS))
    assert_params_close(params, twins, **tolerance(torch.float32, STEPS))


GROUP_OPTIONS: dict[str, dict[str, Any]] = {
    "lr": {"lr": 0.5},
    "weight_decay": {"weight_decay": 0.25},
    "eps": {"eps": 0.5},
    "maximize": {"maximize": True},
    "foreach": {"foreach": True},
    "not foreach": {"foreach": False},
}
OWN_GROUP_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "Adagrad": [{"lr_decay": 0.5}],
    "Adam": [{"betas": (0.5, 0.75)}, {"amsgrad": True}, {"decoupled_weight_decay": True}],
    "AdamW": [{"betas": (0.5, 0.75)}, {"amsgrad": True}],
    "NAdam": [{"betas": (0.5, 0.75)}, {"momentum_decay": 0.5}, {"decoupled_weight_decay": True}],
    "RAdam": [{"betas": (0.5, 0.75)}, {"decoupled_weight_decay": True}],
}
EVERY_GROUP_OPTION = [
    pytest.param(cls, options, id=f"{cls.__name__}-{options}")
    for cls in OPTIMIZERS
    for options in [*GROUP_OPTIONS.values(), *OWN_GROUP_OPTIONS[cls.__name__]]
]


@pytest.mark.parametrize(("cls", "options"), EVERY_GROUP_OPTION)
def test_each_group_has_its_own_options(cls: type, options: dict[str, Any]) -> None:
    def grouped(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[:1]}, {"params": params[1:], **options}]

    params, twins = make_params(), make_params()
    settings = {"lr": LR, "weight_decay": 0.125}
    optimizer = cls(grouped(params), **settings)
    twin = twin_of(cls)(grouped(twins), **settings)
    for name, value in options.items():
        assert optimizer.param_groups[0][name] == optimizer.defaults[name]
        assert optimizer.param_groups[1][name] == value
    run(optimizer, params, range(STEPS))
    run(twin, twins, range(STEPS))
    assert_params_close(params, twins, **tolerance(torch.float32, STEPS))


def test_a_group_of_adagrad_has_its_own_initial_accumulator_value() -> None:
    # torch.optim ignores it. Oracle: the documentation of this library, which says that it counts.
    p, q = make_params([(2,), (2,)])
    optimizer = stepforge.Adagrad(
        [{"params": [p]}, {"params": [q], "initial_accumulator_value": 4.0}],
        initial_accumulator_value=1.0,
    )
    assert optimizer.state[p]["sum"].tolist() == [1.0, 1.0]
    assert optimizer.state[q]["sum"].tolist() == [4.0, 4.0]


@each_optimizer
def test_options_changed_in_a_group_take_effect(cls: type) -> None:
    params, twins = make_params(), make_params()
    optimizer, twin = cls(params, lr=LR), twin_of(cls)(twins, lr=LR)
    for opt, owned in ((optimizer, params), (twin, twins)):
        run(opt, owned, range(2))
        opt.param_groups[0]["lr"] = 0.5
        opt.param_groups[0]["weight_decay"] = 0.25
        opt.param_groups[0]["maximize"] = True
        run(opt, owned, range(2, STEPS))
    assert_params_close(params, twins, **tolerance(torch.float32, STEPS))


@pytest.mark.parametrize(
    "cls",
    [
        pytest.param(cls, marks=adagrad_takes_later_groups if cls is stepforge.Adagrad else ())
        for cls in OPTIMIZERS
    ],
    ids=lambda cls: cls.__name__,
)
def test_a_group_added_in_mid_training_starts_at_its_first_step(cls: type) -> None:
    params, twins = make_params(), make_params()
    optimizer, twin = cls(params[:1], lr=LR), twin_of(cls)(twins[:1], lr=LR)
    for opt, owned in ((optimizer, params), (twin, twins)):
        run(opt, owned, range(3))
        opt.add_param_group({"params": owned[1], "lr": 0.5})
        opt.add_param_group({"params": iter(owned[2:])})
        run(opt, owned, range(3, STEPS))
    assert [group["lr"] for group in optimizer.param_groups] == [LR, 0.5, LR]
    assert [float(optimizer.state[p]["step"]) for p in params] == [6.0, 3.0, 3.0]
    assert_params_close(params, twins, **tolerance(torch.float32, STEPS))


@each_optimizer
def test_the_callers_dicts_are_not_changed(cls: type) -> None:
    params = make_params()
    first: dict[str, Any] = {"params": params[:1], "lr": 0.5, "note": ["mine"]}
    second: dict[str, Any] = {"params": params[1]}
    third: dict[str, Any] = {"params": [("name", params[2])]}
    optimizer = cls([first])
    optimizer.add_param_group(second)
    run(optimizer, params, range(1))
    named = cls([third])
    assert_identical(first, {"params": params[:1], "lr": 0.5, "note": ["mine"]})
    assert first["params"] is not optimizer.param_groups[0]["params"]
    assert list(second) == ["params"]
    assert second["params"] is params[1]
    assert list(third) == ["params"]
    assert third["params"][0][0] == "name"
    assert named.param_groups[0] is not third


@each_optimizer
def test_the_callers_list_can_grow_without_growing_the_group(cls: type) -> None:
    params = make_params()
    given = params[:2]
    optimizer = cls(given)
    given.append(params[2])
    assert len(optimizer.param_groups[0]["params"]) == 2


@each_optimizer
def test_extra_keys_are_kept(cls: type) -> None:
    params = make_params()
    optimizer = cls([{"params": params, "note": "first", "scale": 3}])
    run(optimizer, params, range(1))
    assert optimizer.param_groups[0]["note"] == "first"
    assert optimizer.state_dict()["param_groups"][0]["scale"] == 3


@each_optimizer
def test_a_duplicate_within_a_group_warns_and_is_stepped_once(cls: type) -> None:
    # The twin warns too, but its for-loop steps the parameter as often as it is listed.
    (p,), (q,) = make_params([(3,)]), make_params([(3,)])
    with pytest.warns(UserWarning, match=r"duplicate parameters.*once"):
        optimizer = cls([p, p], lr=LR)
    run(optimizer, [p], range(STEPS))
    run(twin_of(cls)([q], lr=LR), [q], range(STEPS))
    assert float(optimizer.state[p]["step"]) == STEPS
    assert_params_close([p], [q], **tolerance(torch.float32, STEPS))
    state = snapshot(optimizer)["state"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert_identical(snapshot(optimizer)["state"], state)


@each_optimizer
def test_a_parameter_in_two_groups_is_refused(cls: type) -> None:
    params = make_params()
    with pytest.raises(ValueError, match="more than one parameter group"):
        cls([{"params": params}, {"params": params[:1]}])
    optimizer = cls(params)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": params[2]})
    assert_unchanged(optimizer, before)


@each_optimizer
def test_names_are_for_all_or_for_none(cls: type) -> None:
    params = make_params()
    with pytest.raises(ValueError, match="Some param names are missing"):
        cls([("first", params[0]), params[1]])
    with pytest.raises(ValueError, match=r"with/without names.*without names"):
        cls([{"params": named_params(params[:1])}, {"params": params[1:]}])
    with pytest.raises(ValueError, match=r"with/without names.*with names"):
        cls([{"params": params[:1]}, {"params": named_params(params[1:])}])
    optimizer = cls(named_params(params[:1]))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": params[1:]})
    assert_unchanged(optimizer, before)


@each_optimizer
def test_names_of_every_group_are_saved(cls: type) -> None:
    params = make_params()
    optimizer = cls(named_params(params[:1]))
    optimizer.add_param_group({"params": [("added", params[1])]})
    saved = optimizer.state_dict()["param_groups"]
    assert [group["param_names"] for group in saved] == [["layer0"], ["added"]]


@each_optimizer
def test_sets_are_refused_as_they_have_no_order(cls: type) -> None:
    with pytest.raises(TypeError, match="ordered collections"):
        cls([{"params": set(make_params())}])


@each_optimizer
def test_parameters_without_gradients_and_empty_groups_pass(cls: type) -> None:
    idle = torch.zeros(2)
    params, twins = make_params(), make_params()
    optimizer = cls([{"params": []}, {"params": [idle, *params]}], lr=LR)
    run(optimizer, params, range(STEPS))
    run(twin_of(cls)(twins, lr=LR), twins, range(STEPS))
    assert idle.tolist() == [0.0, 0.0]
    assert_params_close(params, twins, **tolerance(torch.float32, STEPS))


@each_optimizer
def test_a_non_leaf_that_retains_its_gradient_is_taken(cls: type) -> None:
    (leaf,) = make_params([(3,)])
    (twin_leaf,) = make_params([(3,)])
    values = []
    for make, start in ((cls, leaf), (twin_of(cls), twin_leaf)):
        non_leaf = start * 2
        non_leaf.retain_grad()
        optimizer = make([non_leaf], lr=LR)
        (non_leaf**2).sum().backward()
        optimizer.step()
        values.append(non_leaf.detach())
    torch.testing.assert_close(*values, **tolerance(torch.float32, 1))


@each_optimizer
def test_differentiable_takes_non_leaves(cls: type) -> None:
    (leaf,) = make_params([(3,)])
    assert len(cls([leaf * 2], differentiable=True).param_groups[0]["params"]) == 1


@each_optimizer
def test_parameters_may_be_replaced_in_a_group(cls: type) -> None:
    params, replacements = make_params(), make_params()
    optimizer = cls(params, lr=LR)
    run(optimizer, params, range(2))
    optimizer.param_groups[0]["params"] = replacements
    give_gradients(params, 2)
    before = [p.detach().clone() for p in params]
    run(optimizer, replacements, range(2, 4))
    assert_identical([p.detach() for p in params], before)
    assert [float(optimizer.state[p]["step"]) for p in replacements] == [2.0, 2.0, 2.0]
