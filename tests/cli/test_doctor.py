"""``stepforge doctor`` on this machine, and on one that cannot run kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from stepforge import extension
from stepforge.backends import FUSED, disk_cache, triton
from stepforge.backends.native import compiler, openmp, prebuilt
from stepforge.cli import devices, make_app
from stepforge.cli.kernels import c_sources
from stepforge.rules import ALL
from tests.cli.compilers import needs_compiler

DTYPES = ("float32", "bfloat16", "float16", "float64", "complex64")
VARIABLES = (
    "STEPFORGE_BACKEND",
    "STEPFORGE_GUARDS",
    "STEPFORGE_ISA",
    "STEPFORGE_PREBUILT",
    "STEPFORGE_CACHE",
    "CC",
    "CXX",
    "TRITON_INTERPRET",
)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "accelerators", lambda: ())  # report on the CPU alone


def run(**environment: str) -> tuple[int, str]:
    result = CliRunner().invoke(make_app(), ["doctor"], env=environment, catch_exceptions=False)
    return result.exit_code, result.output


def run_afresh(**environment: str) -> tuple[int, str]:
    """Run in a new process, which has no kernels loaded."""
    done = subprocess.run(
        [sys.executable, "-c", "from stepforge.cli import main; main()", "doctor"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def backends(output: str) -> dict[str, list[str]]:
    cells = [line.split() for line in output.splitlines()]
    return {row[0]: row[1:] for row in cells if row and row[0] in ALL}


def line(output: str, name: str) -> str:
    (found,) = [line for line in output.splitlines() if line.startswith(f"{name:<18}")]
    return found.removeprefix(f"{name:<18}")


def test_where_kernels_run():
    needs_compiler()
    code, output = run()
    assert code == 0
    assert backends(output) == dict.fromkeys(ALL, len(DTYPES) * ["native"])
    assert line(output, "torch") == torch.__version__
    assert line(output, "numpy") == np.__version__
    assert line(output, "instruction set") == (compiler.instruction_set() or "the plain one")
    assert line(output, "compiler").startswith(f"{' '.join(compiler.compiler())}: ")
    assert line(output, "kernel cache").startswith(f"{disk_cache.cache_folder()}: ")
    assert line(output, "threads").startswith(f"{torch.get_num_threads()}; torch's OpenMP pool")
    assert line(output, "environment") == f"none of {', '.join(VARIABLES)} is set"
    assert line(output, "bits") == "stepforge selftest compares those of all backends here"
    assert "no native" not in output


def test_no_compiler_and_an_empty_cache(tmp_path: Path):
    folder = tmp_path / "kernels"
    code, output = run_afresh(CC="/nonexistent", STEPFORGE_CACHE=str(folder), STEPFORGE_PREBUILT="")
    why = "CC names '/nonexistent', which is not on the PATH: install gcc or clang"
    assert code == 1
    assert backends(output) == dict.fromkeys(ALL, len(DTYPES) * ["foreach"])
    assert line(output, "compiler") == f"none: {why}"
    assert line(output, "kernel cache") == f"{folder}: 0 kernels, 0.0 MB"
    assert line(output, "environment") == (
        f"STEPFORGE_PREBUILT=, STEPFORGE_CACHE={folder}, CC=/nonexistent"
    )
    assert line(output, "prebuilt kernels") == "none: STEPFORGE_PREBUILT is empty"
    assert output.splitlines()[-1] == f"no native for any of them: {why}"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")
def test_a_cache_that_cannot_be_used(tmp_path: Path):
    needs_compiler()
    tmp_path.chmod(0o777)
    code, output = run_afresh(STEPFORGE_CACHE=str(tmp_path), STEPFORGE_PREBUILT="")
    assert code == 1
    assert line(output, "kernel cache").startswith(f"none: the kernel cache {tmp_path} can be wri")
    assert f"chmod 700 {tmp_path}" in output.splitlines()[-1]


def test_a_cache_with_kernels(tmp_path: Path, monkeypatch):
    tmp_path.chmod(0o700)
    (tmp_path / "a-b.so").write_bytes(bytes(1_500_000))
    monkeypatch.setenv("STEPFORGE_CACHE", str(tmp_path))
    assert line(run()[1], "kernel cache") == f"{tmp_path}: 1 kernel, 1.5 MB"


def test_prebuilt_kernels(tmp_path: Path, monkeypatch):
    """The report counts usable kernels, and the size of all."""
    needs_compiler()
    tmp_path.chmod(0o755)
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path)
    assert line(run()[1], "prebuilt kernels") == f"none in {tmp_path}"
    wanted = c_sources()
    best = compiler.instruction_set()
    used, damaged = (
        prebuilt.compile_ahead(tmp_path, source, best, compiler.compiler()) for source in wanted[:2]
    )
    damaged.write_bytes(b"no library")
    (used.parent / f"{'0' * 32}-{'1' * 32}.so").write_bytes(bytes(1_000_000))  # another version's
    size = (1_000_010 + used.stat().st_size) / 1e6
    counted = f"1 of {len(wanted)} for {best or 'plain'}; {size:.1f} MB"
    assert line(run()[1], "prebuilt kernels") == f"{tmp_path}: {counted}"
    monkeypatch.setenv("STEPFORGE_PREBUILT", str(tmp_path / "missing"))
    message = f"none: STEPFORGE_PREBUILT is '{tmp_path}/missing', which is no folder"
    assert line(run()[1], "prebuilt kernels") == message


@pytest.mark.parametrize("columns", ["80", "20"])
def test_all_dtypes_are_told_by_their_whole_names(columns):
    (heading,) = (
        line for line in run(COLUMNS=columns)[1].splitlines() if line.startswith("would run on")
    )
    assert tuple(heading.split()[4:]) == DTYPES
    assert len(heading) <= 80  # it fits on a usual terminal


def test_the_guards(monkeypatch, tmp_path: Path):
    """Oracle: what steps get, which is the module or the reason why there is none."""
    found = extension.module()
    if isinstance(found, str):
        assert line(run()[1], "guards") == f"Python: {found}"
    else:
        versions = f"torch {torch.__version__}, {sysconfig.get_config_var('SOABI')}"
        folder = Path(str(found.__file__)).parent
        assert line(run()[1], "guards") == f"C++ (built for {versions}) in {folder}"
    reason = "STEPFORGE_GUARDS asks for python"
    assert line(run(STEPFORGE_GUARDS="python")[1], "guards") == f"Python: {reason}"
    monkeypatch.setattr(extension, "_module", None)
    monkeypatch.setenv("STEPFORGE_PREBUILT", "")
    monkeypatch.setenv("STEPFORGE_CACHE", str(tmp_path))
    tmp_path.chmod(0o700)
    reason = "CXX names '/nonexistent', which is not on the PATH: install g++ or clang++"
    assert line(run(CXX="/nonexistent")[1], "guards") == f"Python: {reason}"


def test_guards_that_do_not_exist():
    code, output = run(STEPFORGE_GUARDS="rust")
    assert code == 1
    why = "STEPFORGE_GUARDS is 'rust'; it must be one of python, cpp"
    assert line(output, "guards") == f"none: {why}"
    assert output.splitlines()[-1] == f"no native for any of them: {why}"


def test_no_openmp_pool(monkeypatch):
    monkeypatch.setattr(openmp, "thread_pool", lambda: None)
    assert "pool was not found, so kernels use one" in line(run()[1], "threads")


@pytest.mark.parametrize("forced", ["foreach", "reference"])
def test_a_forced_backend(monkeypatch, forced):
    monkeypatch.setenv("STEPFORGE_BACKEND", forced)
    code, output = run()
    assert code == 1
    assert backends(output) == dict.fromkeys(ALL, len(DTYPES) * [forced])
    assert line(output, "environment") == f"STEPFORGE_BACKEND={forced}"
    assert output.splitlines()[-1] == (
        f"no native for any of them: STEPFORGE_BACKEND asks for {forced}"
    )


def test_a_backend_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("STEPFORGE_BACKEND", "warp")
    code, output = run()
    assert code == 1
    assert set(backends(output)) == set(ALL)
    assert output.splitlines()[-1].startswith(
        "no native for any of them: STEPFORGE_BACKEND is 'warp'; it must be one of "
    )


def test_no_accelerator_and_a_triton():
    output = run()[1]
    assert line(output, "accelerators") == "none"
    assert line(output, "triton") == devices.triton_version()
    assert "would run on cpu" in output
    assert output.count("would run on") == 1


@pytest.fixture
def elsewhere(monkeypatch) -> None:
    """The meta device in place of an accelerator."""
    facts = {"GPU": "meta:0 Nothing, 0.0 GB", "platform": "meta, driver 1", "triton": "3"}
    monkeypatch.setattr(devices, "accelerators", lambda: 2 * (torch.device("meta"),))
    monkeypatch.setattr(devices, "describe", lambda _: facts)


@pytest.mark.usefixtures("elsewhere")
def test_an_accelerator_that_no_kernel_is_made_for():
    """Nothing is wrong there: foreach is the fastest backend."""
    needs_compiler()
    code, output = run()
    assert code == 0
    described = "meta:0 Nothing, 0.0 GB, meta, driver 1"
    assert line(output, "accelerators") == f"{described}; {described}"
    on_cpu, on_device = output.split("would run on")[1:]
    assert backends(on_cpu) == dict.fromkeys(ALL, len(DTYPES) * ["native"])
    assert on_device.split()[0] == "meta"
    assert backends(on_device) == dict.fromkeys(ALL, len(DTYPES) * ["foreach"])


@pytest.mark.usefixtures("elsewhere")
def test_a_gpu_that_its_kernels_do_not_serve(monkeypatch):
    monkeypatch.setitem(FUSED, "meta", "triton")
    monkeypatch.setattr(triton, "unsupported_reason", lambda *_: "Triton is not installed")
    code, output = run()
    assert code == 1
    assert backends(output.split("would run on")[2]) == dict.fromkeys(
        ALL, len(DTYPES) * ["foreach"]
    )
    assert output.splitlines()[-1] == "no triton for any of them: Triton is not installed"
    monkeypatch.setattr(triton, "unsupported_reason", lambda *_: None)
    assert backends(run()[1].split("would run on")[2]) == dict.fromkeys(
        ALL, len(DTYPES) * ["triton"]
    )


@pytest.mark.usefixtures("elsewhere")
def test_a_dtype_that_an_accelerator_does_not_have(monkeypatch):
    """Apple's GPUs, for example, have no float64."""
    zeros = torch.zeros

    def refuse(*args, dtype=None, device=None, **kwargs):
        if dtype == torch.float64 and torch.device(device).type == "meta":
            raise TypeError("there is no float64 on it")
        return zeros(*args, dtype=dtype, device=device, **kwargs)

    monkeypatch.setattr(torch, "zeros", refuse)
    needs_compiler()
    code, output = run()
    assert code == 0
    expected = ["foreach", "foreach", "foreach", "-", "foreach"]
    assert backends(output.split("would run on")[2]) == dict.fromkeys(ALL, expected)


@pytest.mark.gpu
def test_a_gpu_gets_its_kernels(monkeypatch):
    monkeypatch.undo()
    if not devices.accelerators():
        pytest.skip("needs a GPU")
    kind = devices.accelerators()[0].type
    backend = FUSED.get(kind, "foreach")
    assert backends(run()[1].split("would run on")[2])["AdamW"][:2] == 2 * [backend]


def test_an_instruction_set_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("STEPFORGE_ISA", "x86-64-v9")
    code, output = run()
    assert code == 1
    assert line(output, "instruction set").startswith("none: STEPFORGE_ISA is 'x86-64-v9'")
    assert "no native for any of them: STEPFORGE_ISA is 'x86-64-v9'" in output
