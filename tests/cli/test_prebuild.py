"""``stepforge prebuild``. Oracles: the files that it writes, and the conformance table."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner, Result

from stepforge import extension
from stepforge.backends.native import compiler, prebuilt
from stepforge.backends.native.dtypes import STORABLE
from stepforge.backends.native.source import c_source
from stepforge.backends.spec import KernelSpec, arithmetic_of
from stepforge.backends.triton.reduction_source import combine_source, pass_source
from stepforge.backends.triton.source import triton_source
from stepforge.backends.triton.variant import Target, Variant, units
from stepforge.cli import kernels, make_app
from stepforge.cli.kernels import c_sources, pass_specs, specs, triton_sources
from stepforge.state.layout import state_layout
from tests.backends.graphs import c_of, graph_of
from tests.backends.native.faults import bears_its_digest, executable
from tests.cli.compilers import needs_compiler
from tests.conformance.table import OPTIMIZERS, VARIANTS
from tests.extension.compilers import copying, ready_made

ISA = compiler.instruction_set()
NAME = ISA or "plain"
#: Some of all sources, for fast tests.
FEW = c_sources()[::40]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile only some sources, and no C++."""
    needs_compiler()
    monkeypatch.setattr(kernels, "c_sources", lambda: FEW)
    monkeypatch.setenv("CXX", "/nonexistent")


def run(*arguments: object) -> Result:
    command = ["prebuild", *map(str, arguments)]
    return CliRunner().invoke(make_app(), command)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.glob("*/*"))


def test_every_form_of_every_optimizer_in_every_dtype_is_a_source_once() -> None:
    forms = {
        c_of(graph_of(name, **options), dtype, arithmetic_of(dtype))
        for name, options in VARIANTS.values()
        for dtype in STORABLE
    }
    for name, options in VARIANTS.values():
        for dtype, more in (
            (torch.float32, {}),
            (torch.bfloat16, {"master_weight_bits": 24}),
        ):
            p = torch.zeros(64, 64, dtype=dtype)
            optimizer = OPTIMIZERS[name].ours([p], state_format="int8", **options, **more)
            (group,), rule = optimizer.param_groups, optimizer.rule
            layout, graph = state_layout(rule, group, p), rule.graph(group)
            dtypes = {"g": dtype, **layout.dtypes}
            forms.add(c_source(KernelSpec.of(graph, dtypes, layout.formats)))
    passes = set(map(c_source, pass_specs()))
    assert set(c_sources()) == forms | passes
    assert len(c_sources()) == len(forms | passes)


