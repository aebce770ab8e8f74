"""Sparse gradients: Adagrad takes them and steps only their elements. The others refuse.

Oracles: the same optimizer with the dense form of the gradient, bit for bit (a rule computes each
element by itself, and a gradient of zero changes nothing in Adagrad); and torch.optim.Adagrad with
the sparse gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests.conformance.table import (
    FLAGS,
    OPTIMIZERS,
    assert_same_bits,
    contiguous,
    normal,
    outcome,
    parameter,
    run,
)

ROWS = 6
STEPS = 4

#: The indices of a sparse gradient's values, a list for each sparse dimension.
Indices = Sequence[Sequence[int]]


def sparse(indices: Indices, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return a gradient with random values at the indices. The other dimensions are dense."""
    index_tensor = torch.tensor(indices, dtype=torch.int64)
    values = normal((index_tensor.shape[1], *shape[len(indices) :]), dtype, seed)
    return torch.sparse_coo_tensor(index_tensor, values, shape, check_invariants=True)


def by_row(step: int) -> Indices:
    return [[(step + 1) % ROWS, (step + 3) % ROWS]]


def by_element(step: int) -> Indices:
    return [[step % ROWS, 1, 2], [0, 1, (step + 1) % 3]]


def with_duplicates(step: int) -> Indices:
    return [[2, step % ROWS, 2, 2]]


def nothing(step: int) -> Indices:
    return [[]]


def now_and_then(step: int) -> Indices:
    return nothing(step) if step % 2 else by_row(step)


IndicesOfStep = Callable[[int], Indices]
INDICES: dict[str, IndicesOfStep] = {
    indices.__name__: indices
    for indices in (by_row, by_element, with_duplicates, nothing, now_and_then)
}
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "complex64": torch.complex64,
}
#: The dtypes in which torch.optim.Adagrad computes as here. It rounds bfloat16 after every
#: operation, and divides complex numbers as such instead of each part by its own root.
DTYPES_OF_TORCH = {name: DTYPES[name] for name in ("float32", "float64")}
OPTIONS: dict[str, dict[str, Any]] = {
    "usual": {},
    "maximize": {"maximize": True},
    "lr-decay": {"lr": 0.1, "lr_decay": 0.5},
    "from-above-zero": {"lr": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3},
}
SHAPE = (ROWS, 3)

every_index = pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES)
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_flag = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)


