"""``stepforge.explain``, and the choice between backends that it reports.

Oracle of the choice: the documentation. ``foreach=True`` asks for the foreach backend. Either flag
False, and the other not True, asks for the reference. Both unset ask for the fastest backend that
serves. ``STEPFORGE_BACKEND`` overrides all of them. Oracle of the report: a record of the backends
that run in a step. Oracle of the bytes: the sizes of the tensors after a step.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

import stepforge
from stepforge import backends, extension
from stepforge.accounting import Account
from stepforge.explain import Frozen, InFull
from tests.twins import (
    assert_unchanged,
    each_optimizer,
    give_gradients,
    make_params,
    run,
    snapshot,
    twin_of,
)

SETTINGS = list(itertools.product([None, False, True], [None, False]))
every_setting = pytest.mark.parametrize(("foreach", "fused"), SETTINGS, ids=str)


@pytest.fixture(autouse=True)
def _no_backend_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEPFORGE_BACKEND", raising=False)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which each backend appends its name when it runs."""
    record: list[str] = []

    def watched(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            record.append(name)
            return inner(*args, **kwargs)

        return wrapper

    for name, backend in backends.BACKENDS.items():
        monkeypatch.setattr(backend, "run", watched(name, backend.run))
    return record


def chosen(optimizer: stepforge.Optimizer) -> list[str]:
    return [served.backend for served in stepforge.explain(optimizer).served]


def sparse_gradient(p: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(p).detach().to_sparse()


@every_setting
@each_optimizer
def test_the_flags_choose_the_backend(
    cls: type, foreach: bool | None, fused: bool | None, ran: list[str]
) -> None:
    params = make_params()
    optimizer = cls(params, foreach=foreach, fused=fused)
    (backend,) = chosen(optimizer)
    if foreach:
        assert backend == "foreach"
    elif foreach is None and fused is None:
        assert backend != "reference"
    else:
        assert backend == "reference"
    run(optimizer, params, range(1))
    assert set(ran) == {backend}


@pytest.mark.parametrize("forced", ["reference", "foreach"])
@every_setting
def test_the_environment_overrides_the_flags(
    foreach: bool | None,
    fused: bool | None,
    forced: str,
    ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = make_params()
    optimizer = stepforge.Adam(params, foreach=foreach, fused=fused)
    monkeypatch.setenv("STEPFORGE_BACKEND", forced)
    assert chosen(optimizer) == [forced]
    run(optimizer, params, range(1))
    assert set(ran) == {forced}


def test_an_empty_environment_variable_forces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = stepforge.Adam(make_params(), foreach=False)
    monkeypatch.setenv("STEPFORGE_BACKEND", "")
    assert chosen(optimizer) == ["reference"]


def test_an_unknown_backend_is_refused_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optimizer = stepforge.Adam(make_params())
    monkeypatch.setenv("STEPFORGE_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"'abacus'.*foreach.*reference"):
        stepforge.explain(optimizer)


def test_a_forced_backend_that_cannot_serve_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    (p,) = make_params([(3, 2)])
    p.grad = sparse_gradient(p)
    optimizer = stepforge.Adagrad([p])
    monkeypatch.setenv("STEPFORGE_BACKEND", "foreach")
    message = r"STEPFORGE_BACKEND=foreach .*\(3, 2\).*float32.*cpu.*sparse"
    with pytest.raises(RuntimeError, match=message):
        stepforge.explain(optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


def test_fused_without_a_kernel_is_an_error_that_says_why() -> None:
    (p,) = make_params([(3, 2)])
    optimizer = stepforge.Adagrad([p], fused=True)
    p.grad = sparse_gradient(p)
    message = r"fused=True .*\(3, 2\).*float32 on cpu: .*sparse"
    with pytest.raises(RuntimeError, match=message):
        stepforge.explain(optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_fused_runs_a_generated_kernel(ran: list[str]) -> None:
    params = make_params()
    optimizer = stepforge.Adam(params, fused=True)
    (backend,) = chosen(optimizer)
    assert backend in backends.FUSED.values()
    run(optimizer, params, range(1))
    assert set(ran) == {backend}


@each_optimizer
def test_a_differentiable_step_is_the_references(cls: type) -> None:
    optimizer = cls(make_params(), differentiable=True)
    (served,) = stepforge.explain(optimizer).served
    assert served.backend == "reference"
    assert "autograd" in dict(served.reasons)["foreach"]


@pytest.mark.parametrize("foreach", [None, True])
def test_parameters_of_one_group_may_be_served_apart(foreach: bool | None, ran: list[str]) -> None:
    dense, sparse, idle = make_params([(4, 2), (3,), (5,)])
    dense.grad, sparse.grad = torch.ones_like(dense).detach(), sparse_gradient(sparse)
    optimizer = stepforge.Adagrad([dense, sparse, idle], foreach=foreach)
    by_backend = {served.backend: served for served in stepforge.explain(optimizer).served}
    reference = by_backend.pop("reference")
    (ordinary,) = by_backend.values()
    assert (reference.tensors, reference.elements) == (1, 3)
    assert "sparse" in dict(reference.reasons)["foreach"]
    assert (ordinary.tensors, ordinary.elements) == (2, 13)
    optimizer.step()
    assert set(ran) == {"reference", ordinary.backend}


def test_every_faster_backend_has_its_reason() -> None:
    names = [backends.FUSED["cpu"], "foreach", "reference"]
    for options in ({}, {"differentiable": True}):
        for served in stepforge.explain(stepforge.Adam(make_params(), **options)).served:
            faster = names[: names.index(served.backend)]
            assert [name for name, _ in served.reasons] == faster
            assert all(why for _, why in served.reasons)


def test_the_answer_counts_group_by_group() -> None:
    first, second = make_params([(3, 4), (5,)]), make_params([(1000, 2)], dtype=torch.float64)
    optimizer = stepforge.RAdam(
        [{"params": first, "foreach": True}, {"params": second, "foreach": False}]
    )
    explanation = stepforge.explain(optimizer)
    assert explanation.optimizer == "RAdam"
    assert [
        (s.group, s.backend, s.tensors, s.elements, s.dtypes, s.devices) for s in explanation.served
    ] == [
        (0, "foreach", 2, 17, ("float32",), ("cpu",)),
        (1, "reference", 1, 2000, ("float64",), ("cpu",)),
    ]
    title, *lines = str(explanation).splitlines()
    assert title == "RAdam"
    assert "group 0: foreach (2 parameters, 17 elements, float32 on cpu)" in lines
    assert "group 1: reference (1 parameter, 2,000 elements, float64 on cpu)" in lines


def test_the_text_says_why_nothing_faster_runs() -> None:
    text = str(stepforge.explain(stepforge.Adam(make_params(), differentiable=True)))
    assert "\n  not foreach: autograd" in text


@each_optimizer
def test_explaining_changes_nothing(cls: type) -> None:
    params = make_params()
    optimizer = cls(params)
    run(optimizer, params, range(2))
    before = snapshot(optimizer)
    stepforge.explain(optimizer)
    assert_unchanged(optimizer, before)


@each_optimizer
def test_optimizers_of_torch_are_refused_by_name(cls: type) -> None:
    with pytest.raises(TypeError, match=rf"stepforge optimizer, but got {cls.__name__}"):
        stepforge.explain(twin_of(cls)(make_params()))


# Bytes

#: A matrix, a vector, a tensor without dimensions, one whose rows end within a block, an empty one,
#: and one whose rows are too short for int8 states.
MANY_SHAPES = ((64, 128), (5000,), (), (65, 5, 41), (0, 3), (500, 10))

FORMATS: list[dict[str, Any]] = [
    {},
    {"state_format": "float32"},
    {"state_format": "bfloat16"},
    {"state_format": "int8"},
    {"state_format": "int8", "master_weight_bits": 24},
    {"master_weight_bits": 32},
    {"state_format": "int8", "stochastic_rounding": True},
]
every_format = pytest.mark.parametrize(
    "options", FORMATS, ids=lambda x: " ".join(map(str, x.values()))
)


def bytes_of(optimizer: stepforge.Optimizer) -> dict[str, int]:
    """Return the bytes of all tensors of an optimizer, by the fields of an ``Account``."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    total = dict.fromkeys(("states", "scales", "low_bits", "numbers"), 0)
    for p in params:
        for key, x in optimizer.state[p].items():
            field = (
                "numbers"
                if key in ("step", "mu_product")
                else "scales"
                if key.endswith("_scale")
                else "low_bits"
                if key.startswith("low_bits_")
                else "states"
            )
            total[field] += x.nbytes
    return total | {
        "weights": sum(p.nbytes for p in params),
        "gradients": sum(p.grad.nbytes for p in params if p.grad is not None),
        "elements": sum(p.numel() for p in params),
    }


def assert_bytes(account: Account, expected: dict[str, int]) -> None:
    """Assert that an account, its total and its checkpoint have the expected bytes."""
    assert {name: getattr(account, name) for name in expected} == expected
    fields = ("weights", "gradients", "states", "scales", "low_bits")
    assert account.total == sum(expected[field] for field in fields)
    assert account.checkpoint == account.total - expected["gradients"]


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.complex64])
@pytest.mark.filterwarnings("ignore:.* has no effect")
@each_optimizer
def test_bytes_are_those_of_the_tensors(
    cls: type, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """The account is the same before the first step, which makes the states."""
    params = make_params(MANY_SHAPES, dtype)
    optimizer = cls([{"params": params[:2]}, {"params": params[2:]}], **options)
    before = stepforge.explain(optimizer).account
    run(optimizer, params, range(1))
    explained = stepforge.explain(optimizer)
    assert_bytes(explained.account, bytes_of(optimizer))
    assert explained.account == before
    accounts = [served.account for served in explained.served]
    assert sum(account.total for account in accounts) == before.total


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_flag_that_adds_a_state_adds_its_bytes(amsgrad: bool) -> None:
    optimizer = stepforge.Adam(make_params([(10,)]), amsgrad=amsgrad)
    assert stepforge.explain(optimizer).account.states == (120 if amsgrad else 80)


def test_bytes_that_a_step_reads_and_writes() -> None:
    """By hand: 8192 elements, each a bfloat16, its low bits and two codes, in 64 blocks of 128."""
    params = make_params([(64, 128)], torch.bfloat16)
    optimizer = stepforge.AdamW(params, state_format="int8", master_weight_bits=24)
    account = stepforge.explain(optimizer).account
    assert account.written == 8192 * (2 + 1 + 2) + 64 * 4 * 2
    assert account.read == account.written + 8192 * 2
    assert account.moved == account.read + account.written


def test_a_gradient_of_another_dtype_counts_its_own_bytes() -> None:
    p = torch.zeros(10)
    p.grad_dtype = None  # any
    p.grad = torch.zeros(10, dtype=torch.bfloat16)
    assert stepforge.explain(stepforge.Adam([p])).account.gradients == 20


def test_a_sparse_gradient_counts_its_indices_and_values() -> None:
    """By hand: two indices of two int64 each, and two float32 values."""
    (p,) = make_params([(100, 3)])
    p.grad = torch.sparse_coo_tensor([[0, 1], [2, 2]], [1.0, 2.0], (100, 3), check_invariants=True)
    assert stepforge.explain(stepforge.Adagrad([p])).account.gradients == 4 * 8 + 2 * 4


def test_states_of_a_longer_dtype_than_the_parameter_stay() -> None:
    """torch.optim keeps states in float32 too if a parameter becomes a bfloat16."""
    (p,) = params = make_params([(64, 128)])
    optimizer = stepforge.Adam(params)
    run(optimizer, params, range(1))
    p.data = p.data.bfloat16()
    p.grad = None
    for options, states in (({}, 8), ({"state_format": "bfloat16"}, 4)):
        optimizer.param_groups[0].update(options)
        explained = stepforge.explain(optimizer).account
        assert explained.states == states * p.numel()
        run(optimizer, params, range(1))
        assert_bytes(stepforge.explain(optimizer).account, bytes_of(optimizer))
        assert stepforge.explain(optimizer).account == explained


def test_a_change_of_format_counts_before_the_next_step_makes_it() -> None:
    params = make_params(MANY_SHAPES)
    optimizer = stepforge.Adam(params)
    run(optimizer, params, range(1))
    optimizer.param_groups[0]["state_format"] = "int8"
    before = stepforge.explain(optimizer).account
    assert before.scales > 0
    run(optimizer, params, range(1))
    assert_bytes(before, bytes_of(optimizer))


def test_scalar_states_under_another_default_dtype() -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        params = make_params()
        optimizer = stepforge.NAdam(params, foreach=True)
        assert stepforge.explain(optimizer).account.numbers == len(params) * 2 * 8
        run(optimizer, params, range(1))
    finally:
        torch.set_default_dtype(before)
    assert_bytes(stepforge.explain(optimizer).account, bytes_of(optimizer))


def test_a_parameter_that_is_listed_twice_counts_once() -> None:
    (p,) = make_params([(10,)])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = stepforge.Adam([p, p])
    (served,) = stepforge.explain(optimizer).served
    assert (served.tensors, served.elements, served.account.weights) == (1, 10, 40)


def test_parameters_left_in_full_precision_have_their_reason() -> None:
    params = make_params(MANY_SHAPES)
    optimizer = stepforge.Adam(params, state_format="int8", foreach=True)
    (served,) = stepforge.explain(optimizer).served
    assert served.in_full == (
        InFull("fewer than 64 elements in a row of dimension 0", 2, 10000),
        InFull("fewer than 4,096 elements", 2, 1),
    )
    with pytest.warns(UserWarning, match="no effect"):
        optimizer = stepforge.Adam(make_params([(64, 128)], torch.complex64), state_format="int8")
    (served,) = stepforge.explain(optimizer).served
    assert served.in_full == (InFull("complex numbers have no codes of 8 bits", 1, 8192),)


@pytest.mark.parametrize(
    ("options", "asked", "reason"),
    [
        ({"master_weight_bits": 24}, "24 bits", "has them already"),
        ({"master_weight_bits": 32}, "32 bits", "has them already"),
        ({"stochastic_rounding": True}, "rounded at random", "is stored as it is computed"),
    ],
    ids=["24 bits", "32 bits", "stochastic"],
)
def test_weights_on_which_an_option_has_no_effect_have_their_reason(
    options: dict[str, Any], asked: str, reason: str
) -> None:
    params = [
        *make_params([(7,)], torch.bfloat16),
        *make_params([(10, 2), (5,)]),
        *make_params([(3,)], torch.float64),
    ]
    (served,) = stepforge.explain(stepforge.Adam(params, foreach=True, **options)).served
    assert served.in_full == (
        InFull(f"float32 {reason}", 2, 25, asked),
        InFull(f"float64 {reason}", 1, 3, asked),
    )
    lines = str(served).splitlines()
    assert lines[-2] == f"  not {asked} for 2 parameters, 25 elements: float32 {reason}"


@pytest.mark.parametrize("options", [{}, {"state_format": "bfloat16"}])
def test_full_precision_is_not_reported_without_int8(options: dict[str, Any]) -> None:
    optimizer = stepforge.Adam(make_params(MANY_SHAPES), **options)
    assert [served.in_full for served in stepforge.explain(optimizer).served] == [()]


def test_the_text_has_bytes_per_element() -> None:
    """By hand: 8 + 2 of codes and 2 * 4 / 128 of scales, and 8 + 8 of the vectors in float32."""
    matrix, *vectors = make_params([(1024, 128), (128,), (128,)])
    optimizer = stepforge.AdamW(
        [{"params": [matrix]}, {"params": vectors, "weight_decay": 0.0}],
        state_format="int8",
        foreach=True,
    )
    assert str(stepforge.explain(optimizer)).splitlines() == [
        "AdamW",
        "group 0: foreach (1 parameter, 131,072 elements, float32 on cpu)",
        "  10.06 bytes an element: weights 4, gradients 4, states 2, scales 0.06",
        "group 1: foreach (2 parameters, 256 elements, float32 on cpu)",
        "  16 bytes an element: weights 4, gradients 4, states 8",
        "  not int8 for 2 parameters, 256 elements: fewer than 4,096 elements",
        "in all 10.07 bytes an element: weights 4, gradients 4, states 2.01, scales 0.06",
        f"guards in {extension.described(extension.module())}",
    ]


def test_the_text_has_no_bytes_per_element_without_elements() -> None:
    text = str(stepforge.explain(stepforge.Adam(make_params([(0, 3)]), foreach=True)))
    assert text.splitlines()[:-1] == [
        "Adam",
        "group 0: foreach (1 parameter, 0 elements, float32 on cpu)",
    ]


# Guards


def test_the_text_ends_with_the_guards_and_why_they_are_in_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: what steps get, which is a module or the reason why there is none."""
    optimizer = stepforge.Adam(make_params())
    explanation = stepforge.explain(optimizer)
    found = extension.module()
    assert explanation.guards == (f"Python: {found}" if isinstance(found, str) else "C++")
    assert str(explanation).splitlines()[-1] == f"guards in {explanation.guards}"
    monkeypatch.setenv("STEPFORGE_GUARDS", "python")
    reason = "STEPFORGE_GUARDS asks for python"
    assert str(stepforge.explain(optimizer)).endswith(f"\nguards in Python: {reason}")


def test_unknown_guards_are_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = stepforge.Adam(make_params())
    monkeypatch.setenv("STEPFORGE_GUARDS", "abacus")
    with pytest.raises(ValueError, match=r"'abacus'.*python, cpp"):
        stepforge.explain(optimizer)


# Frozen parameters


@each_optimizer
def test_frozen_parameters_count_with_the_tensors_that_they_have(cls: type) -> None:
    """Oracle: the sizes of all tensors after a step. Adagrad gives frozen parameters states too."""
    frozen_param, *trained = params = make_params([(64, 128), (500, 10), (5,)])
    frozen_param.requires_grad_(False)
    optimizer = cls(params, foreach=True)
    before = stepforge.explain(optimizer)
    give_gradients(trained, 0)
    optimizer.step()
    after = stepforge.explain(optimizer)
    assert_bytes(before.account, bytes_of(optimizer) | {"numbers": before.account.numbers})
    assert after == before
    (served,), (frozen,) = after.served, after.frozen
    assert (served.tensors, served.elements) == (2, 5005)
    assert isinstance(frozen, Frozen)
    assert (frozen.group, frozen.tensors, frozen.elements) == (0, 1, 8192)
    assert frozen.account.weights == 4 * 8192
    assert frozen.account.states == (4 * 8192 if cls is stepforge.Adagrad else 0)
    assert frozen.account.moved == frozen.account.gradients == 0


def test_the_text_has_frozen_parameters() -> None:
    """By hand: a frozen matrix of bfloat16 and a trained layer of float32 have 2 and 16 bytes."""
    base, *adapter = (*make_params([(100, 90)], torch.bfloat16), *make_params([(100, 5), (500,)]))
    base.requires_grad_(False)
    groups = [{"params": [base]}, {"params": adapter}]
    optimizer = stepforge.Adam(groups, foreach=True, master_weight_bits=24)
    assert str(stepforge.explain(optimizer)).splitlines() == [
        "Adam",
        "group 0: frozen (1 parameter, 9,000 elements, bfloat16 on cpu)",
        "  2 bytes an element: weights 2",
        "group 1: foreach (2 parameters, 1,000 elements, float32 on cpu)",
        "  16 bytes an element: weights 4, gradients 4, states 8",
        "  not 24 bits for 2 parameters, 1,000 elements: float32 has them already",
        "in all 3.4 bytes an element: weights 2.2, gradients 0.4, states 0.8",
        f"guards in {extension.described(extension.module())}",
    ]


def test_a_tensor_whose_gradients_are_set_by_hand_is_not_frozen() -> None:
    p = torch.zeros(10)
    optimizer = stepforge.Adam([p])
    assert stepforge.explain(optimizer).served == ()
    p.grad = torch.ones(10)
    (served,) = stepforge.explain(optimizer).served
    assert served.elements == 10
    optimizer.step()
    p.grad = None
    assert [x.elements for x in stepforge.explain(optimizer).served] == [10]
    assert stepforge.explain(optimizer).frozen == ()
