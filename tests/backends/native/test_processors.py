"""The generated C on another processor and by another compiler. Oracle: the kernel on this one.

The kernels are linked into a program that reads batches from stdin: for aarch64 in an emulator, and
for this processor by clang. No tolerance: IEEE 754 leaves only the sign and payload of NaN to
processors, so all NaNs count as equal.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stepforge.backends import Batch, native
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.native import compiler
from stepforge.backends.native.source import c_source
from tests.backends.graphs import special_values
from tests.conformance.table import OPTIMIZERS, forced

#: By processor and compiler: the compiler's command, then the programs that it and its result need.
PROCESSORS = {
    "aarch64-gcc": (["aarch64-linux-gnu-gcc", "-static"], ["qemu-aarch64"]),
    "aarch64-clang": (
        ["clang", "--target=aarch64-linux-gnu", "-static"],
        ["qemu-aarch64", "aarch64-linux-gnu-gcc"],
    ),
    "here-clang": (["clang"], []),
}

#: The optimizers to step, with the dtype of their parameters and their options.
CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    *((name, torch.float32, {"weight_decay": 0.1}) for name in OPTIMIZERS),
    ("Adam", torch.float64, {"amsgrad": True}),
    ("NAdam", torch.bfloat16, {}),
    ("RAdam", torch.float16, {"maximize": True}),
    ("AdamW", torch.float32, {"state_format": "int8", "amsgrad": True}),
    ("Adagrad", torch.float32, {"state_format": "bfloat16"}),
    ("NAdam", torch.bfloat16, {"state_format": "int8", "master_weight_bits": 24}),
    ("AdamW", torch.bfloat16, {"master_weight_bits": 32}),
    ("Adam", torch.float16, {"master_weight_bits": 24, "state_format": "float32"}),
    ("AdamW", torch.float16, {"master_weight_bits": 32}),
    ("RAdam", torch.bfloat16, {"stochastic_rounding": True, "state_format": "int8"}),
    ("NAdam", torch.float16, {"stochastic_rounding": True}),
]
#: Steps of each; the first and last are compared, because RAdam changes its form at the sixth.
STEPS = 6

MAIN = """\
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef void run(int64_t, const int64_t *, void *const *, const void *, double,
                 int, void *, void *, void *);
run RUNS;
static run *const runs[] = {ADDRESSES};

static void *read_bytes(int64_t bytes) {
    void *at = malloc((size_t)bytes + 1);
    if (bytes && fread(at, (size_t)bytes, 1, stdin) != 1) exit(2);
    return at;
}

