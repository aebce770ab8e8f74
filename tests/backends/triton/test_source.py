"""The generated Triton code, as readers and the compiler see it; compiling needs no GPU.

Oracles: the names that a reader looks for; the instructions of the compiled kernel.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from stepforge.backends.spec import KernelSpec
from stepforge.backends.triton import kernel
from stepforge.backends.triton.dtypes import STORABLE
from stepforge.backends.triton.inspection import GPUS, compile_for, compile_step
from stepforge.backends.triton.kernel import BLOCK, Kernel, kernel_for
from stepforge.backends.triton.source import named, triton_source
from stepforge.backends.triton.variant import Variant, units
from stepforge.metrics import METRICS
from stepforge.program import Graph
from stepforge.state.layout import state_layout
from tests.backends.graphs import columns_of, graph_of, spec_of, traced
from tests.backends.rules import RULES, together
from tests.backends.triton.kernels import compiled_in_new_process, tables
from tests.conformance.table import FORMATS, OPTIMIZERS, normal, parameter

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def source_of(graph: Graph, dtype: torch.dtype, dims: int = 0) -> str:
    return triton_source(spec_of(graph, dtype), Variant(dims=dims))


def spec_of_format(name: str, format_: str) -> KernelSpec:
    """Return the spec of the kernel that steps an optimizer's parameters in a format."""
    dtype, options = FORMATS[format_]
    p = torch.zeros(64, 64, dtype=dtype)
    optimizer = OPTIMIZERS[name].ours([p], **options)
    layout = state_layout(optimizer.rule, optimizer.param_groups[0], p)
    return KernelSpec.of(graph_of(name), {"g": dtype, **layout.dtypes}, layout.formats)


def metered_spec(name: str, format_: str | None = None) -> KernelSpec:
    """Return the spec of a kernel with metrics; in float32 if there is no format."""
    dtype, options = FORMATS[format_] if format_ else (torch.float32, {})
    p = torch.zeros(64, 64, dtype=dtype)
    optimizer = OPTIMIZERS[name].ours([p], **options)
    rule, group = optimizer.rule.with_metrics(METRICS), optimizer.param_groups[0]
    layout = state_layout(rule, group, p)
    return KernelSpec.of(rule.graph(group), {"g": dtype, **layout.dtypes}, layout.formats)


@pytest.mark.parametrize("dims", [0, 2])
@pytest.mark.parametrize("format_", FORMATS)
def test_formats_are_readable(format_: str, dims: int) -> None:
    """Stored bits, decoded values and new bits have names of their own."""
    spec = dataclasses.replace(spec_of_format("Adam", format_), arithmetic=torch.float32)
    text = triton_source(spec, Variant(dims=dims))
    for name in set(spec.tensors) - {"g"}:
        assert f"tl.store({named(name, 'at')}, " in text
        is_part = name.partition(".")[0] in spec.formats
        assert is_part == (f" {named(name, 'stored')} = " in text)
        assert is_part == (f"{named(name, 'new')} = " in text.replace(", ", " = "))
    for format_name in {x.name for x in spec.formats.values()}:
        assert f'"""{format_name}: a number of what is stored."""' in text
    assert max(map(len, text.splitlines())) <= 100
    compile(text, "step.py", "exec")


@pytest.mark.parametrize("dims", [0, 2])
@every_optimizer
def test_triton_is_readable(name: str, dims: int) -> None:
    """Every value is named after its column, and every coefficient has its formula as a comment."""
    graph = graph_of(name)
    text = source_of(graph, torch.float32, dims)
    for column in graph.varying.inputs:
        assert f"{column}_in = tl.load({column}_at" in text
    for column in graph.results:
        assert f"tl.store({column}_at, {column}_out" in text
    for position, node in enumerate(graph.coefficients):
        comment = text.split(f" c{position} = ")[1].split("\n")[0]
        assert f"# {str(node)[:50]}" in comment
    assert max(map(len, text.splitlines())) <= 100
    assert "\t" not in text
    compile(text, "step.py", "exec")


