"""Checkpoints of optimizers that keep states and weights in few bits.

The oracle of a round trip is the run that was never interrupted, bit for bit. That of a change of
format is what the codes say by their definition, written out below in float64; that of an export is
the torch.optim twin, given those numbers by hand; that of joined weights a run in float32.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import stepforge
from stepforge.checkpoint import full_precision_weights, to_torch
from stepforge.declare import NonNegative
from stepforge.ops import bitcast_f32, bitcast_u32
from stepforge.state.layout import LOW_BITS

from .codes import numbers
from .twins import (
    LR,
    assert_identical,
    assert_unchanged,
    each_optimizer,
    frozen,
    make_params,
    run,
    through_a_file,
    twin_of,
)

Params = list[torch.nn.Parameter]
BFLOAT16 = torch.bfloat16

#: Two parameters that have codes, with blocks that rows cut short, and three that are too small.
SHAPES = ((32, 130), (3, 8, 200), (5,), (), (64, 16))
#: Ways to store a run: the dtype of its parameters, and its options.
STORED: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain": (torch.float32, {}),
    "float32": (BFLOAT16, {"state_format": "float32"}),
    "bfloat16": (torch.float32, {"state_format": "bfloat16"}),
    "int8": (torch.float32, {"state_format": "int8"}),
    "24 bits": (BFLOAT16, {"state_format": "int8", "master_weight_bits": 24}),
    "32 bits": (torch.float16, {"state_format": "bfloat16", "master_weight_bits": 32}),
    "stochastic": (BFLOAT16, {"state_format": "int8", "stochastic_rounding": True}),
}
every_way = pytest.mark.parametrize(("dtype", "options"), STORED.values(), ids=STORED)
ADAMS = pytest.mark.parametrize("cls", [stepforge.Adam, stepforge.AdamW])


def trained(
    cls: type, options: dict[str, Any], dtype: torch.dtype = torch.float32, steps: int = 3
) -> tuple[Any, Params]:
    params = make_params(SHAPES, dtype)
    optimizer = cls(params, **{"lr": LR, "rounding_seed": 5, **options})
    run(optimizer, params, range(steps))
    return optimizer, params


def copies(params: Params) -> Params:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def moments(entry: dict[str, Any]) -> list[str]:
    """The keys of an entry that name states with an element for each element."""
    known = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "sum")
    return [key for key in known if key in entry or f"{key}_codes" in entry]


# Round trips


@every_way
@each_optimizer
def test_a_round_trip_continues_bit_for_bit(
    cls: type, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    optimizer, params = trained(cls, options, dtype)
    own = copies(params)
    resumed = cls(own, lr=0.7, rounding_seed=5, **options)
    assert not any(resumed.load_state_dict(through_a_file(optimizer.state_dict())))
    assert_identical(frozen(resumed)["state"], frozen(optimizer)["state"])
    run(optimizer, params, range(3, 6), uneven=True)
    run(resumed, own, range(3, 6), uneven=True)
    assert_identical(frozen(resumed)["state"], frozen(optimizer)["state"])
    assert_identical(frozen(resumed)["params"], frozen(optimizer)["params"])


@pytest.mark.parametrize("way", ["bfloat16", "int8", "stochastic"])
def test_random_bits_follow_from_seed_parameter_and_step(way: str) -> None:
    dtype, options = STORED[way]

    def stored(shapes: Any, seed: int) -> list[dict[str, Any]]:
        params = make_params(shapes, dtype)
        optimizer = stepforge.Adam(params, lr=LR, rounding_seed=seed, **options)
        for _ in range(2):
            for p in params:
                p.grad = torch.full_like(p, 0.3)
            optimizer.step()
        return [{"p": p.detach(), **optimizer.state[p]} for p in params]

    shape = (32, 130)
    ((first, second), (again, _), (other, _)) = (stored([shape] * 2, seed) for seed in (0, 0, 1))
    rounded = {"stochastic": "p", "int8": "exp_avg_sq_codes"}.get(way, "exp_avg_sq")
    assert_identical(again, first)
    assert not torch.equal(other[rounded], first[rounded])
    if rounded != "p":  # the weights began apart
        assert not torch.equal(second[rounded], first[rounded])


@every_way
@each_optimizer
def test_nothing_is_aliased(cls: type, dtype: torch.dtype, options: dict[str, Any]) -> None:
    source, source_params = trained(cls, options, dtype)
    params = make_params(SHAPES, dtype)
    loaded = cls(params, **options)
    loaded.load_state_dict(source.state_dict())
    before = frozen(loaded)
    run(source, source_params, range(3, 5))
    assert_unchanged(loaded, before)
    before = frozen(source)
    run(loaded, params, range(3, 5))
    assert_unchanged(source, before)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
@every_way
def test_a_copy_continues_identically(
    dtype: torch.dtype, options: dict[str, Any], duplicate: Callable[[Any], Any]
) -> None:
    optimizer, params = trained(stepforge.NAdam, options, dtype)
    copied = duplicate(optimizer)
    own = copied.param_groups[0]["params"]
    run(optimizer, params, range(3, 6))
    run(copied, own, range(3, 6))
    assert_identical(frozen(copied), frozen(optimizer))


def test_a_file_is_as_compact_as_the_state() -> None:
    """Two codes of 8 bits, and of float32 scales two for each 128 elements: 2.0625 bytes."""
    params = [torch.nn.Parameter(torch.ones(256, 1024))]
    optimizer = stepforge.AdamW(params, state_format="int8")
    run(optimizer, params, range(1))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    beside = 4096  # names, options and the frame of the file
    assert params[0].numel() * 2.0625 <= file.tell() <= params[0].numel() * 2.0625 + beside


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
    assert not any(loaded.load_state_dict(through_a_file(saved.state_dict())))
    for p, entry in zip(params, saved.state_dict()["state"].values(), strict=True):
        found = loaded.state[p]
        assert set(moments(found)) == set(moments(entry))
        for key in moments(entry):
            before, after = numbers(entry, key), numbers(found, key)
            if key in found and found[key].dtype == BFLOAT16:
                assert_identical(after, before.float().bfloat16().double())
            elif key in found or source == "int8":
                # Codes that have become numbers are the same numbers in codes.
                assert_identical(after, before)
            else:
                # Half of the eighth of an octave between two codes; first moments below 1.0625 *
                # 2**-15 of the scale, of which the largest of a block is at least 0.9375, are 0.
                lost = 2.0**-14 * before.abs().max() if key == "exp_avg" else 0.0
                assert ((after - before).abs() <= before.abs() / 16 + lost).all()
                assert (after.sign() == before.sign()).all() or key == "exp_avg"
    run(loaded, params, range(3, 5))
    assert all(float(loaded.state[p]["step"]) == 5 for p in params)


@pytest.mark.parametrize("way", ["bfloat16", "int8", "24 bits"])
@each_optimizer
def test_a_checkpoint_of_torch_optim_loads_and_returns(cls: type, way: str) -> None:
    dtype, options = STORED[way]
    params = make_params(SHAPES, dtype)
    twin = twin_of(cls)(params, lr=LR)
    run(twin, params, range(3))
    checkpoint = through_a_file(twin.state_dict())
    own = copies(params)
    optimizer = cls(own, **options)
    assert not any(optimizer.load_state_dict(checkpoint))
    run(optimizer, own, range(3, 5))
    returned = twin_of(cls)(copies(own))
    returned.load_state_dict(through_a_file(to_torch(optimizer)))
    assert_identical(returned.param_groups[0]["lr"], LR)
    run(returned, returned.param_groups[0]["params"], range(5, 6))


def test_states_in_fewer_bits_than_the_parameter_become_its_own() -> None:
    """As torch.optim casts them; averages that are rounded to nearest would stand still."""
    saved, _ = trained(stepforge.Adam, {"state_format": "bfloat16"})
    params = make_params(SHAPES)
    optimizer = stepforge.Adam(params)
    optimizer.load_state_dict(saved.state_dict())
    assert {optimizer.state[p][key].dtype for p in params for key in ("exp_avg", "exp_avg_sq")} == {
        torch.float32
    }


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16], ids=str)
@pytest.mark.parametrize(("source", "target"), [(24, 32), (32, 24), (24, None), (None, 32)])
def test_lower_bits_of_any_width_load_into_any(
    dtype: torch.dtype, source: int | None, target: int | None
) -> None:
    saved, params = trained(stepforge.Adam, {"master_weight_bits": source}, dtype)
    own = copies(params)
    optimizer = stepforge.Adam(own, master_weight_bits=target)
    assert not any(optimizer.load_state_dict(through_a_file(saved.state_dict())))
    for p, q in zip(params, own, strict=True):
        before, after = (weight_of(*pair) for pair in ((saved, p), (optimizer, q)))
        if target is None:
            assert not {"low_bits_8", "low_bits_16"} & set(optimizer.state[q])
        elif source is None or source < target:
            assert_identical(after, before)
        else:
            # One of the last of its 16 bits of fraction (a float16's 19): half of one to round it,
            # and another where rounding up would leave 8 bits.
            assert ((after - before).abs() <= before.abs() * 2.0**-15 + 2.0**-32).all()
    run(optimizer, own, range(3, 5))


def weight_of(optimizer: Any, p: torch.nn.Parameter) -> torch.Tensor:
    """The weight that is stepped, by :func:`full_precision_weights`."""
    model = torch.nn.Module()
    model.register_parameter("p", p)
    return full_precision_weights(model, optimizer)["p"].detach().float()


@ADAMS
def test_amsgrad_begins_in_a_format_when_it_is_turned_on(cls: type) -> None:
    saved, params = trained(cls, {"state_format": "int8"})
    own = copies(params)
    optimizer = cls(own, amsgrad=True, state_format="int8")
    assert not any(optimizer.load_state_dict(saved.state_dict()))
    run(optimizer, own, range(3, 4))
    for p in own:
        entry = optimizer.state[p]
        assert ("max_exp_avg_sq_codes" in entry) == ("exp_avg_sq_codes" in entry)
        # Begun at 0, the largest so far is the newest; each is rounded by bits of its own, by
        # less than an eighth of it.
        newest, largest = numbers(entry, "exp_avg_sq"), numbers(entry, "max_exp_avg_sq")
        assert ((largest - newest).abs() <= newest / 8).all()


@pytest.mark.parametrize("target", ["int8", "bfloat16", None])
def test_names_match_whatever_the_order_and_format(target: str | None) -> None:
    params = make_params(SHAPES)
    names = [(f"layer{index}", p) for index, p in enumerate(params)]
    source = stepforge.RAdam(names, state_format="int8")
    run(source, params, range(2))
    own = make_params(SHAPES)
    order = [3, 1, 4, 0, 2]
    loaded = stepforge.RAdam([(f"layer{i}", own[i]) for i in order], state_format=target)
    assert not any(loaded.load_state_dict(through_a_file(source.state_dict())))
    for p, q in zip(params, own, strict=True):
        before, after = (numbers(o.state[x], "exp_avg") for o, x in ((source, p), (loaded, q)))
        assert_identical(after, before.bfloat16().double() if target == "bfloat16" else before)


@pytest.mark.parametrize(
    ("first", "then"), list(itertools.permutations(["int8", "bfloat16", None], 2))
)
@each_optimizer
def test_a_group_may_change_its_format_between_steps(
    cls: type, first: str | None, then: str | None
) -> None:
    """Oracle: its checkpoint, loaded into an optimizer that had that format from the beginning."""
    optimizer, params = trained(cls, {"state_format": first})
    own = copies(params)
    other = cls(own, lr=LR, rounding_seed=5, state_format=then)
    other.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["state_format"] = then
    run(optimizer, params, range(3, 6))
    run(other, own, range(3, 6))
    assert_identical(frozen(optimizer)["state"], frozen(other)["state"])
    assert_identical(frozen(optimizer)["params"], frozen(other)["params"])


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


def _without_scales(entry: dict[str, Any]) -> None:
    del entry["exp_avg_sq_scale"]


def _scales_of_another_shape(entry: dict[str, Any]) -> None:
    entry["exp_avg_sq_scale"] = entry["exp_avg_sq_scale"][:, :1]


def _scales_of_another_dtype(entry: dict[str, Any]) -> None:
    entry["exp_avg_sq_scale"] = entry["exp_avg_sq_scale"].to(torch.int32)


def _scales_that_are_a_number(entry: dict[str, Any]) -> None:
    entry["exp_avg_sq_scale"] = 1.0


def _scales_without_codes(entry: dict[str, Any]) -> None:
    entry["exp_avg_sq"] = entry.pop("exp_avg_sq_codes").float()


def _codes_of_another_shape(entry: dict[str, Any]) -> None:
    entry["exp_avg_sq_codes"] = entry["exp_avg_sq_codes"][:, 1:]


def _codes_of_another_dtype(entry: dict[str, Any]) -> None:
    entry["exp_avg_sq_codes"] = entry["exp_avg_sq_codes"].float()


def _low_bits_that_are_numbers(entry: dict[str, Any]) -> None:
    entry["low_bits_8"] = torch.ones(32, 130)


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
    before = frozen(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


def test_lower_bits_of_another_dtype_are_refused() -> None:
    options = {"master_weight_bits": 24}
    saved = copy.deepcopy(trained(stepforge.Adam, options, BFLOAT16)[0].state_dict())
    _low_bits_that_are_numbers(saved["state"][0])
    optimizer, _ = trained(stepforge.Adam, options, BFLOAT16, steps=2)
    before = frozen(optimizer)
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
    before = frozen(optimizer)["state"]
    result = optimizer.load_state_dict(saved, strict=False)
    assert result.missing_keys == ["0.exp_avg_sq_scale"]
    assert result.mismatched_keys == ["1.exp_avg_sq_scale"]
    assert result.unexpected_keys == ["2.exp_avg_scale"]
    after = frozen(optimizer)["state"]
    assert_identical([after[0], after[1]], [before[0], before[1]])
    plain = {key: x for key, x in saved["state"][2].items() if key != "exp_avg_scale"}
    assert_identical([after[2], after[3]], [plain, saved["state"][3]])
    run(optimizer, params, range(3, 4))


def test_a_rule_has_no_words() -> None:
    def sign_of_bits(h: Any, t: Any, p: Any, g: Any) -> Any:
        return p - h.lr * bitcast_f32(bitcast_u32(g))

    class Wordy(stepforge.Optimizer, rule=sign_of_bits):
        """Computes with words."""

        lr: NonNegative = 0.1

    with pytest.raises(TypeError, match=r"sign_of_bits computes with uint32.*for formats"):
        Wordy(make_params())


# What torch.optim loads


def decoded_by_hand(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict with the numbers of its codes, and torch's options only."""
    state = {
        number: {
            key: numbers(entry, key).float() if key in moments(entry) else entry[key]
            for key in [*moments(entry), *entry]
            if not key.endswith(("_codes", "_scale"))
        }
        for number, entry in state_dict["state"].items()
    }
    return copy.deepcopy({"state": state, "param_groups": state_dict["param_groups"]})


