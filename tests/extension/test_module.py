"""The places that an extension comes from, and reasons to refuse one. Oracle: a string that each
extension holds, which says who made it; the calls that a compiler logs.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
import torch

from stepforge import extension
from stepforge.backends import disk_cache
from stepforge.extension import compiler, target
from stepforge.extension.order import Order
from tests.backends.native.faults import (
    altered,
    bears_its_digest,
    emptied,
    mode_of,
    never,
    raises_os_error,
    shortened,
)
from tests.extension.compilers import calls, copying, ready_made
from tests.extension.test_background import BUILDING, waited

PYTHON = sysconfig.get_config_var("SOABI")


@pytest.fixture
def ahead(tmp_path: Path, cxx: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of prebuilt kernels with an extension."""
    folder = tmp_path / "ahead"
    extension.build_into(folder)
    (tmp_path / "log").unlink()
    monkeypatch.setenv("STEPFORGE_PREBUILT", str(folder))
    return folder


def the_extension(folder: Path) -> Path:
    (path,) = folder.rglob("*.so")
    return path


def renamed(path: Path, part: str, by: str) -> Path:
    """Rename an extension's file as if it were for another target; return the new path."""
    assert path.name.count(part) == 1
    return path.rename(path.with_name(path.name.replace(part, by)))


# Prebuilt.


