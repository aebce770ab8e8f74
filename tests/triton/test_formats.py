"""Formats within the kernel. Oracles: the reference, bit for bit; what was there before a step that
is skipped; a twin that is stepped in another way. tests/conformance/test_formats.py has the rest of
the comparison with the reference: every optimizer and format.
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
from tests.native.graphs import batch_of, traced
from tests.triton.kernels import by_kernels_only, moved, on_host, tables

FULLEST = "bfloat16, 24 bits, int8 states"
AT_RANDOM = "float16 at random"
IN_DOUBLE = "float64, int8 states"
some_formats = pytest.mark.parametrize("format_", [FULLEST, AT_RANDOM, IN_DOUBLE])

#: One block of the kernel and a part, whose chunks are all whole; chunks that end within rows; one
#: row; several dimensions; what is too small for codes.
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
    """An optimizer that has stepped; its gradients lie as its parameters do."""
    dtype, storage = FORMATS[format_]
    place = torch.device(device)
    params = [
        torch.nn.Parameter(moved(LAYOUTS[layout](normal(shape, dtype, k)), place))
        for k, shape in enumerate(shapes)
    ]
    optimizer = stepforge.AdamW(params, lr=0.01, amsgrad=True, **storage, **options)
    advance(optimizer, range(steps), layout)
    return optimizer


def advance(
    optimizer: stepforge.Optimizer, steps: Sequence[int], layout: str = "contiguous"
) -> None:
    params = params_of(optimizer)
    for step in steps:
        given = [extreme(p.shape, p.dtype, 100 * step + k) for k, p in enumerate(params)]
        given = [moved(LAYOUTS[layout](g), p.device) for g, p in zip(given, params, strict=True)]
        run(optimizer, params, [given])


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
    """Wherever its memory is: the oracle's is contiguous."""
    with forced("triton"), by_kernels_only():
        optimizer = trained(format_, layout, device=device)
    with forced("reference"):
        oracle = trained(format_)
    assert_equal(optimizer, oracle)


@pytest.mark.parametrize("offset", [0, 1])
@some_formats
def test_neighbours_are_not_touched(format_: str, offset: int, device: torch.device) -> None:
    """Every tensor lies between guards, which stay; what is between them is the reference's."""
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
        entry = before.state[source]
        p.data = guarded(source.detach())
        optimizer.state[p] = {k: guarded(x) if x.dim() else x for k, x in entry.items()}
    with forced("triton"), by_kernels_only():
        advance(optimizer, [1])
    assert_equal(optimizer, oracle)
    for whole, begin, size in memory:
        assert (whole[:begin] == 77).all()
        assert (whole[begin + size :] == 77).all()


def test_columns_and_parts_of_any_names(device: torch.device) -> None:
    """A state may be called as a part of another is in the kernel, or as a variable there.

    Where there is no element a kernel may read a zero, of which these states would be large.
    """
    names = ["m", "m_at_scale", "m_at", "index", "key", "element", "column", "decode_0", "x0"]

    def rule(p: Expr, g: Expr) -> dict[str, Expr]:
        states = {name: where(g == 0.0, 1e6, g * (2.0 + k)) for k, name in enumerate(names)}
        return {"p": p - g, **states}

    graph = traced(rule)
    formats = {name: int8_blocks(unsigned=k % 2 == 1) for k, name in enumerate(names)}

    def results(step: Callable[..., None], place: torch.device) -> dict[str, torch.Tensor]:
        row = {name: normal((33, 130), torch.float32, k).to(place) for k, name in enumerate("pg")}
        for name in names:
            for part in formats[name].parts:
                column = f"{name}.{part.name}" if part.name else name
                row[column] = torch.full(part.shape((33, 130)), 7, dtype=part.dtype, device=place)
        random = {"step_seeds": np.array([5]), "first_indices": np.array([0])}
        step(batch_of(graph, [row], [[]], torch.float32, formats=formats, **random))
        return on_host(row)

    wanted = results(reference.run, torch.device("cpu"))
    with by_kernels_only():
        assert_same_bits(results(triton.run, device), wanted)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("key", [0, 2**31, 2**32 - 1])