@pytest.mark.usefixtures("few")
def test_it_leaves_a_kernel_for_each_source(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    result = run("--output", folder, "--isa", NAME)
    assert result.exit_code == 0
    for source in FEW:
        (kernel,) = prebuilt.find(folder, source, ISA)
        assert bears_its_digest(kernel)
    size = sum(path.stat().st_size for path in folder.glob("*/*")) / 1e6
    summary = f"{len(FEW)} kernels for {NAME}: {size:.1f} MB in {folder}, in "
    assert summary in result.output
    assert f"To use them: STEPFORGE_PREBUILT={folder}\n" in result.output
    assert len(names(folder)) == len(FEW)
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.usefixtures("few")
def test_several_instruction_sets_by_default(tmp_path: Path) -> None:
    result = run("--output", tmp_path)
    assert result.exit_code == 0, result.output
    wanted = prebuilt.instruction_sets()
    assert len(names(tmp_path)) == len(FEW) * len(wanted)
    for isa in wanted:
        assert all(any(prebuilt.find(tmp_path, source, isa)) for source in FEW)
        assert (isa or "plain") in result.output


@pytest.mark.usefixtures("few")
def test_kernels_go_into_the_package_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kernels"
    monkeypatch.setattr(prebuilt, "FOLDER", folder)
    monkeypatch.delenv("STEPFORGE_PREBUILT", raising=False)
    result = run("--isa", NAME)
    assert result.exit_code == 0
    assert len(names(folder)) == len(FEW)
    assert "STEPFORGE_PREBUILT" not in result.output, "they are used as they are"


@pytest.mark.usefixtures("few")
def test_again_it_leaves_the_same_and_nothing_of_another_version(tmp_path: Path) -> None:
    run("--output", tmp_path, "--isa", NAME)
    before = names(tmp_path)
    (tmp_path / NAME / f"{'0' * 32}-{'1' * 32}.so").touch()
    run("--output", tmp_path, "--isa", NAME)
    assert names(tmp_path) == before


@pytest.mark.usefixtures("few")
def test_an_instruction_set_that_does_not_exist(tmp_path: Path) -> None:
    result = run("--output", tmp_path, "--isa", "mmx")
    assert result.exit_code == 2
    assert "'mmx' is not one of" in result.output
    assert all(f"'{level or 'plain'}'" in result.output for level in prebuilt.instruction_sets())


@pytest.mark.usefixtures("few")
def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nonexistent")
    result = run("--output", tmp_path / "kernels")
    assert result.exit_code == 1
    why = "CC names '/nonexistent', which is not on the PATH: install gcc or clang"
    assert result.output == f"stepforge: {why}\n"
    assert not (tmp_path / "kernels").exists()


@pytest.mark.usefixtures("few")
def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for parent in (tmp_path / "file", tmp_path / "mistyped"):
        result = run("--output", parent / "kernels")
        assert result.exit_code == 2
        assert f"there is no folder {parent}: make it, or name another." in result.output
    assert not (tmp_path / "mistyped").exists()
    folder = tmp_path / "file" / "kernels"
    monkeypatch.setattr(prebuilt, "FOLDER", folder)
    result = run()
    assert result.exit_code == 1
    assert result.output == (
        f"stepforge: {folder} cannot be written to (Not a directory): "
        "name a folder of yours with --output\n"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
@pytest.mark.usefixtures("few")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written to (Permission denied)" in run("--output", tmp_path).output


@pytest.mark.usefixtures("few")
def test_what_cannot_be_compiled_is_said_and_the_rest_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler cannot convert float16. Existing kernels stay."""
    folder, old = tmp_path / "kernels", f"{'0' * 32}-{'1' * 32}.so"
    (folder / NAME).mkdir(parents=True)
    (folder / NAME / old).touch()
    real = " ".join(compiler.compiler())
    script = f"""\
for file; do case $file in *.c) if grep -q widen_float16 $file; then
    echo "error: it is not known here" >&2; exit 1; fi;; esac; done
exec {real} "$@"
"""
    old_compiler = executable(tmp_path / "old-cc", script)
    monkeypatch.setenv("CC", str(old_compiler))
    float16 = [source for source in c_sources() if "widen_float16" in source][:2]
    others = [source for source in FEW if "widen_float16" not in source]
    monkeypatch.setattr(kernels, "c_sources", lambda: [*float16, *others])
    result = run("--output", folder, "--isa", NAME)
    assert result.exit_code == 1
    assert f"{len(others)} kernels for {NAME}: " in result.output
    why = f"{old_compiler} failed: error: it is not known here"
    assert f"2 could not be compiled: {why}\n" in result.output
    assert len(names(folder)) == len(others) + 1
    assert (folder / NAME / old).exists()


# Guards. ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few")
def test_guards_are_built_for_this_torch_and_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler copies a ready-made library. Oracle: what steps find in the folder."""
    monkeypatch.setenv("CXX", str(copying(tmp_path, ready_made(tmp_path))))
    folder = tmp_path / "kernels"
    result = run("--output", folder, "--isa", NAME)
    assert result.exit_code == 0, result.output
    versions = f"torch {torch.__version__}, {sysconfig.get_config_var('SOABI')}"
    assert f"\nguards in C++ for {versions}: 0.0 MB, in " in result.output
    (guards,) = folder.glob("extension/*")
    assert bears_its_digest(guards)
    monkeypatch.setattr(extension, "_module", None)
    monkeypatch.setenv("STEPFORGE_PREBUILT", str(folder))
    found = extension.module()
    assert isinstance(found, ModuleType)
    assert found.__file__ == str(guards)
    # Again it leaves the same, nothing of another source, and what is for another torch.
    old = guards.with_name(re.sub("-[0-9a-f]{32}-", f"-{'0' * 32}-", guards.name))
    other = guards.with_name(guards.name.replace(torch.__version__, "2.9.9"))
    for path in (old, other):
        path.touch()
    assert run("--output", folder, "--isa", NAME).exit_code == 0
    assert sorted(folder.glob("extension/*")) == sorted([guards, other])


@pytest.mark.usefixtures("few")
def test_without_a_cpp_compiler_there_are_kernels_alone(tmp_path: Path) -> None:
    result = run("--output", tmp_path, "--isa", NAME)
    assert result.exit_code == 0
    why = "CXX names '/nonexistent', which is not on the PATH: install g++ or clang++"
    assert f"\nno guards in C++: {why}\n" in result.output
    assert len(names(tmp_path)) == len(FEW)


@pytest.mark.usefixtures("few")
def test_a_failing_cpp_compiler_leaves_the_kernels_and_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = executable(tmp_path / "failing-c++", "echo 'error: out of paper' >&2; exit 1")
    monkeypatch.setenv("CXX", str(failing))
    folder = tmp_path / "kernels"
    result = run("--output", folder, "--isa", NAME)
    assert result.exit_code == 1
    assert f"\nno guards in C++: {failing} failed: error: out of paper\n" in result.output
    assert len(names(folder)) == len(FEW)
    assert list(folder.glob("extension/*")) == []


# Sources. -----------------------------------------------------------------------------------------


def sha256(text: str) -> str:
    """Return the first 32 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def test_sources_are_written_under_their_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the C source of every kernel, and its Triton sources: dense and strided."""
    monkeypatch.setenv("CC", "/nonexistent")
    monkeypatch.setenv("STEPFORGE_ISA", "not a set")  # nothing is compiled
    folder = tmp_path / "sources"
    result = run("--sources", folder)
    assert result.exit_code == 0, result.output
    written = {".c": set(), ".py": set()}
    for path in folder.iterdir():
        text = path.read_bytes().decode()
        assert path.stem == sha256(text)
        written[path.suffix].add(text)
    passes = set(map(c_source, pass_specs()))
    assert written[".c"] == {c_source(spec) for spec in specs()} | passes
    gpu = Target(rounds_bfloat16=True)
    forms = [(spec, Variant(dims=2, target=gpu)) for spec in specs()]
    forms += [(spec, Variant(unit=unit, target=gpu)) for spec in specs() for unit in units(spec)]
    found = {triton_source(*form) for form in forms}
    found |= {pass_source(spec, gpu) for spec in pass_specs()}
    choices = [("squares",), ("count",), ("squares", "count"), ("squares", "largest", "count")]
    found |= set(map(combine_source, choices))
    assert written[".py"] == found
    c, triton = len(written[".c"]), len(written[".py"])
    assert result.output == f"{c} C sources and {triton} Triton sources in {folder}\n"
    assert (c, triton) == (len(c_sources()), len(triton_sources()))


@pytest.fixture
def few_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the sources of only two kernels."""
    first = tuple(itertools.islice(specs(), 2))
    monkeypatch.setattr(kernels, "specs", lambda: iter(first))


@pytest.mark.usefixtures("few_sources")
def test_sources_of_another_version_are_removed_and_other_files_stay(tmp_path: Path) -> None:
    run("--sources", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) > 2
    others = ("notes.py", f"{'0' * 31}.c", f"{'0' * 32}.txt")
    for name in (f"{'0' * 32}.c", f"{'f' * 32}.py", *others):
        (tmp_path / name).touch()
    changed = next(iter(before))
    (tmp_path / changed).write_text("changed")
    assert run("--sources", tmp_path).exit_code == 0
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after == before | dict.fromkeys(others, b"")


@pytest.mark.usefixtures("few_sources")
@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: folder.touch(), r".*sources.* is a file\."),
        (
            lambda folder: folder.parent.rmdir(),
            r"there is no folder .*: make it, or name another\.",
        ),
        (
            lambda folder: (folder / f"{sha256(c_sources()[0])}.c").mkdir(parents=True),
            r".*sources cannot be written to \(Is a directory\)\.",
        ),
    ],
    ids=["a file", "no parent", "a folder of the same name"],
)
def test_a_bad_folder_for_sources_gets_one_sentence(
    tmp_path: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    folder = parent / "sources"
    spoil(folder)
    result = run("--sources", folder)
    assert result.exit_code == 2
    last = result.output.splitlines()[-1]
    assert re.fullmatch(rf"Error: Invalid value for '?--sources'?: {sentence}", last)


@pytest.mark.parametrize("option", [("--isa", "plain"), ("--output", "kernels")])
def test_sources_exclude_the_options_of_kernels(tmp_path: Path, option: tuple[str, str]) -> None:
    result = run("--sources", tmp_path / "sources", *option)
    assert result.exit_code == 2
    sentence = "it compiles nothing, so it excludes --output and --isa."
    assert result.output.splitlines()[-1] == f"Error: Invalid value for --sources: {sentence}"
    assert not (tmp_path / "sources").exists()
