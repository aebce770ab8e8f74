"""``stepforge.param_groups``: the parameters of a model, sorted into named groups.

Oracles: groups of real modules written by hand; optimizers with such groups, bit for bit; torch's
own names of parameters; for patterns, a table of what they match.
"""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

import stepforge
from tests.twins import assert_identical, each_optimizer, save_and_load, snapshot, twin_of

ROOT = Path(__file__).parents[2]
ignore_lazy = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
ignore_torch_jit = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def grouped(model: nn.Module, **options: Any) -> dict[str, list[str]]:
    """Return the names of parameters by the name of their group."""
    groups = stepforge.param_groups(model, **{"weight_decay": 0.1, **options})
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


def undecayed(model: nn.Module, *no_decay: Any) -> list[str]:
    """Return the names of parameters that do not decay."""
    return grouped(model, no_decay=no_decay).get("no_decay", [])


def model_of(names: Iterable[str]) -> nn.Module:
    """Return a model of plain modules whose parameters have these names."""
    model = nn.Module()
    for name in names:
        *path, own = name.split(".")
        module = model
        for key in path:
            if key not in module._modules:
                module.add_module(key, nn.Module())
            module = module.get_submodule(key)
        module.register_parameter(own, nn.Parameter(torch.zeros(2)))
    return model


# Groups of real modules, by hand.


def test_a_transformer_layer() -> None:
    model = nn.TransformerEncoderLayer(8, nhead=2)
    assert grouped(model) == {
        "decay": [
            "self_attn.in_proj_weight",
            "self_attn.out_proj.weight",
            "linear1.weight",
            "linear2.weight",
        ],
        "no_decay": [
            "self_attn.in_proj_bias",
            "self_attn.out_proj.bias",
            "linear1.bias",
            "linear2.bias",
            "norm1.weight",
            "norm1.bias",
            "norm2.weight",
            "norm2.bias",
        ],
    }


def test_a_convolutional_net() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    assert grouped(model) == {
        "decay": ["0.weight", "3.weight"],
        "no_decay": ["0.bias", "1.weight", "1.bias", "3.bias"],
    }


def test_a_recurrent_net() -> None:
    assert undecayed(nn.LSTM(2, 2), "bias") == ["bias_ih_l0", "bias_hh_l0"]


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(2),
        nn.BatchNorm3d(2),
        nn.SyncBatchNorm(2),
        nn.GroupNorm(1, 2),
        nn.InstanceNorm2d(2, affine=True),
        nn.LayerNorm(2),
        nn.RMSNorm(2),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_normalization_layers_of_torch(norm: nn.Module) -> None:
    names = [f"0.{name}" for name, _ in norm.named_parameters()]
    assert names
    assert undecayed(nn.Sequential(norm, nn.Linear(2, 2)), "norm") == names


def with_weight(name: str, *bases: type[nn.Module]) -> nn.Module:
    """Return a module of a class with that name, which holds a weight and a linear layer."""
    module = type(name, bases or (nn.Module,), {})()
    module.register_parameter("weight", nn.Parameter(torch.ones(2)))
    module.add_module("linear", nn.Linear(2, 2))
    return module


NORM_CLASSES = {
    "LlamaRMSNorm": True,
    "T5LayerNorm": True,
    "FrozenBatchNorm2d": True,
    "AdaLayerNorm": True,
    "LayerNormLinear": False,  # a normalization and a matrix in one
    "NormalizedLinear": False,
    "Normal": False,
}


@pytest.mark.parametrize("name", NORM_CLASSES)
def test_a_class_is_a_normalization_by_its_name(name: str) -> None:
    """The linear layer within always decays, as in the adaptive norms of diffusion models."""
    expected = ["0.weight"] if NORM_CLASSES[name] else []
    assert undecayed(nn.Sequential(with_weight(name)), "norm") == expected