def test_triton_depends_on_the_dtypes_and_dimensions() -> None:
    graph = graph_of("Adam")
    sources = {source_of(graph, dtype, dims) for dtype in STORABLE for dims in range(3)}
    assert len(sources) == 3 * len(STORABLE)
    assert source_of(graph, torch.float32) == source_of(graph_of("Adam"), torch.float32)


@pytest.mark.parametrize("options", [{}, {"state_format": "int8"}], ids=["plain", "int8"])
def test_a_kernel_is_made_once(
    options: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps do not differ in anything that makes Triton compile again."""
    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")
    launches: list[dict[str, Any]] = []
    inner = Kernel.launch

    def launch(self: Kernel, *args: Any) -> None:
        _, *tensors, aligned, _, _ = args
        # Numbers are arguments of one type, whatever they are.
        keys = [(x.dtype, x.data_ptr() % 16) for x in tensors if isinstance(x, torch.Tensor)]
        launches.append({"kernel": id(self), "specialization": keys, "aligned": aligned})
        inner(self, *args)

    monkeypatch.setattr(Kernel, "launch", launch)
    shapes = [(40, 144), (64, 64)] if options else [(5,), (0,), (BLOCK + 1,)]
    params = [parameter(normal(shape, torch.float32, 1)) for shape in shapes]
    params = [torch.nn.Parameter(p.detach().to(device)) for p in params]
    optimizer = OPTIMIZERS["NAdam"].ours(params, **options)
    compiled = []
    for step in range(4):
        for p in params:
            p.grad = torch.full_like(p, 1.0 + step)
        optimizer.step()
        (table,) = tables(optimizer)
        assert launches[-1]["kernel"] == launches[0]["kernel"]
        if device.type == "cuda":
            assert launches[-1] == launches[0]
            compiled.append(sum(len(x[0]) for x in table.kernel._step.device_caches.values()))
    assert len(launches) == 4
    assert len(set(compiled)) <= 1


def test_a_source_that_cannot_be_written_is_a_reason(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(kernel.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    why = kernel_for(spec_of(traced(lambda p, g: p - g), torch.float32))
    assert why == (
        f"the kernel cache {cache} cannot be written to (full): set STEPFORGE_CACHE to a folder "
        "of yours"
    )
    assert not list(cache.glob("build-*"))


# Compiled kernels.

CASES: dict[str, tuple[str, torch.dtype, int]] = {
    "NAdam": ("NAdam", torch.float32, 0),
    "double": ("NAdam", torch.float64, 0),
    "bfloat16": ("RAdam", torch.bfloat16, 0),
    "float16": ("Adagrad", torch.float16, 0),
    "strided": ("Adam", torch.float32, 2),
    "all operations": ("", torch.float32, 0),
    "all operations in double": ("", torch.float64, 0),
}
#: The optimizer, the format, and the strided dimensions.
FORMAT_CASES: dict[str, tuple[str, str, int]] = {
    "int8": ("Adam", "float32, int8 states", 0),
    "24 bits": ("RAdam", "bfloat16, 24 bits, int8 states", 0),
    "32 bits of float16, strided": ("NAdam", "float16, 32 bits, int8 states", 2),
    "double, int8": ("Adagrad", "float64, int8 states", 0),
    "at random": ("Adam", "float16 at random", 0),
}
#: The optimizer, and the format if any.
METERED_CASES = {"metrics": ("AdamW", None), "metrics of int8": ("AdamW", "float32, int8 states")}


def print_instructions() -> None:
    """Compile each case for GPUs of NVIDIA and AMD, and print counts of instructions."""
    found: dict[str, Any] = {}
    gpus = [GPUS["sm_80"], GPUS["gfx942"]]
    for case in [*CASES, *FORMAT_CASES, *METERED_CASES]:
        dims = 0
        if case in METERED_CASES:
            spec = metered_spec(*METERED_CASES[case])
        elif case in CASES:
            name, dtype, dims = CASES[case]
            graph = graph_of(name) if name else traced(together(*RULES), "c")
            spec = spec_of(graph, dtype)
        else:
            name, format_, dims = FORMAT_CASES[case]
            spec = spec_of_format(name, format_)
        unit = 1 if case in CASES or dims else units(spec)[0]
        cuda, hip = (
            compile_step(spec, Variant(dims, unit, gpu.target), gpu, is_scaled=case != "NAdam")
            for gpu in gpus
        )
        opcode = re.compile(r"^\s*(?:@!?%p\d+ )?([a-z][a-z0-9_.:]+) ", re.M)
        found[case] = {
            "ptx": Counter(opcode.findall(cuda.asm["ptx"])),
            "llvm": [hip.asm["llir"].count(word) for word in ("contract", "fmuladd", "afn")],
            "ttir": str(cuda.asm["ttir"]),
        }
    write = kernel._writer().write
    types = {n: "*i32" if n == "table" else "i32" for n in write.arg_names}
    for gpu in gpus:
        compile_for(gpu, write, types, {}, {})
    print(json.dumps(found))


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compiled_in_new_process(
        print_instructions, tmp_path_factory.mktemp("compiled"), timeout_s=240
    )


@pytest.mark.parametrize("case", [*CASES, *FORMAT_CASES, *METERED_CASES])
def test_every_operation_is_rounded_by_itself_and_nothing_is_flushed(
    case: str, instructions: Any
) -> None:
    """No fused multiply-add, no approximate division or root, no denormal flushed to zero."""
    opcodes = instructions[case]["ptx"]
    assert not [x for x in opcodes if re.search(r"\bfma|\.ftz|approx|div\.full|\bmad\.f", x)]
    kind = "f64" if "double" in case else "f32"
    for operation in ("div", "sqrt", "add", "mul"):
        assert opcodes[f"{operation}.rn.{kind}"]
    assert not any(instructions[case]["llvm"])


@pytest.mark.parametrize("case", ["NAdam", "double", "bfloat16", "float16"])
def test_loads_and_stores_are_16_bytes_wide(case: str, instructions: Any) -> None:
    """For every column read and written."""
    opcodes = instructions[case]["ptx"]
    name, dtype, _ = CASES[case]
    graph = graph_of(name)
    form = "v2.b64" if dtype == torch.float64 else "v4.b32"
    threads = 256 if dtype == torch.float64 else 128
    count = BLOCK // threads * dtype.itemsize // 16  # per thread and column
    assert opcodes[f"ld.global.{form}"] == count * len(graph.varying.inputs)
    assert opcodes[f"st.global.{form}"] == count * len(graph.results)


def test_codes_are_loaded_and_stored_eight_at_a_time(instructions: Any) -> None:
    """A thread has 8 elements: two columns of codes are two 8-byte loads and stores."""
    opcodes = instructions["int8"]["ptx"]
    assert opcodes["ld.global.v2.b32"] == opcodes["st.global.v2.b32"] == 2


@pytest.mark.parametrize("case", CASES)
def test_elements_are_counted_in_64_bits(case: str, instructions: Any) -> None:
    """Pointers to elements are advanced by 64-bit offsets; those to tables by an index."""
    lines = instructions[case]["ttir"].splitlines()
    advanced = [line for line in lines if "tt.addptr" in line and "tensor<1024" not in line]
    by_64_bits = [line for line in advanced if ", i64" in line]
    if not CASES[case][2]:
        assert len(by_64_bits) >= len(set(columns_of(graph_of("Adagrad"))))
    assert any(
        "arith.muli" in line and line.rstrip().split(" : ")[1][:3] == "i64" for line in lines
    )
