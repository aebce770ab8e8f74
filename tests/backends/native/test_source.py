"""The generated C. Oracles: the reference's operations, torch's conversions between dtypes, GCC's
own report of what it vectorized. No tolerance: every operation is correctly rounded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stepforge.backends.native import build
from stepforge.backends.native.dtypes import STORABLE
from stepforge.backends.native.expressions import OPERATIONS
from stepforge.backends.native.source import c_source
from stepforge.backends.spec import KernelSpec
from stepforge.expr import Expr
from stepforge.ops import (
    bitcast_f32,
    bitcast_u32,
    f32_to_i32,
    finite,
    i32_to_f32,
    maximum,
    minimum,
    sign,
    sqrt,
    where,
)
from stepforge.program import Graph
from tests.conformance.table import OPTIMIZERS, assert_same_bits, extreme
from tests.backends.graphs import (
    ARITHMETICS,
    INSTRUCTION_SETS,
    Row,
    by_kernel,
    by_reference,
    c_of,
    coefficients,
    columns_of,
    every_pair,
    graph_of,
    run_compiler,
    special,
    traced,
    with_results,
)

every_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETICS.values(), ids=ARITHMETICS)
every_instruction_set = pytest.mark.parametrize(
    "isa", INSTRUCTION_SETS.values(), ids=INSTRUCTION_SETS
)
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("STEPFORGE_ISA", request.param)
    return str(request.param)


#: Rules that end in each operation, its operands varying, uniform and both.
RULES: dict[str, list[Callable[[Expr, Expr, Expr], Expr]]] = {
    "add": [lambda p, g, c: p + g, lambda p, g, c: p + c, lambda p, g, c: p * g + p],
    "sub": [lambda p, g, c: p - g, lambda p, g, c: p - c, lambda p, g, c: c - p * g],
    "mul": [lambda p, g, c: p * g, lambda p, g, c: p * c],
    "div": [lambda p, g, c: p / g, lambda p, g, c: c / p],
    "neg": [lambda p, g, c: -p, lambda p, g, c: -(p + c)],
    "abs": [lambda p, g, c: abs(p)],
    "sqrt": [lambda p, g, c: sqrt(p), lambda p, g, c: 1 / sqrt(p * g)],
    "sign": [lambda p, g, c: sign(p)],
    "maximum": [lambda p, g, c: maximum(p, g), lambda p, g, c: maximum(c, p)],
    "minimum": [lambda p, g, c: minimum(p, g), lambda p, g, c: minimum(c, p)],
    "finite": [lambda p, g, c: finite(p), lambda p, g, c: finite(p * g)],
    "where": [
        lambda p, g, c: where(p < g, p, g),
        lambda p, g, c: where(c < 1, p, g),
        lambda p, g, c: where(p < g, c, p),
        lambda p, g, c: where(p < g, p, c),
        lambda p, g, c: where(p < g, c, 0.1) * p,
        lambda p, g, c: where(p < g, 1.2, 0.1) * p,
        lambda p, g, c: where(where(p < g, p < c, g < c), p, g),
        lambda p, g, c: where(where(c < 1, p < g, g < p), p, g),
    ],
    "lt": [lambda p, g, c: where(p < g, p, 1.0), lambda p, g, c: where(c < p, p, g)],
    "le": [lambda p, g, c: where(p <= g, p, 1.0), lambda p, g, c: where(p >= c, p, g)],
    "eq": [lambda p, g, c: where(p == g, p, 1.0), lambda p, g, c: where(p == c, p, g)],
    "ne": [lambda p, g, c: where(p != g, p, 1.0), lambda p, g, c: where(p != c, p, g)],
}


def whole(x: Expr) -> Expr:
    """A number that a word can be made of."""
    return where(abs(x) < 1e6, x, 0.0)


#: Those on words, of which numbers are made again. Formats compute with them, in float32 alone.
RULES_OF_WORDS: dict[str, list[Callable[[Expr, Expr, Expr], Expr]]] = {
    "u32_add": [
        lambda p, g, c: i32_to_f32(bitcast_u32(p) + bitcast_u32(g)),
        lambda p, g, c: i32_to_f32(bitcast_u32(p) + 77),
    ],
    "u32_sub": [
        lambda p, g, c: i32_to_f32(bitcast_u32(p) - bitcast_u32(g)),
        lambda p, g, c: i32_to_f32(5 - bitcast_u32(p)),
    ],
    "u32_mul": [
        lambda p, g, c: i32_to_f32(bitcast_u32(p) * bitcast_u32(g)),
        lambda p, g, c: i32_to_f32(bitcast_u32(p) * 77),
    ],
    "and": [
        lambda p, g, c: i32_to_f32(bitcast_u32(p) & bitcast_u32(g)),
        lambda p, g, c: i32_to_f32(bitcast_u32(p) & 0xFF00),
    ],
    "or": [
        lambda p, g, c: i32_to_f32(bitcast_u32(p) | bitcast_u32(g)),
        lambda p, g, c: i32_to_f32(bitcast_u32(p) | 2**31),
    ],
    "xor": [
        lambda p, g, c: i32_to_f32(bitcast_u32(p) ^ bitcast_u32(g)),
        lambda p, g, c: i32_to_f32(bitcast_u32(p) ^ 2**31),
    ],
    "shift_left": [lambda p, g, c: i32_to_f32(bitcast_u32(p) << 7)],
    "shift_right": [lambda p, g, c: i32_to_f32(bitcast_u32(p) >> 7)],
    "bitcast_u32": [
        lambda p, g, c: i32_to_f32(bitcast_u32(p)),
        lambda p, g, c: where(bitcast_u32(p) < bitcast_u32(g), p, g),
    ],
    "bitcast_f32": [
        lambda p, g, c: bitcast_f32(bitcast_u32(p) ^ 2**31),
        lambda p, g, c: bitcast_f32(where(bitcast_u32(p) < 2**31, bitcast_u32(g), 0)),
    ],
    "i32_to_f32": [lambda p, g, c: i32_to_f32(where(p < g, bitcast_u32(p), bitcast_u32(g)))],
    "f32_to_i32": [lambda p, g, c: i32_to_f32(f32_to_i32(whole(p)) + f32_to_i32(whole(g * 1000)))],
}

Rule = Callable[[Expr, Expr, Expr], dict[str, Expr]]


def together(*ops: str) -> Rule:
    """One rule with a result for each of the rules of these operations."""
    return lambda p, g, c: {
        f"{op}_{position}": rule(p, g, c)
        for op in ops
        for position, rule in enumerate((RULES | RULES_OF_WORDS)[op])
    }


def assert_as_the_reference(graph: Graph, arithmetic: torch.dtype) -> None:
    """Runs every pair of special values, with every special uniform value in a row of its own."""
    values = special(arithmetic)
    p, g = every_pair(values)
    given = [coefficients(graph, {"c": c}, arithmetic) for c in values.tolist()]
    rows = [with_results(graph, {"p": p, "g": g}) for _ in given]
    found = by_kernel(graph, rows, given, arithmetic)
    wanted = by_reference(graph, rows, given, arithmetic)
    for c, got, oracle in zip(values.tolist(), found, wanted, strict=True):
        assert_same_bits(got, oracle, f"c = {c}:")


def test_every_operation_of_c_is_in_the_rules_above() -> None:
    assert list(RULES | RULES_OF_WORDS) == list(OPERATIONS)
    for op in RULES | RULES_OF_WORDS:
        graph = traced(together(op), "c")
        assert op in {instruction.op for instruction in graph.varying.instructions}


@every_arithmetic
@pytest.mark.parametrize("op", RULES)
def test_an_operation_computes_what_the_reference_does(op: str, arithmetic: torch.dtype) -> None:
    assert_as_the_reference(traced(together(op), "c"), arithmetic)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS.values(), ids=INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("op", RULES_OF_WORDS)
def test_an_operation_on_words_computes_what_the_reference_does(op: str, isa: str) -> None:
    assert_as_the_reference(traced(together(op), "c"), torch.float32)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS.values(), ids=INSTRUCTION_SETS, indirect=True)
@every_arithmetic
def test_all_operations_in_one_loop_on_every_instruction_set(
    arithmetic: torch.dtype, isa: str
) -> None:
    assert_as_the_reference(traced(together(*RULES), "c"), arithmetic)


CONSTANTS = [0.0, -0.0, 1.0, -2.5, 0.1, 1e-45, 1e-310, 3.4e38, math.inf, -math.inf, math.nan]


@every_arithmetic
@pytest.mark.parametrize("constant", CONSTANTS)
def test_numbers_that_stand_in_a_rule(constant: float, arithmetic: torch.dtype) -> None:
    def rule(p: Expr, g: Expr) -> dict[str, Expr]:
        return {
            "sum": p * g + constant,
            "product": (p + g) * constant,
            "quotient": constant / p,
            "smaller": minimum(p, constant),
            "chosen": where(g < constant, p, constant),
        }

    graph = traced(rule)
    p, g = every_pair(special(arithmetic))
    rows = [with_results(graph, {"p": p, "g": g})]
    got = by_kernel(graph, rows, [[]], arithmetic)
    assert_same_bits(got[0], by_reference(graph, rows, [[]], arithmetic)[0])


@pytest.mark.parametrize("isa", INSTRUCTION_SETS.values(), ids=INSTRUCTION_SETS, indirect=True)
@every_arithmetic
def test_a_product_and_a_sum_are_rounded_apart(arithmetic: torch.dtype, isa: str) -> None:
    """The oracle is one number's two roundings; fused they would leave the product's error."""
    p = torch.linspace(1, 2, 1000, dtype=arithmetic)
    rows = [{"p": p, "g": -(p * p)}]
    graph = traced(lambda p, g: p * p + g)
    assert not by_kernel(graph, rows, [[]], arithmetic)[0]["p"].any()
    wide = p.to(torch.float64)
    assert arithmetic == torch.float64 or (wide * wide - (p * p)).any()


# What is stored in what.


def step_of_three(p: Expr, g: Expr, c: Expr) -> dict[str, Expr]:
    """A rule whose results need rounding in every storage."""
    return {"p": p - c * g / (sqrt(g * g) + 0.5), "m": g * c + p * 0.3}


def mixes() -> list[tuple[torch.dtype, ...]]:
    """Dtypes of p, g and m, every pair of dtypes in every two of the three."""
    kinds = list(STORABLE)
    indices = itertools.product(range(len(kinds)), repeat=2)
    return [(kinds[i], kinds[j], kinds[(i + j) % len(kinds)]) for i, j in indices]


def name_of(mix: tuple[torch.dtype, ...]) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in mix)


@every_arithmetic
@pytest.mark.parametrize("mix", mixes(), ids=name_of)
def test_dtypes_in_any_mix(mix: tuple[torch.dtype, ...], arithmetic: torch.dtype) -> None:
    graph = traced(step_of_three, "c")
    row = {
        name: extreme((999,), torch.float64, seed).to(dtype)
        for seed, (name, dtype) in enumerate(zip("pgm", mix, strict=True))
    }
    given = [coefficients(graph, {"c": 0.7}, arithmetic)]
    got = by_kernel(graph, [row], given, arithmetic)
    assert_same_bits(got[0], by_reference(graph, [row], given, arithmetic)[0])


def bits_from(patterns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of those bit patterns."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return patterns.to(integer).view(dtype)


def around(x: torch.Tensor) -> torch.Tensor:
    """Numbers, each with its two neighbours."""
    inf = torch.tensor(math.inf, dtype=x.dtype)
    return torch.cat([x, torch.nextafter(x, inf), torch.nextafter(x, -inf)])


def where_roundings_change(stored: torch.dtype, arithmetic: torch.dtype) -> torch.Tensor:
    """Every number of a 16-bit dtype and every midpoint between two, each with its neighbours.

    Beyond the largest number the midpoint to what would be the next one decides over infinity.
    """
    every = bits_from(torch.arange(2**16), stored).to(arithmetic)
    finite_ones = every[every.isfinite()].unique()
    gap = finite_ones[-1] - finite_ones[-2]
    ends = torch.stack([finite_ones[0] - gap, finite_ones[-1] + gap])
    ladder = torch.cat([ends[:1], finite_ones, ends[1:]])
    midpoints = ladder[:-1] / 2 + ladder[1:] / 2
    return torch.cat([every, around(ladder), around(midpoints), -torch.zeros(1).to(arithmetic)])


def any_floats(count: int) -> torch.Tensor:
    """Random bit patterns: floats of all exponents, infinities and NaN among them."""
    patterns = torch.randint(2**32, (count,), generator=torch.Generator().manual_seed(0))
    return bits_from(patterns, torch.float32)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS.values(), ids=INSTRUCTION_SETS, indirect=True)
@every_arithmetic
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_rounding_to_sixteen_bits_is_torch_s(
    stored: torch.dtype, arithmetic: torch.dtype, isa: str
) -> None:
    g = torch.cat([where_roundings_change(stored, arithmetic), any_floats(2**20).to(arithmetic)])
    row = {"g": g, "p": torch.zeros(len(g), dtype=stored)}
    got = by_kernel(traced(lambda p, g: g), [row], [[]], arithmetic)
    assert_same_bits(got[0], {"p": g.to(stored)})


@pytest.mark.parametrize("isa", INSTRUCTION_SETS.values(), ids=INSTRUCTION_SETS, indirect=True)
@every_arithmetic
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_all_sixteen_bit_numbers_are_read(
    stored: torch.dtype, arithmetic: torch.dtype, isa: str
) -> None:
    g = bits_from(torch.arange(2**16), stored)
    row = {"g": g, "p": torch.zeros(len(g), dtype=arithmetic)}
    got = by_kernel(traced(lambda p, g: g), [row], [[]], arithmetic)
    assert_same_bits(got[0], {"p": g.to(arithmetic)})


@every_instruction_set
def test_float16_nan_has_one_processor_s_bits_on_all(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is another instruction set: the plain one, which spells the conversions out."""

    def bits_of_nan() -> list[torch.Tensor]:
        half, single = bits_from(torch.arange(2**16), torch.float16), any_floats(2**20)
        found = []
        for g, p in ((half, torch.zeros(2**16)), (single, torch.zeros(2**20).half())):
            g = g[g.isnan()]
            row = {"g": g, "p": p[: len(g)]}
            (got,) = by_kernel(traced(lambda p, g: g), [row], [[]], torch.float32)
            assert got["p"].isnan().all()
            found.append(got["p"].view(torch.int16 if p.dtype == torch.float16 else torch.int32))
        return found

    monkeypatch.setenv("STEPFORGE_ISA", "")
    wanted = bits_of_nan()
    monkeypatch.setenv("STEPFORGE_ISA", isa)
    assert all(map(torch.equal, bits_of_nan(), wanted))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS.values(), ids=INSTRUCTION_SETS, indirect=True)
