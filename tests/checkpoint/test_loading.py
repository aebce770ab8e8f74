"""``load_state_dict`` refuses all that a later step would refuse, and a refusal changes nothing.

Oracle: a deep copy of the optimizer's parameters, state and options, taken before.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import stepforge
from stepforge.checkpoint import full_precision_weights, reset_low_bits
from tests.twins import (
    LR,
    assert_identical,
    assert_unchanged,
    each_optimizer,
    make_params,
    run,
    save_and_load,
    snapshot,
)

NAN, INF = float("nan"), float("inf")


def trained(cls: type = stepforge.Adam, steps: int = 2, **options: Any) -> tuple[Any, list[Any]]:
    """Return an optimizer of two groups after some steps, and its parameters."""
    params = make_params()
    optimizer = cls([{"params": params[:1]}, {"params": params[1:]}], **{"lr": LR, **options})
    run(optimizer, params, range(steps))
    return optimizer, params


def state_dict_with(key: str, value: Any, cls: type = stepforge.Adam) -> dict[str, Any]:
    """Return a state dict in which this state of the first parameter has this value."""
    saved = copy.deepcopy(trained(cls)[0].state_dict())
    saved["state"][0][key] = value
    return saved


STEPS = {
    "negative": (torch.tensor(-1.0), "is -1.0"),
    "a negative number": (-1, "is -1.0"),
    "NaN": (torch.tensor(NAN), "is nan"),
    "infinite": (INF, "is inf"),
    "not whole": (torch.tensor(2.5), "is 2.5"),
    "larger than any float": (10**400, "is larger than any float"),
    "True": (True, "is True"),
    "a boolean tensor": (torch.tensor(True), "a tensor of .*torch.bool"),
    "of float8": (torch.tensor(2.0).to(torch.float8_e4m3fn), "a tensor of .*float8_e4m3fn"),
    "complex": (torch.tensor(2.0 + 0j), "a tensor of .*torch.complex64"),
    "sparse": (torch.ones(1).to_sparse(), "a tensor of "),
    "on the device meta": (torch.tensor(2.0, device="meta"), "on the device meta"),
    "None": (None, "is None"),
    "a list": ([2.0], r"is \[2.0\]"),
}
TENSORS = {
    "None": (None, r"is None, which must be a tensor of shape \(3, 4\)"),
    "a list": ([[0.0] * 4] * 3, r"is \[\[0.0, .*, which must be a tensor of shape \(3, 4\)"),
    "a float": (0.5, "is 0.5, which must be a tensor"),
    "a dict": ({}, r"is {}, which must be a tensor"),
    "sparse": (torch.zeros(3, 4).to_sparse(), "is of layout torch.sparse_coo"),
    "float8": (torch.zeros(3, 4).to(torch.float8_e5m2), "is of torch.float8_e5m2"),
    "boolean": (torch.zeros(3, 4, dtype=torch.bool), "is of torch.bool, which must be .*float32"),
    "of integers": (torch.zeros(3, 4, dtype=torch.int32), "is of torch.int32"),
    "of bytes": (torch.zeros(3, 4, dtype=torch.uint8), "is of torch.uint8"),
    "on the device meta": (torch.zeros(3, 4, device="meta"), "on the device meta"),
    "of another shape": (torch.zeros(4, 3), r"is of shape \(4, 3\), which must be \(3, 4\)"),
}
BAD_STATES = [
    *(pytest.param("step", *case, id=f"step {name}") for name, case in STEPS.items()),
    *(pytest.param("exp_avg_sq", *case, id=f"moment {name}") for name, case in TENSORS.items()),
]


@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
@pytest.mark.parametrize(("key", "value", "words"), BAD_STATES)
def test_a_state_that_the_next_step_would_refuse_is_refused_when_loading(
    key: str, value: Any, words: str, fused: bool | None
) -> None:
    saved = state_dict_with(key, value)
    optimizer, params = trained(fused=fused)
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match=rf"of another shape or kind: 0\.{key} \(.*{words}"
    ) as error:
        optimizer.load_state_dict(saved)
    assert "must be" in str(error.value) or "no values" in str(error.value)
    assert_unchanged(optimizer, before)
    result = optimizer.load_state_dict(saved, strict=False)
    assert result.mismatched_keys == [f"0.{key}"]
    assert_identical(dict(optimizer.state[params[0]]), before["state"][0])
    run(optimizer, params, range(2, 3))


@pytest.mark.parametrize("value", [None, True, [1.0], torch.ones(2), "1", 10**400], ids=repr)
def test_a_scalar_state_that_is_no_number_is_refused(value: Any) -> None:
    optimizer, _ = trained(stepforge.NAdam)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"0\.mu_product \(.*which must be a number"):
        optimizer.load_state_dict(state_dict_with("mu_product", value, stepforge.NAdam))
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("param_state", [None, [], 1.0], ids=repr)
def test_a_parameters_state_that_is_no_dict_is_refused(param_state: Any) -> None:
    saved = copy.deepcopy(trained()[0].state_dict())
    saved["state"][1] = param_state
    optimizer, _ = trained()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="the state of parameter 1 is not a dict, but"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float16], ids=str)
def test_a_step_count_of_a_dtype_that_cannot_count_on_becomes_a_float32(
    dtype: torch.dtype,
) -> None:
    """A bfloat16 counts to 256 only, a float16 to 2048."""
    start = 2047 if dtype == torch.float16 else 255
    optimizer, params = trained()
    optimizer.load_state_dict(state_dict_with("step", torch.tensor(start, dtype=dtype)))
    run(optimizer, params, range(3))
    assert_identical(optimizer.state[params[0]]["step"], torch.tensor(start + 3.0))


# Options


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16], ids=str)
def test_a_learning_rate_that_its_tensor_cannot_hold_is_refused(dtype: torch.dtype) -> None:
    value = 1e6 if dtype == torch.float16 else 0.5
    lr = torch.tensor(1, dtype=dtype)
    optimizer = stepforge.Adam([{"params": p, "lr": lr} for p in make_params()])
    saved = optimizer.state_dict()
    for group in saved["param_groups"][1:]:
        group["lr"] = value
    before = snapshot(optimizer)
    words = rf"param_groups\[1\]\.lr of the state dict is {value}, which would be .* {dtype}"
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


def test_a_whole_learning_rate_is_written_into_a_tensor_of_integers() -> None:
    lr = torch.tensor(1)
    optimizer = stepforge.Adam(make_params(), lr=lr)
    optimizer.load_state_dict(stepforge.Adam(make_params(), lr=2.0).state_dict())
    assert optimizer.param_groups[0]["lr"] is lr
    assert_identical(lr, torch.tensor(2))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (10**400, "Invalid learning rate: it is larger than any float"),
        (torch.tensor(0.5, device="meta"), r"param_groups\[1\].lr .* on the device meta"),
    ],
    ids=["larger than any float", "on the device meta"],
)
@pytest.mark.parametrize("as_tensor", [True, False], ids=["tensor", "float"])
def test_a_later_groups_learning_rate_spoils_nothing_of_an_earlier_one(
    value: Any, words: str, as_tensor: bool
) -> None:
    own = [torch.tensor(0.1), torch.tensor(0.1)] if as_tensor else [0.1, 0.1]
    params = make_params()
    groups = [{"params": params[:1], "lr": own[0]}, {"params": params[1:], "lr": own[1]}]
    optimizer = stepforge.Adam(groups)
    run(optimizer, params, range(2))
    saved = copy.deepcopy(trained(lr=0.7)[0].state_dict())
    saved["param_groups"][1]["lr"] = value
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)
    with pytest.raises(ValueError, match="larger than any float"):
        stepforge.Adam(make_params(), lr=10**400)


def test_names_that_are_no_list_are_refused() -> None:
    saved = copy.deepcopy(trained()[0].state_dict())
    saved["param_groups"][1]["param_names"] = None
    optimizer, _ = trained()
    with pytest.raises(ValueError, match=r"param_groups\[1\] .* param_names None.* must be a list"):
        optimizer.load_state_dict(saved)


# Pickles


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", None), ("step", [1]), ("exp_avg", None), ("exp_avg", 0.5), ("exp_avg", [0.5])],
    ids=repr,
)
def test_a_pickle_with_no_tensor_where_one_is_due_is_refused(key: str, value: Any) -> None:
    optimizer, params = trained()
    optimizer.state[params[0]][key] = value
    words = rf"the state {key} of a parameter of shape \(3, 4\) is .*, which must be a"
    pickled = pickle.dumps(optimizer)
    for again in (lambda: pickle.loads(pickled), lambda: copy.deepcopy(optimizer)):
        with pytest.raises(ValueError, match=words):
            again()


# Options of formats, which belong to the optimizer and not to its checkpoint


FORMAT_OPTIONS = {
    "state_format": "int8",
    "master_weight_bits": 24,
    "stochastic_rounding": False,
    "rounding_seed": 7,
}


@each_optimizer
def test_state_dicts_leave_out_options_of_formats_and_pickles_keep_them(cls: type) -> None:
    params = make_params([(64, 64), (3,)], dtype=torch.bfloat16)
    optimizer = cls(params, **FORMAT_OPTIONS)
    run(optimizer, params, range(2))
    (packed,) = optimizer.state_dict()["param_groups"]
    assert not packed.keys() & FORMAT_OPTIONS.keys()
    duplicates = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for other in (optimizer, *duplicates):
        assert_identical(
            {name: other.param_groups[0][name] for name in FORMAT_OPTIONS}, FORMAT_OPTIONS
        )
    # accelerate does this when it prepares an optimizer, and trainers when they resume.
    before = snapshot(optimizer)
    optimizer.load_state_dict(save_and_load(optimizer.state_dict()))
    optimizer.load_state_dict(optimizer.state_dict())
    assert_unchanged(optimizer, before)


@each_optimizer
def test_a_loop_over_a_group_yields_the_keys_of_a_state_dict_and_lookups_find_every_option(
    cls: type,
) -> None:
    optimizer = cls(make_params(), rounding_seed=3)
    (group,), (packed,) = optimizer.param_groups, optimizer.state_dict()["param_groups"]
    assert set(iter(group)) == set(packed)
    every = set(cls._hyperparameters) | {"params"}
    assert set(group.keys()) == set({**group}) == set(group.copy()) == set(dict(group)) == every
    assert group["rounding_seed"] == group.get("rounding_seed") == 3
    assert "rounding_seed" in group
    again = cls([group | {"params": make_params()}])
    assert again.param_groups[0]["rounding_seed"] == 3


def test_adagrad_shares_codes_and_scales() -> None:
    p = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = stepforge.Adagrad([p], state_format="int8")
    optimizer.share_memory()
    assert {key for key, x in optimizer.state[p].items() if x.is_shared()} == {
        "sum_codes",
        "sum_scale",
    }


# Low bits of weights that were loaded


@pytest.mark.parametrize("width", [24, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_weight_that_was_loaded_counts_as_it_is_after_a_reset(
    dtype: torch.dtype, width: int
) -> None:
    model = torch.nn.Linear(3, 2, dtype=dtype)
    optimizer = stepforge.AdamW(model.parameters(), lr=0.001, master_weight_bits=width)
    run(optimizer, list(model.parameters()), range(3))
    ones = {name: torch.ones_like(x) for name, x in model.state_dict().items()}
    model.load_state_dict(ones)
    joined = full_precision_weights(model, optimizer)
    assert any(not torch.equal(joined[name], x.float()) for name, x in ones.items())
    moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
    reset_low_bits(optimizer)
    for name, x in full_precision_weights(model, optimizer).items():
        assert_identical(x, ones[name].float())
    assert_identical([optimizer.state[p]["exp_avg"] for p in model.parameters()], moments)
    with pytest.raises(TypeError, match=r"reset_low_bits is for optimizers of this library.*SGD"):
        reset_low_bits(torch.optim.SGD(model.parameters()))


# Sharded states


def _sharded(mesh: DeviceMesh, placement: Any, **options: Any) -> tuple[Any, torch.nn.Parameter]:
    weight = torch.full((64, 128), 0.3, dtype=torch.bfloat16)
    p = torch.nn.Parameter(distribute_tensor(weight, mesh, [placement], src_data_rank=None))
    optimizer = stepforge.Adam([p], lr=0.001, **options)
    p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer, p


def test_a_state_that_is_sharded_unlike_its_parameter_is_refused_when_loading(
    mesh: DeviceMesh,
) -> None:
    saved = _sharded(mesh, Replicate())[0].state_dict()
    optimizer, p = _sharded(mesh, Shard(0))
    before = optimizer.state[p]
    with pytest.raises(ValueError, match=r"0\.exp_avg \(is sharded as .*load_distributed reshards"):
        optimizer.load_state_dict(saved)
    assert optimizer.state[p] is before


def test_low_bits_of_sharded_weights_are_reset(mesh: DeviceMesh) -> None:
    optimizer, p = _sharded(mesh, Shard(0), master_weight_bits=24)
    low = optimizer.state[p]["low_bits_8"]
    assert low.full_tensor().any()
    reset_low_bits(optimizer)
    assert optimizer.state[p]["low_bits_8"] is low
    assert not low.full_tensor().any()


# Hooks


def test_a_hook_that_raises_before_loading_changes_nothing() -> None:
    def raise_error(*_: Any) -> None:
        raise RuntimeError("no")

    saved = copy.deepcopy(trained(lr=0.7)[0].state_dict())
    optimizer, _ = trained()
    optimizer.register_load_state_dict_pre_hook(raise_error)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)
