"""Formats of sharded parameters: FSDP2, and distributed checkpoints of two processes in one.

The oracle is the run of one process on whole tensors, bit for bit: formats are chosen from the
whole shape, blocks are not cut, and random bits follow from an element's place in the whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from stepforge.checkpoint import full_precision_weights, to_torch

from .processes import run_ranks
from .ranks import (
    AFTER,
    BEFORE,
    CASES,
    LR,
    SEED,
    Case,
    built,
    held,
    load,
    misplaced,
    save,
    train,
    whole,
)
from .twins import assert_identical, through_a_file

# What modules of torch say of themselves when they are used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what they found."""
    return run_ranks("tests.contract.ranks", (2,), lambda: tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """What two processes have found in each case."""
    results: dict[str, Any] = torch.load(folder / "results.pt", weights_only=True)
    return results


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    with tempfile.NamedTemporaryFile() as file:
        store = torch.distributed.FileStore(file.name, 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Any]]:
    """Each case in one process, on whole tensors."""
    runs = {}
    for name, case in CASES.items():
        model, optimizer = built(case, None)
        train(model, optimizer, BEFORE)
        runs[name] = {
            "saved": held(model, optimizer),
            "exported": whole(to_torch(optimizer)["state"]),
            "weights": whole(full_precision_weights(model, optimizer)),
        }
        train(model, optimizer, AFTER)
        runs[name]["trained"] = held(model, optimizer)
    return runs


@every_case
def test_two_processes_store_what_one_does(name: str, found: Any, expected: Any) -> None:
    assert_identical(found[name]["saved"], expected[name]["saved"])
    assert_identical(found[name]["trained"], expected[name]["trained"])


@every_case
def test_states_are_sharded_row_by_row_as_their_parameters(name: str, found: Any) -> None:
    assert found[name]["misplaced"] == []


def test_the_cases_have_codes_in_a_shard_of_every_kind(found: Any) -> None:
    """Rows that are shared unevenly; a parameter of which a process has nothing; small ones."""
    keys = [
        entry.keys() & {"exp_avg", "exp_avg_codes"} for entry in found["int8"]["saved"]["state"]
    ]
    assert keys == [{"exp_avg_codes"}, {"exp_avg_codes"}, {"exp_avg"}, {"exp_avg_codes"}]
    scales = [found["int8"]["saved"]["state"][i]["exp_avg_scale"].shape for i in (0, 1, 3)]
    assert scales == [(65, 2), (1, 40), (4, 16)]


@every_case
def test_a_distributed_checkpoint_of_two_continues_in_two(
    name: str, found: Any, expected: Any
) -> None:
    assert_identical(found[name]["loaded"], expected[name]["saved"])
    assert_identical(found[name]["resumed"], expected[name]["trained"])


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "whole"])
@every_case
def test_a_distributed_checkpoint_of_two_continues_in_one(
    name: str, sharded: bool, folder: Path, expected: Any, mesh: DeviceMesh
) -> None:
    model, optimizer = built(CASES[name], mesh if sharded else None, seed=1)
    load(model, optimizer, folder / name)
    assert not sharded or misplaced(model, optimizer) == []
    assert_identical(held(model, optimizer), expected[name]["saved"])
    train(model, optimizer, AFTER)
    assert_identical(held(model, optimizer), expected[name]["trained"])


@every_case
def test_a_distributed_checkpoint_of_one_continues_in_one(
    name: str, expected: Any, mesh: DeviceMesh, tmp_path: Path
) -> None:
    model, optimizer = built(CASES[name], mesh)
    train(model, optimizer, BEFORE)
    save(model, optimizer, tmp_path)
    resumed, its_optimizer = built(CASES[name], mesh, seed=1)
    load(resumed, its_optimizer, tmp_path)
    train(resumed, its_optimizer, AFTER)
    assert_identical(held(resumed, its_optimizer), expected[name]["trained"])


@every_case
def test_a_whole_state_dict_loads_into_sharded_parameters(
    name: str, found: Any, expected: Any
) -> None:
    assert_identical(found[name]["moved"], expected[name]["trained"])


@every_case
def test_the_state_dict_of_two_processes_loads_into_whole_parameters(
    name: str, found: Any, expected: Any
) -> None:
    assert_identical(found[name]["gathered"], expected[name]["saved"]["state"])


def test_a_sharded_state_dict_loads_into_whole_parameters(mesh: DeviceMesh, expected: Any) -> None:
    case = CASES["int8"]
    sharded_model, sharded = built(case, mesh)
    train(sharded_model, sharded, BEFORE)
    model, optimizer = built(case, None)
    optimizer.load_state_dict(sharded.state_dict())
    assert_identical(held(model, optimizer)["state"], expected["int8"]["saved"]["state"])


@every_case
def test_exports_of_two_processes_are_those_of_one(name: str, found: Any, expected: Any) -> None:
    assert_identical(found[name]["exported"], expected[name]["exported"])
    assert_identical(found[name]["weights"], expected[name]["weights"])


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
    other, its_optimizer = built(case, own_mesh)
    set_optimizer_state_dict(other, its_optimizer, saved, options=options)
    assert not sharded or misplaced(other, its_optimizer) == []
    assert_identical(held(other, its_optimizer)["state"], expected["24 bits"]["saved"]["state"])


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
    saved = through_a_file(optimizer.state_dict())
    weights = whole(model.state_dict())
    train(model, optimizer, AFTER)
    resumed, its_optimizer = redundant(1)
    its_optimizer.load_state_dict(saved)
    resumed.load_state_dict(weights)
    train(resumed, its_optimizer, AFTER)
    assert_identical(whole(resumed.state_dict()), whole(model.state_dict()))


def test_a_state_that_is_not_sharded_as_its_parameter_changes_nothing(mesh: DeviceMesh) -> None:
    model, optimizer = built(Case(CASES["int8"].cls, {}), mesh)
    train(model, optimizer, BEFORE)
    p = next(model.parameters())
    assert isinstance(p, DTensor)
    entry = optimizer.state[p]
    # As if another process had the other rows.
    entry["exp_avg"] = DTensor.from_local(
        entry["exp_avg"].to_local()[:33],
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
    entry["exp_avg"] = torch.zeros_like(p)
    optimizer.step()


def test_rows_that_are_cut_keep_states_in_full_and_random_bits_of_their_own(found: Any) -> None:
    weight, state = found["cut"]["weight"], found["cut"]["state"]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    assert "exp_avg_scale" not in state
    # 1 - 2**-10 lies between 1 and the bfloat16 below it, a quarter of the way.
    below = weight < 1
    assert 0.2 < below.double().mean() < 0.3
    # Whole rows of words would be the same if both processes counted elements from 0.
    assert not torch.equal(below[:, :128], below[:, 128:])


def test_whole_codes_become_numbers_where_rows_are_cut(found: Any) -> None:
    """The oracle is what the codes say as they are exported, whole."""
    assert_identical(found["cut through blocks"]["found"], found["cut through blocks"]["expected"])
