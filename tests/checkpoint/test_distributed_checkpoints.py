"""``torch.distributed.checkpoint`` in one process: equal formats load, others raise or convert.

Oracle: the saved state, bit for bit. Oracle of a mismatch: an error that names it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import stepforge
from stepforge.checkpoint import load_distributed
from tests.decoding import decode_state, join_low_bits
from tests.twins import LR, assert_identical, each_optimizer, run, snapshot, twin_of

# Warnings that there is one process only, and that modules of torch are deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
every_form = pytest.mark.parametrize("form", [None, FLAT], ids=["nested", "flattened"])


class Model(torch.nn.Module):
    """A model of two layers. The first has int8 states."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = torch.nn.Linear(130, 64, dtype=dtype)
        self.last = torch.nn.Linear(3, 2, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))


def built(
    cls: type, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Model, Any]:
    """Return a model and its optimizer."""
    model = Model(seed, dtype)
    return model, cls(model.parameters(), **{"lr": LR, **options})


def trained(cls: type, *args: Any, steps: int = 3, **options: Any) -> tuple[Model, Any]:
    """Return a model and its optimizer after some steps."""
    model, optimizer = built(cls, *args, **options)
    run(optimizer, list(model.parameters()), range(steps))
    return model, optimizer


def save(model: Model, optimizer: Any, folder: Path, form: Any = None, **more: Any) -> None:
    """Write a distributed checkpoint, with the optimizer's state nested or flattened."""
    states = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=form),
    }
    checkpoint.save(states | more, checkpoint_id=folder)


def load_as_torch_does(
    model: Model, optimizer: Any, folder: Path, form: Any = None, *, partial: bool = False
) -> None:
    """Load the optimizer by the functions of torch, which match keys and know no formats."""
    own = {"optimizer": get_optimizer_state_dict(model, optimizer, options=form)}
    planner = DefaultLoadPlanner(allow_partial_load=partial)
    checkpoint.load(own, checkpoint_id=folder, planner=planner)
    set_optimizer_state_dict(model, optimizer, own["optimizer"], options=form)


