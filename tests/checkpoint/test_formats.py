"""Checkpoints of optimizers with low-precision states and weights.

Oracle of a round trip: the run without a break, bit for bit. Oracle of a change of format: the
values of the codes by their definition, in float64 (``tests/decoding.py``). Oracle of an export:
the torch.optim twin, given those values by hand. Oracle of full-precision weights: a run in
float32.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import stepforge
from stepforge.checkpoint import full_precision_weights, to_torch
from stepforge.declare import NonNegative
from stepforge.ops import bitcast_f32, bitcast_u32
from stepforge.state.layout import LOW_BITS
from tests.decoding import decode_state
from tests.twins import (
    LR,
    assert_identical,
    assert_unchanged,
    copy_params,
    each_optimizer,
    make_params,
    named_params,
    run,
    save_and_load,
    snapshot,
    twin_of,
)

Params = list[torch.nn.Parameter]
BFLOAT16 = torch.bfloat16

#: Two parameters that have int8 states, in rows that end within a block, and three too small ones.
SHAPES = ((32, 130), (3, 8, 200), (5,), (), (64, 16))
#: The dtype of a run's parameters, and its options.
FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain": (torch.float32, {}),
    "float32": (BFLOAT16, {"state_format": "float32"}),
    "bfloat16": (torch.float32, {"state_format": "bfloat16"}),
    "int8": (torch.float32, {"state_format": "int8"}),
    "24 bits": (BFLOAT16, {"state_format": "int8", "master_weight_bits": 24}),
    "32 bits": (torch.float16, {"state_format": "bfloat16", "master_weight_bits": 32}),
    "stochastic": (BFLOAT16, {"state_format": "int8", "stochastic_rounding": True}),
}
every_format = pytest.mark.parametrize(("dtype", "options"), FORMATS.values(), ids=FORMATS)
ADAMS = pytest.mark.parametrize("cls", [stepforge.Adam, stepforge.AdamW])


def trained(
    cls: type, options: dict[str, Any], dtype: torch.dtype = torch.float32, steps: int = 3
) -> tuple[Any, Params]:
    """Return an optimizer and its parameters after some steps."""
    params = make_params(SHAPES, dtype)
    optimizer = cls(params, **{"lr": LR, "rounding_seed": 5, **options})
    run(optimizer, params, range(steps))
    return optimizer, params


def moments(param_state: dict[str, Any]) -> list[str]:
    """Return the keys of the states that have an element for each element of the parameter."""
    known = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "sum")
    return [key for key in known if key in param_state or f"{key}_codes" in param_state]


# Round trips


@every_format
@each_optimizer
def test_a_round_trip_continues_bit_for_bit(
    cls: type, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    optimizer, params = trained(cls, options, dtype)
    own = copy_params(params)
    resumed = cls(own, lr=0.7, rounding_seed=5, **options)
    assert not any(resumed.load_state_dict(save_and_load(optimizer.state_dict())))
    assert_identical(snapshot(resumed)["state"], snapshot(optimizer)["state"])
    run(optimizer, params, range(3, 6), uneven=True)
    run(resumed, own, range(3, 6), uneven=True)
    assert_identical(snapshot(resumed)["state"], snapshot(optimizer)["state"])
    assert_identical(snapshot(resumed)["params"], snapshot(optimizer)["params"])


@pytest.mark.parametrize("format_", ["bfloat16", "int8", "stochastic"])
def test_random_bits_depend_on_seed_parameter_and_step(format_: str) -> None:
    dtype, options = FORMATS[format_]

    def after_two_steps(shapes: Any, seed: int) -> list[dict[str, Any]]:
        params = make_params(shapes, dtype)
        optimizer = stepforge.Adam(params, lr=LR, rounding_seed=seed, **options)
        for _ in range(2):
            for p in params:
                p.grad = torch.full_like(p, 0.3)
            optimizer.step()
        return [{"p": p.detach(), **optimizer.state[p]} for p in params]

    shape = (32, 130)
    ((first, second), (again, _), (other, _)) = (
        after_two_steps([shape] * 2, seed) for seed in (0, 0, 1)
    )
    rounded = {"stochastic": "p", "int8": "exp_avg_sq_codes"}.get(format_, "exp_avg_sq")
    assert_identical(again, first)
    assert not torch.equal(other[rounded], first[rounded])
    if rounded != "p":  # the weights differ from the start
        assert not torch.equal(second[rounded], first[rounded])


@every_format
@each_optimizer
def test_nothing_is_aliased(cls: type, dtype: torch.dtype, options: dict[str, Any]) -> None:
    source, source_params = trained(cls, options, dtype)
    params = make_params(SHAPES, dtype)
    loaded = cls(params, **options)
    loaded.load_state_dict(source.state_dict())
    before = snapshot(loaded)
    run(source, source_params, range(3, 5))
    assert_unchanged(loaded, before)
    before = snapshot(source)
    run(loaded, params, range(3, 5))
    assert_unchanged(source, before)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
@every_format
def test_a_copy_continues_identically(
    dtype: torch.dtype, options: dict[str, Any], duplicate: Callable[[Any], Any]
) -> None:
    optimizer, params = trained(stepforge.NAdam, options, dtype)
    copied = duplicate(optimizer)
    own = copied.param_groups[0]["params"]
    run(optimizer, params, range(3, 6))
    run(copied, own, range(3, 6))
    assert_identical(snapshot(copied), snapshot(optimizer))


def test_a_file_is_as_compact_as_the_state() -> None:
    """By hand, per element: two codes of 8 bits, two float32 scales per 128: 2.0625 bytes."""
    params = [torch.nn.Parameter(torch.ones(256, 1024))]
    optimizer = stepforge.AdamW(params, state_format="int8")
    run(optimizer, params, range(1))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    overhead = 4096  # names, options and the archive itself
    assert params[0].numel() * 2.0625 <= file.tell() <= params[0].numel() * 2.0625 + overhead


# From any format into any other


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("target", ["float32", "bfloat16", "int8", None])
@pytest.mark.parametrize("source", ["float32", "bfloat16", "int8", None])
def test_states_of_any_format_load_into_any(
    source: str | None, target: str | None, amsgrad: bool
) -> None:
    saved, _ = trained(stepforge.Adam, {"state_format": source, "amsgrad": amsgrad})
    params = make_params(SHAPES)
    loaded = stepforge.Adam(params, state_format=target, amsgrad=amsgrad)
    assert not any(loaded.load_state_dict(save_and_load(saved.state_dict())))
    for p, saved_state in zip(params, saved.state_dict()["state"].values(), strict=True):
        loaded_state = loaded.state[p]
        assert set(moments(loaded_state)) == set(moments(saved_state))
        for key in moments(saved_state):
            before, after = decode_state(saved_state, key), decode_state(loaded_state, key)
            if key in loaded_state and loaded_state[key].dtype == BFLOAT16:
                assert_identical(after, before.float().bfloat16().double())
            elif key in loaded_state or source == "int8":
                # The values of codes are exact in float32, and become the same codes again.
                assert_identical(after, before)
            else:
                # Two codes differ by an eighth of an octave; rounding errs by half of that. First
                # moments below 1.0625 * 2**-15 of the scale become 0. A block's largest element is
                # at least 0.9375 of its scale.
                lost = 2.0**-14 * before.abs().max() if key == "exp_avg" else 0.0
                assert ((after - before).abs() <= before.abs() / 16 + lost).all()
                assert (after.sign() == before.sign()).all() or key == "exp_avg"
    run(loaded, params, range(3, 5))
    assert all(float(loaded.state[p]["step"]) == 5 for p in params)


@pytest.mark.parametrize("format_", ["bfloat16", "int8", "24 bits"])
@each_optimizer
def test_a_checkpoint_of_torch_optim_loads_and_returns(cls: type, format_: str) -> None:
    dtype, options = FORMATS[format_]
    params = make_params(SHAPES, dtype)
    twin = twin_of(cls)(params, lr=LR)
    run(twin, params, range(3))
    checkpoint = save_and_load(twin.state_dict())
    own = copy_params(params)
    optimizer = cls(own, **options)
    assert not any(optimizer.load_state_dict(checkpoint))
    run(optimizer, own, range(3, 5))
    returned = twin_of(cls)(copy_params(own))
    returned.load_state_dict(save_and_load(to_torch(optimizer)))
    assert_identical(returned.param_groups[0]["lr"], LR)
    run(returned, returned.param_groups[0]["params"], range(5, 6))


def test_states_in_fewer_bits_than_the_parameter_get_its_dtype() -> None:
    """torch.optim casts them too. Rounded to nearest, averages in few bits would stand still."""
    saved, _ = trained(stepforge.Adam, {"state_format": "bfloat16"})
    params = make_params(SHAPES)
    optimizer = stepforge.Adam(params)
    optimizer.load_state_dict(saved.state_dict())
    assert {optimizer.state[p][key].dtype for p in params for key in ("exp_avg", "exp_avg_sq")} == {
        torch.float32
    }


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16], ids=str)
@pytest.mark.parametrize(("source", "target"), [(24, 32), (32, 24), (24, None), (None, 32)])
def test_low_bits_of_any_width_load_into_any(
    dtype: torch.dtype, source: int | None, target: int | None
) -> None:
    saved, params = trained(stepforge.Adam, {"master_weight_bits": source}, dtype)
    own = copy_params(params)
    optimizer = stepforge.Adam(own, master_weight_bits=target)
    assert not any(optimizer.load_state_dict(save_and_load(saved.state_dict())))
    for p, q in zip(params, own, strict=True):
        before, after = (weight_of(*pair) for pair in ((saved, p), (optimizer, q)))
        if target is None:
            assert not {"low_bits_8", "low_bits_16"} & set(optimizer.state[q])
        elif source is None or source < target:
            assert_identical(after, before)
        else:
            # One unit in the last of 16 bits of fraction (a float16's 19): half a unit to round,
            # and another half where rounding up would exceed 8 bits.
            assert ((after - before).abs() <= before.abs() * 2.0**-15 + 2.0**-32).all()
    run(optimizer, own, range(3, 5))


def test_low_bits_of_a_weight_that_has_become_longer_are_dropped_on_loading() -> None:
    optimizer, params = trained(stepforge.AdamW, {"master_weight_bits": 24}, BFLOAT16)
    own = [torch.nn.Parameter(p.detach().float()) for p in params]
    own.append(torch.nn.Parameter(torch.ones(3, dtype=BFLOAT16)))
    named = named_params(own)
    resumed = stepforge.AdamW(named, master_weight_bits=24)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = [name for name, _ in named[: len(params)]]
    resumed.load_state_dict(saved, strict=False)
    assert all("exp_avg" in resumed.state[p] for p in own[:-1])
    assert not any(LOW_BITS.keys() & x.keys() for x in resumed.state.values())


def weight_of(optimizer: Any, p: torch.nn.Parameter) -> torch.Tensor:
    """Return the weight that a step reads, by :func:`full_precision_weights`."""
    model = torch.nn.Module()
    model.register_parameter("p", p)
    return full_precision_weights(model, optimizer)["p"].detach().float()


@ADAMS
def test_amsgrad_begins_in_a_format_when_it_is_turned_on(cls: type) -> None:
    saved, params = trained(cls, {"state_format": "int8"})
    own = copy_params(params)
    optimizer = cls(own, amsgrad=True, state_format="int8")
    assert not any(optimizer.load_state_dict(saved.state_dict()))
    run(optimizer, own, range(3, 4))
    for p in own:
        state = optimizer.state[p]
        assert ("max_exp_avg_sq_codes" in state) == ("exp_avg_sq_codes" in state)
        # The maximum starts at 0, so it equals the newest value. The two are rounded with random
        # bits of their own, each by less than an eighth of the value.
        newest, largest = decode_state(state, "exp_avg_sq"), decode_state(state, "max_exp_avg_sq")
        assert ((largest - newest).abs() <= newest / 8).all()


@pytest.mark.parametrize("target", ["int8", "bfloat16", None])
def test_names_match_whatever_the_order_and_format(target: str | None) -> None:
    params = make_params(SHAPES)
    source = stepforge.RAdam(named_params(params), state_format="int8")
    run(source, params, range(2))
    own = make_params(SHAPES)
    loaded = stepforge.RAdam(named_params(own, [3, 1, 4, 0, 2]), state_format=target)
    assert not any(loaded.load_state_dict(save_and_load(source.state_dict())))
    for p, q in zip(params, own, strict=True):
        before, after = (decode_state(o.state[x], "exp_avg") for o, x in ((source, p), (loaded, q)))
        assert_identical(after, before.bfloat16().double() if target == "bfloat16" else before)


@pytest.mark.parametrize(
    ("first", "then"), list(itertools.permutations(["int8", "bfloat16", None], 2))
)
@each_optimizer
def test_a_group_may_change_its_format_between_steps(
    cls: type, first: str | None, then: str | None
) -> None:
    """Oracle: the same checkpoint in an optimizer that has the new format from the beginning."""
    optimizer, params = trained(cls, {"state_format": first})
    own = copy_params(params)
    other = cls(own, lr=LR, rounding_seed=5, state_format=then)
    other.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["state_format"] = then
    run(optimizer, params, range(3, 6))
    run(other, own, range(3, 6))
    assert_identical(snapshot(optimizer)["state"], snapshot(other)["state"])
    assert_identical(snapshot(optimizer)["params"], snapshot(other)["params"])


def test_a_group_may_change_the_bits_of_its_weights_between_steps() -> None:
    optimizer, params = trained(stepforge.AdamW, {"master_weight_bits": 24}, BFLOAT16)
    for width, key, dtype in (
        (32, "low_bits_16", torch.int16),
        (24, "low_bits_8", torch.int8),
    ):
        before = [weight_of(optimizer, p) for p in params]
        optimizer.param_groups[0].update(master_weight_bits=width, lr=0.0)
        run(optimizer, params, range(3, 4))
        assert {optimizer.state[p][key].dtype for p in params} == {dtype}
        assert all(
            len(optimizer.state[p].keys() & {"low_bits_8", "low_bits_16"}) == 1 for p in params
        )
        assert_identical([weight_of(optimizer, p) for p in params], before)


# Checkpoints that do not fit


def _without_scales(param_state: dict[str, Any]) -> None:
    del param_state["exp_avg_sq_scale"]


def _scales_of_another_shape(param_state: dict[str, Any]) -> None:
    param_state["exp_avg_sq_scale"] = param_state["exp_avg_sq_scale"][:, :1]


def _scales_of_another_dtype(param_state: dict[str, Any]) -> None:
    param_state["exp_avg_sq_scale"] = param_state["exp_avg_sq_scale"].to(torch.int32)


def _scales_that_are_a_number(param_state: dict[str, Any]) -> None:
    param_state["exp_avg_sq_scale"] = 1.0


def _scales_without_codes(param_state: dict[str, Any]) -> None:
    param_state["exp_avg_sq"] = param_state.pop("exp_avg_sq_codes").float()


def _codes_of_another_shape(param_state: dict[str, Any]) -> None:
    param_state["exp_avg_sq_codes"] = param_state["exp_avg_sq_codes"][:, 1:]


def _codes_of_another_dtype(param_state: dict[str, Any]) -> None:
    param_state["exp_avg_sq_codes"] = param_state["exp_avg_sq_codes"].float()


def _low_bits_that_are_numbers(param_state: dict[str, Any]) -> None:
    param_state["low_bits_8"] = torch.ones(32, 130)


BAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no scales": (
        _without_scales,
        r"missing: 0.exp_avg_sq_scale \(exp_avg_sq has codes without scales.*\(32, 2\)",
    ),
    "scales of another shape": (
        _scales_of_another_shape,
        r"kind: 0.exp_avg_sq_scale \(exp_avg_sq has codes with .* \(32, 1\), .* \(32, 2\)",
    ),
    "scales of another dtype": (
        _scales_of_another_dtype,
        r"kind: 0.exp_avg_sq_scale \(.*torch.int32, which must be torch.float32",
    ),
    "scales that are a number": (_scales_that_are_a_number, "kind: 0.exp_avg_sq_scale"),
    "scales without codes": (_scales_without_codes, "unexpected: 0.exp_avg_sq_scale"),
    "codes of another shape": (
        _codes_of_another_shape,
        r"kind: 0.exp_avg_sq_codes \(.*\(32, 129\)",
    ),
    "codes of another dtype": (
        _codes_of_another_dtype,
        r"kind: 0.exp_avg_sq_codes \(.*torch.float32, which must be torch.uint8",
    ),
}


@pytest.mark.parametrize("target", ["int8", "bfloat16", None])
@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_codes_and_scales_that_disagree_are_refused_and_change_nothing(
    spoil: Callable[[dict[str, Any]], None], message: str, target: str | None
) -> None:
    saved = copy.deepcopy(trained(stepforge.Adam, {"state_format": "int8"})[0].state_dict())
    spoil(saved["state"][0])
    optimizer, _ = trained(stepforge.Adam, {"state_format": target}, steps=2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


def test_low_bits_of_another_dtype_are_refused() -> None:
    options = {"master_weight_bits": 24}
    saved = copy.deepcopy(trained(stepforge.Adam, options, BFLOAT16)[0].state_dict())
    _low_bits_that_are_numbers(saved["state"][0])
    optimizer, _ = trained(stepforge.Adam, options, BFLOAT16, steps=2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"0.low_bits_8 \(.*torch.float32.*torch.int8"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("target", ["int8", None])
def test_what_fits_is_loaded_and_the_rest_is_named(target: str | None) -> None:
    source, _ = trained(stepforge.Adam, {"state_format": "int8"})
    saved = copy.deepcopy(source.state_dict())
    _without_scales(saved["state"][0])
    _scales_of_another_shape(saved["state"][1])
    saved["state"][2]["exp_avg_scale"] = torch.ones(5, 1)
    optimizer, params = trained(stepforge.Adam, {"state_format": target}, steps=2)
    before = snapshot(optimizer)["state"]
    result = optimizer.load_state_dict(saved, strict=False)
    assert result.missing_keys == ["0.exp_avg_sq_scale"]
    assert result.mismatched_keys == ["1.exp_avg_sq_scale"]
    assert result.unexpected_keys == ["2.exp_avg_scale"]
    after = snapshot(optimizer)["state"]
    assert_identical([after[0], after[1]], [before[0], before[1]])
    plain = {key: x for key, x in saved["state"][2].items() if key != "exp_avg_scale"}
    assert_identical([after[2], after[3]], [plain, saved["state"][3]])
    run(optimizer, params, range(3, 4))


def test_a_rule_may_not_compute_with_bit_patterns() -> None:
    def sign_of_bits(h: Any, t: Any, p: Any, g: Any) -> Any:
        return p - h.lr * bitcast_f32(bitcast_u32(g))

    class BitwiseDescent(stepforge.Optimizer, rule=sign_of_bits):
        """BitwiseDescent: a rule that reads bit patterns."""

        lr: NonNegative = 0.1

    with pytest.raises(TypeError, match=r"sign_of_bits computes with uint32.*for formats"):
        BitwiseDescent(make_params())


# Exports that torch.optim loads


def decoded_by_hand(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict with the values of its codes, and torch's options only."""

    def decoded(param_state: dict[str, Any]) -> dict[str, Any]:
        keys = moments(param_state)
        return {
            key: decode_state(param_state, key).float() if key in keys else param_state[key]
            for key in [*keys, *param_state]
            if not key.endswith(("_codes", "_scale"))
        }

    state = {index: decoded(param_state) for index, param_state in state_dict["state"].items()}
    return copy.deepcopy({"state": state, "param_groups": state_dict["param_groups"]})