def test_a_class_is_a_normalization_by_the_name_of_its_base() -> None:
    base = type("MyNorm", (nn.Module,), {})
    assert undecayed(nn.Sequential(with_weight("Scale", base)), "norm") == ["0.weight"]


def test_a_layer_called_norm_is_one_but_not_what_is_inside() -> None:
    model = nn.ModuleDict({"norm1": with_weight("Scale"), "normal": with_weight("Scale")})
    model["layer_norm_weight"] = with_weight("Scale")
    model.register_parameter("q_norm_scale", nn.Parameter(torch.ones(2)))
    assert undecayed(model, "norm") == [
        "q_norm_scale",
        "norm1.weight",
        "layer_norm_weight.weight",
    ]


def test_a_module_called_bias_is_no_bias() -> None:
    names = ["pair_bias.to_q.weight", "relative_bias_table", "unbiased", "fc.bias"]
    assert undecayed(model_of(names), "bias") == ["relative_bias_table", "fc.bias"]


# Patterns and classes.

MATCHES = [
    ("head", "head.weight", True),
    ("head", "lm_head.weight", True),
    ("head", "head2.weight", True),
    ("head", "multihead.weight", False),
    ("head", "heads.weight", False),
    ("Head", "head.weight", False),
    ("head.weight", "lm_head.weight", True),
    ("head.w", "head.weight", False),
    ("layers.1", "layers.1.weight", True),
    ("layers.1", "layers.10.weight", False),
    ("layers.1", "layers.0.1.weight", False),
    ("layers.*.fc", "layers.0.mlp.fc.weight", True),
    ("layers.*.fc", "layers.0.mlp.ffc.weight", False),
    ("embed", "embedding.weight", False),
    ("embed*", "embedding.weight", True),
    ("*head", "multihead.weight", True),
    ("*", "anything.weight", True),
    ("a.b", "a_b.weight", False),
    (".weight", "fc.weight", True),
    ("[ab]", "a.weight", False),
    ("größe", "größe_1.weight", True),
    ("größ", "größe_1.weight", False),
]


@pytest.mark.parametrize(("pattern", "name", "matches"), MATCHES)
def test_a_pattern_stands_in_a_name_as_whole_words(pattern: str, name: str, matches: bool) -> None:
    model = model_of([name])
    if matches:
        assert undecayed(model, pattern) == [name]
    else:
        with pytest.raises(ValueError, match="matches no parameter"):
            undecayed(model, pattern)


def test_a_class_matches_submodules_and_subclasses() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.TransformerEncoderLayer(2, 1))
    attention = [name for name, _ in model.named_parameters() if ".self_attn." in name]
    assert undecayed(model, nn.MultiheadAttention) == attention
    assert "1.self_attn.out_proj.weight" in undecayed(model, nn.Linear)


def test_entries_may_be_any_iterable() -> None:
    model = nn.TransformerEncoderLayer(8, nhead=2)
    for entries in (["bias", "norm"], {"bias", "norm"}, iter(["bias", "norm"])):
        assert grouped(model, no_decay=entries) == grouped(model)
    assert list(grouped(model, no_decay=())) == ["decay"]


def test_the_default_words_may_match_nothing() -> None:
    model = nn.Linear(2, 2, bias=False)
    assert grouped(model) == {"decay": ["weight"]}
    assert grouped(model, no_decay=("norm", "weight", "bias")) == {"no_decay": ["weight"]}
    assert grouped(model, lr=0.1, lr_scale={"norm": 0.5}) == {"decay": ["weight"]}


# Every parameter, once.


def test_a_shared_parameter_has_its_first_name_and_is_matched_by_any() -> None:
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2), nn.Linear(2, 3, bias=False))
    model[2].weight = model[0].weight
    assert grouped(model) == {"decay": ["0.weight", "1.weight"], "no_decay": ["1.bias"]}
    for entry in (nn.Embedding, "0", "2"):
        assert undecayed(model, entry) == ["0.weight"]