int main(void) {
    int64_t head[5];
    while (fread(head, sizeof head, 1, stdin) == 1) {
        int64_t params = head[1], width = head[2], tensors = head[3];
        int64_t *starts = read_bytes((params + 1) * 8);
        void **records = read_bytes(params * width * 8);
        void *coefficients = read_bytes(head[4]);
        double *unscale = read_bytes(8);
        int64_t *bytes = read_bytes(params * tensors * 8);
        for (int64_t n = 0; n < params * tensors; n++)
            records[n / tensors * width + n % tensors] = read_bytes(bytes[n]);
        runs[head[0]](params, starts, records, coefficients, *unscale, 1, 0, 0, 0);
        for (int64_t n = 0; n < params * tensors; n++)
            fwrite(records[n / tensors * width + n % tensors], (size_t)bytes[n], 1, stdout);
    }
    return 0;
}
"""


@dataclass
class Step:
    """A call of a kernel on this machine.

    Attributes:
        source: the kernel's C.
        arguments: the input of the program, except for the kernel's index.
        wanted: the tensors after the call.
    """

    source: str
    arguments: bytes
    wanted: list[torch.Tensor]


def extreme(x: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Return values for a tensor: all magnitudes, similar in each stretch, and special values."""
    if not x.dtype.is_floating_point:
        return torch.frombuffer(bytearray(random.bytes(x.nbytes)), dtype=x.dtype)
    count = x.numel()
    info = torch.finfo(x.dtype)
    least, most = np.log2(float(info.smallest_normal) * info.eps), np.log2(info.max)
    stretch = 64
    around = random.uniform(least, most, -(-count // stretch)).repeat(stretch)[:count]
    with np.errstate(over="ignore", under="ignore"):
        sizes = np.exp2(around + random.uniform(-12, 12, count))
    values = torch.from_numpy(sizes * random.choice([-1.0, 1.0], count)).to(x.dtype)
    # Half of the tensor has no special values, since one NaN makes its whole block NaN.
    specials = special_values(x.dtype)
    chosen = torch.from_numpy(random.integers(0, len(specials), count))
    where = torch.from_numpy(random.random(count) < 0.05) & (torch.arange(count) > count // 2)
    return torch.where(where, specials[chosen], values)


def powers_of_two(x: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Return scales of blocks: all possible values, including NaN."""
    scales = np.exp2(random.integers(-95, 128, x.numel()).astype(np.float32))
    return torch.from_numpy(np.where(random.random(x.numel()) < 0.05, np.nan, scales))


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.detach().reshape(-1)


def steps_of(name: str, dtype: torch.dtype, options: dict[str, Any], seed: int) -> list[Step]:
    """Return the first and last step of an optimizer on extreme values, by the kernel here."""
    random = np.random.default_rng(seed)
    made: list[Step] = []
    step_by_kernel = native.Table.run

    def run(table: native.Table, batch: Batch, grad_scale: GradScale | None = None) -> None:
        names = batch.spec.tensors
        tensors = [batch.columns[n][index] for index in range(len(batch)) for n in names]
        with torch.no_grad():
            for name, x in zip(itertools.cycle(names), tensors):
                is_scale = name.endswith(".scale")
                flat(x).copy_(powers_of_two(x, random) if is_scale else extreme(x, random))
        before = b"".join(flat(x).view(torch.uint8).numpy().tobytes() for x in tensors)
        step_by_kernel(table, batch, grad_scale)
        head = [len(batch), table.records.shape[1], len(names), table.coefficients.nbytes]
        sizes = [x.nbytes for x in tensors]
        arrays = [np.array(head), table.starts, table.records, table.coefficients]
        arrays += [np.array(1.0), np.array(sizes)]
        made.append(
            Step(
                c_source(batch.spec),
                b"".join([*(array.tobytes() for array in arrays), before]),
                [flat(x).clone() for x in tensors],
            )
        )

    parameters = [torch.nn.Parameter(torch.ones(s, dtype=dtype)) for s in ((40, 130), (64, 64))]
    optimizer = OPTIMIZERS[name].ours(parameters, **options)
    with forced("native"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(native.Table, "run", run)
        for _ in range(STEPS):
            for p in parameters:
                p.grad = torch.ones_like(p)
            optimizer.step()
    assert len(made) == STEPS, "each step is one call"
    return [made[0], made[-1]]


@functools.cache
def steps() -> list[Step]:
    return [step for seed, case in enumerate(CASES) for step in steps_of(*case, seed)]


def built(command: Sequence[str], sources: Sequence[str], folder: Path) -> Path:
    """Compile the program with these kernels."""
    flags = [flag for flag in compiler.FLAGS if flag not in ("-shared", "-fPIC")]
    names = [f"run_{index}" for index in range(len(sources))]
    main, *files = folder / "main.c", *(folder / f"{name}.o" for name in names)
    prototypes, addresses = ", ".join(names), ", ".join(f"&{name}" for name in names)
    main.write_text(MAIN.replace("RUNS", prototypes).replace("ADDRESSES", addresses))
    for name, source, object_file in zip(names, sources, files, strict=True):
        c_file = object_file.with_suffix(".c")
        c_file.write_text(source)
        files_flags = ["-c", str(c_file), "-o", str(object_file)]
        done = subprocess.run(
            [*command, *flags, "-Werror", f"-Dstepforge_run={name}", *files_flags],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
    program = folder / "program"
    subprocess.run(
        [*command, *map(str, [main, *files]), "-lm", "-o", str(program)], check=True, timeout=60
    )
    return program


def same(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return True for each element with the same bits in both, or NaN in both."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    return (got.view(integer) == wanted.view(integer)) | ((got != got) & (wanted != wanted))


@pytest.mark.parametrize("processor", PROCESSORS)
def test_another_processor_or_compiler_makes_the_same_bits(processor: str, tmp_path: Path) -> None:
    command, needed = PROCESSORS[processor]
    for program in (command[0], *needed):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    sources = list(dict.fromkeys(step.source for step in steps()))
    heads = [np.array([sources.index(step.source)]).tobytes() for step in steps()]
    data = b"".join(head + step.arguments for head, step in zip(heads, steps(), strict=True))
    done = subprocess.run(
        [*needed[:1], str(built(command, sources, tmp_path))],
        input=data,
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    at = 0
    for index, step in enumerate(steps()):
        ordinary = []
        for wanted in step.wanted:
            size = wanted.nbytes
            got = torch.frombuffer(bytearray(done.stdout[at : at + size]), dtype=wanted.dtype)
            at += size
            wrong = ~same(got, wanted)
            assert not wrong.any(), (
                f"{CASES[index // 2]}: {got[wrong][:5]} instead of {wanted[wrong][:5]}"
            )
            ordinary.append(wanted.double().isfinite() & (wanted != 0))
        assert torch.cat(ordinary).double().mean() > 0.5, "too few finite values to compare"
    assert at == len(done.stdout)
