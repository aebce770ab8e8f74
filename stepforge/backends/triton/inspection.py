"""Inspection of what Triton compiles a kernel to, for a GPU that need not be there.

Registers and spills decide how many threads a multiprocessor runs at a time; the width of loads and
stores decides how much of its memory's speed they reach; instructions count where a kernel computes
more than it moves. All of it stands in the machine code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepforge.backends.spec import KernelSpec
from stepforge.backends.triton.kernel import BLOCK, launch_options, load
from stepforge.backends.triton.source import (
    WHOLE,
    coefficient_words,
    has_two_paths,
    named,
    triton_source,
)
from stepforge.backends.triton.variant import AMPERE, WIDEST, Target, Variant, units
from stepforge.formats import BLOCK as CHUNK

__all__ = [
    "GPU",
    "GPUS",
    "Inspection",
    "compile_for",
    "compile_step",
    "dense_paths",
    "inspect_kernel",
    "paths",
]


@dataclass(frozen=True)
class GPU:
    """A GPU to compile for.

    Attributes:
        backend: Triton's name of its maker's compiler.
        architecture: the number or name of its architecture.
        target: its properties.
    """

    backend: str
    architecture: int | str
    target: Target


#: The GPUs that kernels are checked for, by the names that their makers use: A100, H100 and H200,
#: MI300.
GPUS = {
    "sm_80": GPU("cuda", 80, AMPERE),
    "sm_90": GPU("cuda", 90, AMPERE),
    "gfx942": GPU("hip", "gfx942", Target(lanes=64, root_takes_denormals=False)),
}


@dataclass(frozen=True)
class Inspection:
    """Properties of a compiled kernel.

    Attributes:
        registers: the registers of a thread.
        spills: the bytes (AMD: the registers) of a thread that do not fit and go through memory.
        instructions_per_element: the instructions of a thread, without the ones for special values
            that a call leads to, divided by its elements.
        load_bits: the bits of the widest load.
        store_bits: the bits of the widest store.
        rsq: the reciprocal roots of a number that may be a denormal, of which they are infinite.
    """

    registers: int
    spills: int
    instructions_per_element: float
    load_bits: int
    store_bits: int
    rsq: int


def paths(spec: KernelSpec, variant: Variant) -> dict[str, str | None]:
    """Return the paths through a kernel: the name of each, and a condition that takes it alone.

    The condition is None if it is the only one. On the whole path every element, or every chunk
    that shares a scale, is a parameter's own.
    """
    if has_two_paths(spec, variant):
        return {"whole": "BLOCK > 0", "masked": "BLOCK < 0"}
    if variant.dims:
        return {"strided": None}
    if variant.unit == CHUNK:
        return {"whole": None}
    return {f"masked, multiple of {variant.unit}" if variant.unit > 1 else "masked": None}


def dense_paths(spec: KernelSpec, target: Target) -> Iterator[tuple[Variant, str]]:
    """Yield the variants of a spec's kernel for dense tables, with each path through them."""
    for unit in units(spec):
        variant = Variant(unit=unit, target=target)
        for path in paths(spec, variant):
            yield variant, path


def inspect_kernel(spec: KernelSpec, variant: Variant, gpu: GPU, path: str) -> Inspection:
    """Compile a kernel, and read what it has become.

    Registers and spills are those of the whole kernel, the rest that of the path.

    Args:
        spec: the kernel's spec.
        variant: its variant.
        gpu: the GPU.
        path: one of :func:`paths`.

    Raises:
        RuntimeError: Triton or one of its tools fails.
    """
    condition = paths(spec, variant)[path]
    read = _read_nvidia if gpu.backend == "cuda" else _read_amd
    threads = launch_options(spec, variant)["num_warps"] * gpu.target.lanes
    whole = read(compile_step(spec, variant, gpu), BLOCK / threads)
    if condition is None:
        return whole
    part = read(compile_step(spec, variant, gpu, condition=condition), BLOCK / threads)
    return Inspection(
        whole.registers,
        whole.spills,
        part.instructions_per_element,
        part.load_bits,
        part.store_bits,
        part.rsq,
    )