def test_a_parameter_with_two_names_in_a_module_is_matched_by_both() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.register_parameter("alias", model.weight)
    assert undecayed(model, "alias") == ["weight"]


def test_a_shared_module_is_matched_by_any_name() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"first": shared, "second": shared})
    assert undecayed(model, "second") == ["first.weight", "first.bias"]


def test_a_frozen_parameter_trains_once_it_is_unfrozen() -> None:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    optimizer = stepforge.AdamW(stepforge.param_groups(model, weight_decay=0.1), lr=0.1)
    before = model.weight.detach().clone()
    for frozen in (True, False):
        model.weight.requires_grad_(not frozen)
        optimizer.zero_grad()
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        assert torch.equal(model.weight, before) == frozen


@ignore_lazy
def test_meta_and_lazy_parameters_are_grouped() -> None:
    with torch.device("meta"):
        assert grouped(nn.Linear(2, 2)) == {"decay": ["weight"], "no_decay": ["bias"]}
    model = nn.LazyLinear(2)
    assert undecayed(nn.Sequential(nn.LazyBatchNorm2d()), "norm") == ["0.weight", "0.bias"]
    optimizer = stepforge.AdamW(stepforge.param_groups(model, weight_decay=0.1))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["exp_avg"].shape == (2, 3)


KEYS = st.sampled_from(["bias", "norm", "head", "fc1", "layers", "0", "1", "10", "weight"])
NAMES = st.lists(KEYS, min_size=1, max_size=4).map(".".join)


@given(
    names=st.lists(NAMES, unique=True, max_size=12),
    shared=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=3),
    frozen=st.sets(st.integers(0, 11)),
    factors=st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=12, max_size=12),
)
def test_groups_are_a_partition_of_the_parameters(
    names: list[str], shared: list[tuple[int, int]], frozen: set[int], factors: list[float]
) -> None:
    """Oracle: ``model.named_parameters()``."""
    # A name within another one, such as fc1 and fc1.bias, cannot be a module and a parameter.
    names = [x for x in names if not any(y.startswith(f"{x}.") for y in names)]
    model = model_of(names)
    for one, other in shared:
        if one < len(names) and other < len(names):
            module, _, own = names[other].rpartition(".")
            parameter = model.get_parameter(names[one])
            setattr(model.get_submodule(module), own, parameter)
    expected = dict(model.named_parameters())
    for index, p in enumerate(expected.values()):
        p.requires_grad_(index not in frozen)
    by_name = dict(zip(expected, factors))
    groups = stepforge.param_groups(model, weight_decay=0.1, lr=2.0, lr_scale=by_name.__getitem__)
    found = [pair for group in groups for pair in group["params"]]
    assert len(found) == len(expected)
    assert all(expected[name] is p for name, p in found)
    assert all(group["params"] for group in groups)
    order = list(expected)
    for group in groups:
        positions = [order.index(name) for name, _ in group["params"]]
        assert positions == sorted(positions)
        assert {2.0 * by_name[name] for name, _ in group["params"]} == {group["lr"]}
    kinds = [(group["lr"], group["weight_decay"]) for group in groups]
    assert kinds == sorted(set(kinds), reverse=True)
    assert len({group["name"] for group in groups}) == len(groups)


# Wrappers.


def plain_names(model: nn.Module) -> list[str]:
    return sorted(name for names in grouped(model).values() for name in names)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))


def compiled_inside(model: nn.Module) -> nn.Module:
    model[1] = torch.compile(model[1])
    return model


def checkpointed_inside(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model[0] = checkpoint_wrapper(model[0])
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": torch.compile,
    "compile inside": compiled_inside,
    "DDP": lambda model: nn.parallel.DistributedDataParallel(model),
    "DDP of compile": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model)),
    "compile of DDP": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model)),
    "DataParallel": nn.DataParallel,
    "checkpoint": checkpointed_inside,
}