@pytest.mark.parametrize("state_format", ["int8", "bfloat16", None])
@each_optimizer
def test_torch_optim_continues_from_what_the_codes_say(cls: type, state_format: str | None) -> None:
    optimizer, params = trained(cls, {"state_format": state_format, "weight_decay": 0.1})
    results = []
    for checkpoint in (to_torch(optimizer), decoded_by_hand(optimizer.state_dict())):
        own = copy_params(params)
        twin = twin_of(cls)(own)
        twin.load_state_dict(save_and_load(checkpoint))
        run(twin, own, range(3, 6))
        results.append(snapshot(twin))
    assert_identical(results[0]["params"], results[1]["params"])
    assert_identical(results[0]["state"], results[1]["state"])


@each_optimizer
def test_the_options_are_those_of_the_twin(cls: type) -> None:
    optimizer, _ = trained(cls, {"state_format": "int8"})
    optimizer.param_groups[0]["initial_lr"] = 0.5
    exported = to_torch(optimizer)
    twins = twin_of(cls)(make_params(SHAPES), lr=LR).state_dict()["param_groups"][0]
    assert_identical(exported["param_groups"], [twins | {"initial_lr": 0.5}])
    # A plain state dict has no other option: a distributed checkpoint of the twin would lack it.
    assert_identical(optimizer.state_dict()["param_groups"], exported["param_groups"])


