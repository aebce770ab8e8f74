"""Cases and inputs of the selftest.

Oracles: the compatible choices by hand; for powers, Python's decimal module.
"""

from __future__ import annotations

import decimal
import itertools
import math
from typing import Any

import pytest
import torch

from stepforge import ops
from stepforge.backends.triton.kernel import is_interpreted
from stepforge.cli.devices import CPU
from stepforge.cli.selftest.cases import FACTORS, STEPS, Case, cases
from stepforge.cli.selftest.compare import bits, outcomes
from stepforge.cli.selftest.inputs import GROUPS, LARGE_GROUP, values
from stepforge.rules import ALL
from tests.backends.triton.kernels import by_kernels_only
from tests.cli.compilers import needs_compiler
from tests.cli.selftest.powers import patch_powers


def possible(a: str, x: Any, b: str, y: Any) -> bool:
    """Return True if two choices are compatible, by hand from constructors and formats."""
    both = {a: x, b: y}
    half = (None, torch.bfloat16, torch.float16)
    if both.get("weights") and both.get("dtype") not in half:
        return False
    if both.get("dtype") == torch.complex64 and both.get("gradient"):
        return False
    if both.get("gradient") and both.get("gradient") == both.get("dtype"):
        return False
    if both.get("amsgrad"):
        return both.get("optimizer") in (None, "Adam", "AdamW")
    if both.get("decoupled_weight_decay"):
        return both.get("optimizer") in (None, "Adam", "NAdam", "RAdam")
    return True


def chosen(case: Case) -> dict[str, Any]:
    options = dict(case.options)
    weights = options.get("master_weight_bits") or (
        "at random" if options.get("stochastic_rounding") else None
    )
    return {
        "optimizer": case.optimizer,
        "dtype": case.dtype,
        "gradient": None if case.gradient == case.dtype else case.gradient,
        "weights": weights,
        **{
            name: options.get(name, FACTORS[name][0])
            for name in FACTORS
            if name not in ("optimizer", "dtype", "gradient", "weights")
        },
    }


def test_every_two_choices_that_fit_meet_in_some_case() -> None:
    met = {
        frozenset(pair)
        for case in cases()
        for pair in itertools.combinations(chosen(case).items(), 2)
    }
    wanted = {
        frozenset([(a, x), (b, y)])
        for (a, xs), (b, ys) in itertools.combinations(FACTORS.items(), 2)
        for x, y in itertools.product(xs, ys)
        if possible(a, x, b, y)
    }
    assert met == wanted
    assert len({case.name for case in cases()}) == len(cases())


def test_every_optimizer_steps_every_dtype_as_it_is_made() -> None:
    plain = {
        (case.optimizer, case.dtype)
        for case in cases()
        if not case.options and case.gradient == case.dtype
    }
    assert plain == set(itertools.product(ALL, FACTORS["dtype"]))


def test_every_layout_is_stepped() -> None:
    case_params = [param for _, in_group in (*GROUPS, LARGE_GROUP) for param in in_group]
    params = [param.make(0, torch.float32, CPU) for param in case_params]
    gradients = [param.make_gradient(0, torch.float32, CPU) for param in case_params]
    shapes = {tuple(p.shape) for p in params}
    assert () in shapes
    assert any(0 in shape for shape in shapes)
    assert any(not p.is_contiguous() and p.t().is_contiguous() for p in params if p.dim() == 2)
    assert any(p.data_ptr() % 16 for p in params if p.numel())
    for tensors in (params, gradients):
        assert any(x.stride()[-1:] == (2,) for x in tensors), "gaps"
    assert any(0 in g.stride() for g in gradients if g.numel()), "expanded"
    assert any(g.stride() != p.stride() for p, g in zip(params, gradients))
    with_int8 = [p for p in params if p.dim() == 2 and p.numel() >= 4096]
    assert {p.is_contiguous() for p in with_int8} == {True, False}
    assert params[-1].numel() >= 2**16, "enough for several threads"


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_kernels_leave_no_case_to_the_reference(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference would store the right bits without testing a kernel."""
    if backend == "native":
        needs_compiler()
    elif not is_interpreted():
        pytest.skip("kernels are compiled here, for the GPU")
    monkeypatch.setenv("STEPFORGE_BACKEND", backend)
    few = cases()[:: 4 if backend == "native" else 19]
    with by_kernels_only():
        assert all(len(outcomes(case, backend, CPU)) == STEPS for case in few)


@pytest.mark.parametrize("dtype", FACTORS["dtype"], ids=str)
def test_inputs_reach_the_corners_they_are_meant_for(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    wide = torch.cat([values((4369,), dtype, seed, wide=True) for seed in range(9)])
    wide = torch.view_as_real(wide).flatten() if dtype.is_complex else wide
    sizes = wide.abs().double()
    assert wide.isnan().any()
    assert (wide == torch.inf).any()
    assert (wide == -torch.inf).any()
    assert (wide == 0).any()
    assert (torch.signbit(wide) & (wide == 0)).any()
    assert ((sizes > 0) & (sizes < info.smallest_normal)).any()
    assert sizes[sizes > 0].min() == info.smallest_normal * info.eps
    assert (sizes == info.max).any()
    assert wide.isfinite().double().mean() > 0.99
    narrow = values((4369,), dtype, 1, wide=False)
    narrow = torch.view_as_real(narrow).flatten() if dtype.is_complex else narrow
    assert narrow.abs().min() >= 2.0**-12
    assert narrow.abs().max() < 2.0**4
    assert 0.4 < (narrow > 0).double().mean() < 0.6
    assert len(narrow.unique()) > 0.6 * min(len(narrow), 2 * 16 / info.eps)


def test_bits_of_nans_are_alike_and_those_of_zeros_are_not() -> None:
    patterns = torch.tensor([0x7FC00000, 0x7F800001, -0x400000, -1], dtype=torch.int32)
    assert patterns.view(torch.float32).isnan().all()
    assert len(set(bits(patterns.view(torch.float32)).tolist())) == 1
    assert len(set(bits(torch.tensor([0.0, -0.0, torch.inf, 1.0])).tolist())) == 4
    assert bits(torch.tensor([3.0, 4.0])[1:]).tolist() == [0x40800000]
    assert bits(torch.tensor([1 + 2j])).tolist() == [[0x3F800000, 0x40000000]]


def test_powers_are_far_from_where_c_libraries_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only powers come from a C library. Those of glibc and musl err by 0.54 units at most.

    Any C library that errs by less than 0.55 units rounds as decimal does, if the exact value is
    more than 0.05 units from the midpoint of two floats.
    """
    powers: dict[tuple[float, float], float] = {}
    original = ops._number_power

    def recorded(base: float, exponent: float) -> float:
        powers[float(base), float(exponent)] = original(base, exponent)
        return powers[float(base), float(exponent)]

    patch_powers(monkeypatch, recorded)
    for name in ALL:  # powers depend on no dtype and no other option
        outcomes(next(case for case in cases() if case.optimizer == name), "reference", CPU)
    assert {base for base, _ in powers} == {0.0, 0.25, 0.375, 0.9, 0.96, 0.999}
    assert {exponent for base, exponent in powers if base == 0.999} >= set(range(1, STEPS + 1))
    with decimal.localcontext(prec=60):
        for (base, exponent), found in powers.items():
            if base == 0:
                assert found == 0
                continue
            exact = decimal.Decimal(base) ** decimal.Decimal(exponent)
            off = abs(exact - decimal.Decimal(found)) / decimal.Decimal(math.ulp(found))
            assert off < decimal.Decimal("0.45"), (base, exponent)
