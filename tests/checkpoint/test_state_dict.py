"""``state_dict`` and ``load_state_dict`` between optimizers of this library.

Oracle of a round trip: the run without a break, bit for bit. Oracle of names, dtypes and shapes:
the torch.optim twin. Oracle of hooks: torch's documentation. A load that fails must leave
everything exactly as it was.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import stepforge
from stepforge import LoadResult, saving
from stepforge.hyperparameter import EXECUTION_FLAGS
from tests.twins import (
    LR,
    OPTIMIZERS,
    SHAPES,
    assert_identical,
    assert_params_close,
    assert_unchanged,
    copy_params,
    each_optimizer,
    give_gradients,
    make_params,
    named_params,
    run,
    save_and_load,
    snapshot,
    tolerance,
    twin_of,
)

Params = list[torch.nn.Parameter]


def trained(cls: type, steps: int = 3, shapes: Any = SHAPES, **options: Any) -> tuple[Any, Params]:
    """Return an optimizer and its parameters after some steps."""
    params = make_params(shapes)
    optimizer = cls(params, **{"lr": LR, **options})
    run(optimizer, params, range(steps))
    return optimizer, params


def moments_of(cls: type) -> list[str]:
    """Return the keys of the states that have an element for each element of the parameter."""
    optimizer, params = trained(cls, 1)
    return [key for key, value in optimizer.state[params[0]].items() if value.dim()]


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@each_optimizer
def test_a_round_trip_continues_bit_for_bit(cls: type, dtype: torch.dtype) -> None:
    settings = {"lr": LR, "weight_decay": 0.1}
    params = make_params(dtype=dtype)
    optimizer = cls(params, **settings)
    run(optimizer, params, range(4), uneven=True)
    resumed_params = copy_params(params)
    resumed = cls(resumed_params, lr=0.7)
    result = resumed.load_state_dict(save_and_load(optimizer.state_dict()))
    assert result == LoadResult([], [], [])
    assert repr(result) == "<All keys matched successfully>"
    assert_identical(resumed.state_dict(), optimizer.state_dict())
    run(optimizer, params, range(4, 9), uneven=True)
    run(resumed, resumed_params, range(4, 9), uneven=True)
    assert_identical(snapshot(resumed)["params"], snapshot(optimizer)["params"])
    assert_identical(snapshot(resumed)["state"], snapshot(optimizer)["state"])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str
)
@each_optimizer
def test_states_are_named_typed_and_shaped_as_the_twins(cls: type, dtype: torch.dtype) -> None:
    def described(make: type) -> dict[int, dict[str, Any]]:
        params = make_params(dtype=dtype)
        optimizer = make(params)
        run(optimizer, params, range(2))
        state = optimizer.state_dict()["state"]
        return {
            index: {key: (x.dtype, x.shape, x.stride()) for key, x in param_state.items()}
            for index, param_state in state.items()
        }

    assert described(cls) == described(twin_of(cls))


@each_optimizer
def test_the_state_dict_has_the_twins_structure(cls: type) -> None:
    ours = trained(cls)[0].state_dict()
    theirs = trained(twin_of(cls))[0].state_dict()
    assert list(ours) == list(theirs)
    assert list(ours["state"]) == list(theirs["state"])
    assert set(ours["state"][0]) == set(theirs["state"][0])
    assert ours["param_groups"][0].items() >= theirs["param_groups"][0].items()


@each_optimizer
def test_states_stand_in_the_twins_order(cls: type) -> None:
    # Equal runs must write equal checkpoints, byte for byte, so no order may depend on the process.
    def order(make: type) -> list[str]:
        return list(trained(make)[0].state_dict()["state"][0])

    assert order(cls) == order(twin_of(cls))


@each_optimizer
def test_the_state_before_the_first_step_is_the_twins(cls: type) -> None:
    assert_identical(
        cls(make_params()).state_dict()["state"], twin_of(cls)(make_params()).state_dict()["state"]
    )


@each_optimizer
def test_parameters_that_were_never_stepped_have_no_more_state_than_the_twins(cls: type) -> None:
    params, twins = make_params(), make_params()
    optimizer, twin = cls(params, lr=LR), twin_of(cls)(twins, lr=LR)
    for opt, owned in ((optimizer, params), (twin, twins)):
        give_gradients(owned, 0)
        owned[1].grad = None
        opt.step()
    assert list(optimizer.state_dict()["state"]) == list(twin.state_dict()["state"])
    resumed = cls(make_params())
    resumed.load_state_dict(optimizer.state_dict())
    assert_identical(resumed.state_dict(), optimizer.state_dict())


@each_optimizer
def test_loading_over_a_trained_optimizer_replaces_its_state(cls: type) -> None:
    fresh = cls(make_params(), lr=LR)
    optimizer, params = trained(cls, 5)
    optimizer.load_state_dict(fresh.state_dict())
    assert_identical(optimizer.state_dict(), fresh.state_dict())
    for p, q in zip(params, make_params(), strict=True):
        p.data.copy_(q.data)
    run(optimizer, params, range(2))
    expected, _ = trained(cls, 2)
    assert_identical(snapshot(optimizer)["params"], snapshot(expected)["params"])


# Aliasing


@each_optimizer
def test_stepping_the_source_does_not_move_the_copy(cls: type) -> None:
    source, source_params = trained(cls)
    copied = cls(make_params(), lr=LR)
    copied.load_state_dict(source.state_dict())
    before = snapshot(copied)
    run(source, source_params, range(3, 5))
    assert_unchanged(copied, before)


@each_optimizer
def test_stepping_the_copy_does_not_move_the_source(cls: type) -> None:
    source, _ = trained(cls)
    params = make_params()
    copied = cls(params, lr=LR)
    copied.load_state_dict(source.state_dict())
    before = snapshot(source)
    run(copied, params, range(3, 5))
    assert_unchanged(source, before)


@each_optimizer
def test_the_state_dict_may_be_changed_after_loading(cls: type) -> None:
    source, _ = trained(cls, lr=torch.tensor(0.1))
    source.state["note"] = ["mine"]
    source.param_groups[0]["note"] = ["mine"]
    saved = copy.deepcopy(source.state_dict())
    copied = cls(make_params())
    copied.load_state_dict(saved)
    before = snapshot(copied)
    for param_state in itertools.islice(saved["state"].values(), len(SHAPES)):
        for tensor in param_state.values():
            tensor.fill_(7)
    saved["state"]["note"].append("changed")
    saved["param_groups"][0]["note"].append("changed")
    saved["param_groups"][0]["lr"].fill_(7)
    saved["param_groups"][0]["params"].clear()
    assert_unchanged(copied, before)


@each_optimizer
def test_loading_does_not_change_the_state_dict(cls: type) -> None:
    saved = copy.deepcopy(trained(cls)[0].state_dict())
    before = copy.deepcopy(saved)
    params = make_params()
    optimizer = cls(params, lr=torch.tensor(0.3), foreach=True, capturable=True)
    optimizer.load_state_dict(saved)
    run(optimizer, params, range(2))
    assert_identical(saved, before)


@each_optimizer
def test_an_optimizer_can_load_its_own_state_dict(cls: type) -> None:
    optimizer, params = trained(cls)
    expected, _ = trained(cls, 6)
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, params, range(3, 6))
    assert_identical(snapshot(optimizer)["params"], snapshot(expected)["params"])


# Dtypes, flags and the learning rate's tensor survive a load


def test_mu_product_stays_float32_beside_bfloat16_parameters() -> None:
    params = make_params(dtype=torch.bfloat16)
    optimizer = stepforge.NAdam(params)
    run(optimizer, params, range(5))
    resumed_params = make_params(dtype=torch.bfloat16)
    resumed = stepforge.NAdam(resumed_params)
    resumed.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, resumed_params, strict=True):
        assert_identical(resumed.state[q]["mu_product"], optimizer.state[p]["mu_product"])
        assert resumed.state[q]["mu_product"].dtype == torch.float32


@each_optimizer
def test_float32_moments_stay_so_beside_bfloat16_parameters(cls: type) -> None:
    params = make_params(dtype=torch.bfloat16)
    optimizer = cls(params, lr=LR)
    run(optimizer, params, range(2))
    moments = moments_of(cls)
    for p, key in itertools.product(params, moments):
        optimizer.state[p][key] = optimizer.state[p][key].float()
    run(optimizer, params, range(2, 4))
    resumed_params = copy_params(params)
    resumed = cls(resumed_params)
    resumed.load_state_dict(save_and_load(optimizer.state_dict()))
    for p, key in itertools.product(resumed_params, moments):
        assert resumed.state[p][key].dtype == torch.float32
    run(optimizer, params, range(4, 7))
    run(resumed, resumed_params, range(4, 7))
    assert_identical(snapshot(resumed)["state"], snapshot(optimizer)["state"])
    assert_identical(snapshot(resumed)["params"], snapshot(optimizer)["params"])


FLAGS = [
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"fused": False},
    {"capturable": True},
    {"differentiable": True},
    {"state_format": "int8", "rounding_seed": 7},
    {"state_format": "bfloat16"},
]


@pytest.mark.filterwarnings("ignore:state_format='int8' has no effect")  # on small parameters
@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: "-".join(f"{k}={v}" for k, v in f.items()))
@each_optimizer
def test_how_this_optimizer_runs_is_kept(cls: type, flags: dict[str, bool]) -> None:
    optimizer = cls(make_params(), **flags)
    optimizer.load_state_dict(trained(cls)[0].state_dict())
    for name in EXECUTION_FLAGS:
        assert optimizer.param_groups[0][name] is optimizer.defaults[name]
        assert optimizer.param_groups[0][name] is flags.get(name, cls(make_params()).defaults[name])


@pytest.mark.filterwarnings("ignore:state_format='int8' has no effect")  # on small parameters
@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: "-".join(f"{k}={v}" for k, v in f.items()))
@each_optimizer
def test_how_the_saved_optimizer_ran_is_not_taken_over(cls: type, flags: dict[str, bool]) -> None:
    optimizer = cls(make_params())
    before = {name: optimizer.param_groups[0][name] for name in flags}
    optimizer.load_state_dict(cls(make_params(), **flags).state_dict())
    assert {name: optimizer.param_groups[0][name] for name in flags} == before


@pytest.mark.parametrize("saved_lr", [0.25, torch.tensor(0.25)], ids=["float", "tensor"])
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@each_optimizer
def test_a_tensor_learning_rate_is_updated_in_place(
    cls: type, shape: tuple[int, ...], saved_lr: Any
) -> None:
    lr = torch.full(shape, 0.7)
    optimizer = cls(make_params(), lr=lr)
    optimizer.load_state_dict(trained(cls, lr=saved_lr)[0].state_dict())
    assert optimizer.param_groups[0]["lr"] is lr
    assert_identical(lr, torch.full(shape, 0.25))


@pytest.mark.parametrize("saved_lr", [0.25, torch.tensor(0.25)], ids=["float", "tensor"])
@each_optimizer
def test_a_float_learning_rate_is_replaced(cls: type, saved_lr: Any) -> None:
    optimizer = cls(make_params(), lr=0.7)
    optimizer.load_state_dict(trained(cls, lr=saved_lr)[0].state_dict())
    assert_identical(optimizer.param_groups[0]["lr"], saved_lr)
    assert optimizer.param_groups[0]["lr"] is not saved_lr or isinstance(saved_lr, float)


@each_optimizer
def test_options_of_every_group_are_loaded(cls: type) -> None:
    def grouped(params: Params, **second: Any) -> list[dict[str, Any]]:
        return [{"params": params[:2]}, {"params": params[2:], **second}]

    source = cls(grouped(make_params(), lr=0.5, weight_decay=0.25), eps=0.125)
    optimizer = cls(grouped(make_params()), lr=0.7)
    optimizer.load_state_dict(source.state_dict())
    assert_identical(snapshot(optimizer)["groups"], snapshot(source)["groups"])
    assert optimizer.defaults["lr"] == 0.7


def test_adamw_stays_decoupled_whatever_it_loads() -> None:
    optimizer = stepforge.AdamW(make_params())
    optimizer.load_state_dict(trained(stepforge.Adam)[0].state_dict())
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


# Matching by name and by order

ORDERS = list(itertools.permutations(range(len(SHAPES))))


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: "".join(map(str, o)))
@each_optimizer
def test_names_match_whatever_the_order(cls: type, order: tuple[int, ...]) -> None:
    params = make_params()
    source = cls(named_params(params), lr=LR)
    run(source, params, range(3), uneven=True)
    permuted_params = copy_params(params)
    permuted = cls(named_params(permuted_params, list(order)))
    assert not any(permuted.load_state_dict(save_and_load(source.state_dict())))
    for p, q in zip(params, permuted_params, strict=True):
        assert_identical(dict(permuted.state.get(q, {})), dict(source.state.get(p, {})))
    assert permuted.param_groups[0]["param_names"] == [f"layer{index}" for index in order]
    run(source, params, range(3, 6), uneven=True)
    run(permuted, permuted_params, range(3, 6), uneven=True)
    assert_identical([p.detach() for p in permuted_params], [p.detach() for p in params])


@each_optimizer
def test_names_match_between_permuted_groups(cls: type) -> None:
    params, others = make_params(), make_params()
    source = cls(
        [
            {"params": named_params(params, [0, 1]), "lr": 0.5},
            {"params": named_params(params, [2]), "lr": 0.25},
        ]
    )
    run(source, params, range(3))
    permuted = cls(
        [
            {"params": named_params(others, [2])},
            {"params": named_params(others, [1, 0])},
        ]
    )
    assert not any(permuted.load_state_dict(source.state_dict()))
    assert [group["lr"] for group in permuted.param_groups] == [0.25, 0.5]
    for p, q in zip(params, others, strict=True):
        assert_identical(permuted.state[q], source.state[p])


@each_optimizer
def test_names_match_when_groups_were_split_without_a_conflict(cls: type) -> None:
    params, others = make_params(), make_params()
    source = cls(named_params(params), lr=0.5)
    run(source, params, range(3))
    split = cls([{"params": [pair]} for pair in named_params(others, [2, 0, 1])])
    split.load_state_dict(source.state_dict())
    assert [group["lr"] for group in split.param_groups] == [0.5] * 3
    for p, q in zip(params, others, strict=True):
        assert_identical(split.state[q], source.state[p])


@each_optimizer
def test_a_group_whose_members_were_in_two_groups_is_refused(cls: type) -> None:
    params, others = make_params(), make_params()
    pairs = named_params(params)
    source = cls([{"params": pairs[:1], "lr": 0.5}, {"params": pairs[1:], "lr": 0.25}])
    run(source, params, range(2))
    merged = cls(named_params(others), lr=0.7)
    before = snapshot(merged)
    with pytest.raises(ValueError, match=r"param_groups\[0\] are in the groups \[0, 1\]"):
        merged.load_state_dict(source.state_dict())
    assert_unchanged(merged, before)
    assert not any(merged.load_state_dict(source.state_dict(), strict=False))
    assert merged.param_groups[0]["lr"] == 0.7
    for p, q in zip(params, others, strict=True):
        assert_identical(merged.state[q], source.state[p])


@pytest.mark.parametrize(
    ("saved_form", "form", "names"),
    [
        (list, list, None),
        (list, named_params, ["layer0", "layer1", "layer2"]),
        (named_params, list, ["layer0", "layer1", "layer2"]),
    ],
    ids=["neither named", "saved without names", "saved with names"],
)
@each_optimizer
def test_order_matches_unless_both_sides_have_names(
    cls: type, saved_form: Callable[..., Any], form: Callable[..., Any], names: Any
) -> None:
    # An optimizer without names adopts those of the checkpoint, as torch.optim does.
    params, others = make_params(), make_params()
    source = cls(saved_form(params))
    run(source, params, range(2))
    optimizer = cls(form(others))
    optimizer.load_state_dict(source.state_dict())
    assert optimizer.param_groups[0].get("param_names") == names
    for p, q in zip(params, others, strict=True):
        assert_identical(optimizer.state[q], source.state[p])


@each_optimizer
def test_names_that_are_not_unique_match_by_order(cls: type) -> None:
    # One optimizer may have two models, each with a "weight": torch.optim takes that.
    def doubled(params: Params) -> list[dict[str, Any]]:
        return [{"params": [("weight", p)]} for p in params]

    shapes = [(3,), (3,)]
    params, others = make_params(shapes), make_params(shapes)
    source = cls(doubled(params))
    run(source, params, range(2))
    optimizer = cls(doubled(others))
    optimizer.load_state_dict(source.state_dict())
    for p, q in zip(params, others, strict=True):
        assert_identical(optimizer.state[q], source.state[p])


# State dicts that do not fit


def _without_state(saved: dict[str, Any]) -> Any:
    return {"param_groups": saved["param_groups"]}


def _without_groups(saved: dict[str, Any]) -> Any:
    return {"state": saved["state"]}


def _without_params_of_a_group(saved: dict[str, Any]) -> Any:
    del saved["param_groups"][0]["params"]
    return saved


def _groups_are_none(saved: dict[str, Any]) -> Any:
    return saved | {"param_groups": None}


def _group_is_a_number(saved: dict[str, Any]) -> Any:
    return saved | {"param_groups": [3]}


def _state_is_a_list(saved: dict[str, Any]) -> Any:
    return saved | {"state": []}


def _param_state_is_a_list(saved: dict[str, Any]) -> Any:
    saved["state"][2] = [1, 2]
    return saved


def _without_step(saved: dict[str, Any]) -> Any:
    del saved["state"][2]["step"]
    return saved


def _without_last_moment(saved: dict[str, Any]) -> Any:
    param_state = saved["state"][2]
    del param_state[[key for key in param_state if key != "step"][-1]]
    return saved


def _with_an_extra_state(saved: dict[str, Any]) -> Any:
    saved["state"][2]["momentum_buffer"] = torch.zeros(())
    return saved


def _with_an_extra_parameter(saved: dict[str, Any]) -> Any:
    saved["state"][3] = copy.deepcopy(saved["state"][0])
    return saved


def _first_moment(saved: dict[str, Any]) -> str:
    """Return the key of the first state of parameter 2 that is not a scalar."""
    return next(key for key in saved["state"][2] if key not in ("step", "mu_product"))


def _wrong_shape(saved: dict[str, Any]) -> Any:
    saved["state"][2][_first_moment(saved)] = torch.zeros(9)
    return saved


def _wrong_type(saved: dict[str, Any]) -> Any:
    saved["state"][2][_first_moment(saved)] = "a string"
    return saved


def _step_with_two_elements(saved: dict[str, Any]) -> Any:
    saved["state"][2]["step"] = torch.ones(2)
    return saved


def _complex_moment(saved: dict[str, Any]) -> Any:
    key = _first_moment(saved)
    saved["state"][2][key] = saved["state"][2][key].to(torch.complex64)
    return saved


def _one_group_more(saved: dict[str, Any]) -> Any:
    saved["param_groups"].append({**saved["param_groups"][0], "params": [3]})
    return saved


def _one_group_fewer(saved: dict[str, Any]) -> Any:
    saved["param_groups"].pop()
    return saved


def _group_too_short(saved: dict[str, Any]) -> Any:
    saved["param_groups"][1]["params"].pop()
    return saved


def _group_too_long(saved: dict[str, Any]) -> Any:
    saved["param_groups"][1]["params"].append(3)
    return saved


def _names_too_few(saved: dict[str, Any]) -> Any:
    saved["param_groups"][1]["param_names"] = ["only one"]
    return saved


def _without_lr(saved: dict[str, Any]) -> Any:
    del saved["param_groups"][1]["lr"]
    return saved


def _option(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def changed(saved: dict[str, Any]) -> Any:
        saved["param_groups"][1][name] = value
        return saved

    return changed


BAD_STATE_DICTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a string": (lambda saved: "saved", "'state' and 'param_groups'.*str"),
    "None": (lambda saved: None, "'state' and 'param_groups'.*NoneType"),
    "a list": (lambda saved: [saved], "'state' and 'param_groups'.*list"),
    "an empty dict": (lambda saved: {}, "'state' and 'param_groups'"),
    "a model's dict": (lambda saved: {"weight": torch.ones(2)}, "'param_groups'.*weight"),
    "cut off before state": (_without_state, "'state' and 'param_groups'"),
    "cut off before param_groups": (_without_groups, "'state' and 'param_groups'"),
    "a group without params": (_without_params_of_a_group, r"param_groups\[0\].*'params'"),
    "groups are None": (_groups_are_none, "param_groups"),
    "a group is a number": (_group_is_a_number, r"param_groups\[0\]"),
    "state is a list": (_state_is_a_list, "'state'.*not a dict"),
    "a state is a list": (_param_state_is_a_list, "state of parameter 2 is not a dict"),
    "no step": (_without_step, "missing: 2.step"),
    "a missing state": (_without_last_moment, "missing: 2."),
    "an extra state": (_with_an_extra_state, "unexpected: 2.momentum_buffer"),
    "an extra parameter": (_with_an_extra_parameter, "unexpected: 3"),
    "a wrong shape": (_wrong_shape, "another shape or kind: 2."),
    "a wrong type": (_wrong_type, "another shape or kind: 2."),
    "two step counts": (_step_with_two_elements, "another shape or kind: 2.step"),
    "a complex moment": (_complex_moment, "another shape or kind: 2."),
    "one group more": (_one_group_more, "different number of parameter groups: 3.* 2"),
    "one group fewer": (_one_group_fewer, "different number of parameter groups: 1.* 2"),
    "a group too short": (_group_too_short, r"doesn't match the size.*param_groups\[1\].*1 .*2"),
    "a group too long": (_group_too_long, r"doesn't match the size.*param_groups\[1\].*3 .*2"),
    "too few names": (_names_too_few, r"param_groups\[1\].*2 parameters.*1 names"),
    "no lr": (_without_lr, r"missing: param_groups\[1\].lr"),
    "lr is NaN": (_option("lr", float("nan")), "Invalid learning rate: nan.*>= 0"),
    "lr is negative": (_option("lr", -1.0), "Invalid learning rate: -1.0.*>= 0"),
    "lr is a NaN tensor": (_option("lr", torch.tensor(float("nan"))), "learning rate: nan.*>= 0"),
    "lr has two elements": (_option("lr", torch.ones(2)), "lr must be 1-element.*2"),
    "eps is negative": (_option("eps", -1.0), "Invalid epsilon value: -1.0.*>= 0"),
    "weight_decay is negative": (_option("weight_decay", -1), "Invalid weight_decay value: -1"),
}


def two_groups(cls: type, **options: Any) -> tuple[Any, Params]:
    """Return a trained optimizer, one parameter in its first group and two in its second."""
    params = make_params()
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.3, **options}]
    optimizer = cls(groups, lr=LR)
    run(optimizer, params, range(3))
    return optimizer, params


@pytest.mark.parametrize(("spoil", "message"), BAD_STATE_DICTS.values(), ids=BAD_STATE_DICTS)
@each_optimizer
def test_a_bad_state_dict_is_refused_and_changes_nothing(
    cls: type, spoil: Callable[[dict[str, Any]], Any], message: str
) -> None:
    saved = copy.deepcopy(two_groups(cls)[0].state_dict())
    optimizer, params = two_groups(cls, weight_decay=0.5)
    run(optimizer, params, range(3, 5))
    before, containers = snapshot(optimizer), (optimizer.state, *optimizer.param_groups)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(spoil(saved))
    assert_unchanged(optimizer, before)
    containers_after = (optimizer.state, *optimizer.param_groups)
    assert all(x is y for x, y in zip(containers_after, containers, strict=True))


@each_optimizer
def test_a_value_of_the_wrong_type_is_refused_and_changes_nothing(cls: type) -> None:
    saved = copy.deepcopy(two_groups(cls)[0].state_dict())
    saved["param_groups"][1]["lr"] = "fast"
    optimizer, _ = two_groups(cls)
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match="lr must be a number >= 0, but got 'fast'"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


#: The optimizers that have the same states.
ALIKE = {stepforge.Adam, stepforge.AdamW}
PAIRS = [
    pytest.param(*pair, id="-from-".join(cls.__name__ for cls in pair))
    for pair in itertools.permutations(OPTIMIZERS, 2)
    if set(pair) != ALIKE
]


@pytest.mark.parametrize("stepped", [True, False], ids=["stepped", "fresh"])
@pytest.mark.parametrize(("cls", "other"), PAIRS)
def test_another_optimizers_state_dict_is_refused(cls: type, other: type, stepped: bool) -> None:
    saved = trained(other, 2 if stepped else 0)[0].state_dict()
    optimizer, _ = trained(cls)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"does not fit this optimizer .*nothing was loaded"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize(("cls", "other"), PAIRS)
def test_another_optimizers_state_dict_loads_where_it_fits(cls: type, other: type) -> None:
    saved = trained(other, lr=0.5)[0].state_dict()
    optimizer, params = trained(cls)
    moments_fit = set(moments_of(cls)) <= set(moments_of(other)) and cls is not stepforge.NAdam
    before = snapshot(optimizer)["state"]
    result = optimizer.load_state_dict(saved, strict=False)
    assert any(result)
    assert optimizer.param_groups[0]["lr"] == 0.5
    expected = [saved["state"][i] if moments_fit else before[i] for i in range(len(params))]
    for p, values in zip(params, expected, strict=True):
        assert_identical(optimizer.state[p], {key: values[key] for key in optimizer.state[p]})
    run(optimizer, params, range(1))


@pytest.mark.parametrize("saved_by", sorted(ALIKE, key=lambda cls: cls.__name__))
def test_adam_and_adamw_load_each_other(saved_by: type) -> None:
    source, _ = trained(saved_by)
    (other,) = ALIKE - {saved_by}
    optimizer, _ = trained(other)
    optimizer.load_state_dict(source.state_dict())
    assert_identical(snapshot(optimizer)["state"], snapshot(source)["state"])


#: The errors of torch.load for a truncated file. They depend on where the file ends.
UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError)


@each_optimizer
def test_a_file_cut_short_changes_nothing(cls: type) -> None:
    optimizer, _ = trained(cls)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    before = snapshot(optimizer)
    whole = file.getvalue()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        with pytest.raises(UNREADABLE):
            optimizer.load_state_dict(torch.load(io.BytesIO(whole[:length]), weights_only=True))
        assert_unchanged(optimizer, before)


@each_optimizer
def test_what_fits_is_loaded_and_the_rest_is_named(cls: type) -> None:
    source, _ = two_groups(cls)
    saved = copy.deepcopy(source.state_dict())
    moment = moments_of(cls)[-1]
    del saved["state"][0]["step"]
    saved["state"][1][moment] = torch.zeros(9)
    saved["state"][2]["momentum_buffer"] = torch.zeros(())
    saved["param_groups"][0]["lr"] = 0.25
    del saved["param_groups"][1]["eps"]
    optimizer, params = two_groups(cls)
    run(optimizer, params, range(3, 5))
    before = snapshot(optimizer)
    result = optimizer.load_state_dict(saved, strict=False)
    assert sorted(result.missing_keys) == ["0.step", "param_groups[1].eps"]
    assert result.unexpected_keys == ["2.momentum_buffer"]
    assert result.mismatched_keys == [f"1.{moment}"]
    assert "1." in repr(result)
    after = snapshot(optimizer)
    assert_identical(after["state"][0], before["state"][0])
    assert_identical(after["state"][1], before["state"][1])
    assert_identical(after["state"][2], snapshot(source)["state"][2])
    assert after["groups"][0]["lr"] == 0.25
    assert after["groups"][1]["eps"] == before["groups"][1]["eps"]


@each_optimizer
def test_unnamed_groups_of_other_sizes_load_what_fits(cls: type) -> None:
    source, _ = trained(cls)
    others = make_params([*SHAPES, (2,)])
    larger = cls([{"params": others[:2]}, {"params": others[2:]}])
    result = larger.load_state_dict(source.state_dict(), strict=False)
    assert result == LoadResult(missing_keys=["2", "3"], unexpected_keys=["2"], mismatched_keys=[])
    assert float(larger.state[others[0]]["step"]) == 3.0
    assert float(larger.state[others[1]]["step"]) == 3.0
    run(larger, others, range(2))


@each_optimizer
def test_names_are_adopted_only_where_all_of_them_fit(cls: type) -> None:
    params = make_params()
    source = cls(named_params(params, [0, 1]))
    others = make_params()
    optimizer = cls(others)
    optimizer.load_state_dict(source.state_dict(), strict=False)
    names = optimizer.param_groups[0].get("param_names")
    assert names is None or len(names) == len(others)


@each_optimizer
def test_named_parameters_load_what_fits(cls: type) -> None:
    params, others = make_params(), make_params()
    source = cls(named_params(params, [0, 1]))
    run(source, params, range(3))
    optimizer = cls(named_params(others, [2, 1]))
    with pytest.raises(ValueError, match=r"missing: layer2; unexpected: layer0"):
        optimizer.load_state_dict(source.state_dict())
    result = optimizer.load_state_dict(source.state_dict(), strict=False)
    assert result == LoadResult(["layer2"], ["layer0"], [])
    assert_identical(optimizer.state[others[1]], source.state[params[1]])


@each_optimizer
def test_an_error_of_value_is_raised_without_strictness_too(cls: type) -> None:
    saved = copy.deepcopy(trained(cls)[0].state_dict())
    saved["param_groups"][0]["lr"] = float("nan")
    optimizer, _ = trained(cls)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="Invalid learning rate: nan"):
        optimizer.load_state_dict(saved, strict=False)
    assert_unchanged(optimizer, before)


# Flags that add a state


AMSGRAD = pytest.mark.parametrize("cls", [stepforge.Adam, stepforge.AdamW])


def _by_constructor(cls: type, params: Params, saved: dict[str, Any]) -> Any:
    optimizer = cls(params, lr=LR, amsgrad=True)
    optimizer.load_state_dict(saved)
    return optimizer


def _by_group(cls: type, params: Params, saved: dict[str, Any]) -> Any:
    optimizer = cls(params, lr=LR)
    optimizer.load_state_dict(saved)
    optimizer.param_groups[0]["amsgrad"] = True
    return optimizer


@pytest.mark.parametrize("turn_on", [_by_constructor, _by_group])
@AMSGRAD
def test_amsgrad_can_be_turned_on_in_a_later_run(cls: type, turn_on: Callable[..., Any]) -> None:
    source, source_params = trained(cls)
    params = copy_params(source_params)
    optimizer = turn_on(cls, params, source.state_dict())
    assert optimizer.param_groups[0]["amsgrad"] is True
    # Oracle: the twin. Its maximum starts at 0, as in its first step.
    twins = copy_params(source_params)
    twin = twin_of(cls)(twins)
    twin.load_state_dict(copy.deepcopy(source.state_dict()))
    twin.param_groups[0]["amsgrad"] = True
    for p in twins:
        twin.state[p]["max_exp_avg_sq"] = torch.zeros_like(p)
    run(optimizer, params, range(3, 8))
    run(twin, twins, range(3, 8))
    assert_params_close(params, twins, **tolerance(torch.float32, 5))
    assert float(optimizer.state[params[0]]["step"]) == 8.0


@AMSGRAD
def test_amsgrad_stays_on_if_the_checkpoint_has_it_on(cls: type) -> None:
    source, source_params = trained(cls, amsgrad=True)
    params = copy_params(source_params)
    optimizer = cls(params)
    optimizer.load_state_dict(source.state_dict())
    run(source, source_params, range(3, 6))
    run(optimizer, params, range(3, 6))
    assert_identical(snapshot(optimizer)["state"], snapshot(source)["state"])


# Older checkpoints


@pytest.mark.parametrize("as_step", [float, int, lambda step: step.to(torch.int64)])
@each_optimizer
def test_older_dicts_without_newer_flags_load(cls: type, as_step: Callable[..., Any]) -> None:
    source, source_params = trained(cls)
    saved = copy.deepcopy(source.state_dict())
    for name in (*EXECUTION_FLAGS, "maximize", "decoupled_weight_decay"):
        saved["param_groups"][0].pop(name, None)
    for param_state in saved["state"].values():
        param_state["step"] = as_step(param_state["step"])
        if "mu_product" in param_state:
            param_state["mu_product"] = float(param_state["mu_product"])
    params = copy_params(source_params)
    optimizer = cls(params)
    assert not any(optimizer.load_state_dict(saved))
    assert all(isinstance(optimizer.state[p]["step"], torch.Tensor) for p in params)
    run(source, source_params, range(3, 6))
    run(optimizer, params, range(3, 6))
    assert_identical(snapshot(optimizer)["params"], snapshot(source)["params"])


# Keys that the user added


@each_optimizer
def test_keys_that_are_no_parameters_survive(cls: type) -> None:
    optimizer, params = trained(cls)
    optimizer.state["test"] = 1
    optimizer.state["nested"] = {"values": [1, 2]}
    run(optimizer, params, range(1))
    saved = save_and_load(optimizer.state_dict())
    assert saved["state"]["test"] == 1
    resumed = cls(make_params())
    resumed.load_state_dict(saved)
    assert resumed.state["test"] == 1
    assert resumed.state["nested"] == {"values": [1, 2]}
    assert resumed.state["nested"] is not saved["state"]["nested"]


@each_optimizer
def test_extra_keys_of_a_group_are_loaded(cls: type) -> None:
    # For example a scheduler's `initial_lr`, and anything else that a user puts there.
    values = {"initial_lr": 0.5, "note": "mine", "mask": torch.tensor([1.0, 2.0])}
    source, _ = trained(cls)
    source.param_groups[0].update(values)
    fresh, full = cls(make_params()), cls(make_params())
    full.param_groups[0].update(
        {"initial_lr": 0.1, "note": "other", "mask": torch.tensor([3.0, 4.0])}
    )
    for optimizer in (fresh, full):
        optimizer.load_state_dict(source.state_dict())
        assert_identical({key: optimizer.param_groups[0][key] for key in values}, values)


@each_optimizer
def test_keys_that_only_this_optimizer_has_are_kept(cls: type) -> None:
    # For example if the new run has a scheduler and the run of the checkpoint had none.
    optimizer, params = trained(cls)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.load_state_dict(cls(make_params(), lr=0.25).state_dict())
    assert optimizer.param_groups[0]["initial_lr"] == LR
    assert optimizer.param_groups[0]["lr"] == 0.25
    run(optimizer, params, range(1))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.125


@each_optimizer
def test_an_optimizer_and_its_scheduler_resume_together(cls: type) -> None:
    def with_scheduler(params: Params) -> tuple[Any, Any]:
        optimizer = cls(params, lr=LR)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)

    def advance(optimizer: Any, scheduler: Any, params: Params, steps: range) -> None:
        for step in steps:
            run(optimizer, params, range(step, step + 1))
            scheduler.step()

    params = make_params()
    optimizer, scheduler = with_scheduler(params)
    advance(optimizer, scheduler, params, range(3))
    resumed_params = copy_params(params)
    resumed, resumed_scheduler = with_scheduler(resumed_params)
    resumed.load_state_dict(save_and_load(optimizer.state_dict()))
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    advance(optimizer, scheduler, params, range(3, 8))
    advance(resumed, resumed_scheduler, resumed_params, range(3, 8))
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert_identical([p.detach() for p in resumed_params], [p.detach() for p in params])


# Hooks


@each_optimizer
def test_state_dict_hooks_run_in_order_until_removed(cls: type) -> None:
    optimizer, _ = trained(cls)
    calls: list[str] = []
    handles = [
        optimizer.register_state_dict_pre_hook(lambda opt: calls.append("pre")),
        optimizer.register_state_dict_pre_hook(lambda opt: calls.append("pre0"), prepend=True),
        optimizer.register_state_dict_post_hook(lambda opt, saved: calls.append("post")),
        optimizer.register_state_dict_post_hook(
            lambda opt, saved: calls.append("post0"), prepend=True
        ),
    ]
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    assert calls == ["pre0", "pre", "post0", "post"]
    for handle in handles:
        handle.remove()
    optimizer.state_dict()
    assert len(calls) == 4


@each_optimizer
def test_a_state_dict_post_hook_may_change_or_replace_the_dict(cls: type) -> None:
    optimizer, _ = trained(cls)

    def change(opt: Any, saved: dict[str, Any]) -> None:
        assert opt is optimizer
        saved["seen"] = True

    def replace(opt: Any, saved: dict[str, Any]) -> dict[str, Any]:
        return {**saved, "version": 2}

    optimizer.register_state_dict_post_hook(change)
    optimizer.register_state_dict_post_hook(replace)
    assert list(optimizer.state_dict()) == ["state", "param_groups", "seen", "version"]


@each_optimizer
def test_a_state_dict_pre_hook_sees_the_optimizer_before_it_is_packed(cls: type) -> None:
    optimizer, _ = trained(cls)
    optimizer.register_state_dict_pre_hook(lambda opt: opt.state.__setitem__("test", 1))
    assert optimizer.state_dict()["state"]["test"] == 1


@each_optimizer
def test_load_hooks_run_in_order_until_removed(cls: type) -> None:
    saved = trained(cls)[0].state_dict()
    optimizer = cls(make_params())
    calls: list[str] = []
    handles = [
        optimizer.register_load_state_dict_pre_hook(lambda opt, given: calls.append("pre")),
        optimizer.register_load_state_dict_pre_hook(
            lambda opt, given: calls.append("pre0"), prepend=True
        ),
        optimizer.register_load_state_dict_post_hook(
            lambda opt: calls.append(f"post at step {float(opt.state_dict()['state'][0]['step'])}")
        ),
        optimizer.register_load_state_dict_post_hook(
            lambda opt: calls.append("post0"), prepend=True
        ),
    ]
    optimizer.load_state_dict(saved)
    assert calls == ["pre0", "pre", "post0", "post at step 3.0"]
    for handle in handles:
        handle.remove()
    optimizer.load_state_dict(saved)
    assert len(calls) == 4


@pytest.mark.parametrize("in_place", [True, False], ids=["changes", "replaces"])
@each_optimizer
def test_a_load_pre_hook_may_change_or_replace_the_dict(cls: type, in_place: bool) -> None:
    saved = trained(cls)[0].state_dict()
    wrapped = {"optimizer": saved}
    optimizer = cls(make_params())

    def unwrap(opt: Any, given: dict[str, Any]) -> dict[str, Any] | None:
        if not in_place:
            return given["optimizer"]
        given.update(given.pop("optimizer"))
        return None

    optimizer.register_load_state_dict_pre_hook(unwrap)
    optimizer.load_state_dict(wrapped)
    assert list(wrapped) == ["optimizer"]
    assert_identical(optimizer.state_dict()["state"], saved["state"])


@each_optimizer
def test_load_post_hooks_do_not_run_after_a_refusal(cls: type) -> None:
    optimizer = cls(make_params())
    calls: list[Any] = []
    optimizer.register_load_state_dict_post_hook(calls.append)
    with pytest.raises(ValueError, match="param_groups"):
        optimizer.load_state_dict({})
    assert calls == []


@each_optimizer
def test_the_argument_of_load_state_dict_is_named_state_dict(cls: type) -> None:
    # Distributed checkpointing passes it by keyword.
    source, _ = trained(cls)
    optimizer = cls(make_params())
    optimizer.load_state_dict(state_dict=source.state_dict())
    assert_identical(optimizer.state_dict(), source.state_dict())


def test_older_pickles_find_the_class_of_their_param_groups() -> None:
    """Oracle: the name that such a pickle holds."""
    named = pickle.loads(b"cstepforge.saving\nParamGroup\n.")
    optimizer = stepforge.Adam([torch.zeros(1)])
    assert named is saving.ParamGroup is type(optimizer.param_groups[0])