def compile_step(
    spec: KernelSpec,
    variant: Variant,
    gpu: GPU,
    *,
    condition: str = WHOLE,
    is_scaled: bool = False,
) -> Any:
    """Compile a kernel as a launch does whose parameters share coefficients, and are aligned.

    Args:
        spec: the kernel's spec.
        variant: its variant.
        gpu: the GPU.
        condition: takes the first of two paths.
        is_scaled: True if gradients have a scale.
    """
    source = triton_source(spec, variant).replace(f"if {WHOLE}:", f"if {condition}:")
    number = "*fp64" if spec.arithmetic == torch.float64 else "*fp32"
    types = {"owners": "*i32", "rows": "*i64", "gradients": "*i64", "keys": "*i64"}
    types |= {"unscale": number, "found_inf": "*fp32", "partial": "*fp64", "blocks": "i32"}
    types |= {word: "i32" for words in coefficient_words(spec) for word in words}
    constants: dict[str, Any] = {named(tensor, "aligned"): WIDEST for tensor in spec.elements}
    constants |= {"SCALED": is_scaled, "BLOCK": BLOCK, "numbers": None}
    if not is_scaled:
        constants |= {"unscale": None, "found_inf": None}
    return compile_for(gpu, load(source).step, types, constants, launch_options(spec, variant))


def compile_for(
    gpu: GPU,
    function: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Any:
    """Compile a function of Triton's for a GPU.

    Args:
        gpu: the GPU.
        function: the function.
        types: Triton's types of arguments; an address is a multiple of 16 bytes.
        constants: the values of arguments that are part of the machine code.
        options: Triton's options of a launch.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    given = {name: "constexpr" if name in constants else types[name] for name in names}
    pointers = [place for place, name in enumerate(names) if given[name].startswith("*")]
    return triton.compile(
        ASTSource(
            function,
            given,
            {(names.index(name),): x for name, x in constants.items() if name in names},
            {(place,): [["tt.divisibility", 16]] for place in pointers},
        ),
        target=GPUTarget(gpu.backend, gpu.architecture, gpu.target.lanes),
        options=dict(options),
    )


def _read_nvidia(compiled: Any, elements: float) -> Inspection:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        usage, code = (_cuobjdump(flag, binary) for flag in ("-res-usage", "-sass"))
    registers, stack = _numbers(r"REG:(\d+) STACK:(\d+)", usage)
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", code, re.M)
    end = max(place for place, opcode in enumerate(opcodes) if opcode == "EXIT")
    return Inspection(
        registers,
        stack,
        _per_element(end + 1, elements),
        _widest(r"^LDG\.E(?:\.(\d+))?$", opcodes),
        _widest(r"^STG\.E(?:\.(\d+))?$", opcodes),
        0,  # its reciprocal root takes denormals
    )


def _cuobjdump(flag: str, binary: Path) -> str:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, flag, str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} has failed: {done.stderr.strip()}")
    return done.stdout


def _read_amd(compiled: Any, elements: float) -> Inspection:
    code = compiled.asm["amdgcn"]
    (registers,) = _numbers(r"\.vgpr_count:\s+(\d+)", code)
    (spilled,) = _numbers(r"\.vgpr_spill_count:\s+(\d+)", code)
    opcodes = re.findall(r"^\t((?:v|s|ds|buffer|global|flat)_\w+)", code, re.M)
    return Inspection(
        registers,
        spilled,
        _per_element(len(opcodes), elements),
        32 * _widest(r"^(?:buffer|global)_load_dword(?:x(\d))?$", opcodes, narrowest=1),
        32 * _widest(r"^(?:buffer|global)_store_dword(?:x(\d))?$", opcodes, narrowest=1),
        _bare_roots(compiled.asm["llir"]),
    )


def _bare_roots(llvm: str) -> int:
    """Count the reciprocal roots whose operand is not chosen between a number and a scaled one."""
    defined = dict(re.findall(r"^\s*(%\d+) = (.*)$", llvm, re.M))

    def is_chosen(name: str) -> bool:
        text = defined.get(name, "")
        inner = re.match(r"extractelement <[^>]*> (%\d+),", text)
        return is_chosen(inner[1]) if inner else text.startswith("select ")

    roots = re.findall(r"call float @llvm\.amdgcn\.rsq\.f32\(float (%\d+)\)", llvm)
    return sum(not is_chosen(name) for name in roots)


def _numbers(pattern: str, text: str) -> tuple[int, ...]:
    found = re.search(pattern, text)
    if not found:
        raise RuntimeError(f"the compiler's output has no {pattern}")
    return tuple(map(int, found.groups()))


def _per_element(instructions: int, elements: float) -> float:
    return round(instructions / elements, 1)


def _widest(pattern: str, opcodes: Sequence[str], narrowest: int = 32) -> int:
    """Return the largest number in the opcodes that match; ``narrowest`` stands for none."""
    found = [match for opcode in opcodes if (match := re.match(pattern, opcode))]
    return max((int(match[1] or narrowest) for match in found), default=0)
