"""Prebuilt kernels. Oracles: the path of the loaded library, and ``p + 2 * g`` by torch."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import stepforge
from stepforge.backends import native
from stepforge.backends.native import build, compiler, prebuilt
from tests.backends.graphs import INSTRUCTION_SETS, c_of, graph_of, in_new_process
from tests.backends.native.faults import (
    altered,
    assert_right,
    bears_its_digest,
    emptied,
    key_of,
    leftovers,
    mode_of,
    never,
    new_graph,
    refusal,
    shortened,
)

SOURCE = c_of(new_graph(), torch.float32)
BEST, *LESSER = INSTRUCTION_SETS.values()
needs_lesser = pytest.mark.skipif(not LESSER, reason="this processor has one instruction set")


@pytest.fixture
def ahead(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the kernel for every instruction set; the cache does not exist yet."""
    folder = tmp_path / "ahead"
    for isa in INSTRUCTION_SETS.values():
        prebuilt.compile_ahead(folder, SOURCE, isa, compiler.compiler())
    monkeypatch.setenv("STEPFORGE_PREBUILT", str(folder))
    return folder


def the_kernel(folder: Path, isa: str) -> Path:
    (path,) = prebuilt.shelf(folder, isa).iterdir()
    return path


def loaded() -> Path:
    """Return the path of the library that is loaded for the small rule."""
    return Path(prebuilt.load(SOURCE)._name)


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nonexistent")