@pytest.mark.parametrize("state_format", ["int8", "bfloat16", None])
@each_optimizer
def test_torch_optim_continues_from_what_the_codes_say(cls: type, state_format: str | None) -> None:
    optimizer, params = trained(cls, {"state_format": state_format, "weight_decay": 0.1})
    ways = [to_torch(optimizer), decoded_by_hand(optimizer.state_dict())]
    results = []
    for checkpoint in ways:
        own = copies(params)
        twin = twin_of(cls)(own)
        twin.load_state_dict(through_a_file(checkpoint))
        run(twin, own, range(3, 6))
        results.append(frozen(twin))
    assert_identical(results[0]["params"], results[1]["params"])
    assert_identical(results[0]["state"], results[1]["state"])


@each_optimizer
def test_the_options_are_those_of_the_twin(cls: type) -> None:
    optimizer, _ = trained(cls, {"state_format": "int8"})
    optimizer.param_groups[0]["initial_lr"] = 0.5
    exported = to_torch(optimizer)
    twins = twin_of(cls)(make_params(SHAPES), lr=LR).state_dict()["param_groups"][0]
    assert_identical(exported["param_groups"], [twins | {"initial_lr": 0.5}])
    # A plain state dict has no more, as no distributed checkpoint of the twin would have it.
    assert_identical(optimizer.state_dict()["param_groups"], exported["param_groups"])