def states(model: Model, optimizer: Any) -> dict[str, Any]:
    """Return the state of each parameter, by the parameter's name."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}


# States that torch's own functions load


@every_form
@pytest.mark.parametrize("direction", ["to torch", "from torch", "here"])
@each_optimizer
def test_plain_states_load_from_and_into_torch_optim_as_they_are(
    cls: type, direction: str, form: Any, tmp_path: Path
) -> None:
    """The target may have other options of formats, as no state dict has them."""
    source, target = {
        "to torch": (cls, twin_of(cls)),
        "from torch": (twin_of(cls), cls),
        "here": (cls, cls),
    }[direction]
    model, optimizer = trained(source)
    save(model, optimizer, tmp_path, form)
    options = {} if direction == "to torch" else {"rounding_seed": 7, "state_format": "float32"}
    own, other = built(target, seed=1, **{"lr": 0.7, **options})
    load_as_torch_does(own, other, tmp_path, form)
    assert_identical(states(own, other), states(model, optimizer))
    assert other.param_groups[0]["lr"] == LR
    if options:
        assert other.param_groups[0]["rounding_seed"] == 7
    run(other, list(own.parameters()), range(3, 4))


@every_form
def test_the_same_format_loads_as_it_is(form: Any, tmp_path: Path) -> None:
    options = {"state_format": "int8", "master_weight_bits": 24}
    model, optimizer = trained(stepforge.AdamW, 0, torch.bfloat16, **options)
    save(model, optimizer, tmp_path, form)
    own, other = built(stepforge.AdamW, 1, torch.bfloat16, **options)
    load_as_torch_does(own, other, tmp_path, form)
    assert_identical(states(own, other), states(model, optimizer))


# A mismatch is an error that names it


FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "int8": (torch.float32, {"state_format": "int8"}),
    "24 bits": (torch.bfloat16, {"state_format": "float32", "master_weight_bits": 24}),
    "32 bits": (torch.bfloat16, {"state_format": "float32", "master_weight_bits": 32}),
}
MISMATCHES = [
    pytest.param("float32", "int8", "exp_avg_codes", id="codes of numbers"),
    pytest.param("int8", "float32", "exp_avg", id="numbers of codes"),
    pytest.param("24 bits", "32 bits", "low_bits_16", id="16 low bits of 8"),
    pytest.param("32 bits", "24 bits", "low_bits_8", id="8 low bits of 16"),
    pytest.param("float32", "24 bits", "low_bits_8", id="low bits of none"),
]


@every_form
@pytest.mark.parametrize(("source", "target", "key"), MISMATCHES)
def test_another_format_is_a_missing_key(
    source: str, target: str, key: str, form: Any, tmp_path: Path
) -> None:
    save(*trained(stepforge.AdamW, 0, FORMATS[source][0], **FORMATS[source][1]), tmp_path, form)
    own, other = built(stepforge.AdamW, 1, FORMATS[target][0], **FORMATS[target][1])
    with pytest.raises(checkpoint.CheckpointException, match=rf"Missing key .*\.{key}\."):
        load_as_torch_does(own, other, tmp_path, form)


@every_form
@pytest.mark.parametrize(("source", "target", "key"), MISMATCHES[:2])
def test_a_partial_load_that_leaves_zeros_beside_a_step_count_is_refused(
    source: str, target: str, key: str, form: Any, tmp_path: Path
) -> None:
    save(*trained(stepforge.AdamW, 0, **FORMATS[source][1]), tmp_path, form)
    own, other = built(stepforge.AdamW, 1, **FORMATS[target][1])
    with pytest.raises(ValueError, match=rf"missing: .*\.{key} \(it was not read from the check"):
        load_as_torch_does(own, other, tmp_path, form, partial=True)


def test_a_partial_load_joins_no_old_low_bits_to_new_weights(tmp_path: Path) -> None:
    """The low bits of a new optimizer are 0, so it may load: the weights count as they are."""
    save(*trained(stepforge.AdamW, 0, **FORMATS["float32"][1]), tmp_path)
    dtype, options = FORMATS["24 bits"]
    load_as_torch_does(*built(stepforge.AdamW, 1, dtype, **options), tmp_path, partial=True)
    older = trained(stepforge.AdamW, 1, dtype, steps=2, **options)
    with pytest.raises(ValueError, match=r"missing: .*\.low_bits_8 \(it was not read"):
        load_as_torch_does(*older, tmp_path, partial=True)


@every_form
def test_a_partial_load_may_lack_a_whole_parameter(form: Any, tmp_path: Path) -> None:
    model, optimizer = trained(stepforge.AdamW)
    del optimizer.state[model.last.bias]
    model.last.bias.requires_grad_(False)
    save(model, optimizer, tmp_path, form)
    own, other = built(stepforge.AdamW, 1)
    if form is None:
        load_as_torch_does(own, other, tmp_path, form, partial=True)
        assert_identical(
            states(own, other)["first.weight"], states(model, optimizer)["first.weight"]
        )
        assert not other.state[own.last.bias]["exp_avg"].any()
    assert load_distributed(own, other, tmp_path, strict=False) is not None
    assert_identical(states(own, other)["last.weight"], states(model, optimizer)["last.weight"])


def test_a_state_that_was_changed_in_its_state_dict_loads() -> None:
    """A change by the user is no partial load: of any tensor, alone or with the step count."""
    for keys in (("exp_avg",), ("exp_avg_sq",), ("exp_avg", "exp_avg_sq", "step")):
        model, optimizer = trained(stepforge.AdamW)
        saved = optimizer.state_dict()
        for param_state in saved["state"].values():
            for key in keys:
                param_state[key].zero_()
        assert not any(optimizer.load_state_dict(saved))
        saved = optimizer.state_dict()
        for param_state in saved["state"].values():
            param_state["exp_avg"] = torch.ones_like(param_state["exp_avg"])
            param_state["step"] = torch.tensor(7.0)
        assert not any(optimizer.load_state_dict(saved))
        assert optimizer.state[model.last.bias]["exp_avg"].all()


@pytest.mark.parametrize(("source", "target"), [("float32", "int8"), ("int8", "float32")])
def test_a_whole_state_dict_of_another_format_is_converted(source: str, target: str) -> None:
    """torch merges the given state into the optimizer's own, so it has the keys of both formats."""
    full = StateDictOptions(full_state_dict=True)
    model, optimizer = trained(stepforge.AdamW, **FORMATS[source][1])
    saved = get_optimizer_state_dict(model, optimizer, options=full)
    own, other = trained(stepforge.AdamW, 1, **FORMATS[target][1], steps=1)
    set_optimizer_state_dict(own, other, saved, options=full)
    reference = built(stepforge.AdamW, 1, **FORMATS[target][1])
    reference[1].load_state_dict(optimizer.state_dict())
    assert_identical(states(own, other), states(*reference))


# load_distributed, which converts formats


