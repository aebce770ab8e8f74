"""The generated C under the address and undefined behavior sanitizers, in a program of its own.

Oracles: the sanitizers, on heap blocks of exactly the size of each tensor; and the results of one
thread for all other numbers of threads. C with deliberate mistakes tests the sanitizers themselves.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from stepforge.backends.native import compiler
from stepforge.backends.native.dtypes import STORABLE
from stepforge.backends.spec import arithmetic_of
from tests.backends.graphs import c_of, graph_of, run_compiler
from tests.conformance.table import OPTIMIZERS

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

#: Sizes of parameters that one call steps: empty, single, with whole and split cache lines.
SHAPES = {
    "one": [1000],
    "empty": [0, 0],
    "around a cache line": [63, 64, 65],
    "empties between": [0, 17, 0, 0, 1, 1000, 0],
    "many small": [*range(40)],
    "odd splits": [191, 1, 129, 0, 62, 3, 1],
}

# Inputs are any small values: control flow does not depend on them.
MAIN = """\
#include <stdio.h>
#include <stdlib.h>

static int current, size;
static int thread(void) { return current; }
static int team(void) { return size; }
static void parallel(void (*share)(void *), void *work, unsigned threads, unsigned flags) {
    (void)flags;
    size = threads > 3 ? 2 : (int)threads;    /* four are asked for, two are given */
    for (current = size - 1; current >= 0; current--) share(work);
}

static uint64_t stepped(int64_t params, const int64_t *sizes, int threads) {
    int64_t *starts = malloc((size_t)(params + 1) * sizeof *starts);
    void **pointers = malloc((size_t)(params * COLUMNS) * sizeof *pointers);
    number *coefficients = malloc((size_t)(params * COEFFICIENTS) * sizeof *coefficients);
    const size_t widths[COLUMNS] = {WIDTHS};
    starts[0] = 0;
    for (int64_t n = 0; n < params; n++) {
        starts[n + 1] = starts[n] + sizes[n];
        for (int k = 0; k < COEFFICIENTS; k++)
            coefficients[n * COEFFICIENTS + k] = (number)(0.1 * (double)(k + n + 1));
        for (int column = 0; column < COLUMNS; column++) {
            size_t bytes = (size_t)sizes[n] * widths[column];
            unsigned char *at = bytes ? malloc(bytes) : NULL;
            for (size_t b = 0; b < bytes; b++)    /* 0x3c to 0x3f: positive, neither NaN nor huge */
                at[b] = (unsigned char)(0x3c + (b * 7 + (size_t)(column + n)) % 4);
            pointers[n * COLUMNS + column] = at;
        }
    }
    stepforge_run(params, starts, pointers, coefficients, 1.0, threads, thread, team, parallel);
    uint64_t hash = 14695981039346656037u;
    for (int64_t at = 0; at < params * COLUMNS; at++) {
        const unsigned char *bytes = pointers[at];
        for (size_t b = 0; b < (size_t)sizes[at / COLUMNS] * widths[at % COLUMNS]; b++)
            hash = (hash ^ bytes[b]) * 1099511628211u;
        free(pointers[at]);
    }
    free(coefficients), free(pointers), free(starts);
    return hash;
}

