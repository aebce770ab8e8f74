"""Formats of sharded parameters: FSDP2, and distributed checkpoints of two processes in one.

Oracle: the run of one process on whole tensors, bit for bit. Formats depend on the whole shape,
blocks are not cut, and random bits depend on an element's index in the whole tensor.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import stepforge
from stepforge.checkpoint import full_precision_weights, to_torch
from tests.checkpoint.sharded_format_ranks import (
    AFTER,
    BEFORE,
    CASES,
    IN_ORDER,
    IN_TWO_DIMENSIONS,
    LR,
    PLACEMENTS,
    REPLICATED,
    SEED,
    Case,
    backward,
    built,
    flat_model,
    in_two_dimensions,
    load,
    misplaced_states,
    save,
    train,
    whole,
    whole_run,
)
from tests.process_groups import ROOT, run_ranks
from tests.twins import assert_identical, save_and_load

# Modules of torch warn that they are deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]
every_case = pytest.mark.parametrize("name", CASES)
RANKS = "tests.checkpoint.sharded_format_ranks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run two processes; return the folder of their results and checkpoints."""
    return run_ranks(RANKS, (2,), lambda: tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def by_two(folder: Path) -> dict[str, Any]:
    """Return the results of two processes, by case."""
    results: dict[str, Any] = torch.load(folder / "results.pt", weights_only=True)
    return results


@pytest.fixture(scope="module")
def by_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run four processes on a mesh of two dimensions; return their results."""
    folder = run_ranks(RANKS, (4,), lambda: tmp_path_factory.mktemp("ranks"))
    results: dict[str, Any] = torch.load(folder / "results.pt", weights_only=True)
    return results


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Any]]:
    """Return each case run in one process, on whole tensors."""
    runs = {}
    for name, case in CASES.items():
        model, optimizer = built(case, None)
        train(model, optimizer, BEFORE)
        runs[name] = {
            "saved": whole_run(model, optimizer),
            "exported": whole(to_torch(optimizer)["state"]),
            "weights": whole(full_precision_weights(model, optimizer)),
        }
        train(model, optimizer, AFTER)
        runs[name]["trained"] = whole_run(model, optimizer)
    return runs


@every_case
def test_two_processes_store_what_one_does(name: str, by_two: Any, expected: Any) -> None:
    assert_identical(by_two[name]["saved"], expected[name]["saved"])
    assert_identical(by_two[name]["trained"], expected[name]["trained"])


@every_case
def test_states_are_sharded_row_by_row_as_their_parameters(name: str, by_two: Any) -> None:
    assert by_two[name]["misplaced"] == []


def test_the_cases_have_codes_in_a_shard_of_every_kind(by_two: Any) -> None:
    """Rows shared unevenly, a parameter of which a process has nothing, and a small one."""
    keys = [
        state.keys() & {"exp_avg", "exp_avg_codes"} for state in by_two["int8"]["saved"]["state"]
    ]
    assert keys == [{"exp_avg_codes"}, {"exp_avg_codes"}, {"exp_avg"}, {"exp_avg_codes"}]
    scales = [by_two["int8"]["saved"]["state"][i]["exp_avg_scale"].shape for i in (0, 1, 3)]
    assert scales == [(65, 2), (1, 40), (4, 16)]


@every_case
def test_a_distributed_checkpoint_of_two_continues_in_two(
    name: str, by_two: Any, expected: Any
) -> None:
    assert_identical(by_two[name]["loaded"], expected[name]["saved"])
    assert_identical(by_two[name]["resumed"], expected[name]["trained"])


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "whole"])
@every_case
def test_a_distributed_checkpoint_of_two_continues_in_one(
    name: str, sharded: bool, folder: Path, expected: Any, mesh: DeviceMesh
) -> None:
    model, optimizer = built(CASES[name], mesh if sharded else None, seed=1)
    load(model, optimizer, folder / name)
    assert not sharded or misplaced_states(model, optimizer) == []
    assert_identical(whole_run(model, optimizer), expected[name]["saved"])
    train(model, optimizer, AFTER)
    assert_identical(whole_run(model, optimizer), expected[name]["trained"])


@every_case
def test_a_distributed_checkpoint_of_one_continues_in_one(
    name: str, expected: Any, mesh: DeviceMesh, tmp_path: Path
) -> None:
    model, optimizer = built(CASES[name], mesh)
    train(model, optimizer, BEFORE)
    save(model, optimizer, tmp_path)
    resumed, resumed_optimizer = built(CASES[name], mesh, seed=1)
    load(resumed, resumed_optimizer, tmp_path)
    train(resumed, resumed_optimizer, AFTER)
    assert_identical(whole_run(resumed, resumed_optimizer), expected[name]["trained"])


@every_case
def test_a_whole_state_dict_loads_into_sharded_parameters(
    name: str, by_two: Any, expected: Any
) -> None:
    assert_identical(by_two[name]["distributed"], expected[name]["trained"])


@every_case
def test_the_state_dict_of_two_processes_loads_into_whole_parameters(
    name: str, by_two: Any, expected: Any
) -> None:
    assert_identical(by_two[name]["gathered"], expected[name]["saved"]["state"])


def test_a_sharded_state_dict_loads_into_whole_parameters(mesh: DeviceMesh, expected: Any) -> None:
    case = CASES["int8"]
    sharded_model, sharded = built(case, mesh)
    train(sharded_model, sharded, BEFORE)
    model, optimizer = built(case, None)
    optimizer.load_state_dict(sharded.state_dict())
    assert_identical(whole_run(model, optimizer)["state"], expected["int8"]["saved"]["state"])


@every_case
def test_exports_of_two_processes_are_those_of_one(name: str, by_two: Any, expected: Any) -> None:
    assert_identical(by_two[name]["exported"], expected[name]["exported"])
    assert_identical(by_two[name]["weights"], expected[name]["weights"])


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "whole"])
@pytest.mark.parametrize(
    "options",
    [
        StateDictOptions(full_state_dict=True),
        StateDictOptions(flatten_optimizer_state_dict=True),
    ],
    ids=["full", "flattened"],
)
def test_state_dicts_may_be_gathered_or_flattened(
    options: StateDictOptions, sharded: bool, mesh: DeviceMesh, expected: Any
) -> None:
    case, own_mesh = CASES["24 bits"], mesh if sharded else None
    model, optimizer = built(case, own_mesh)
    train(model, optimizer, BEFORE)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    other, resumed_optimizer = built(case, own_mesh)
    set_optimizer_state_dict(other, resumed_optimizer, saved, options=options)
    assert not sharded or misplaced_states(other, resumed_optimizer) == []
    assert_identical(
        whole_run(other, resumed_optimizer)["state"], expected["24 bits"]["saved"]["state"]
    )


@pytest.mark.parametrize("name", ["bfloat16", "24 bits"])
def test_zero_redundancy_optimizer_continues_bit_for_bit(name: str, mesh: DeviceMesh) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    case = CASES[name]

    def redundant(seed: int) -> tuple[Any, Any]:
        model, _ = built(case, None, seed)
        options = {"lr": LR, "rounding_seed": SEED, **case.options}
        params = model.parameters()
        return model, ZeroRedundancyOptimizer(params, optimizer_class=case.cls, **options)

    model, optimizer = redundant(0)
    train(model, optimizer, BEFORE)
    optimizer.consolidate_state_dict()
    saved = save_and_load(optimizer.state_dict())
    weights = whole(model.state_dict())
    train(model, optimizer, AFTER)
    resumed, resumed_optimizer = redundant(1)
    resumed_optimizer.load_state_dict(saved)
    resumed.load_state_dict(weights)
    train(resumed, resumed_optimizer, AFTER)
    assert_identical(whole(resumed.state_dict()), whole(model.state_dict()))


def test_a_state_that_is_not_sharded_as_its_parameter_changes_nothing(mesh: DeviceMesh) -> None:
    model, optimizer = built(Case(CASES["int8"].cls, {}), mesh)
    train(model, optimizer, BEFORE)
    p = next(model.parameters())
    assert isinstance(p, DTensor)
    state = optimizer.state[p]
    # As if another process had the other rows.
    state["exp_avg"] = DTensor.from_local(
        state["exp_avg"].to_local()[:33],
        mesh,
        [Shard(0)],
        run_check=False,
        shape=p.shape,
        stride=p.stride(),
    )
    params = list(model.parameters())
    before = whole(params)
    with pytest.raises(RuntimeError, match=r"\(65, 200\) is here .*exp_avg of which \(33, 200\)"):
        optimizer.step()
    assert_identical(whole(params), before)
    state["exp_avg"] = torch.zeros_like(p)
    optimizer.step()


def test_rows_that_are_cut_keep_states_in_full_and_random_bits_of_their_own(by_two: Any) -> None:
    weight, state = by_two["cut"]["weight"], by_two["cut"]["state"]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    assert "exp_avg_scale" not in state
    # 1 - 2**-10 is a quarter of the way from 1 to the bfloat16 below it.
    below = weight < 1
    assert 0.2 < below.double().mean() < 0.3
    # If both processes counted elements from 0, both halves would be rounded alike.
    assert not torch.equal(below[:, :128], below[:, 128:])


def test_whole_codes_become_numbers_where_rows_are_cut(by_two: Any) -> None:
    """Oracle: the whole codes, as ``to_torch`` decodes them."""
    assert_identical(
        by_two["cut through blocks"]["loaded"], by_two["cut through blocks"]["expected"]
    )


# A mesh of two dimensions


@pytest.mark.parametrize("name", IN_TWO_DIMENSIONS)
def test_tensor_parallel_fsdp2_stores_what_one_process_does(name: str, by_four: Any) -> None:
    """Rows that FSDP2 cuts after tensor parallelism (``_StridedShard``) stay consecutive."""
    ours, case = by_four[name], CASES[name]
    rows, _, columns, _ = ours["placements"]
    assert rows == "(_StridedShard(dim=0, sf=2), Shard(dim=0))"
    assert columns == "(Shard(dim=0), Shard(dim=1))"
    assert ours["misplaced"] == []
    model, optimizer = in_two_dimensions(case, None)
    train(model, optimizer, BEFORE)
    # The parameter that is cut along columns keeps full states, and has its own random bits.
    assert_identical(without(ours["saved"], 2), without(whole_run(model, optimizer), 2))
    train(model, optimizer, AFTER)
    assert_identical(without(ours["resumed"], 2), without(whole_run(model, optimizer), 2))


def test_hsdp_stores_what_one_process_does(by_four: Any, expected: Any) -> None:
    ours = dict(by_four["HSDP"])
    assert set(ours.pop("placements")) == {"(Replicate(), Shard(dim=0))"}
    assert_identical(ours, expected["stochastic"]["saved"])


def without(run: dict[str, Any], index: int) -> dict[str, Any]:
    """Return all tensors of a run but those of one parameter."""
    return {key: [*values[:index], *values[index + 1 :]] for key, values in run.items()}


def test_tensor_parallel_fsdp2_has_codes_where_dimension_0_alone_is_cut(
    by_four: Any,
) -> None:
    first, _, second, _ = by_four["24 bits"]["saved"]["state"]
    assert first["exp_avg_codes"].dtype == torch.uint8
    assert first["exp_avg_scale"].shape == (65, 2)
    assert second["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("name", PLACEMENTS)
def test_rows_cut_over_two_dimensions_of_a_mesh_have_codes(name: str, by_four: Any) -> None:
    """Equal bits if shards are in order; else in everything that is not rounded at random."""
    ours, expected = (by_four["placements"][key] for key in (name, "whole"))
    assert ours["misplaced"] == []
    assert ours["state"][0]["exp_avg_codes"].dtype == torch.uint8
    if name in IN_ORDER:
        assert_identical(ours["params"], expected["params"])
        assert_identical(ours["state"], expected["state"])
        return
    (state,), (whole_state,) = ours["state"], expected["state"]
    for key in ("step", "exp_avg_codes", "exp_avg_scale", "exp_avg_sq_scale"):
        assert_identical(state[key], whole_state[key])
    # Rounding up or down differs by one code.
    difference = (state["exp_avg_sq_codes"].int() - whole_state["exp_avg_sq_codes"].int()).abs()
    assert difference.max() == 1


@pytest.mark.parametrize("name", PLACEMENTS)
def test_no_two_shards_have_the_same_random_bits(name: str, by_four: Any) -> None:
    """Ranges of flat indices are equal between replicas, and disjoint otherwise."""
    ranges = sorted(set(by_four["placements"][name]["index ranges"]))
    replicas = 2 if "replicas" in name else 1
    assert len(ranges) == 4 // replicas
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))


# FSDP1


@pytest.mark.parametrize("orig", [False, True], ids=["flat", "use_orig_params"])
def test_flat_vectors_of_fsdp1_keep_states_in_full_and_say_so(orig: bool, by_two: Any) -> None:
    """Oracle: the run of one process whose states are in float32, bit for bit."""
    ours = by_two["flat"][orig]
    reason = "a flat vector of FullyShardedDataParallel, which has no rows"
    assert ours["dtypes"] == ["torch.float32"]
    (message,) = ours["warnings"]
    assert message.startswith("state_format='int8' has no effect: not int8 for ")
    assert message.endswith(reason)
    assert f" elements: {reason}" in ours["explained"]
    model = flat_model()
    optimizer = stepforge.AdamW(model.parameters(), lr=LR)
    for step in range(4):
        backward(model, step)
        optimizer.step()
    assert_identical(ours["trained"], [p.detach() for p in model.parameters()])
    assert_identical(ours["resumed"], ours["trained"])


@pytest.mark.parametrize("width", [24, 32])
@pytest.mark.parametrize("orig", [False, True], ids=["flat", "use_orig_params"])
def test_fsdp1_refuses_weights_of_more_bits_as_it_could_not_load_them(
    orig: bool, width: int, by_two: Any
) -> None:
    assert by_two["flat"][orig][f"{width} bits"] == (
        f"master_weight_bits={width} is not for parameters that FullyShardedDataParallel has "
        "flattened, as its optim_state_dict takes no states of integers: use fully_shard, or "
        "stochastic_rounding"
    )


# Replicas, and dtypes that gloo does not send


@pytest.mark.parametrize("name", REPLICATED)
def test_replicas_agree_bit_for_bit(name: str, by_two: Any) -> None:
    """They also agree with one process, unless random bits depend on a process's parameters."""
    ours = by_two["replicated"][name]
    for params in ours["processes"]:
        assert_identical(params, ours["params"])
    if name == "ZeRO, stochastic":
        return
    model = flat_model(torch.bfloat16)
    options = {"lr": LR, "rounding_seed": SEED, **REPLICATED[name]}
    optimizer = stepforge.AdamW(model.parameters(), **options)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    assert_identical(ours["params"], [p.detach() for p in model.parameters()])


def test_the_guide_quotes_the_error_of_gloo_for_int16(by_two: Any) -> None:
    assert by_two["int16"].splitlines()[-1] == "Invalid scalar type"
    guide = (ROOT / "docs" / "low-precision.md").read_text(encoding="utf-8")
    assert f"`{by_two['int16'].splitlines()[-1]}`" in guide