@each_optimizer
def test_every_optimizer_loads_a_checkpoint_of_its_twin_in_8_bits(
    cls: type, tmp_path: Path
) -> None:
    model, optimizer = trained(twin_of(cls))
    save(model, optimizer, tmp_path)
    own, other = built(cls, 1, state_format="int8")
    assert not any(load_distributed(own, other, tmp_path))
    reference = built(cls, 1, state_format="int8")
    reference[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_identical(states(own, other), states(*reference))
    assert_identical(dict(own.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(("source", "target"), [("float32", "32 bits"), ("32 bits", "float32")])
def test_weights_keep_all_their_bits(source: str, target: str, tmp_path: Path) -> None:
    model, optimizer = trained(stepforge.AdamW, 0, FORMATS[source][0], **FORMATS[source][1])
    save(model, optimizer, tmp_path)
    own, other = built(stepforge.AdamW, 1, FORMATS[target][0], **FORMATS[target][1])
    load_distributed(own, other, tmp_path)
    for p, q in zip(own.parameters(), model.parameters(), strict=True):
        assert_identical(join_low_bits(p, other.state[p]), join_low_bits(q, optimizer.state[q]))
    alone, its_optimizer = built(stepforge.AdamW, 1, FORMATS[target][0], **FORMATS[target][1])
    before = copy.deepcopy(dict(alone.state_dict()))
    load_distributed(alone, its_optimizer, tmp_path, weights=False)
    assert_identical(dict(alone.state_dict()), before)


@every_form
def test_parameters_are_matched_by_name_whatever_the_groups(form: Any, tmp_path: Path) -> None:
    model = Model(0)
    params = dict(model.named_parameters())
    groups = [
        {"params": [params["last.bias"], params["first.weight"]], "lr": 0.3},
        {"params": [params["last.weight"], params["first.bias"]], "lr": 0.2},
    ]
    optimizer = stepforge.Adam(groups)
    run(optimizer, list(params.values()), range(2))
    save(model, optimizer, tmp_path, form)
    own = Model(1)
    split = dict(own.named_parameters())
    other = stepforge.Adam(
        [
            {"params": [split["first.bias"]], "state_format": "int8"},
            {"params": [split["first.weight"]], "state_format": "int8"},
            {"params": [split["last.weight"]]},
            {"params": [split["last.bias"]]},
        ]
    )
    load_distributed(own, other, tmp_path)
    assert [group["lr"] for group in other.param_groups] == [0.2, 0.3, 0.2, 0.3]
    assert "param_names" not in other.param_groups[0]
    for name, p in split.items():
        found, saved = other.state[p], dict(optimizer.state[params[name]])
        if name == "first.weight":
            x = decode_state(saved, "exp_avg_sq")
            # An error of a sixteenth: two codes differ by an eighth of a power of two.
            assert ((decode_state(found, "exp_avg_sq") - x).abs() <= x / 16).all()
        else:
            assert_identical(dict(found), saved)


def _renamed(folder: Path) -> tuple[Any, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    return model, stepforge.Adam(model.parameters())


def _of_another_shape(folder: Path) -> tuple[Any, Any]:
    model, _ = built(stepforge.Adam, 1)
    model.last = torch.nn.Linear(4, 2)
    return model, stepforge.Adam(model.parameters())


def _with_more(folder: Path) -> tuple[Any, Any]:
    model, _ = built(stepforge.Adam, 1)
    model.more = torch.nn.Linear(4, 2)
    return model, stepforge.Adam(model.parameters())


def _of_another_model(folder: Path) -> tuple[Any, Any]:
    return built(stepforge.Adam, 1)[0], built(stepforge.Adam, 1)[1]


def _another_optimizer(folder: Path) -> tuple[Any, Any]:
    return built(stepforge.Adagrad, 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_renamed, "the checkpoint has no state of these parameters"),
        (_of_another_shape, r"has last.weight of shape \(2, 3\), but the model's is \(2, 4\)"),
        (_with_more, "the checkpoint has no model.more.weight, which the model has"),
        (_of_another_model, r"parameter 0 of param_groups\[0\].* is not one of the model"),
        (_another_optimizer, "missing: .*first.weight.sum.*nothing was loaded"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(
    make: Any, words: str, tmp_path: Path
) -> None:
    save(*trained(stepforge.Adam), tmp_path)
    model, optimizer = make(tmp_path)
    before, weights = snapshot(optimizer), copy.deepcopy(dict(model.state_dict()))
    with pytest.raises(ValueError, match=words):
        load_distributed(model, optimizer, tmp_path)
    assert_identical(snapshot(optimizer), before)
    assert_identical(dict(model.state_dict()), weights)


def test_a_checkpoint_with_two_models_or_without_one_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained(stepforge.Adam)
    save(model, optimizer, tmp_path / "two", ema=get_model_state_dict(model))
    with pytest.raises(
        ValueError, match="weights of this model under several keys: 'ema', 'model'"
    ):
        load_distributed(model, optimizer, tmp_path / "two")
    alone = get_optimizer_state_dict(model, optimizer)
    checkpoint.save(alone, checkpoint_id=tmp_path / "alone")
    with pytest.raises(ValueError, match="the checkpoint has no weights of this model"):
        load_distributed(model, optimizer, tmp_path / "alone")
    own, other = built(stepforge.Adam, 1)
    load_distributed(own, other, tmp_path / "alone", weights=False)
    assert_identical(states(own, other), states(model, optimizer))


def test_only_optimizers_of_this_library_are_loaded(tmp_path: Path) -> None:
    model, optimizer = built(torch.optim.Adam)
    with pytest.raises(TypeError, match=r"is for optimizers of this library, but got Adam"):
        load_distributed(model, optimizer, tmp_path)
    with pytest.raises(ValueError, match="either a checkpoint_id or a storage_reader"):
        load_distributed(*built(stepforge.Adam))
