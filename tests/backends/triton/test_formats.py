"""Formats within Triton kernels. Oracles: the reference, bit for bit; the state before a skipped
step; a twin that is stepped in another way. tests/conformance/test_formats.py compares every
optimizer and format with the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import stepforge
from stepforge.backends import reference, triton
from stepforge.backends.triton import table
from stepforge.backends.triton.kernel import BLOCK, is_interpreted
from stepforge.expr import Expr
from stepforge.formats import BLOCK as CHUNK
from stepforge.formats import int8_blocks, stochastic
from stepforge.ops import where
from tests.backends.graphs import batch_of, traced
from tests.backends.triton.kernels import by_kernels_only, moved, on_host, tables
from tests.conformance.table import (
    FORMATS,
    LAYOUTS,
    assert_same_bits,
    contiguous,
    extreme,
    forced,
    normal,
    outcome,
    run,
)

FULLEST = "bfloat16, 24 bits, int8 states"
AT_RANDOM = "float16 at random"
IN_DOUBLE = "float64, int8 states"
some_formats = pytest.mark.parametrize("format_", [FULLEST, AT_RANDOM, IN_DOUBLE])

#: More than one block of the kernel, with whole chunks only; chunks that end within rows; a single
#: row; several dimensions; too small for int8.
SHAPES = [(5, 8 * CHUNK), (17, 257), (1, 4 * BLOCK + 4), (4, 3, 400), (7,)]


def trained(
    format_: str,
    layout: str = "contiguous",
    *,
    steps: int = 3,
    device: torch.device | str = "cpu",
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    **options: Any,
) -> stepforge.Optimizer:
    """Return an optimizer after some steps, with gradients in the layout of the parameters."""
    dtype, format_options = FORMATS[format_]
    device = torch.device(device)
    params = [
        torch.nn.Parameter(moved(LAYOUTS[layout](normal(shape, dtype, k)), device))
        for k, shape in enumerate(shapes)
    ]
    optimizer = stepforge.AdamW(params, lr=0.01, amsgrad=True, **format_options, **options)
    advance(optimizer, range(steps), layout)
    return optimizer


def advance(
    optimizer: stepforge.Optimizer, steps: Sequence[int], layout: str = "contiguous"
) -> None:
    params = params_of(optimizer)
    for step in steps:
        gradients = [extreme(p.shape, p.dtype, 100 * step + k) for k, p in enumerate(params)]
        pairs = zip(gradients, params, strict=True)
        run(optimizer, params, [[moved(LAYOUTS[layout](g), p.device) for g, p in pairs]])


def params_of(optimizer: stepforge.Optimizer) -> list[torch.nn.Parameter]:
    return list(optimizer.param_groups[0]["params"])


def outcomes(optimizer: stepforge.Optimizer) -> list[dict[str, torch.Tensor]]:
    found = (on_host(outcome(optimizer, p)) for p in params_of(optimizer))
    return [{key: contiguous(x) for key, x in each.items()} for each in found]


def assert_equal(one: stepforge.Optimizer, other: stepforge.Optimizer) -> None:
    for got, oracle in zip(outcomes(one), outcomes(other), strict=True):
        assert_same_bits(got, oracle)


@pytest.mark.parametrize("layout", LAYOUTS)
@some_formats
def test_blocks_and_random_bits_follow_the_index_of_an_element(
    format_: str, layout: str, device: torch.device
) -> None:
    """In any memory layout; the oracle's tensors are contiguous."""
    with forced("triton"), by_kernels_only():
        optimizer = trained(format_, layout, device=device)
    with forced("reference"):
        oracle = trained(format_)
    assert_equal(optimizer, oracle)