def test_a_prebuilt_one_needs_neither_compiler_nor_cache(
    ahead: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setattr(tempfile, "mkdtemp", never)
    module = extension.module()
    assert module.made_by == "a test"
    assert module.__file__ == str(the_extension(ahead))
    assert not cache.parent.exists()
    assert calls(tmp_path) == 0


def test_a_prebuilt_one_can_be_read_by_all_and_bears_its_targets(ahead: Path) -> None:
    path = the_extension(ahead)
    assert path.parent == ahead / "extension"
    assert path.name.startswith(f"guards-torch{torch.__version__}-{PYTHON}-")
    assert bears_its_digest(path)
    assert [mode_of(x) for x in (path, path.parent, ahead)] == [0o644, 0o755, 0o755]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("part", "by", "said"),
    [
        (
            f"torch{torch.__version__}",
            "torch2.9.9",
            f"was built for torch 2.9.9, and this is {torch.__version__}",
        ),
        (PYTHON, "cpython-39-sparc", f"was built for cpython-39-sparc, and this is {PYTHON}"),
    ],
    ids=["torch", "python"],
)
def test_one_for_another_torch_or_python_is_refused_and_not_loaded(
    ahead: Path, part: str, by: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed(the_extension(ahead), part, by)
    monkeypatch.setattr(extension.load, "_load", never)
    monkeypatch.setenv("CXX", "/nonexistent")
    assert extension.module() == (
        "CXX names '/nonexistent', which is not on the PATH: install g++ or clang++; the "
        f"extension in {ahead}/extension {said}"
    )


def test_one_of_another_source_or_other_flags_is_refused_and_not_loaded(
    ahead: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension.load, "_load", never)
    monkeypatch.setenv("CXX", "/nonexistent")
    for change in (
        lambda: monkeypatch.setattr(target, "source", lambda: "another"),
        lambda: monkeypatch.setattr(target, "FLAGS", ("-O0",)),
        lambda: monkeypatch.setattr(torch.version, "git_version", "0" * 40),
        lambda: monkeypatch.setattr("platform.machine", lambda: "sparc"),
        lambda: monkeypatch.setattr(target, "cxx11_abi", lambda: "0"),
    ):
        with monkeypatch.context():
            before = target.name()
            change()
            assert target.name() != before
            extension._next_look = 0.0
            reason = extension.module()
        assert str(reason).endswith(f"{ahead}/extension was built from another source")


def test_one_for_another_torch_is_built_anew_in_the_cache(
    ahead: Path, cache: Path, tmp_path: Path
) -> None:
    renamed(the_extension(ahead), f"torch{torch.__version__}", "torch2.9.9")
    reason = extension.module()
    assert isinstance(reason, str)
    assert reason.startswith(f"{BUILDING}; the extension in ")
    assert Path(str(waited().__file__)).parent == cache
    assert calls(tmp_path) == 1


@pytest.mark.parametrize("fault", [shortened, altered, emptied])
def test_a_damaged_prebuilt_one_is_passed_over(
    ahead: Path, cache: Path, fault: Callable[[bytes], bytes]
) -> None:
    path = the_extension(ahead)
    path.write_bytes(fault(path.read_bytes()))
    reason = str(extension.module())
    assert reason.endswith("does not load, is damaged, or can be changed by others")
    assert Path(str(waited().__file__)).parent == cache


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_prebuilt_one_that_others_may_write_to_is_passed_over(
    ahead: Path, cache: Path, mode: int
) -> None:
    the_extension(ahead).chmod(mode)
    assert Path(str(waited().__file__)).parent == cache


def test_a_prebuilt_one_that_does_not_load_is_passed_over(ahead: Path, cache: Path) -> None:
    with_content(the_extension(ahead), b"no library")
    assert Path(str(waited().__file__)).parent == cache


@pytest.mark.parametrize("inner", [False, True])
def test_a_prebuilt_folder_that_others_may_write_to_is_refused(ahead: Path, inner: bool) -> None:
    folder = ahead / "extension" if inner else ahead
    folder.chmod(0o777)
    assert f"{folder} can be written to by others" in str(extension.module())


def with_content(path: Path, content: bytes) -> Path:
    """Replace the content of an extension's file, and the hash of it in the name."""
    digest = hashlib.sha256(content).hexdigest()[:32]
    other = path.with_name(f"{path.stem.rsplit('-', 1)[0]}-{digest}.so")
    path.unlink()
    other.write_bytes(content)
    other.chmod(0o600)
    return other


# The cache.


@pytest.fixture
def filled(cache: Path, cxx: Path, tmp_path: Path) -> Path:
    """The extension's file in the cache, which no process has loaded."""
    order = extension._find()
    assert isinstance(order, Order)
    disk_cache.cache_folder("extension")
    order.run()
    (tmp_path / "log").unlink()
    return the_extension(cache)


def test_one_in_the_cache_is_taken(filled: Path, tmp_path: Path) -> None:
    assert extension.module().made_by == "a test"
    assert calls(tmp_path) == 0


@pytest.mark.parametrize("fault", [shortened, altered, emptied])
def test_a_damaged_one_in_the_cache_is_built_again(
    filled: Path, tmp_path: Path, fault: Callable[[bytes], bytes]
) -> None:
    whole = filled.read_bytes()
    filled.write_bytes(fault(whole))
    assert waited().made_by == "a test"
    assert calls(tmp_path) == 1
    assert filled.read_bytes() == whole


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_one_in_the_cache_that_others_may_write_to_is_built_again(
    filled: Path, tmp_path: Path, mode: int
) -> None:
    filled.chmod(mode)
    assert waited().made_by == "a test"
    assert calls(tmp_path) == 1
    assert mode_of(filled) == 0o600


def test_one_in_the_cache_that_does_not_load_is_a_reason(filled: Path, tmp_path: Path) -> None:
    """It would not load once more if it was built once more."""
    path = with_content(filled, b"no library")
    reason = str(extension.module())
    assert reason.startswith(f"the compiled extension cannot be loaded ({path.name}: ")
    assert calls(tmp_path) == 0


def test_one_whose_init_function_raises_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising = ready_made(tmp_path, "nobody", init='PyErr_SetString(PyExc_ValueError, "unlike")')
    monkeypatch.setenv("CXX", str(copying(tmp_path, raising)))
    assert waited() == "the compiled extension cannot be loaded (unlike)"


def test_one_by_another_compiler_serves_where_there_is_none(
    filled: Path, tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    theirs = copying(other, ready_made(other, "another compiler"))
    monkeypatch.setenv("CXX", str(theirs))
    assert waited().made_by == "another compiler"
    monkeypatch.setattr(extension, "_module", None)
    monkeypatch.setenv("CXX", "/nonexistent")
    assert waited().made_by in ("a test", "another compiler")


@pytest.mark.parametrize("which", ["cache", "subfolder"])
def test_a_cache_that_others_may_write_to_is_refused(filled: Path, which: str) -> None:
    folder = filled.parent if which == "subfolder" else filled.parents[1]
    folder.chmod(0o777)
    assert f"{folder} can be written to by others" in str(extension.module())


def test_a_cache_that_cannot_be_written_to(cxx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", raises_os_error(30))
    reason = str(extension.module())
    assert "cannot be written to (Read-only file system): set STEPFORGE_CACHE" in reason


def test_without_a_home(cxx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STEPFORGE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert "as no home folder is known" in str(extension.module())


# The compiler.


def test_without_a_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert extension.module() == "no C++ compiler is on the PATH: install g++ or clang++"
    assert not cache.parent.exists()


def test_a_command_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", 'g++ "')
    assert extension.module() == "CXX is 'g++ \"', which is no command (No closing quotation)"


def test_without_python_s_headers(
    cxx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    assert extension.module() == (
        f"Python's headers are missing ({tmp_path}/include/Python.h): install those of this Python"
    )
    assert calls(tmp_path) == 0


def test_without_the_global_interpreter_lock(
    cxx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = sysconfig.get_config_var
    monkeypatch.setattr(
        sysconfig, "get_config_var", lambda name: name == "Py_GIL_DISABLED" or known(name)
    )
    assert extension.module() == (
        "the C++ guards need the global interpreter lock, which this Python lacks"
    )
    assert calls(tmp_path) == 0


def test_without_torch_s_headers(
    cxx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "_torch", lambda: tmp_path)
    assert f"torch's headers are missing ({tmp_path}/include/" in str(extension.module())
    assert calls(tmp_path) == 0


def test_a_compiler_that_is_installed_later_is_used_within_a_second(
    cxx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = os.environ["CXX"]
    monkeypatch.setenv("CXX", "/nonexistent")
    assert "which is not on the PATH" in str(extension.module())
    monkeypatch.setenv("CXX", there)
    deadline = time.monotonic() + 30
    while isinstance(extension.module(), str):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# STEPFORGE_GUARDS.


def test_python_means_never(ahead: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFORGE_GUARDS", "python")
    monkeypatch.setattr(extension.load, "_load", never)
    assert extension.module() == extension.status() == "STEPFORGE_GUARDS asks for python"


def test_the_variable_is_followed(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, found in [("", True), ("python", False), ("cpp", True), ("python", False)]:
        monkeypatch.setenv("STEPFORGE_GUARDS", value)
        assert isinstance(extension.module(), ModuleType) == found
    monkeypatch.delenv("STEPFORGE_GUARDS")
    assert isinstance(extension.module(), ModuleType)


def test_cpp_builds_it_at_once(cache: Path, cxx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFORGE_GUARDS", "cpp")
    assert extension.module().made_by == "a test"
    assert the_extension(cache).exists()


def test_cpp_waits_for_a_build_in_the_background(
    cache: Path, tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(copying(tmp_path, library, "sleep 1")))
    assert isinstance(extension.module(), str)
    monkeypatch.setenv("STEPFORGE_GUARDS", "cpp")
    assert extension.module().made_by == "a test"
    assert calls(tmp_path) == 1


def test_cpp_raises_the_reason_and_does_not_compile_in_each_step(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = copying(tmp_path, library, 'echo "error: out of paper" >&2; exit 1')
    monkeypatch.setenv("CXX", str(failing))
    monkeypatch.setenv("STEPFORGE_GUARDS", "cpp")
    expected = f"STEPFORGE_GUARDS=cpp cannot be served: {failing} failed: error: out of paper"
    for _ in range(3):
        with pytest.raises(RuntimeError) as raised:
            extension.module()
        assert str(raised.value) == expected
    assert calls(tmp_path) == 1


def test_another_value_is_refused(ahead: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFORGE_GUARDS", "rust")
    for ask in (extension.module, extension.status):
        with pytest.raises(
            ValueError, match="STEPFORGE_GUARDS is 'rust'; it must be one of python"
        ):
            ask()


def test_the_status_starts_no_build(cache: Path, cxx: Path, tmp_path: Path) -> None:
    assert extension.status() == ("the C++ guards are not built yet: the first step has them built")
    assert not cache.parent.exists()
    assert calls(tmp_path) == 0


def test_a_signal_handler_that_steps_during_a_build_builds_its_own(
    cxx: Path, tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not wait for the build that it interrupts."""
    other = tmp_path / "other"
    other.mkdir()
    waits = f"kill -USR1 {os.getpid()}; for x in $(seq 200); do [ -e {tmp_path}/go ] && break; "
    slow = copying(other, library, f"{waits} sleep 0.05; done")
    found = []

    def handle(signum: int, frame: object) -> None:
        monkeypatch.setenv("CXX", str(cxx))
        found.append(extension.module())
        (tmp_path / "go").touch()

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        monkeypatch.setenv("CXX", str(slow))
        monkeypatch.setenv("STEPFORGE_GUARDS", "cpp")
        extension.module()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert found[0].made_by == "a test"


# Import, threads.


def test_the_import_neither_loads_nor_builds_it(cache: Path, cxx: Path, tmp_path: Path) -> None:
    code = """if True:
        import sys, stepforge
        from stepforge import extension
        assert extension._module is None
        assert not [name for name in sys.modules if name == "stepforge.extension._guards"]
        for name in ("setuptools", "torch.utils.cpp_extension"):
            assert name not in sys.modules, name
    """
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    assert not cache.parent.exists()
    assert calls(tmp_path) == 0


def test_threads_load_one(filled: Path) -> None:
    found: list[ModuleType | str] = []
    barrier = threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        found.append(extension.build_into_cache())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1


# Prebuilt by the command, and the real source.


def test_only_older_ones_of_the_same_torch_and_python_are_pruned(ahead: Path) -> None:
    kept = the_extension(ahead)
    old = kept.with_name(f"guards-torch{torch.__version__}-{PYTHON}-{'0' * 32}-{'1' * 32}.so")
    other = kept.with_name(kept.name.replace(torch.__version__, "2.9.9"))
    foreign = kept.with_name("another.so")
    for path in (old, other, foreign):
        path.touch()
    extension.prune(ahead, keep={kept})
    assert sorted(kept.parent.iterdir()) == sorted([kept, other, foreign])


def test_steps_do_not_take_an_extension_with_other_flags(ahead: Path) -> None:
    the_extension(ahead).unlink()
    extension.build_into(ahead, "-fsanitize=address")
    assert str(extension.status()).endswith("was built from another source")


def test_the_real_source_compiles_and_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """From where ``tests/conftest.py`` has found it, or has put it. Oracle: the system's loader."""
    monkeypatch.undo()
    if os.environ.get("STEPFORGE_GUARDS") == "python":
        pytest.skip("the suite runs on guards in Python")
    monkeypatch.setattr(extension, "_module", None)
    module = extension.status()
    assert isinstance(module, ModuleType), module
    assert not hasattr(module, "made_by")
