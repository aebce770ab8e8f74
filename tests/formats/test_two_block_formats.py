"""Two different formats in blocks within one kernel. Oracle: the reference, bit for bit.

The library has one format in blocks. A second one, with two bits of fraction, another scale and an
infinity, shows that kernels take nothing of the first for granted.
"""

from __future__ import annotations

import math

import pytest
import torch

from stepforge.backends import BACKENDS, Batch, reference
from stepforge.backends.native.source import c_source
from stepforge.expr import Trace
from stepforge.formats import Format, Part, int8_blocks, tensor_name
from stepforge.formats.float_bits import INFINITY_BITS, SIGN_BIT, at_least
from stepforge.formats.format import traced, traced_scale
from stepforge.ops import UInt32, Value, bitcast_f32, bitcast_u32, ema, finite, largest, sqrt, where
from stepforge.program import Graph

SHAPE = (40, 300)  # three blocks per row, the last one short
SHIFT = 21  # leaves two bits of fraction
ONE = 0x7E - 3  # the code of the scale: the largest finite code is 1.5 times the scale


def magnitude(x: Value) -> UInt32:
    size = bitcast_u32(x) & (SIGN_BIT - 1)
    return where(size < INFINITY_BITS, size, 0)  # infinities and NaN do not set the scale


def scale(x: Value) -> Value:
    most = largest(magnitude(x), across="block")
    return bitcast_f32(at_least((most + (1 << SHIFT) - 1) & INFINITY_BITS, 0x18000000))


def decode(stored: UInt32, scale: Value) -> Value:
    code = stored & 0x7F
    size = (code << SHIFT) + (bitcast_u32(scale) - (ONE << SHIFT))
    size = where(code < 0x7F, where(code > 0, size, 0), INFINITY_BITS)
    return bitcast_f32(size | ((stored << 24) & SIGN_BIT))


def encode(x: Value, scale: Value) -> UInt32:
    size = bitcast_u32(x) & (SIGN_BIT - 1)
    origin = bitcast_u32(scale) - (ONE << SHIFT)
    code = (at_least(size, origin) >> SHIFT) - (origin >> SHIFT)
    return where(size < INFINITY_BITS, code, 0x7F) | ((bitcast_u32(x) >> 24) & 0x80)


MAGNITUDE, SCALE = traced_scale(scale)
WITH_INFINITY = Format(
    "e5m2",
    (Part("", torch.uint8, suffix="e5m2"), Part("scale", torch.float32, of_block=True)),
    decode=traced(decode, "stored_u32", "scale"),
    encode=traced(encode, "x", "scale"),
    magnitude=MAGNITUDE,
    scale=SCALE,
)
FORMATS = {"m": WITH_INFINITY, "v": int8_blocks(unsigned=True)}


def graph() -> Graph:
    """Return a step whose first moment may be infinite, and whose average then stays finite."""
    trace = Trace()
    p, g, m, v = (trace.input(name, varying=True) for name in "pgmv")
    c = trace.input("c")
    m, v = ema(m, g, c), ema(finite(v), g * g, c)
    return Graph.of({"p": p - m / (sqrt(v) + 1.0), "m": m, "v": v})


def batch() -> Batch:
    """Return two parameters with codes of either format, infinities among the first."""
    generator = torch.Generator().manual_seed(0)
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in "pg"}
    for _ in range(2):
        for name in "pg":
            columns[name].append(torch.randn(SHAPE, generator=generator))
        columns["g"][-1][3, 5] = math.inf
        for column, format_ in FORMATS.items():
            for part in format_.parts:
                shape = part.shape(SHAPE)
                made = (
                    torch.full(shape, 2.0**-3)
                    if part.of_block
                    else torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
                )
                columns.setdefault(tensor_name(column, part), []).append(made)
    step = graph()
    nodes = step.coefficients
    values = [node.boolean or 0.75 for node in nodes]
    random = {"step_seeds": torch.tensor([3, 4]).numpy(), "first_indices": torch.zeros(2).numpy()}
    return Batch.of(step, columns, values, FORMATS, **random)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_each_column_uses_the_scale_of_its_format(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPFORGE_BACKEND", name)
    if name == "triton":
        pytest.importorskip("triton")
    wanted, got = batch(), batch()
    reference.run(wanted)
    BACKENDS[name].run(got)
    for column, tensors in wanted.columns.items():
        for one, other in zip(tensors, got.columns[column], strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), column


def test_a_kernel_has_a_function_for_each_scale() -> None:
    """The first keeps the name it has alone, so that kernels of one format stay as they are."""
    source = c_source(batch().spec)
    assert source.count("static inline float scale_of(uint32_t largest)") == 1
    assert source.count("static inline float scale_of_1(uint32_t largest)") == 1


def test_infinities_are_replaced_where_a_format_has_them() -> None:
    """``finite`` is skipped only on what a format without infinities has decoded."""
    trace = Trace()
    p, m = (trace.input(name, varying=True) for name in "pm")
    step = Graph.of({"p": p + finite(m)})
    names = {"p": torch.float32, "g": torch.float32, "m": torch.uint8, "m.scale": torch.float32}
    sources = {}
    for format_ in (WITH_INFINITY, int8_blocks(unsigned=False)):
        columns = {name: [torch.zeros(1, dtype=dtype)] for name, dtype in names.items()}
        sources[format_.name] = c_source(Batch.of(step, columns, [], {"m": format_}).spec)
    assert "= to_finite(" in sources["e5m2"]
    assert "= to_finite(" not in sources["int8"]