@ignore_torch_jit
@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_leave_no_trace_in_names(wrapper: str) -> None:
    """Oracles: the model without them; the names of torch.distributed.checkpoint."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    model = WRAPPERS[wrapper](small())
    assert grouped(model) == grouped(small())
    if wrapper != "DataParallel":  # which torch.distributed.checkpoint does not look into
        assert plain_names(model) == sorted(get_model_state_dict(model))


@ignore_torch_jit
def test_sharded_parameters_have_the_names_of_the_model(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    model = small()
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert grouped(model) == grouped(small())
    optimizer = stepforge.AdamW(stepforge.param_groups(model, weight_decay=0.1))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 4


@ignore_torch_jit
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.usefixtures("single_process_group")
def test_fsdp1_needs_its_original_parameters() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    def sharded(**options: Any) -> nn.Module:
        return FullyShardedDataParallel(small(), device_id=torch.device("cpu"), **options)

    assert grouped(sharded(use_orig_params=True)) == grouped(small())
    with pytest.raises(ValueError, match=r"hides the names.*use_orig_params=True, or use fully_sh"):
        grouped(sharded())


def test_an_attribute_called_module_is_part_of_a_name() -> None:
    assert plain_names(nn.ModuleDict({"module": nn.Linear(2, 2)})) == [
        "module.bias",
        "module.weight",
    ]


# Learning rates.


def test_the_first_entry_that_matches_scales_the_learning_rate() -> None:
    model = nn.TransformerEncoderLayer(2, 1)
    scale = {"out_proj": 3.0, nn.MultiheadAttention: 0.5, "norm": 0.0}
    groups = stepforge.param_groups(model, weight_decay=0.1, lr=0.25, lr_scale=scale)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("decay_lr*3", 0.75, 0.1),
        ("no_decay_lr*3", 0.75, 0.0),
        ("decay", 0.25, 0.1),
        ("no_decay", 0.25, 0.0),
        ("decay_lr*0.5", 0.125, 0.1),
        ("no_decay_lr*0.5", 0.125, 0.0),
        ("no_decay_lr*0", 0.0, 0.0),
    ]
    assert [name for name, _ in groups[0]["params"]] == ["self_attn.out_proj.weight"]


def test_a_learning_rate_alone_is_that_of_all_groups() -> None:
    groups = stepforge.param_groups(small(), weight_decay=0, lr=1)
    assert [(group["name"], group["lr"]) for group in groups] == [("decay", 1.0), ("no_decay", 1.0)]
    assert all("lr" not in group for group in stepforge.param_groups(small(), weight_decay=0))


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=8),
        lambda optimizer: lr_scheduler.LinearLR(optimizer, total_iters=4),
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    ],
)
def test_schedulers_keep_the_factors(scheduler: Any) -> None:
    groups = stepforge.param_groups(small(), weight_decay=0.1, lr=1.0, lr_scale={"1": 0.25})
    optimizer = stepforge.AdamW(groups)
    schedule = scheduler(optimizer)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert 0 < rates["decay"] < 1
    assert rates["no_decay_lr*0.25"] == pytest.approx(rates["decay"] / 4, rel=1e-12)


# Steps and checkpoints.


def net(*, reordered: bool = False) -> nn.Module:
    """Return a model, whose layers may be listed in another order; values follow from names."""
    layers = {"body": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 2)}
    model = nn.ModuleDict(dict(reversed(layers.items())) if reordered else layers)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        model["head"](model["norm"](model["body"](x))).square().sum().backward()
        optimizer.step()


def by_name(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in sorted(model.named_parameters())}


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    scale = {"head": np.float32(0.5)}
    return stepforge.param_groups(model, weight_decay=0.25, lr=0.125, lr_scale=scale)


def groups_by_hand(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())

    def chosen(*names: str) -> list[torch.Tensor]:
        return [p for name, p in named if name in names]

    return [
        {"params": chosen("body.weight"), "weight_decay": 0.25, "lr": 0.125},
        {"params": chosen("body.bias", "norm.weight", "norm.bias"), "weight_decay": 0, "lr": 0.125},
        {"params": chosen("head.weight"), "weight_decay": 0.25, "lr": 0.0625},
        {"params": chosen("head.bias"), "weight_decay": 0, "lr": 0.0625},
    ]


@pytest.mark.parametrize("library", [lambda cls: cls, twin_of], ids=["stepforge", "torch"])
@each_optimizer
def test_steps_are_those_of_groups_written_by_hand(cls: type, library: Any) -> None:
    model, twin = net(), net()
    train(model, library(cls)(groups_of(model)), range(4))
    train(twin, library(cls)(groups_by_hand(twin)), range(4))
    assert_identical(by_name(model), by_name(twin))


@each_optimizer
def test_a_checkpoint_is_loaded_by_name_into_a_reordered_model(cls: type) -> None:
    """Oracle: the run without a break, bit for bit."""
    model = net()
    optimizer = cls(groups_of(model))
    train(model, optimizer, range(3))
    saved = save_and_load(optimizer.state_dict())
    assert [group["name"] for group in saved["param_groups"]] == [
        "decay",
        "no_decay",
        "decay_lr*0.5",
        "no_decay_lr*0.5",
    ]
    assert saved["param_groups"][1]["param_names"] == ["body.bias", "norm.weight", "norm.bias"]

    resumed = net(reordered=True)
    assert list(resumed.state_dict()) != list(model.state_dict())
    resumed.load_state_dict(model.state_dict())
    groups = stepforge.param_groups(resumed, weight_decay=0.5, lr=1.0, lr_scale={"head": 0.5})
    other = cls(groups)
    other.load_state_dict(saved)
    train(model, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    assert_identical(by_name(resumed), by_name(model))
    assert [group["name"] for group in other.param_groups] == [group["name"] for group in groups]


@pytest.mark.parametrize("library", [stepforge, torch.optim], ids=["stepforge", "torch"])
def test_groups_are_kept_with_their_names(library: Any) -> None:
    model = net()
    optimizer = library.AdamW(groups_of(model))
    train(model, optimizer, range(1))
    for group, made in zip(optimizer.param_groups, groups_of(model), strict=True):
        assert group["name"] == made["name"]
        assert list(zip(group["param_names"], group["params"])) == made["params"]
    other = library.AdamW(groups_of(model))
    other.load_state_dict(save_and_load(optimizer.state_dict()))
    assert_identical(snapshot(other)["groups"], snapshot(optimizer)["groups"])


@ignore_torch_jit
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_distributed_checkpoints_load_with_and_without_names(tmp_path: Path, mesh: Any) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    for index, make in enumerate((groups_by_hand, groups_of)):
        model = net()
        optimizer = stepforge.AdamW(make(model))
        train(model, optimizer, range(2))
        saved = get_optimizer_state_dict(model, optimizer)
        checkpoint.save({"optimizer": saved}, checkpoint_id=tmp_path / str(index))
        resumed = net(reordered=True)
        other = stepforge.AdamW(groups_of(resumed))
        result = stepforge.checkpoint.load_distributed(
            resumed, other, tmp_path / str(index), weights=False
        )
        assert result == stepforge.LoadResult([], [], [])
        for name, p in model.named_parameters():
            assert_identical(other.state[resumed.get_parameter(name)], optimizer.state[p], name)


# Bad input.


class Bad:
    """A bad call of ``param_groups`` on a model: what is wrong, and the sentence."""

    def __init__(self, error: type[Exception], words: str, **options: Any) -> None:
        self.error, self.words, self.options = error, words, options


BAD = {
    "no model": Bad(TypeError, "model must be a torch.nn.Module, but got list", model=[]),
    "negative decay": Bad(
        ValueError, "Invalid weight_decay value: -0.1; it must be a number >= 0", weight_decay=-0.1
    ),
    "NaN": Bad(ValueError, "Invalid weight_decay value: nan", weight_decay=float("nan")),
    "no number": Bad(
        TypeError, "weight_decay must be a number >= 0, but got '0.1'", weight_decay="0.1"
    ),
    "tensor": Bad(TypeError, "lr must be a number >= 0, but got a tensor", lr=torch.tensor(0.1)),
    "negative rate": Bad(ValueError, "Invalid learning rate: -1; it must be a number >= 0", lr=-1),
    "string": Bad(
        TypeError,
        "no_decay must be a tuple of strings, which match names of parameters, and classes of "
        "modules, but got 'bias'",
        no_decay="bias",
    ),
    "class": Bad(TypeError, "no_decay must be a tuple of strings", no_decay=nn.Linear),
    "entry": Bad(
        TypeError, "no_decay has the entry 1; its entries must be strings", no_decay=("bias", 1)
    ),
    "class of no modules": Bad(
        TypeError, "no_decay has the entry <class 'torch.Tensor'>", no_decay=(torch.Tensor,)
    ),
    "a module": Bad(TypeError, "no_decay has the entry ReLU()", no_decay=(nn.ReLU(),)),
    "empty": Bad(
        ValueError, "no_decay has the entry '', which would match every name", no_decay=("",)
    ),
    "misspelt": Bad(
        ValueError,
        "no_decay has the entry 'biass', which matches no parameter: a string must stand in a "
        "name as whole words, in which * stands for any characters",
        no_decay=("biass", "norm"),
    ),
    "lacking class": Bad(
        ValueError,
        "no_decay has the entry Embedding, which matches no parameter: a module of that class "
        "must hold some",
        no_decay=("bias", nn.Embedding),
    ),
    "no lr": Bad(
        ValueError,
        "lr_scale needs lr, the learning rate that it scales, but lr is None",
        lr_scale={"bias": 0.5},
    ),
    "scale": Bad(
        TypeError,
        "lr_scale must be a mapping from strings and classes of modules to factors, or a function "
        "that returns the factor of a name, but got 0.5",
        lr=1.0,
        lr_scale=0.5,
    ),
    "class as scale": Bad(
        TypeError, "lr_scale must be a mapping.*Linear", lr=1.0, lr_scale=nn.Linear
    ),
    "factor": Bad(
        ValueError,
        "Invalid lr_scale['body'] value: -2; it must be a number >= 0",
        lr=1.0,
        lr_scale={"body": -2},
    ),
    "factor of a class": Bad(
        TypeError,
        "lr_scale[Linear] must be a number >= 0, but got None",
        lr=1.0,
        lr_scale={nn.Linear: None},
    ),
    "factor of a function": Bad(
        TypeError,
        "lr_scale('body.weight') must be a number >= 0, but got None",
        lr=1.0,
        lr_scale=lambda name: None,
    ),
    "misspelt scale": Bad(
        ValueError,
        "lr_scale has the entry 'hed', which matches no parameter",
        lr=1.0,
        lr_scale={"hed": 0.5},
    ),
    "entry without effect": Bad(
        ValueError,
        "lr_scale has the entry 'body.bias' after entries that match all of its parameters, and "
        "the first that matches counts: put it before them",
        lr=1.0,
        lr_scale={"body": 0.5, "body.bias": 1.0},
    ),
    "entry of scale": Bad(
        TypeError, "lr_scale has the entry None; its entries must be", lr=1.0, lr_scale={None: 1}
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_sentence(name: str) -> None:
    bad = BAD[name]
    options = {"model": net(), "weight_decay": 0.1, **bad.options}
    words = bad.words if ".*" in bad.words else re.escape(bad.words)
    with pytest.raises(bad.error, match=words) as raised:
        stepforge.param_groups(**options)
    assert "\n" not in str(raised.value)


def test_the_page_of_docs_is_right() -> None:
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    page = str(ROOT / "docs" / "param-groups.md")
    failed, tried = doctest.testfile(page, module_relative=False, optionflags=flags)
    assert tried > 5
    assert not failed