def test_groups_and_names_are_exported() -> None:
    params = make_params(SHAPES)
    named = named_params(params)
    groups = [{"params": named[:2], "lr": 0.5}, {"params": named[2:]}]
    optimizer = stepforge.AdamW(groups, state_format="int8", amsgrad=True)
    run(optimizer, params, range(2))
    twin = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}])
    twin.load_state_dict(to_torch(optimizer))
    assert [group["lr"] for group in twin.param_groups] == [0.5, 1e-3]
    assert twin.param_groups[0]["param_names"] == ["layer0", "layer1"]
    assert list(twin.state[params[0]]) == ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]


DTYPES = [
    (torch.float32, None, torch.float32),
    (torch.float32, "bfloat16", torch.float32),
    (torch.float64, "int8", torch.float64),
    (BFLOAT16, None, BFLOAT16),
    (BFLOAT16, "bfloat16", BFLOAT16),
    (BFLOAT16, "float32", torch.float32),
    (BFLOAT16, "int8", torch.float32),
]


@pytest.mark.parametrize(("dtype", "state_format", "expected"), DTYPES, ids=str)
def test_exported_states_lose_no_bits_and_have_at_least_those_of_the_parameter(
    dtype: torch.dtype, state_format: str | None, expected: torch.dtype
) -> None:
    optimizer, _ = trained(stepforge.Adam, {"state_format": state_format}, dtype)
    for param_state in to_torch(optimizer)["state"].values():
        assert {param_state[key].dtype for key in moments(param_state)} == {expected}