def test_it_serves_without_a_compiler_and_without_a_cache(
    ahead: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_compiler(monkeypatch)
    assert loaded() == the_kernel(ahead, BEST)
    assert_right()
    assert not cache.exists()


def test_it_serves_with_a_compiler_too(
    ahead: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", never)
    assert loaded() == the_kernel(ahead, BEST)
    assert not cache.exists()


def test_it_is_named_as_in_the_cache(ahead: Path) -> None:
    for isa in INSTRUCTION_SETS.values():
        kernel = the_kernel(ahead, isa)
        assert key_of(kernel) == build.key_of(SOURCE, isa)
        assert bears_its_digest(kernel)
        assert not leftovers(kernel.parent)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS.values(), ids=INSTRUCTION_SETS)
def test_the_forced_instruction_set_is_loaded_and_no_other(
    ahead: Path, cache: Path, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPFORGE_ISA", isa)
    assert loaded() == the_kernel(ahead, isa)
    assert_right()
    the_kernel(ahead, isa).unlink()
    assert loaded().parent == cache
    without_compiler(monkeypatch)
    shutil.rmtree(cache)
    assert "no" in refusal()


@needs_lesser
def test_a_lesser_instruction_set_serves_only_where_the_best_cannot_be_had(
    ahead: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    the_kernel(ahead, BEST).unlink()
    assert loaded().parent == cache
    shutil.rmtree(cache)
    without_compiler(monkeypatch)
    for isa in LESSER:  # the best of them first
        assert loaded() == the_kernel(ahead, isa)
        assert_right()
        the_kernel(ahead, isa).unlink()
    assert "CC names '/nonexistent', which is not on the PATH: install gcc or clang" in refusal()


@pytest.mark.parametrize("fault", [shortened, altered, emptied])
def test_a_damaged_kernel_is_passed_over(
    ahead: Path, cache: Path, fault: Callable[[bytes], bytes]
) -> None:
    kernel = the_kernel(ahead, BEST)
    kernel.write_bytes(fault(kernel.read_bytes()))
    assert loaded().parent == cache
    assert_right()


def test_an_unloadable_kernel_is_passed_over(ahead: Path, cache: Path) -> None:
    """As from another system that shares the disk."""
    kernel = the_kernel(ahead, BEST)
    content = b"no library"
    kernel.rename(kernel.with_name(f"{key_of(kernel)}-{build.digest(content)}.so"))
    the_kernel(ahead, BEST).write_bytes(content)
    assert bears_its_digest(the_kernel(ahead, BEST))
    assert loaded().parent == cache
    assert_right()


def test_a_kernel_of_another_source_or_other_flags_is_never_loaded(
    ahead: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Path(prebuilt.load(SOURCE + "\n")._name).parent == cache
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DUNUSED"))
    assert loaded().parent == cache


# The folder.


def test_the_package_s_own_folder_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEPFORGE_PREBUILT")
    assert prebuilt.folder() == Path(native.__file__).parent / "kernels"


def test_a_folder_that_is_missing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's own folder may be missing; one that the user names may not."""
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path / "missing")
    monkeypatch.delenv("STEPFORGE_PREBUILT")
    assert_right()
    monkeypatch.setenv("STEPFORGE_PREBUILT", str(tmp_path / "missing"))
    assert refusal() == f"STEPFORGE_PREBUILT is '{tmp_path}/missing', which is no folder"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(ahead: Path, mode: int) -> None:
    ahead.chmod(mode)
    sentence = refusal()
    assert "can be written to by others" in sentence
    assert f"chmod go-w {ahead}" in sentence


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_of_an_instruction_set_that_others_may_write_to_is_refused(
    ahead: Path, mode: int
) -> None:
    inner = prebuilt.shelf(ahead, BEST)
    inner.chmod(mode)
    assert refusal() == (
        f"the kernels in {inner} are not safe: {inner} can be written to by others, who could put "
        f"code there: chmod go-w {inner}"
    )


def test_a_folder_below_one_that_others_may_write_to_is_refused(ahead: Path) -> None:
    """They could replace the folder, unless its parent has the sticky bit."""
    parent = ahead.parent
    parent.chmod(0o777)
    assert f"{parent} can be written to by others" in refusal()
    parent.chmod(0o1777)
    assert loaded() == the_kernel(ahead, BEST)


def test_a_link_is_as_safe_as_its_target(
    ahead: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    ahead.rename(shared / "ahead")
    ahead.symlink_to(shared / "ahead")
    assert loaded() == the_kernel(shared / "ahead", BEST)
    shared.chmod(0o777)
    assert f"{shared} can be written to by others" in refusal()


def test_prebuilt_kernels_can_be_read_by_all_and_written_by_the_owner(
    tmp_path: Path, umask: int
) -> None:
    """Whatever the umask: one user installs, and others step."""
    folder = tmp_path / "new" / "ahead"
    kernel = prebuilt.compile_ahead(folder, SOURCE, BEST, compiler.compiler())
    assert mode_of(kernel) == 0o644
    assert [mode_of(folder) for folder in (*kernel.parents,)[:3]] == [0o755] * 3


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_kernel_that_others_may_write_to_is_passed_over(
    ahead: Path, cache: Path, mode: int
) -> None:
    the_kernel(ahead, BEST).chmod(mode)
    assert loaded().parent == cache


def test_an_empty_setting_turns_prebuilt_kernels_off(
    ahead: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPFORGE_PREBUILT", "")
    assert prebuilt.folder() is None
    assert loaded().parent == cache


def test_only_other_versions_are_removed(ahead: Path) -> None:
    kept = the_kernel(ahead, BEST)
    old = kept.with_name(f"{'0' * 32}-{'1' * 32}.so")
    foreign = kept.with_name("another.so")
    for path in (old, foreign):
        path.touch()
    prebuilt.prune(ahead, BEST, keep={kept})
    assert sorted(kept.parent.iterdir()) == sorted([kept, foreign])


def test_the_instruction_sets_to_prebuild_are_those_of_this_architecture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert set(prebuilt.instruction_sets()) <= {*compiler.LEVELS, ""}
    assert "" in prebuilt.instruction_sets(), "every processor needs a kernel"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert prebuilt.instruction_sets() == ("",)


# Optimizers.


def step_with_a_state_of_another_dtype() -> None:
    """Step where only the kernel for float32 exists. Oracle: the reference."""
    results = []
    for fused in (True, False):
        p = torch.nn.Parameter(torch.arange(5.0))
        p.grad = torch.ones_like(p)
        optimizer = stepforge.Adam([p], fused=fused)
        optimizer.step()
        assert not fused or stepforge.explain(optimizer).served[0].backend == "native"
        optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].double() / 3
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                optimizer.step()
        warned = ["install gcc or clang" in str(warning.message) for warning in caught]
        assert warned == ([True] if fused else [])
        results.append([p.detach(), *optimizer.state[p].values()])
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


def test_a_state_of_another_dtype_goes_through_torch_operations_with_a_warning(
    cache: Path, tmp_path: Path
) -> None:
    """A checkpoint may bring one at any time, after the choice of the backend."""
    folder = tmp_path / "ahead"
    source = c_of(graph_of("Adam"), torch.float32)
    prebuilt.compile_ahead(folder, source, BEST, compiler.compiler())
    in_new_process(
        step_with_a_state_of_another_dtype,
        STEPFORGE_PREBUILT=str(folder),
        STEPFORGE_GUARDS="python",
        CC="/nonexistent",
    )