int main(void) {
    SHAPES_OF_RUNS
    for (size_t run = 0; run < sizeof runs / sizeof *runs; run++)
        for (int threads = 1; threads <= 4; threads++)
            printf("%zu %d %llx\\n", run, threads,
                   (unsigned long long)stepped(runs[run].params, runs[run].sizes, threads));
    return 0;
}
"""


def program(kernel: str, widths: list[int]) -> str:
    """Return the C of a kernel with a ``main`` that steps all shapes, on 1 to 4 threads."""
    arrays = [
        f"{{{len(sizes)}, (const int64_t[]){{{', '.join(map(str, sizes))}}}}}"
        for sizes in SHAPES.values()
    ]
    struct = "const struct {int64_t params; const int64_t *sizes;}"
    runs = f"{struct} runs[] = {{{', '.join(arrays)}}};"
    main = MAIN.replace("WIDTHS", ", ".join(map(str, widths)))
    return kernel + main.replace("SHAPES_OF_RUNS", runs)


def sanitized(kernel: str, widths: list[int], folder: Path) -> subprocess.CompletedProcess[str]:
    """Compile and run the program."""
    c_file, executable = folder / "program.c", folder / "program"
    c_file.write_text(program(kernel, widths))
    flags = [flag for flag in compiler.FLAGS if flag not in ("-shared", "-fPIC", "-O3")]
    march = [f"-march={compiler.instruction_set()}"] if compiler.instruction_set() else []
    done = run_compiler([*flags, "-O1", "-g", *march, *SANITIZERS, c_file, "-o", executable, "-lm"])
    assert done.returncode == 0, done.stderr
    return subprocess.run(
        [executable],
        env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


@pytest.fixture(scope="module", autouse=True)
def _runtimes(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("sanitizers")
    c_file = folder / "nothing.c"
    c_file.write_text("int main(void) { return 0; }\n")
    done = run_compiler([*SANITIZERS, c_file, "-o", folder / "nothing"])
    if done.returncode != 0:
        pytest.skip(f"the compiler has no sanitizer runtime: {done.stderr.strip()[:200]}")
    if subprocess.run([folder / "nothing"], check=False, timeout=30).returncode != 0:
        pytest.skip("programs with sanitizers do not run here")


def kernel_and_widths(
    name: str, dtype: torch.dtype, options: Mapping[str, Any]
) -> tuple[str, list[int]]:
    """Return an optimizer's C, and the bytes per element of each of its columns."""
    text = c_of(graph_of(name, **options), dtype, arithmetic_of(dtype))
    columns = int(text.split("#define COLUMNS ")[1].split()[0])
    return text, [dtype.itemsize] * columns


CASES: list[tuple[str, torch.dtype, dict[str, bool]]] = [
    *((name, torch.float32, {}) for name in OPTIMIZERS),
    ("Adam", torch.float32, {"amsgrad": True}),
    *(("NAdam", dtype, {}) for dtype in STORABLE if dtype != torch.float32),
]


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    CASES,
    ids=[f"{n}-{str(s).removeprefix('torch.')}{'-amsgrad' * bool(o)}" for n, s, o in CASES],
)
def test_no_access_out_of_bounds_and_no_undefined_behavior(
    name: str, dtype: torch.dtype, options: dict[str, bool], tmp_path: Path
) -> None:
    done = sanitized(*kernel_and_widths(name, dtype, options), tmp_path)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    assert len(found) == 4 * len(SHAPES)
    by_run = [{value for run, _, value in found if run == str(n)} for n in range(len(SHAPES))]
    assert all(len(values) == 1 for values in by_run), "the number of threads changes the result"
    assert len(set.union(*by_run)) == len(SHAPES)


MISTAKES = {
    # the mistake: the right code, the wrong code, and the message of the sanitizer
    "an element too many": ("i < count; i++", "i <= count; i++", "heap-buffer-overflow"),
    "an element too early": ("int64_t i = 0; ", "int64_t i = -1; ", "heap-buffer-overflow"),
    "a parameter too many": (
        "w->starts[row + 1] <",
        "w->starts[row + 2] <",
        "heap-buffer-overflow",
    ),
    "records too far apart": ("row * RECORD", "row * (RECORD + 1)", "heap-buffer-overflow"),
    "an overflow": ("int64_t part = ", "int64_t part = INT64_MAX + ", "signed integer overflow"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_sanitizers_see_mistakes(mistake: str, tmp_path: Path) -> None:
    right, wrong, message = MISTAKES[mistake]
    text, widths = kernel_and_widths("Adagrad", torch.float32, {})
    assert right in text
    done = sanitized(text.replace(right, wrong), widths, tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
