"""The variants of kernels that tables take: never more than their parameters need.

Oracles: the shapes of well-known models; the counts that docs/gpus.md tells; the reference.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

import stepforge
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.spec import KernelSpec
from stepforge.backends.triton import variant
from stepforge.backends.triton.inspection import GPUS
from stepforge.backends.triton.kernel import is_interpreted
from stepforge.backends.triton.variant import Target, Variant, begins_rows_with_words, units
from stepforge.cli.kernels import STORAGES as STORED_AS
from stepforge.cli.kernels import spec_of_storage
from stepforge.state.layout import state_layout
from tests.backends.triton.kernels import tables
from tests.conformance.table import assert_same_bits, forced, normal, outcome, parameter

CPU = torch.device("cpu")


def transformer(width: int, layers: int) -> list[tuple[int, ...]]:
    """Return the shapes of a GPT-2."""
    layer = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(50257, width), (1024, width), *layers * layer, (width,), (width,)]


def resnet50() -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, inputs, 1, 1))
            for shape in convolutions:
                found += [shape, (shape[0],), (shape[0],)]
            inputs = 4 * width
    return [*found, (1000, inputs), (1000,)]


def mixture() -> list[tuple[int, ...]]:
    """Return the shapes of two layers of eight experts, between embeddings."""
    attention = [(4096,), (4096,), (4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)]
    experts = 8 * [(14336, 4096), (4096, 14336), (14336, 4096)]
    return [(32000, 4096), (32000, 4096), *2 * [*attention, (8, 4096), *experts]]


MODELS = {
    "a transformer (GPT-2, 148 tensors)": transformer(768, 12),
    "a convolutional network (ResNet-50, 161 tensors)": resnet50(),
    "a mixture of experts (8 experts, 64 tensors)": mixture(),
}
STORAGES: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {}),
    (torch.float32, {"state_format": "int8"}),
    (torch.bfloat16, {"master_weight_bits": 24, "state_format": "int8"}),
]


def variants(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, options: dict[str, Any]
) -> list[int]:
    """Return the unit of each table that parameters of these shapes are stepped in."""
    optimizer = stepforge.AdamW([torch.zeros(64, 128, dtype=dtype)], **options)
    group = optimizer.param_groups[0]
    lengths = defaultdict(list)
    for shape in shapes:
        p = torch.empty(shape, dtype=dtype, device="meta")
        layout = state_layout(optimizer.rule, group, p)
        graph = optimizer.rule.graph(group)
        spec = KernelSpec.of(graph, {"g": dtype, **layout.dtypes}, layout.formats)
        length = math.prod(shape[1:] if spec.in_blocks else shape)
        lengths[spec, begins_rows_with_words(spec, shape)].append(length)
    return [Variant.of(spec, 0, own, CPU).unit for (spec, _), own in lengths.items()]


@pytest.mark.parametrize("model", MODELS)
def test_the_page_counts_the_variants_of_a_model(model: str) -> None:
    shapes = MODELS[model]
    counts = [len(variants(shapes, dtype, options)) for dtype, options in STORAGES]
    page = Path(__file__).parents[3].joinpath("docs", "gpus.md").read_text(encoding="utf-8")
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {model} |"))
    assert f"{len(shapes)} tensors" in model
    assert [int(cell.strip(" ").partition(":")[0]) for cell in line.split("|")[2:-1]] == counts


def test_a_transformer_takes_the_fastest_paths() -> None:
    shapes = MODELS["a transformer (GPT-2, 148 tensors)"]
    assert [sorted(variants(shapes, *storage)) for storage in STORAGES] == [
        [4],
        [4, 128],
        [16, 128],
    ]


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float64", "int8", "24 bits, int8"])
def test_the_largest_unit_that_divides_all_lengths_is_taken(storage: str) -> None:
    spec = spec_of_storage("AdamW", storage)
    largest, *_ = known = units(spec)
    for lengths in ([largest], [5 * largest, largest], [largest, largest // 2], [0, largest], [7]):
        unit = Variant.of(spec, 0, lengths, CPU).unit
        assert all(length % unit == 0 for length in lengths)
        assert not [u for u in known if u > unit and all(n % u == 0 for n in lengths)]
    assert Variant.of(spec, 2, [largest], CPU) == Variant(dims=2, unit=1, target=Target())


def test_rows_that_begin_anywhere_have_a_table_of_their_own() -> None:
    """Oracle: the lengths of rows: 144 and 4,096 elements are multiples of 16, and 147 are not."""
    with forced("triton"):
        shapes = [(64, 16, 3, 3), (64, 3, 7, 7), (4, 4096)]
        params = [parameter(normal(shape, torch.float32, k)) for k, shape in enumerate(shapes)]
        optimizer = stepforge.AdamW(params, state_format="int8")
        for step in range(2):
            for k, p in enumerate(params):
                p.grad = normal(p.shape, p.dtype, 10 * step + k)
            optimizer.step()
    assert [table.indices for table in tables(optimizer)] == [[0, 2], [1]]


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "24 bits, int8"])
def test_a_kernel_for_amd_has_the_same_bits(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every path is interpreted as for such a GPU; a kernel skips the second step."""
    if not is_interpreted():
        pytest.skip("kernels are compiled here, for the GPU")
    dtype, options = STORED_AS[storage]
    shapes = [(33, 128), (43, 112), (35, 131), (5, 7, 131), (1030,), (8,), (5,)]

    def trained(backend: str) -> list[dict[str, torch.Tensor]]:
        params = [parameter(normal(shape, dtype, k)) for k, shape in enumerate(shapes)]
        optimizer = stepforge.AdamW(params, **options)
        with forced(backend):
            for step in range(3):
                for k, p in enumerate(params):
                    p.grad = normal(p.shape, dtype, 10 * step + k)
                optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(step == 1))
                optimizer.step()
        return [outcome(optimizer, p) for p in params]

    wanted = trained("reference")
    monkeypatch.setattr(variant, "target_of", lambda device: GPUS["gfx942"].target)
    monkeypatch.setattr(GradScale, "on_host", property(lambda self: False))
    for found, expected in zip(trained("triton"), wanted, strict=True):
        assert_same_bits(found, expected)
