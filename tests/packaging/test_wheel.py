"""Wheels, installed where there is no compiler.

Oracle: the reference backend in the same environment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stepforge.backends import disk_cache
from stepforge.backends.native import build, compiler
from stepforge.cli.kernels import c_sources
from stepforge.extension import compiler as cpp_compiler

ROOT = Path(__file__).parents[2]
SHIPPED = ("stepforge", "setup.py", "pyproject.toml", "README.md", "LICENSE")
KERNELS = "stepforge/backends/native/kernels"
ISA = compiler.instruction_set()
#: The number of comparisons: forms of the rules (2 by Adagrad's flag, 8 by Adam's three flags, 4 by
#: two flags of each other rule), times 2 for weight decay, times 5 dtypes.
FORMS = (2 + 8 + 4 + 4 + 4) * 2 * 5


def needs_compiler(cpp: bool = False) -> None:
    """Skip the test if there is no compiler."""
    try:
        compiler.compiler()
        if cpp:
            cpp_compiler.checked_tool()
    except disk_cache.BuildError as error:
        pytest.skip(str(error))


def run(command: list[Any], **environment: str) -> str:
    """Run a command, assert that it succeeds, and return its output."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


def make_wheel(folder: Path, **environment: str) -> Path:
    """Return a wheel of this checkout, made as ``make wheel`` makes it, but in a copy."""
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            unwanted = shutil.ignore_patterns("__pycache__", "kernels")
            shutil.copytree(ROOT / name, checkout / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, checkout / name)
    # A kernel left by ``stepforge prebuild``. A plain install must not include it.
    stray = checkout / "stepforge" / "backends" / "native" / "kernels" / "plain" / "stray.so"
    stray.parent.mkdir(parents=True)
    stray.touch()
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--no-deps"]
    arguments = ["--no-build-isolation", "--no-index", "--wheel-dir", folder, checkout]
    run([*pip_wheel, *arguments], **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel in a new environment, with our torch and numpy; return its Python."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run([*pip, "install", "--no-deps", "--no-index", wheel])
    (site,) = folder.glob("lib/python*/site-packages")
    # Python searches the folders of a .pth file last, and does not read their own .pth files, such
    # as that of an editable stepforge.
    parents = {Path(package.__file__).parents[1] for package in (torch, np)}
    (site / "torch.pth").write_text("".join(f"{parent}\n" for parent in parents))
    return python


def run_without_compiler(python: Path, function: str, cache: Path) -> dict[str, Any]:
    """Run a function of ``steps.py`` with an empty PATH, and return its results.

    No environment variable is set but HOME and the cache's.
    """
    empty = cache.with_name("empty")
    empty.mkdir()
    done = subprocess.run(
        [python, "-I", "-W", "error", Path(__file__).with_name("steps.py"), function],
        cwd=empty,
        env={"PATH": str(empty), "HOME": str(empty), "STEPFORGE_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    assert Path(results["file"]).is_relative_to(python.parents[1]), "not the installed one"
    return results


def libraries(wheel: Path) -> list[str]:
    """Return the names of the shared libraries in a wheel."""
    return [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_a_wheel_with_kernels_steps_without_a_compiler(tmp_path: Path) -> None:
    """Only kernels of this processor's best instruction set; ``make wheel`` makes all of them."""
    needs_compiler(cpp=True)
    kernels = tmp_path / "kernels"
    cli = [sys.executable, "-c", "from stepforge.cli import main; main()"]
    run([*cli, "prebuild", "--output", kernels, "--isa", ISA or "plain"])
    wheel = make_wheel(tmp_path, STEPFORGE_KERNELS=str(kernels))

    assert re.fullmatch(r"stepforge-[\d.]+-py3-none-(?!any)\w+\.whl", wheel.name)
    found = libraries(wheel)
    inside = [name for name in found if name.startswith(f"{KERNELS}/{ISA or 'plain'}/")]
    (guards,) = set(found) - set(inside)
    assert len(inside) == len(c_sources())
    assert guards.startswith(f"{KERNELS}/extension/guards-torch{torch.__version__}-")

    cache = tmp_path / "cache"
    results = run_without_compiler(install(wheel, tmp_path / "env"), "compare", cache)
    assert results["differing"] == []
    assert results["compared"] == FORMS
    assert results["served"] == ["native"]
    assert results["guards"].endswith(guards)
    assert not cache.exists(), "a kernel was compiled"


def test_a_wheel_whose_guards_are_for_another_torch_steps_on_guards_in_python(
    tmp_path: Path,
) -> None:
    hashes = f"{'0' * 32}-{'1' * 32}"
    guards = tmp_path / "kernels" / "extension" / f"guards-torch2.9.9-cpython-311-{hashes}.so"
    guards.parent.mkdir(parents=True)
    guards.write_bytes(b"would crash")
    wheel = make_wheel(tmp_path, STEPFORGE_KERNELS=str(tmp_path / "kernels"))
    results = run_without_compiler(
        install(wheel, tmp_path / "env"), "without_kernel", tmp_path / "cache"
    )
    assert results["guards"] == (
        "no C++ compiler is on the PATH: install g++ or clang++; the extension in the package was "
        f"built for torch 2.9.9, and this is {torch.__version__}"
    )


def test_only_the_owner_can_write_kernels_of_a_wheel_whatever_the_umask(tmp_path: Path) -> None:
    kernel = tmp_path / "kernels" / "plain" / "kernel.so"
    kernel.parent.mkdir(parents=True)
    kernel.write_bytes(b"any")
    before = os.umask(0o000)
    try:
        wheel = make_wheel(tmp_path, STEPFORGE_KERNELS=str(kernel.parents[1]))
    finally:
        os.umask(before)
    (name,) = libraries(wheel)
    assert zipfile.ZipFile(wheel).getinfo(name).external_attr >> 16 & 0o777 == 0o644


def test_a_plain_install_is_pure_python_and_says_what_to_install(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries(wheel) == []
    pages = ("cli/page.css", "cli/demo/page.html", "cli/report/page.html")
    for data in ("cli/selftest/hashes.json", "step/guards.cpp", *pages):
        assert f"stepforge/{data}" in zipfile.ZipFile(wheel).namelist()

    results = run_without_compiler(
        install(wheel, tmp_path / "env"), "without_kernel", tmp_path / "cache"
    )
    assert results["error"].startswith("fused=True cannot serve a parameter of shape (1000,)")
    reason = "no C compiler is on the PATH: install gcc or clang"
    assert results["error"].endswith(reason)
    assert results["served"] == "foreach"
    (warning,) = results["warnings"]
    assert warning.endswith(reason)
    assert results["guards"] == "no C++ compiler is on the PATH: install g++ or clang++"


def test_a_wheel_without_the_kernels_asked_for_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(AssertionError, match="which holds no kernels: stepforge prebuild"):
        make_wheel(tmp_path, STEPFORGE_KERNELS=str(tmp_path / "nothing"))


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("objdump") is None, reason="needs objdump of Linux"
)
@pytest.mark.parametrize("isa", sorted({ISA, ""}), ids=lambda isa: isa or "plain")
def test_a_kernel_needs_nothing_of_the_system(tmp_path: Path, isa: str) -> None:
    """Then it runs on older systems than the one that compiled it. Oracle: objdump."""
    needs_compiler()
    for source in c_sources()[::19]:
        kernel = build.compile_into(tmp_path, "kernel", source, isa, compiler.compiler())
        table = run(["objdump", "--dynamic-syms", kernel]).splitlines()
        undefined = [line for line in table if "*UND*" in line]
        assert all(line.split()[1] == "w" for line in undefined), "more than weak symbols"
        assert "GLIBC_" not in "".join(undefined).replace("GLIBC_2.2.5", "")
