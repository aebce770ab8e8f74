"""The generated C. Oracles: the reference's operations, torch's conversions between dtypes, and
GCC's own report of vectorized loops. No tolerance: every operation is correctly rounded.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from stepforge.backends.native import compiler
from stepforge.backends.native.dtypes import STORABLE
from stepforge.backends.native.expressions import OPERATIONS
from stepforge.backends.native.source import c_source
from stepforge.backends.spec import KernelSpec, arithmetic_of
from tests.backends.graphs import (
    ARITHMETICS,
    INSTRUCTION_SETS,
    Columns,
    by_kernel,
    by_reference,
    c_of,
    columns_of,
    graph_of,
    run_compiler,
    traced,
)
from tests.backends.rules import (
    CONSTANTS,
    RULES,
    RULES_ON_U32,
    assert_agrees_with_reference,
    assert_constant_agrees_with_reference,
    assert_mix_agrees_with_reference,
    dtype_mixes,
    from_bits,
    mix_id,
    random_floats,
    rounding_boundaries,
    rounding_rule,
    together,
)
from tests.conformance.table import OPTIMIZERS, assert_same_bits

every_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETICS.values(), ids=ARITHMETICS)
every_instruction_set = pytest.mark.parametrize(
    "isa", INSTRUCTION_SETS.values(), ids=INSTRUCTION_SETS
)
on_every_instruction_set = pytest.mark.parametrize(
    "isa", INSTRUCTION_SETS.values(), ids=INSTRUCTION_SETS, indirect=True
)
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("STEPFORGE_ISA", request.param)
    return str(request.param)


def test_every_operation_of_c_is_in_the_rules() -> None:
    assert list(RULES | RULES_ON_U32) == list(OPERATIONS)
    for op in RULES | RULES_ON_U32:
        graph = traced(together(op), "c")
        assert op in {instruction.op for instruction in graph.varying.instructions}


@every_arithmetic
@pytest.mark.parametrize("op", RULES)
def test_an_operation_computes_what_the_reference_does(op: str, arithmetic: torch.dtype) -> None:
    assert_agrees_with_reference(by_kernel, traced(together(op), "c"), arithmetic)


@on_every_instruction_set
@pytest.mark.parametrize("op", RULES_ON_U32)
def test_an_operation_on_uint32_computes_what_the_reference_does(op: str, isa: str) -> None:
    assert_agrees_with_reference(by_kernel, traced(together(op), "c"), torch.float32)


@on_every_instruction_set
@every_arithmetic
def test_all_operations_in_one_loop_on_every_instruction_set(
    arithmetic: torch.dtype, isa: str
) -> None:
    assert_agrees_with_reference(by_kernel, traced(together(*RULES), "c"), arithmetic)


@every_arithmetic
@pytest.mark.parametrize("constant", CONSTANTS)
def test_constants_in_a_rule(constant: float, arithmetic: torch.dtype) -> None:
    assert_constant_agrees_with_reference(by_kernel, constant, arithmetic)


@on_every_instruction_set
@every_arithmetic
def test_a_product_and_a_sum_are_rounded_apart(arithmetic: torch.dtype, isa: str) -> None:
    """Oracle: zero, from rounding twice. A fused multiply-add would leave the product's error."""
    p = torch.linspace(1, 2, 1000, dtype=arithmetic)
    params = [{"p": p, "g": -(p * p)}]
    graph = traced(lambda p, g: p * p + g)
    assert not by_kernel(graph, params, [[]], arithmetic)[0]["p"].any()
    wide = p.to(torch.float64)
    assert arithmetic == torch.float64 or (wide * wide - (p * p)).any()


# Dtypes.


@every_arithmetic
@pytest.mark.parametrize("mix", dtype_mixes(), ids=mix_id)
def test_dtypes_in_any_mix(mix: tuple[torch.dtype, ...], arithmetic: torch.dtype) -> None:
    assert_mix_agrees_with_reference(by_kernel, mix, arithmetic)