def test_float16_subnormals_count_where_those_of_float32_are_flushed(isa: str) -> None:
    """In float32 all numbers of float16 are normal. The oracle is torch before it flushes."""
    g = bits_from(torch.arange(1, 2**10), torch.float16)
    row = {"g": g, "p": torch.zeros(len(g))}
    wanted = g.float()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        (read,) = by_kernel(traced(lambda p, g: g), [row], [[]], torch.float32)
        back = {"g": wanted, "p": torch.zeros(len(g)).half()}
        (written,) = by_kernel(traced(lambda p, g: g), [back], [[]], torch.float32)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(read["p"], wanted)
    assert torch.equal(written["p"], g)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 511, 512, 513, 520, 1024, 1100])
def test_float16_in_blocks_of_any_length(length: int) -> None:
    """512 elements are converted at a time, 8 by one instruction. The oracle is the reference."""
    assert "#define BLOCK 512 " in c_of(graph_of("NAdam"), torch.float16)
    graph = graph_of("NAdam")
    row = {name: torch.linspace(0.1, 1.0 + k, length).half() for k, name in enumerate("pgmv")}
    numbers = [[0.1 * (k + 1) for k in range(len(graph.coefficients))]]
    (got,) = by_kernel(graph, [row], numbers, torch.float32)
    (wanted,) = by_reference(graph, [row], numbers, torch.float32)
    assert_same_bits(got, wanted)