@pytest.mark.parametrize("start", [0, 2**31 - 5, 2**32 - 5, 2**40 + 3])
def test_keys_and_indices_wrap_around(
    start: int, key: int, on_device: bool, device: torch.device
) -> None:
    """Rows of two tables that begin anywhere in a tensor, with any key, wherever keys are."""
    graph = traced(lambda p, g: {"m": g * 2.0, "p": p - g})

    def results(step: Callable[..., None], place: torch.device) -> dict[str, torch.Tensor]:
        # Strided tensors have a table of their own.
        rows = [
            {"g": normal((size * step,), torch.float32, size).to(place)[::step]}
            | {n: torch.ones(size * step, dtype=torch.bfloat16, device=place)[::step] for n in "pm"}
            for size, step in ((BLOCK + 3, 1), (9, 2), (5, 1))
        ]
        formats = dict.fromkeys("pm", stochastic(torch.bfloat16))
        keys: Any = np.array([key, key ^ 0x5EED5EED, key ^ 0x60606060])
        keys = torch.from_numpy(keys).to(place) if on_device else keys
        starts = np.array([start, 4, start + 1])
        random = {"step_seeds": keys, "first_indices": starts}
        step(batch_of(graph, rows, [[]] * 3, torch.float32, formats=formats, **random))
        return {f"{name}{k}": x for k, row in enumerate(rows) for name, x in on_host(row).items()}

    wanted = results(reference.run, torch.device("cpu"))
    with by_kernels_only():
        assert_same_bits(results(triton.run, device), wanted)


@some_formats
@pytest.mark.usefixtures("unread")
def test_a_step_that_the_device_skips_leaves_every_bit(format_: str, device: torch.device) -> None:
    """Codes, scales and low bits too; the step after it is the one that it would have been."""
    with by_kernels_only():
        optimizer, twin = (trained(format_, steps=2, device=device, fused=True) for _ in range(2))
        nothing = torch.zeros((), device=device)
        optimizer.grad_scale, optimizer.found_inf = None, nothing + 1
        before = outcomes(optimizer)
        advance(optimizer, [2])
        for got, oracle in zip(outcomes(optimizer), before, strict=True):
            assert_same_bits(got, oracle)
        optimizer.found_inf = nothing
        advance(optimizer, [2])
        advance(twin, [2])
    assert_equal(optimizer, twin)


@pytest.mark.parametrize("capturable", [False, True])
@some_formats
def test_rows_of_several_tables_have_keys_of_their_own(
    format_: str, capturable: bool, device: torch.device
) -> None:
    """Of layouts in turn, at different steps. Keys that are on a GPU are not uploaded."""

    def results(backend: str, place: torch.device) -> tuple[stepforge.Optimizer, list[int]]:
        with forced(backend):
            dtype, storage = FORMATS[format_]
            layouts = [LAYOUTS["transposed" if k % 2 else "contiguous"] for k in range(4)]
            params = [
                torch.nn.Parameter(moved(layout(normal((33, 130), dtype, k)), place))
                for k, layout in enumerate(layouts)
            ]
            optimizer = stepforge.NAdam(params, capturable=capturable, **storage)
            for step in range(3):
                given = [normal((33, 130), dtype, 10 * step + k).to(place) for k in range(4)]
                run(optimizer, params, [[None if step == 0 and k == 2 else g
                                         for k, g in enumerate(given)]])  # fmt: skip
            found = tables(optimizer) if backend == "triton" else []
        return optimizer, [each.step_seeds.uploads for each in found]

    optimizer, uploads = results("triton", device)
    on_device = capturable and device.type == "cuda"
    assert uploads == [0 if on_device else 2] * 2  # of the plan of the second step
    # Powers of a GPU need not be the CPU's.
    oracle, _ = results("reference", device if capturable else torch.device("cpu"))
    assert_equal(optimizer, oracle)


@pytest.mark.skipif(not is_interpreted(), reason="a GPU captures graphs itself")
@pytest.mark.parametrize("steps_before", [0, 2])
@some_formats
def test_a_captured_step_sends_nothing(
    format_: str,
    steps_before: int,
    capturing: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its random bits are new in every step still. Oracle: steps that are not captured."""
    optimizer, twin = (
        trained(format_, steps=steps_before, capturable=True, shapes=[(33, 130), (7,)])
        for _ in range(2)
    )
    with monkeypatch.context() as patch:
        patch.setattr(table, "_uploaded", None)
        capturing(True)
        advance(optimizer, range(steps_before, steps_before + 2))
        capturing(False)
    advance(twin, range(steps_before, steps_before + 2))
    assert_equal(optimizer, twin)


@some_formats
def test_autograd_is_told_of_every_part(format_: str, device: torch.device) -> None:
    with forced("triton"), by_kernels_only():
        optimizer = trained(format_, steps=1, device=device)
        tensors = [x for p in params_of(optimizer) for x in outcome(optimizer, p).values()]
        before = [x._version for x in tensors]
        advance(optimizer, [1])
    assert len(tensors) > 3 * len(SHAPES)
    assert all(x._version > version for x, version in zip(tensors, before, strict=True))


@pytest.mark.skipif(not is_interpreted(), reason="bits of the CPU's powers are wanted")
@pytest.mark.parametrize("shared", [False, True])
def test_scales_that_a_kernel_does_not_read_are_the_reference_s(shared: bool) -> None:
    """Those with gaps, and those that are those of another parameter as well."""

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
