"""``stepforge prebuild``. Oracles: the files that it leaves, and the conformance table."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from stepforge.backends.native import build, prebuilt
from stepforge.backends.native.dtypes import STORABLE
from stepforge.backends.native.source import c_source
from stepforge.backends.spec import KernelSpec, arithmetic_of
from stepforge.cli import make_app, variants
from stepforge.cli.variants import sources
from stepforge.state.layout import state_layout
from tests.backends.graphs import c_of, graph_of
from tests.backends.native.faults import bears_its_digest, executable
from tests.conformance.table import OPTIMIZERS, VARIANTS

ISA = build.instruction_set()
NAME = ISA or "plain"
#: Some of all, so that a test takes a moment.
FEW = sources()[::40]


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(variants, "sources", lambda: FEW)


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
            stored = {"g": dtype, **layout.dtypes}
            forms.add(c_source(KernelSpec.of(graph, stored, layout.formats)))
    assert set(sources()) == forms
    assert len(sources()) == len(forms)


def test_it_leaves_a_kernel_for_each_source(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    result = run("--output", folder, "--isa", NAME)
    assert result.exit_code == 0
    for source in FEW:
        (kernel,) = prebuilt.find(folder, source, ISA)
        assert bears_its_digest(kernel)
    size = sum(path.stat().st_size for path in folder.glob("*/*")) / 1e6
    said = f"{len(FEW)} kernels for {NAME}: {size:.1f} MB in {folder}, in "
    assert said in result.output
    assert f"To use them: STEPFORGE_PREBUILT={folder}\n" in result.output
    assert len(names(folder)) == len(FEW)
    assert folder.stat().st_mode & 0o777 == 0o755


def test_several_instruction_sets_by_default(tmp_path: Path) -> None:
    result = run("--output", tmp_path)
    assert result.exit_code == 0, result.output
    wanted = prebuilt.instruction_sets()
    assert len(names(tmp_path)) == len(FEW) * len(wanted)
    for isa in wanted:
        assert all(any(prebuilt.find(tmp_path, source, isa)) for source in FEW)
        assert (isa or "plain") in result.output


def test_into_the_package_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kernels"
    monkeypatch.setattr(prebuilt, "FOLDER", folder)
    monkeypatch.delenv("STEPFORGE_PREBUILT", raising=False)
    result = run("--isa", NAME)
    assert result.exit_code == 0
    assert len(names(folder)) == len(FEW)
    assert "STEPFORGE_PREBUILT" not in result.output, "they are used as they are"


def test_again_it_leaves_the_same_and_nothing_of_another_version(tmp_path: Path) -> None:
    run("--output", tmp_path, "--isa", NAME)
    before = names(tmp_path)
    (tmp_path / NAME / f"{'0' * 32}-{'1' * 32}.so").touch()
    run("--output", tmp_path, "--isa", NAME)
    assert names(tmp_path) == before


def test_an_instruction_set_that_does_not_exist(tmp_path: Path) -> None:
    result = run("--output", tmp_path, "--isa", "mmx")
    assert result.exit_code == 2
    assert "'mmx' is not one of" in result.output
    assert all(f"'{level or 'plain'}'" in result.output for level in prebuilt.instruction_sets())


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nonexistent")
    result = run("--output", tmp_path / "kernels")
    assert result.exit_code == 1
    why = "CC names '/nonexistent', which is not on the PATH: install gcc or clang"
    assert result.output == f"stepforge: {why}\n"
    assert not (tmp_path / "kernels").exists()


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
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written to (Permission denied)" in run("--output", tmp_path).output


def test_what_cannot_be_compiled_is_said_and_the_rest_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a compiler that lacks what some of them ask for; kernels that are there stay."""
    folder, old = tmp_path / "kernels", f"{'0' * 32}-{'1' * 32}.so"
    (folder / NAME).mkdir(parents=True)
    (folder / NAME / old).touch()
    real = " ".join(build.compiler())
    script = f"""\
for file; do case $file in *.c) if grep -q widen_float16 $file; then
    echo "error: it is not known here" >&2; exit 1; fi;; esac; done
exec {real} "$@"
"""
    compiler = executable(tmp_path / "old-cc", script)
    monkeypatch.setenv("CC", str(compiler))
    float16 = [source for source in sources() if "widen_float16" in source][:2]
    others = [source for source in FEW if "widen_float16" not in source]
    monkeypatch.setattr(variants, "sources", lambda: [*float16, *others])
    result = run("--output", folder, "--isa", NAME)
    assert result.exit_code == 1
    assert f"{len(others)} kernels for {NAME}: " in result.output
    why = f"{compiler} failed: error: it is not known here"
    assert f"2 could not be compiled: {why}\n" in result.output
    assert len(names(folder)) == len(others) + 1
    assert (folder / NAME / old).exists()