@on_every_instruction_set
@every_arithmetic
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_rounding_to_sixteen_bits_is_torch_s(
    dtype: torch.dtype, arithmetic: torch.dtype, isa: str
) -> None:
    g = torch.cat([rounding_boundaries(dtype, arithmetic), random_floats(2**20).to(arithmetic)])
    param = {"g": g, "p": torch.zeros(len(g), dtype=dtype)}
    got = by_kernel(traced(lambda p, g: g), [param], [[]], arithmetic)
    assert_same_bits(got[0], {"p": g.to(dtype)})


@on_every_instruction_set
@every_arithmetic
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_all_sixteen_bit_numbers_are_read(
    dtype: torch.dtype, arithmetic: torch.dtype, isa: str
) -> None:
    g = from_bits(torch.arange(2**16), dtype)
    param = {"g": g, "p": torch.zeros(len(g), dtype=arithmetic)}
    got = by_kernel(traced(lambda p, g: g), [param], [[]], arithmetic)
    assert_same_bits(got[0], {"p": g.to(arithmetic)})


@every_instruction_set
def test_float16_nan_has_one_processor_s_bits_on_all(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the plain instruction set, for which the C spells the conversions out."""

    def bits_of_nan() -> list[torch.Tensor]:
        half, single = from_bits(torch.arange(2**16), torch.float16), random_floats(2**20)
        found = []
        for g, p in ((half, torch.zeros(2**16)), (single, torch.zeros(2**20).half())):
            g = g[g.isnan()]
            param = {"g": g, "p": p[: len(g)]}
            (got,) = by_kernel(traced(lambda p, g: g), [param], [[]], torch.float32)
            assert got["p"].isnan().all()
            found.append(got["p"].view(torch.int16 if p.dtype == torch.float16 else torch.int32))
        return found

    monkeypatch.setenv("STEPFORGE_ISA", "")
    expected = bits_of_nan()
    monkeypatch.setenv("STEPFORGE_ISA", isa)
    assert all(map(torch.equal, bits_of_nan(), expected))


@on_every_instruction_set
def test_float16_subnormals_count_where_those_of_float32_are_flushed(isa: str) -> None:
    """All float16 values are normal in float32. Oracle: torch before flushing is switched on."""
    g = from_bits(torch.arange(1, 2**10), torch.float16)
    param = {"g": g, "p": torch.zeros(len(g))}
    expected = g.float()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        (read,) = by_kernel(traced(lambda p, g: g), [param], [[]], torch.float32)
        back = {"g": expected, "p": torch.zeros(len(g)).half()}
        (written,) = by_kernel(traced(lambda p, g: g), [back], [[]], torch.float32)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(read["p"], expected)
    assert torch.equal(written["p"], g)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 511, 512, 513, 520, 1024, 1100])
def test_float16_in_blocks_of_any_length(length: int) -> None:
    """512 elements are converted at a time, 8 by one instruction. Oracle: the reference."""
    assert "#define BLOCK 512 " in c_of(graph_of("NAdam"), torch.float16)
    graph = graph_of("NAdam")
    param = {name: torch.linspace(0.1, 1.0 + k, length).half() for k, name in enumerate("pgmv")}
    coefficients = [[0.1 * (k + 1) for k in range(len(graph.coefficients))]]
    (got,) = by_kernel(graph, [param], coefficients, torch.float32)
    (expected,) = by_reference(graph, [param], coefficients, torch.float32)
    assert_same_bits(got, expected)


def test_rounding_boundaries_contain_midpoints() -> None:
    """Ties round to even, so half of them round up and half down, in both dtypes."""
    for dtype in (torch.bfloat16, torch.float16):
        g = rounding_boundaries(dtype, torch.float32)
        assert len(g) > 4 * 2**16 - 2**13
        error = (g.to(dtype).to(torch.float32) - g)[g.isfinite()]
        assert (error > 0).any()
        assert (error < 0).any()


# The C, as readers and compilers see it.


@every_optimizer
def test_c_is_readable(name: str) -> None:
    """Every value is named after its column, and every coefficient has its formula as a comment."""
    graph = graph_of(name)
    text = c_of(graph, torch.float32)
    for column in graph.varying.inputs:
        factor = " * unscale" if column == "g" else ""
        assert f"const number {column}_in = (number){column}_at[i]{factor};" in text
    for column in graph.results:
        assert f"{column}_at[i] = (float)x" in text
    for position, node in enumerate(graph.coefficients):
        comment = text.split(f" c{position} = ")[1].split("\n")[0]
        assert f"/* {str(node)[:50]}" in comment
    assert max(map(len, text.splitlines())) <= 100
    assert "\t" not in text
    assert text.endswith("}\n")


@every_optimizer
def test_c_is_free_of_what_a_strict_compiler_warns_of(name: str, tmp_path: Path) -> None:
    for dtype in STORABLE:
        c_file = tmp_path / "kernel.c"
        c_file.write_text(c_of(graph_of(name), dtype, arithmetic_of(dtype)))
        flags = ["-O0", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
        done = run_compiler([*flags, c_file])
        assert done.returncode == 0, done.stderr


@every_optimizer
def test_the_same_rule_has_the_same_c(name: str) -> None:
    """Kernels in the cache are named by a hash of their source."""
    assert c_of(graph_of(name), torch.float32) == c_of(graph_of(name), torch.float32)


def test_c_depends_on_the_dtypes_of_all_columns() -> None:
    graph = traced(rounding_rule, "c")
    sources = [
        c_source(KernelSpec.of(graph, dict(zip(columns_of(graph), mix, strict=True))))
        for mix in itertools.product(STORABLE, repeat=3)
    ]
    assert len(set(sources)) == len(STORABLE) ** 3


@pytest.fixture(scope="module")
def _gcc() -> None:
    predefined = run_compiler(["-dM", "-E", "-x", "c", "/dev/null"]).stdout
    if "__GNUC__" not in predefined or "__clang__" in predefined:
        pytest.skip("the compiler is not GCC, whose report this test reads")


@pytest.mark.usefixtures("_gcc")
@pytest.mark.parametrize(
    ("level", "dtype"),
    [
        ("x86-64-v4", torch.float32),
        ("x86-64-v3", torch.float32),
        ("x86-64-v3", torch.bfloat16),
        ("x86-64-v3", torch.float16),
        ("x86-64-v2", torch.float16),
        ("x86-64-v3", torch.float64),
    ],
    ids=str,
)
@every_optimizer
def test_gcc_vectorizes_the_loop(name: str, level: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if not compiler.instruction_set():
        pytest.skip("the levels of x86-64 are not this processor's")
    text = c_of(graph_of(name), dtype, arithmetic_of(dtype))
    c_file = tmp_path / "kernel.c"
    c_file.write_text(text)
    flags = [*compiler.FLAGS, f"-march={level}", "-fopt-info-vec", "-S"]
    report = run_compiler([*flags, c_file, "-o", tmp_path / "kernel.s"]).stderr
    loops = [n for n, line in enumerate(text.splitlines(), 1) if "i < count; i++" in line]
    if dtype == torch.float16 and level == "x86-64-v3":
        loops = loops[2:]  # these two convert the up to 7 elements that 8-wide instructions leave
    for loop in loops:
        lines = [line for line in report.splitlines() if f"kernel.c:{loop}:" in line]
        assert any("loop vectorized" in line for line in lines), report
    assert "versioned" not in report, "GCC does not see that columns share no memory"


def test_empty_parameters() -> None:
    graph = traced(lambda p, g: p + g)
    param: Columns = {"p": torch.empty(0), "g": torch.empty(0)}
    assert by_kernel(graph, [param, param], [[], []], torch.float32)[1]["p"].numel() == 0
