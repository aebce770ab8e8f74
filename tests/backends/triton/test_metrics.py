"""Metrics in the kernel of a step: reductions of what it stores.

Oracle: the reference, bit for bit, which skips a step on the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch

from stepforge.backends import reference
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.spec import KernelSpec
from stepforge.backends.triton import table
from stepforge.backends.triton.kernel import BLOCK, Kernel, is_interpreted
from stepforge.backends.triton.rounds import Rounds
from stepforge.backends.triton.source import triton_source
from stepforge.backends.triton.variant import AMPERE, Target, Variant, units
from stepforge.ops import count, largest
from tests.backends.triton.kernels import by_kernels_only
from tests.backends.triton.test_source import metered_spec
from tests.conformance.table import (
    FORMATS,
    LAYOUTS,
    OPTIMIZERS,
    Layout,
    assert_same_bits,
    contiguous,
    extreme,
    forced,
    normal,
    outcome,
    parameter,
    transposed,
)

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="kernels are compiled here")

INF, NAN = float("inf"), float("nan")
FLAT = [(BLOCK - 1,), (0,), (BLOCK + 8,), ()]
#: Rows that are whole chunks of 128; that begin with a word of 16 bytes; and that do not.
CHUNKS, WORDS, ANY = (33, 128), (9, 464), (17, 257)


def spread(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return values of several magnitudes, so that a sum's bits depend on its order."""
    magnitudes = torch.exp2(4 * normal(shape, torch.float64, seed + 500)).clamp(max=2.0**12)
    return (magnitudes * normal(shape, torch.float64, seed)).to(dtype)


def with_a_stride_of_its_own(x: torch.Tensor) -> torch.Tensor:
    """Return a transposed copy with another stride of the dimensions of length 1."""
    copy = transposed(x)
    strides = [99 if size == 1 else step for size, step in zip(copy.shape, copy.stride())]
    return copy.as_strided(copy.shape, strides)


@dataclass(frozen=True)
class Case:
    """Parameters, and how they are stepped: their layout is also the gradients' by default."""

    optimizer: str
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    gradients: Layout | None = None
    options: dict[str, Any] = field(default_factory=dict)


def in_format(
    optimizer: str, shapes: list[tuple[int, ...]], name: str, layout: str = "contiguous"
) -> Case:
    dtype, options = FORMATS[name]
    return Case(optimizer, shapes, dtype, layout, options=options)


CASES = {
    **{name: Case(name, FLAT, options={"weight_decay": 0.1}) for name in OPTIMIZERS},
    "bfloat16": Case("AdamW", [(BLOCK,), (5,)], torch.bfloat16, options={"maximize": True}),
    "float16": Case("Adam", [(64,), (24,)], torch.float16),
    "float64": Case("NAdam", [(BLOCK + 8,), (30,)], torch.float64),
    "empty": Case("AdamW", [(0,), (0, 3)]),
    "one order": Case("AdamW", [(5, 6, 40), (30, 40)], layout="channels_last"),
    "two tables": Case(
        "Adam", [(7, 1, 150), (9,), (33, 40)], layout="transposed", gradients=contiguous
    ),
    "length of 1": Case(
        "AdamW", [(30, 1, 40)], layout="transposed", gradients=with_a_stride_of_its_own
    ),
    "int8": in_format("AdamW", [CHUNKS], "float32, int8 states"),
    "int8, any rows": in_format("RAdam", [WORDS, (5,), ANY], "bfloat16, 24 bits, int8 states"),
    "int8, strided": in_format("Adam", [(41, 112)], "float64, int8 states", layout="transposed"),
    "at random": in_format("AdamW", [WORDS], "bfloat16 at random, int8 states"),
}

#: The scale of the gradients in each step, and whether it is skipped.
SCALES = [(4.0, False), (4.0, True), (None, False)]


#: Metrics that elements outside a parameter would change if they counted as zeros.
OWN: dict[str, Callable[..., Any]] = {
    "zeros": lambda g: count(g == 0),
    "least": lambda new_p: -largest(-abs(new_p)),
}


@contextlib.contextmanager
def on_device() -> Iterator[None]:
    """Treat gradient scales as tensors of a device, which nothing reads."""
    synchronizes = AssertionError("synchronizes the device")
    with (
        mock.patch.object(GradScale, "on_host", mock.PropertyMock(return_value=False)),
        mock.patch.object(GradScale, "read", side_effect=synchronizes),
    ):
        yield


def gradient(shape: tuple[int, ...], dtype: torch.dtype, step: int, index: int) -> torch.Tensor:
    """Return a gradient; an extreme one with NaN and infinities in the last step."""
    if step < len(SCALES) - 1:
        return spread(shape, dtype, 100 * step + index)
    values = extreme(shape, dtype, index)
    if values.numel() > 40:
        values.view(-1)[[index, 37]] = torch.tensor([NAN, (INF, -INF)[index % 2]], dtype=dtype)
    return values