@pytest.mark.parametrize("offset", [0, 1])
@some_formats
def test_neighbours_are_not_touched(format_: str, offset: int, device: torch.device) -> None:
    """Every tensor is between guard values, which stay; the tensors equal the reference's."""
    with forced("reference"):
        before, oracle = (trained(format_, steps=1) for _ in range(2))
        advance(oracle, [1])
    memory: list[tuple[torch.Tensor, int, int]] = []

    def guarded(x: torch.Tensor) -> torch.Tensor:
        whole = torch.full((x.numel() + 256,), 77, dtype=x.dtype, device=device)
        memory.append((whole, 128 + offset, x.numel()))
        return whole[128 + offset :][: x.numel()].view(x.shape).copy_(x)

    optimizer = trained(format_, steps=0, device=device)
    for p, source in zip(params_of(optimizer), params_of(before), strict=True):
        p.data = guarded(source.detach())
        optimizer.state[p] = {
            k: guarded(x) if x.dim() else x for k, x in before.state[source].items()
        }
    with forced("triton"), by_kernels_only():
        advance(optimizer, [1])
    assert_equal(optimizer, oracle)
    for whole, begin, size in memory:
        assert (whole[:begin] == 77).all()
        assert (whole[begin + size :] == 77).all()


def test_columns_and_parts_of_any_names(device: torch.device) -> None:
    """A state may have the name of a part of another in the kernel, or of a variable there.

    Past the last element, a kernel may read a zero, from which the rule makes large states.
    """
    names = ["m", "m_at_scale", "m_at", "index", "key", "element", "column", "decode_0", "x0"]

    def rule(p: Expr, g: Expr) -> dict[str, Expr]:
        states = {name: where(g == 0.0, 1e6, g * (2.0 + k)) for k, name in enumerate(names)}
        return {"p": p - g, **states}

    graph = traced(rule)
    formats = {name: int8_blocks(unsigned=k % 2 == 1) for k, name in enumerate(names)}

    def results(step: Callable[..., None], device: torch.device) -> dict[str, torch.Tensor]:
        shape = (33, 130)
        param = {name: normal(shape, torch.float32, k).to(device) for k, name in enumerate("pg")}
        for name in names:
            for part in formats[name].parts:
                key = f"{name}.{part.name}" if part.name else name
                param[key] = torch.full(part.shape(shape), 7, dtype=part.dtype, device=device)
        random = {"step_seeds": np.array([5]), "first_indices": np.array([0])}
        step(batch_of(graph, [param], [[]], torch.float32, formats=formats, **random))
        return on_host(param)

    wanted = results(reference.run, torch.device("cpu"))
    with by_kernels_only():
        assert_same_bits(results(triton.run, device), wanted)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1])
@pytest.mark.parametrize("start", [0, 2**31 - 5, 2**32 - 5, 2**40 + 3])
def test_seeds_and_indices_wrap_around(
    start: int, seed: int, on_device: bool, device: torch.device
) -> None:
    """Parameters of two tables, with any first index and any seed, on the host or the device."""
    graph = traced(lambda p, g: {"m": g * 2.0, "p": p - g})

    def results(run: Callable[..., None], device: torch.device) -> dict[str, torch.Tensor]:
        # Strided tensors have a table of their own.
        params = [
            {"g": normal((size * step,), torch.float32, size).to(device)[::step]}
            | {
                name: torch.ones(size * step, dtype=torch.bfloat16, device=device)[::step]
                for name in "pm"
            }
            for size, step in ((BLOCK + 3, 1), (9, 2), (5, 1))
        ]
        formats = dict.fromkeys("pm", stochastic(torch.bfloat16))
        seeds: Any = np.array([seed, seed ^ 0x5EED5EED, seed ^ 0x60606060])
        seeds = torch.from_numpy(seeds).to(device) if on_device else seeds
        starts = np.array([start, 4, start + 1])
        random = {"step_seeds": seeds, "first_indices": starts}
        run(batch_of(graph, params, [[]] * 3, torch.float32, formats=formats, **random))
        return {f"{n}{k}": x for k, param in enumerate(params) for n, x in on_host(param).items()}

    wanted = results(reference.run, torch.device("cpu"))
    with by_kernels_only():
        assert_same_bits(results(triton.run, device), wanted)