def trained(
    cls: type[torch.optim.Optimizer],
    options: dict[str, Any],
    dtype: torch.dtype,
    gradients: Sequence[torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return the outcome of one parameter after steps with these gradients."""
    p = parameter(normal(SHAPE, dtype, 0))
    optimizer = cls([p], **options)
    run(optimizer, [p], [[g] for g in gradients])
    return outcome(optimizer, p)


def gradients_at(indices: IndicesOfStep, dtype: torch.dtype) -> list[torch.Tensor]:
    return [sparse(indices(step), SHAPE, dtype, step + 1) for step in range(STEPS)]


@every_flag
@every_index
@every_option
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_sparse_gradient_does_what_its_dense_form_does(
    options: dict[str, Any], dtype: torch.dtype, indices: IndicesOfStep, flags: dict[str, Any]
) -> None:
    cls = OPTIMIZERS["Adagrad"].ours
    gradients = gradients_at(indices, dtype)
    got = trained(cls, options | flags, dtype, gradients)
    dense = [contiguous(g.coalesce().to_dense()) for g in gradients]
    assert_same_bits(got, trained(cls, options | {"foreach": False}, dtype, dense))


@every_flag
@every_index
@every_option
@pytest.mark.parametrize("dtype", DTYPES_OF_TORCH.values(), ids=DTYPES_OF_TORCH)
def test_a_sparse_gradient_does_what_it_does_in_torch(
    options: dict[str, Any], dtype: torch.dtype, indices: IndicesOfStep, flags: dict[str, Any]
) -> None:
    """Tolerances are in half units in the last place of the largest number involved.

    The sum: each side squares and adds, 2 roundings a step. The parameter: each side adds once a
    step. Its update has half the sum's roundings, a root (2 in torch), eps and its sum, a quotient,
    a factor and its product: fewer than 20 in all, each at most of the size of the largest update.
    """
    gradients = gradients_at(indices, dtype)
    got = trained(OPTIMIZERS["Adagrad"].ours, options | flags, dtype, gradients)
    # torch.optim makes sparse tensors with implicit checks. Some versions warn about that.
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        theirs = OPTIMIZERS["Adagrad"].theirs
        wanted = trained(theirs, options | {"foreach": False}, dtype, gradients)
    u = torch.finfo(dtype).eps / 2
    assert set(got) == set(wanted)
    assert got["step"] == wanted["step"]
    lr = options.get("lr", 1e-2)  # no element moves further in a step
    largest = {"sum": wanted["sum"].max(), "p": wanted["p"].abs().max() + STEPS * lr}
    tolerances = {
        "sum": STEPS * 4 * u * largest["sum"],
        "p": STEPS * (2 * u * largest["p"] + 20 * STEPS * u * lr),
    }
    for key, tolerance in tolerances.items():
        assert got[key].shape == wanted[key].shape
        assert got[key].dtype == wanted[key].dtype
        assert (got[key] - wanted[key]).abs().max() <= tolerance, key


@every_flag
@every_option
def test_elements_without_a_gradient_are_not_even_read(
    options: dict[str, Any], flags: dict[str, Any]
) -> None:
    """Rows keep their bits where any computation would change them."""
    values = normal(SHAPE, torch.float32, 0)
    values[0], values[5] = float("nan"), -0.0
    p = parameter(values)
    optimizer = OPTIMIZERS["Adagrad"].ours([p], **options | flags)
    optimizer.state[p]["sum"][0] = -1.0
    before = {key: tensor.clone() for key, tensor in outcome(optimizer, p).items()}
    run(optimizer, [p], [[sparse([[1, 3]], SHAPE, torch.float32, step)] for step in range(STEPS)])
    untouched = [0, 2, 4, 5]
    after = outcome(optimizer, p)
    for key in ("p", "sum"):
        bits = before[key][untouched].view(torch.int32)
        assert torch.equal(after[key][untouched].view(torch.int32), bits)
        assert (after[key][[1, 3]] != before[key][[1, 3]]).all()


@every_flag
def test_a_gradient_without_elements_counts_as_a_step(flags: dict[str, Any]) -> None:
    """torch.optim counts it too: the learning rate decays."""
    got = trained(
        OPTIMIZERS["Adagrad"].ours, flags, torch.float32, gradients_at(nothing, torch.float32)
    )
    assert got["step"] == STEPS
    assert torch.equal(got["p"], normal(SHAPE, torch.float32, 0))
    assert not got["sum"].any()


def test_gradients_are_not_written_and_stay_as_they_are() -> None:
    g = sparse(with_duplicates(0), SHAPE, torch.float32, 1)
    indices, values, version = g._indices().clone(), g._values().clone(), g._version
    trained(OPTIMIZERS["Adagrad"].ours, {}, torch.float32, [g])
    assert not g.is_coalesced()
    assert g._version == version
    assert torch.equal(g._indices(), indices)
    assert torch.equal(g._values(), values)


def test_sparse_and_dense_gradients_in_one_step() -> None:
    mixed = [parameter(normal(SHAPE, torch.float32, seed)) for seed in range(3)]
    dense = [normal(SHAPE, torch.float32, 10), normal(SHAPE, torch.float32, 12)]
    middle = sparse(by_row(0), SHAPE, torch.float32, 11)
    cls = OPTIMIZERS["Adagrad"].ours
    optimizer = cls(mixed, lr=0.1)
    run(optimizer, mixed, [[dense[0], middle, dense[1]]] * 2)
    for p, seed, g in zip(mixed, range(3), (dense[0], middle.to_dense(), dense[1]), strict=True):
        alone = parameter(normal(SHAPE, torch.float32, seed))
        other = cls([alone], lr=0.1, foreach=False)
        run(other, [alone], [[g]] * 2)
        assert_same_bits(outcome(optimizer, p), outcome(other, alone))


REFUSALS = {
    "Adam": "Adam does not support sparse gradients, please consider SparseAdam instead",
    "AdamW": "Adam does not support sparse gradients, please consider SparseAdam instead",
    "NAdam": "NAdam does not support sparse gradients",
    "RAdam": "RAdam does not support sparse gradients",
}


@every_flag
@pytest.mark.parametrize("name", REFUSALS)
def test_the_others_refuse_in_torch_s_words_and_change_nothing(
    name: str, flags: dict[str, Any]
) -> None:
    assert_refused(name, flags, REFUSALS[name])
    assert_torch_refuses(name, REFUSALS[name])


@every_flag
def test_weight_decay_refuses_in_torch_s_words_and_changes_nothing(flags: dict[str, Any]) -> None:
    words = "weight_decay option is not compatible with sparse gradients"
    assert_refused("Adagrad", flags | {"weight_decay": 0.1}, words)
    assert_torch_refuses("Adagrad", words, weight_decay=0.1, foreach=False)


def test_every_optimizer_is_either_tested_or_refused() -> None:
    assert {"Adagrad", *REFUSALS} == set(OPTIMIZERS)


def assert_refused(name: str, options: dict[str, Any], words: str) -> None:
    """Assert that a step with one sparse gradient among dense ones raises before any change."""
    parameters = [parameter(normal(SHAPE, torch.float32, seed)) for seed in range(3)]
    optimizer = OPTIMIZERS[name].ours(parameters, **options)
    dense = normal(SHAPE, torch.float32, 9)
    run(optimizer, parameters, [[dense] * 3])
    before = [
        {key: tensor.clone() for key, tensor in outcome(optimizer, p).items()} for p in parameters
    ]
    with pytest.raises(RuntimeError, match=words):
        run(optimizer, parameters, [[dense, sparse(by_row(0), SHAPE, torch.float32, 1), dense]])
    for p, wanted in zip(parameters, before, strict=True):
        assert_same_bits(outcome(optimizer, p), wanted)


def assert_torch_refuses(name: str, words: str, **options: Any) -> None:
    p = parameter(normal(SHAPE, torch.float32, 0))
    optimizer = OPTIMIZERS[name].theirs([p], **options)
    with pytest.raises(RuntimeError, match=words):
        run(optimizer, [p], [[sparse(by_row(0), SHAPE, torch.float32, 1)]])