def test_midpoints_are_among_the_numbers_that_are_rounded() -> None:
    """Ties to even: half of the ties go up, half go down, in both formats."""
    for stored in (torch.bfloat16, torch.float16):
        g = where_roundings_change(stored, torch.float32)
        assert len(g) > 4 * 2**16 - 2**13
        error = (g.to(stored).to(torch.float32) - g)[g.isfinite()]
        assert (error > 0).any()
        assert (error < 0).any()


# What the C looks like, to readers and to the compiler.


@every_optimizer
def test_c_is_readable(name: str) -> None:
    """Every number has the name of what it is, every coefficient says what it was made from."""
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
    for stored in STORABLE:
        arithmetic = torch.float64 if stored == torch.float64 else torch.float32
        c_file = tmp_path / "kernel.c"
        c_file.write_text(c_of(graph_of(name), stored, arithmetic))
        flags = ["-O0", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
        done = run_compiler([*flags, c_file])
        assert done.returncode == 0, done.stderr


@every_optimizer
def test_the_same_rule_has_the_same_c(name: str) -> None:
    """The hash of the source is the name of the kernel in the cache."""
    assert c_of(graph_of(name), torch.float32) == c_of(graph_of(name), torch.float32)


def test_c_depends_on_the_dtypes_of_all_columns() -> None:
    graph = traced(step_of_three, "c")
    mixes_of_three = itertools.product(STORABLE, repeat=3)
    sources = [
        c_source(KernelSpec.of(graph, dict(zip(columns_of(graph), mix, strict=True))))
        for mix in mixes_of_three
    ]
    assert len(set(sources)) == len(STORABLE) ** 3


@pytest.fixture(scope="module")
def _gcc() -> None:
    predefined = run_compiler(["-dM", "-E", "-x", "c", "/dev/null"]).stdout
    if "__GNUC__" not in predefined or "__clang__" in predefined:
        pytest.skip("the compiler is not GCC, whose report this test reads")


@pytest.mark.usefixtures("_gcc")
@pytest.mark.parametrize(
    ("level", "stored"),
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
def test_gcc_vectorizes_the_loop(
    name: str, level: str, stored: torch.dtype, tmp_path: Path
) -> None:
    if not build.instruction_set():
        pytest.skip("the levels of x86-64 are not this processor's")
    arithmetic = torch.float64 if stored == torch.float64 else torch.float32
    text = c_of(graph_of(name), stored, arithmetic)
    c_file = tmp_path / "kernel.c"
    c_file.write_text(text)
    flags = [*build.FLAGS, f"-march={level}", "-fopt-info-vec", "-S"]
    report = run_compiler([*flags, c_file, "-o", tmp_path / "kernel.s"]).stderr
    loops = [n for n, line in enumerate(text.splitlines(), 1) if "i < count; i++" in line]
    if stored == torch.float16 and level == "x86-64-v3":
        loops = loops[2:]  # instructions convert 8 at a time, and these the 7 that may remain
    for loop in loops:
        about_it = [line for line in report.splitlines() if f"kernel.c:{loop}:" in line]
        assert any("loop vectorized" in line for line in about_it), report
    assert "versioned" not in report, "GCC does not see that columns share no memory"


def test_rows_of_nothing() -> None:
    graph = traced(lambda p, g: p + g)
    row: Row = {"p": torch.empty(0), "g": torch.empty(0)}
    assert by_kernel(graph, [row, row], [[], []], torch.float32)[1]["p"].numel() == 0