@some_formats
@pytest.mark.usefixtures("unread")
def test_a_step_that_the_device_skips_leaves_every_bit(format_: str, device: torch.device) -> None:
    """Also of codes, scales and low bits. The next step is as if there had been no skipped one."""
    with by_kernels_only():
        optimizer, twin = (trained(format_, steps=2, device=device, fused=True) for _ in range(2))
        zero = torch.zeros((), device=device)
        optimizer.grad_scale, optimizer.found_inf = None, zero + 1
        before = outcomes(optimizer)
        advance(optimizer, [2])
        for got, oracle in zip(outcomes(optimizer), before, strict=True):
            assert_same_bits(got, oracle)
        optimizer.found_inf = zero
        advance(optimizer, [2])
        advance(twin, [2])
    assert_equal(optimizer, twin)


@pytest.mark.parametrize("capturable", [False, True])
@some_formats
def test_parameters_of_several_tables_have_seeds_of_their_own(
    format_: str, capturable: bool, device: torch.device
) -> None:
    """Layouts alternate, and step counts differ. Seeds that a kernel makes are not uploaded."""

    def results(backend: str, device: torch.device) -> tuple[stepforge.Optimizer, list[int]]:
        with forced(backend):
            dtype, options = FORMATS[format_]
            layouts = [LAYOUTS["transposed" if k % 2 else "contiguous"] for k in range(4)]
            params = [
                torch.nn.Parameter(moved(layout(normal((33, 130), dtype, k)), device))
                for k, layout in enumerate(layouts)
            ]
            optimizer = stepforge.NAdam(params, capturable=capturable, **options)
            for step in range(3):
                gradients = [normal((33, 130), dtype, 10 * step + k).to(device) for k in range(4)]
                run(optimizer, params, [[None if step == 0 and k == 2 else g
                                         for k, g in enumerate(gradients)]])  # fmt: skip
            found = tables(optimizer) if backend == "triton" else []
        return optimizer, [each.step_seeds.uploads for each in found]

    optimizer, uploads = results("triton", device)
    # Since the second step, which made a new plan.
    assert uploads == [0 if capturable else 2] * 2
    # torch's pow on a GPU need not round like its pow on a CPU.
    oracle, _ = results("reference", device if capturable else torch.device("cpu"))
    assert_equal(optimizer, oracle)


@pytest.mark.skipif(not is_interpreted(), reason="a GPU captures graphs itself")
@some_formats
def test_a_captured_step_uploads_nothing(
    format_: str,
    capturing: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random bits still change in every step. Oracle: steps that are not captured."""
    optimizer, twin = (
        trained(format_, steps=2, capturable=True, shapes=[(33, 130), (7,)]) for _ in range(2)
    )
    with monkeypatch.context() as patch:
        patch.setattr(table, "uploaded", None)
        capturing(True)
        advance(optimizer, range(2, 4))
        capturing(False)
    advance(twin, range(2, 4))
    assert_equal(optimizer, twin)


@some_formats
def test_a_step_increments_the_version_of_every_part(format_: str, device: torch.device) -> None:
    with forced("triton"), by_kernels_only():
        optimizer = trained(format_, steps=1, device=device)
        tensors = [x for p in params_of(optimizer) for x in outcome(optimizer, p).values()]
        before = [x._version for x in tensors]
        advance(optimizer, [1])
    assert len(tensors) > 3 * len(SHAPES)
    assert all(x._version > version for x, version in zip(tensors, before, strict=True))


@pytest.mark.skipif(not is_interpreted(), reason="the oracle uses pow of the CPU")
@pytest.mark.parametrize("shared", [False, True])
def test_the_reference_steps_scales_that_a_kernel_cannot(shared: bool) -> None:
    """Scales with gaps, and scales that two parameters share."""

    def odd(backend: str) -> stepforge.Optimizer:
        with forced(backend):
            optimizer = trained(FULLEST, shapes=[(40, 300)] * 2, steps=1)
            p, q = params_of(optimizer)
            scale = optimizer.state[p]["exp_avg_scale"]
            if shared:
                optimizer.state[q]["exp_avg_scale"] = scale
            else:
                optimizer.state[p]["exp_avg_scale"] = LAYOUTS["with_gaps"](scale)
            with mock.patch.object(reference, "run", side_effect=reference.run) as runs:
                advance(optimizer, range(1, 3))
            assert runs.call_count == (2 if backend == "triton" else runs.call_count)
        return optimizer

    assert_equal(odd("triton"), odd("reference"))