@every_format
def test_stepping_the_twin_does_not_move_the_optimizer(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    # torch.optim keeps the tensors that it loads if they have the right dtype.
    optimizer, params = trained(stepforge.NAdam, options | {"lr": torch.tensor(LR)}, dtype)
    optimizer.state["note"] = ["mine"]
    before = snapshot(optimizer)
    exported = to_torch(optimizer)
    own = copy_params(params)
    twin = torch.optim.NAdam(own)
    twin.load_state_dict(exported)
    run(twin, own, range(3, 5))
    exported["param_groups"][0]["lr"].fill_(7)
    exported["state"]["note"].append("changed")
    assert_unchanged(optimizer, before)


def test_an_export_of_many_parameters_is_small() -> None:
    """Step counts are elements of one vector, which must not be copied for each parameter."""
    params = make_params([(2,)] * 300)
    optimizer = stepforge.Adam(params)
    run(optimizer, params, range(3))
    step = to_torch(optimizer)["state"][7]["step"]
    assert step.untyped_storage().nbytes() == 4


def test_only_optimizers_of_this_library_are_exported() -> None:
    with pytest.raises(TypeError, match=r"to_torch is for optimizers of this library.*SGD"):
        to_torch(torch.optim.SGD(make_params()))


def test_codes_without_scales_are_not_exported() -> None:
    optimizer, params = trained(stepforge.Adam, {"state_format": "int8"})
    del optimizer.state[params[0]]["exp_avg_scale"]
    with pytest.raises(RuntimeError, match="exp_avg has codes without scales"):
        to_torch(optimizer)


def test_a_rule_without_a_twin_is_exported_without_execution_flags() -> None:
    def descend(h: Any, t: Any, p: Any, g: Any) -> Any:
        return p - h.lr * g

    class Descent(stepforge.Optimizer, rule=descend):
        """Gradient descent."""

        lr: NonNegative = 0.1

    (group,) = to_torch(Descent(make_params()))["param_groups"]
    assert set(group) == {"lr", "maximize", "params"}


# Full-precision weights


class Model(torch.nn.Module):
    """A model with a weight under two names, a frozen weight, and a buffer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, 16, dtype=dtype)
        self.tied = torch.nn.Linear(16, 16, bias=False, dtype=dtype)
        self.tied.weight = self.first.weight
        self.frozen = torch.nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
        self.register_buffer("count", torch.arange(3))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator).bfloat16())


def stepped(dtype: torch.dtype, steps: int, **options: Any) -> tuple[Model, Any]:
    """Return a model after some steps, with gradients that are exact in every dtype."""
    model = Model(dtype)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = stepforge.AdamW(params, lr=1e-3, **options)
    for step in range(steps):
        # Drawn in float32: not every version of torch draws the same values in all dtypes.
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(dtype)
        optimizer.step()
    return model, optimizer


def test_a_weight_of_32_bits_is_the_weight_of_a_run_in_float32() -> None:
    options = {"state_format": "float32", "master_weight_bits": 32}
    model, optimizer = stepped(BFLOAT16, 9, **options)
    expected, _ = stepped(torch.float32, 9)
    joined = full_precision_weights(model, optimizer)
    own = model.state_dict()
    assert list(joined) == list(own)
    assert not torch.equal(own["first.weight"].float(), joined["first.weight"])
    for name in ("first.weight", "first.bias", "tied.weight"):
        assert_identical(joined[name], expected.state_dict()[name])
    for name in ("frozen", "count"):
        assert joined[name].data_ptr() == own[name].data_ptr()
    fresh = Model(torch.float32)
    fresh.load_state_dict(joined)
    assert_identical(fresh.first.weight.detach(), expected.first.weight.detach())


def test_a_run_moves_to_float32_in_torch_optim_bit_for_bit() -> None:
    """Oracle: the same run in float32, exported too: its states and weights are the same."""
    pairs = [
        stepped(BFLOAT16, 9, state_format="float32", master_weight_bits=32),
        stepped(torch.float32, 9),
    ]
    results = []
    for model, optimizer in pairs:
        moved = Model(torch.float32)
        moved.load_state_dict(full_precision_weights(model, optimizer))
        params = [p for p in moved.parameters() if p.requires_grad]
        twin = torch.optim.AdamW(params)
        twin.load_state_dict(to_torch(optimizer))
        run(twin, params, range(9, 12))
        results.append([p.detach() for p in params])
    assert_identical(*results)


def test_24_bits_are_a_float32_rounded_to_them() -> None:
    model, optimizer = stepped(BFLOAT16, 1, state_format="float32", master_weight_bits=24)
    expected, _ = stepped(torch.float32, 1)
    joined = full_precision_weights(model, optimizer)["first.weight"]
    exact = expected.first.weight.detach()
    assert joined.dtype == torch.float32
    assert not (joined.view(torch.int32) & 0xFF).any()
    # Half a unit in the last of 16 bits; rounding up at the limit of 8 low bits costs one more.
    assert ((joined - exact).abs() <= exact.abs() * 2.0**-15).all()


def test_without_low_bits_the_weights_are_the_models_own() -> None:
    for dtype, options in ((BFLOAT16, {"stochastic_rounding": True}), (torch.float32, {})):
        model, optimizer = stepped(dtype, 2, **options)
        assert_identical(full_precision_weights(model, optimizer), model.state_dict())
    model = Model(BFLOAT16)
    before_any_step = stepforge.Adam(model.parameters(), master_weight_bits=24)
    assert_identical(full_precision_weights(model, before_any_step), model.state_dict())


def test_full_precision_weights_alias_nothing() -> None:
    model, optimizer = stepped(BFLOAT16, 2, master_weight_bits=24)
    before, weights = snapshot(optimizer), copy.deepcopy(model.state_dict())
    joined = full_precision_weights(model, optimizer)
    for name in ("first.weight", "first.bias"):
        joined[name].fill_(math.pi)
    assert_unchanged(optimizer, before)
    assert_identical(model.state_dict(), weights)