def test_groups_and_names_are_exported() -> None:
    params = make_params(SHAPES)
    named = [(f"layer{index}", p) for index, p in enumerate(params)]
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
def test_exported_states_have_all_bits_and_at_least_the_parameters(
    dtype: torch.dtype, state_format: str | None, expected: torch.dtype
) -> None:
    optimizer, _ = trained(stepforge.Adam, {"state_format": state_format}, dtype)
    for entry in to_torch(optimizer)["state"].values():
        assert {entry[key].dtype for key in moments(entry)} == {expected}


@every_way
def test_stepping_the_twin_does_not_move_the_optimizer(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    # torch.optim keeps the tensors that it loads, where they have the right dtype.
    optimizer, params = trained(stepforge.NAdam, options | {"lr": torch.tensor(LR)}, dtype)
    optimizer.state["note"] = ["mine"]
    before = frozen(optimizer)
    exported = to_torch(optimizer)
    own = copies(params)
    twin = torch.optim.NAdam(own)
    twin.load_state_dict(exported)
    run(twin, own, range(3, 5))
    exported["param_groups"][0]["lr"].fill_(7)
    exported["state"]["note"].append("changed")
    assert_unchanged(optimizer, before)


def test_an_export_of_many_parameters_is_small() -> None:
    """Their step numbers are elements of one vector, which is not to be copied for each."""
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


def test_a_rule_without_a_twin_is_exported_without_how_it_ran() -> None:
    def descend(h: Any, t: Any, p: Any, g: Any) -> Any:
        return p - h.lr * g

    class Descent(stepforge.Optimizer, rule=descend):
        """Gradient descent."""

        lr: NonNegative = 0.1

    (group,) = to_torch(Descent(make_params()))["param_groups"]
    assert set(group) == {"lr", "maximize", "params"}


# Joined weights


class Model(torch.nn.Module):
    """Has a weight under two names, a frozen one, and a buffer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, 16, dtype=dtype)
        self.tied = torch.nn.Linear(16, 16, bias=False, dtype=dtype)
        self.tied.weight = self.first.weight
        self.still = torch.nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
        self.register_buffer("count", torch.arange(3))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator).bfloat16())


def stepped(dtype: torch.dtype, steps: int, **options: Any) -> tuple[Model, Any]:
    """A model after some steps of gradients that every dtype can hold."""
    model = Model(dtype)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = stepforge.AdamW(params, lr=1e-3, **options)
    for step in range(steps):
        # Drawn in float32: not every version of torch draws the same numbers in all dtypes.
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
    for name in ("still", "count"):
        assert joined[name].data_ptr() == own[name].data_ptr()
    fresh = Model(torch.float32)
    fresh.load_state_dict(joined)
    assert_identical(fresh.first.weight.detach(), expected.first.weight.detach())


def test_a_run_moves_to_float32_in_torch_optim_bit_for_bit() -> None:
    """Oracle: the run in float32 that was exported, as its states and weights are the same."""
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
    # Half of the last of 16 bits; the rounding up that leaves 8 bits beside the weight costs one.
    assert ((joined - exact).abs() <= exact.abs() * 2.0**-15).all()


def test_without_lower_bits_the_weights_are_the_models_own() -> None:
    for dtype, options in ((BFLOAT16, {"stochastic_rounding": True}), (torch.float32, {})):
        model, optimizer = stepped(dtype, 2, **options)
        assert_identical(full_precision_weights(model, optimizer), model.state_dict())
    model = Model(BFLOAT16)
    before_any_step = stepforge.Adam(model.parameters(), master_weight_bits=24)
    assert_identical(full_precision_weights(model, before_any_step), model.state_dict())


def test_joined_weights_alias_nothing() -> None:
    model, optimizer = stepped(BFLOAT16, 2, master_weight_bits=24)
    before, weights = frozen(optimizer), copy.deepcopy(model.state_dict())
    joined = full_precision_weights(model, optimizer)
    for name in ("first.weight", "first.bias"):
        joined[name].fill_(math.pi)
    assert_unchanged(optimizer, before)
    assert_identical(model.state_dict(), weights)


# Options that some parameters, or all, have no use for


#: Weights as trainers find them: a body of bfloat16, norms and adapters of longer dtypes.
MIXED = (BFLOAT16, torch.float32, torch.float64, torch.complex64, torch.float16)
FOR_SHORT_WEIGHTS: dict[str, dict[str, Any]] = {
    "24 bits": {"master_weight_bits": 24},
    "32 bits": {"master_weight_bits": 32},
    "stochastic": {"stochastic_rounding": True},
}


def mixed_params() -> Params:
    return [p for dtype in MIXED for p in make_params([(40, 3)], dtype)]


def in_every_dtype(params: Params, step: int) -> None:
    for index, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + index)
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("options", FOR_SHORT_WEIGHTS.values(), ids=FOR_SHORT_WEIGHTS)
@each_optimizer
def test_weights_that_have_the_bits_already_are_stepped_as_they_are(
    cls: type, options: dict[str, Any]
) -> None:
    """The oracle has a group for each parameter, and the option where it is of use alone."""
    together, apart = mixed_params(), mixed_params()
    optimizer = cls(together, lr=LR, **options)
    groups = [{"params": [p], **(options if p.dtype.itemsize == 2 else {})} for p in apart]
    expected = cls(groups, lr=LR)
    for step in range(3):
        for params, one in ((together, optimizer), (apart, expected)):
            in_every_dtype(params, step)
            one.step()
    assert_identical(frozen(optimizer)["params"], frozen(expected)["params"])
    states = [
        [dict(one.state[p]) for p in params]
        for params, one in ((together, optimizer), (apart, expected))
    ]
    assert_identical(*states)
    with_low_bits = [bool(LOW_BITS.keys() & entry.keys()) for entry in states[0]]
    assert with_low_bits == [
        p.dtype.itemsize == 2 and "master_weight_bits" in options for p in together
    ]
    own = copies(together)
    resumed = cls(own, lr=LR, **options)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_identical([dict(resumed.state[p]) for p in own], states[0])


def test_low_bits_of_a_weight_that_has_become_longer_are_dropped_on_loading() -> None:
    optimizer, params = trained(stepforge.AdamW, {"master_weight_bits": 24}, BFLOAT16)
    own = [torch.nn.Parameter(p.detach().float()) for p in params]
    own.append(torch.nn.Parameter(torch.ones(3, dtype=BFLOAT16)))
    names = [(str(i), p) for i, p in enumerate(own)]
    resumed = stepforge.AdamW(names, master_weight_bits=24)
    named = optimizer.state_dict()
    named["param_groups"][0]["param_names"] = [str(i) for i in range(len(params))]
    resumed.load_state_dict(named, strict=False)
    assert all("exp_avg" in resumed.state[p] for p in own[:-1])
    assert not any(LOW_BITS.keys() & entry.keys() for entry in resumed.state.values())


def warnings_of(params: Any, **options: Any) -> list[str]:
    """Those of a constructor, which point to the line that called it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        stepforge.Adam(params, **options)
    assert all(x.category is UserWarning and x.filename == __file__ for x in said)
    return [str(x.message) for x in said]


def test_an_option_that_no_parameter_can_use_is_warned_of_once() -> None:
    small, large = make_params([(5,), (7, 3)]), make_params([(64, 128)])
    for option, value, left in (
        ("master_weight_bits", 24, "not 24 bits for 2 parameters, 26 elements: float32 has them"),
        ("stochastic_rounding", True, "not rounded at random for 2 parameters, 26 elements: flo"),
        ("state_format", "int8", "not int8 for 2 parameters, 26 elements: fewer than 4,096 elem"),
    ):
        groups = [{"params": [p]} for p in small]
        (said,) = warnings_of(groups, **{option: value})
        assert said.startswith(f"{option}={value!r} has no effect: {left}")
    # One that can is enough, in whatever group; and groups that ask for nothing do not count.
    assert not warnings_of([*small, *large], state_format="int8")
    mixed = [{"params": small}, {"params": make_params([(2,)], BFLOAT16)}]
    assert not warnings_of(mixed, master_weight_bits=24)
    (said,) = warnings_of([{"params": small, "state_format": "int8"}, {"params": large}])
    assert said.startswith("state_format='int8' has no effect: not int8 for 2 parameters")


def test_parameters_of_lazy_modules_may_yet_use_an_option() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules")
        params = list(torch.nn.LazyLinear(5).parameters())
    assert not warnings_of(params, state_format="int8")


def test_complex_states_keep_their_dtype_and_say_so() -> None:
    params = make_params([(4,)], torch.complex64)
    (said,) = warnings_of(params, state_format="bfloat16")
    assert "not bfloat16 for 1 parameter, 4 elements: states of complex64" in said
    assert not warnings_of(params, state_format="float32")