def trained(backend: str, case: Case, steps: int = len(SCALES)) -> list[dict[str, torch.Tensor]]:
    """Return all tensors, and the reductions of each launch, after each step."""
    params = [parameter(spread(s, case.dtype, k), case.layout) for k, s in enumerate(case.shapes)]
    layout = case.gradients or LAYOUTS[case.layout]
    by_kernel = backend == "triton"
    found = []
    with forced(backend), by_kernels_only() if by_kernel else contextlib.nullcontext():
        cls = OPTIMIZERS[case.optimizer].ours
        optimizer = cls(params, lr=0.01, telemetry=OWN, **case.options)
        for step, (scale, is_skipped) in enumerate(SCALES[:steps]):
            for k, p in enumerate(params):
                p.grad = layout(gradient(p.shape, p.dtype, step, k))
            optimizer.grad_scale = None if scale is None else torch.tensor(scale)
            optimizer.found_inf = None if scale is None else torch.tensor(float(is_skipped))
            with on_device() if by_kernel else contextlib.nullcontext():
                optimizer.step()
            rows = optimizer._control._of_step
            assert rows is not None
            totals = torch.cat([torch.as_tensor(part) for part in rows.parts])
            stored = {
                f"{k}.{name}": contiguous(x)
                for k, p in enumerate(params)
                for name, x in outcome(optimizer, p).items()
            }
            found.append({"totals": totals, **stored})
    return found


@pytest.mark.parametrize("name", CASES)
def test_kernels_have_the_bits_of_the_reference(name: str) -> None:
    """Compare what is stored, and its reductions. The second step is skipped on the device."""
    found, wanted = trained("triton", CASES[name]), trained("reference", CASES[name])
    for step, (got, oracle) in enumerate(zip(found, wanted, strict=True)):
        assert_same_bits(got, oracle, f"step {step}:")
    first, second = ({k: x for k, x in each.items() if k != "totals"} for each in found[:2])
    assert_same_bits(second, first)


def test_the_cases_above_take_every_kind_of_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the paths that kernels have."""
    found = set()
    inner = Variant.of.__func__

    def of(cls: type[Variant], spec: KernelSpec, *args: Any) -> Variant:
        variant: Variant = inner(cls, spec, *args)
        found.update((spec.in_blocks, *path) for path in [(variant.dims > 0, variant.unit)])
        return variant

    monkeypatch.setattr(Variant, "of", classmethod(of))
    monkeypatch.setattr(Kernel, "launch", mock.Mock())
    monkeypatch.setattr(Rounds, "run", mock.Mock(return_value=torch.zeros(1, 1)))
    for case in CASES.values():
        trained("triton", case, steps=1)
    assert {(in_blocks, dims) for in_blocks, dims, _ in found} == set(
        itertools.product((False, True), repeat=2)
    )
    assert {unit for in_blocks, dims, unit in found if in_blocks and not dims} == {1, 16, 128}
    assert {unit for in_blocks, dims, unit in found if not in_blocks and not dims} >= {1, 4, 8}


@pytest.mark.parametrize("is_skipped", [False, True])
def test_shared_memory(is_skipped: bool) -> None:
    """The reference steps what no kernel can."""
    found = []
    for backend in ("triton", "reference"):
        memory = normal((30,), torch.float32, 0)
        params = [torch.nn.Parameter(memory[:20]), torch.nn.Parameter(memory[10:])]
        with forced(backend), mock.patch.object(reference, "run", wraps=reference.run) as run:
            optimizer = OPTIMIZERS["AdamW"].ours(params, telemetry=True, capturable=True)
            for k, p in enumerate(params):
                p.grad = normal((20,), torch.float32, k + 1)
            optimizer.found_inf = torch.tensor(float(is_skipped))
            is_on_host = mock.PropertyMock(return_value=backend == "reference")
            with mock.patch.object(GradScale, "on_host", is_on_host):
                optimizer.step()
        assert run.called is not is_skipped
        assert optimizer._control._of_step is not None
        (totals,) = optimizer._control._of_step.parts
        found.append({"totals": torch.as_tensor(totals), "memory": memory.clone()})
    assert_same_bits(*found)


def test_a_captured_step_uploads_nothing(
    capturing: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the first step of a plan, which has nothing on the device yet. Oracle: its twin."""
    twins = []
    for _ in range(2):
        params = [parameter(normal((size,), torch.float32, size)) for size in (5, 0, BLOCK + 1)]
        twins.append(OPTIMIZERS["AdamW"].ours(params, telemetry=True, capturable=True, lr=0.01))
    captured, twin = twins
    for step in range(3):
        for p, q in zip(*(optimizer.param_groups[0]["params"] for optimizer in twins)):
            p.grad = q.grad = normal(p.shape, p.dtype, step)
        twin.step()
        if step == 2:
            captured._stepper.plans.clear()
        capturing(step > 0)
        with monkeypatch.context() as patch:
            if step:
                patch.setattr(table, "uploaded", mock.Mock(side_effect=AssertionError("uploads")))
            captured.step()
        capturing(False)
        assert_same_bits(captured.metrics(), twin.metrics())


@pytest.mark.parametrize("dims", [0, 2])
@pytest.mark.parametrize("format_", [None, *FORMATS])
def test_sources_are_readable(format_: str | None, dims: int) -> None:
    spec = dataclasses.replace(metered_spec("AdamW", format_), arithmetic=torch.float32)
    for unit in [1] if dims else units(spec):
        for target in (AMPERE, Target(lanes=64, root_takes_denormals=False)):
            text = triton_source(spec, Variant(dims, unit, target))
            assert max(map(len, text.splitlines())) <= 100
            assert "# squares(new_p" in text
            compile(text, "step.py", "exec")
