"""Faults on the way to a kernel. Oracle: ``p + 2 * g`` by torch, which is exact for small integers.
Each fault ends in that result or in one sentence.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import pwd
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch

import stepforge
from stepforge.backends import cache as process_cache
from stepforge.backends import disk_cache, trust
from stepforge.backends.native import Kernel, build, compiler, kernel_for
from tests.backends.graphs import INSTRUCTION_SETS, by_kernel, in_new_process, spec_of, traced
from tests.backends.native.faults import (
    altered,
    assert_right,
    bears_its_digest,
    emptied,
    evil_library,
    executable,
    kernels,
    key_of,
    leftovers,
    mode_of,
    never,
    new_graph,
    processor_of_level_3,
    raises_os_error,
    refusal,
    shortened,
    unloadable,
    wait_for,
)

PROCESSES = 16
#: The compiler's command, quoted for a shell.
try:
    COMPILER = shlex.join(compiler.compiler())
except disk_cache.BuildError:  # all tests skip
    COMPILER = "cc"


# The cache.


def test_a_kernel_is_compiled_once_into_a_private_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_right()
    (kernel,) = kernels(cache)
    assert bears_its_digest(kernel)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert not leftovers(cache)
    monkeypatch.setattr(tempfile, "mkdtemp", never)
    assert_right()
    assert kernels(cache) == [kernel]


def test_the_cache_is_in_the_user_s_cache_folder_unless_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STEPFORGE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert disk_cache.cache_folder() == tmp_path / "home" / ".cache" / "stepforge"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert disk_cache.cache_folder() == tmp_path / "xdg" / "stepforge"
    monkeypatch.setenv("STEPFORGE_CACHE", str(tmp_path / "named"))
    assert disk_cache.cache_folder() == tmp_path / "named"
    assert all(folder.stat().st_mode & 0o777 == 0o700 for folder in tmp_path.glob("*/stepforge"))


def test_a_cache_below_a_file_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("STEPFORGE_CACHE", str(file / "cache"))
    assert f"{file}/cache cannot be made (Not a directory): set STEPFORGE_CACHE" in refusal()


def test_a_cache_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch(mode=0o600)
    monkeypatch.setenv("STEPFORGE_CACHE", str(file))
    assert "cannot be made (File exists): set STEPFORGE_CACHE" in refusal()


def test_a_cache_that_may_not_be_written_still_serves_what_it_has(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(mode=0o700)
    # As for a regular user in a folder of mode 0500. Root is not bound by permissions.
    monkeypatch.setattr(tempfile, "mkdtemp", raises_os_error(errno.EACCES))
    assert "cannot be written to (Permission denied): set STEPFORGE_CACHE" in refusal()
    monkeypatch.undo()
    monkeypatch.setenv("STEPFORGE_CACHE", str(cache))
    assert_right()
    monkeypatch.setattr(tempfile, "mkdtemp", raises_os_error(errno.EACCES))
    assert_right()


@pytest.mark.skipif(os.geteuid() == 0, reason="root is not bound by permissions")
def test_a_read_only_cache(cache: Path) -> None:
    cache.mkdir(mode=0o500)
    assert "cannot be written to (Permission denied): set STEPFORGE_CACHE" in refusal()


@pytest.mark.parametrize("where", ["os.replace", "pathlib.Path.write_text"])
def test_a_full_disk(cache: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, raises_os_error(errno.ENOSPC))
    assert "cannot be written to (No space left on device): set STEPFORGE_CACHE" in refusal()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_cache_that_others_may_write_to_is_refused(cache: Path, mode: int) -> None:
    cache.mkdir()
    cache.chmod(mode)
    sentence = refusal()
    assert "can be written to by others" in sentence
    assert f"chmod 700 {cache}" in sentence
    assert list(cache.iterdir()) == []
    cache.chmod(0o755)
    assert_right()


def test_a_cache_that_belongs_to_another_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(mode=0o700)
    other = os.geteuid() + 1
    monkeypatch.setattr(trust, "belongs_to_user", lambda status: status.st_uid == other)
    assert f"{cache} belongs to another user" in refusal()
    assert list(cache.iterdir()) == []


def test_kernels_are_private_whatever_the_umask(
    tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also missing parent folders, such as ~/.cache."""
    cache = tmp_path / "home" / "cache"
    monkeypatch.setenv("STEPFORGE_CACHE", str(cache))
    assert_right()
    (kernel,) = kernels(cache)
    assert [mode_of(path) for path in (kernel, cache, cache.parent)] == [0o600, 0o700, 0o700]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_kernel_file_that_others_may_write_to_is_rebuilt(filled: Path, mode: int) -> None:
    (kernel,) = kernels(filled)
    kernel.chmod(mode)
    before = kernel.stat().st_ino
    assert_right()
    (kernel,) = kernels(filled)
    assert mode_of(kernel) == 0o600
    assert kernel.stat().st_ino != before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_kernel_file_that_belongs_to_another_is_rebuilt(filled: Path) -> None:
    (kernel,) = kernels(filled)
    os.chown(kernel, 2, 2)
    assert_right()
    assert kernels(filled) == [kernel]
    assert kernel.stat().st_uid == os.geteuid()


def test_a_cache_in_a_folder_that_others_may_write_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They could replace the cache, unless the folder has the sticky bit."""
    parent = tmp_path / "shared"
    parent.mkdir()
    cache = parent / "mine" / "cache"
    monkeypatch.setenv("STEPFORGE_CACHE", str(cache))
    parent.chmod(0o777)
    assert refusal() == (
        f"the kernel cache {cache} is not safe: {parent} can be written to by others, who could "
        f"put code there: chmod go-w {parent}, or set STEPFORGE_CACHE to a folder of yours"
    )
    assert list(parent.iterdir()) == []
    parent.chmod(0o1777)
    assert_right()
    assert len(kernels(cache)) == 1


def test_a_link_to_a_cache_is_as_safe_as_its_target(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "shared" / "cache"
    target.mkdir(mode=0o700, parents=True)
    cache.symlink_to(target)
    target.parent.chmod(0o777)
    assert f"{target.parent} can be written to by others" in refusal()
    target.parent.chmod(0o755)
    assert_right()
    assert disk_cache.cache_folder() == target
    assert len(kernels(target)) == 1


def test_without_a_home_there_is_no_cache_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for the user of a container who is not in its list of users."""
    monkeypatch.chdir(tmp_path)
    for name in ("STEPFORGE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert refusal() == (
        "the kernel cache ~/.cache/stepforge has no place, as no home folder is known: set HOME, "
        "or STEPFORGE_CACHE to a folder of yours"
    )
    monkeypatch.setenv("STEPFORGE_CACHE", "~/kernels")
    assert "the kernel cache ~/kernels has no place" in refusal()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert disk_cache.cache_folder() == tmp_path / "home" / "kernels"


def test_a_relative_xdg_cache_home_is_ignored_as_its_specification_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STEPFORGE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert disk_cache.cache_folder() == tmp_path / ".cache" / "stepforge"


@pytest.fixture(params=["/proc/self/fd", "/nonexistent"], ids=["by-descriptor", "by-copy"])
def way_to_load(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load by file descriptor where the system has /proc, and by a private copy elsewhere."""
    monkeypatch.setattr(build, "_OPEN_FILES", request.param)


@pytest.mark.usefixtures("way_to_load")
def test_the_checked_bytes_are_the_loaded_bytes(
    cache: Path, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if another library replaces the file in between."""
    (original,) = kernels(filled)
    cache.mkdir(mode=0o700)
    kernel = Path(shutil.copy(original, cache))  # no process has loaded it
    monkeypatch.setenv("STEPFORGE_CACHE", str(cache))
    evil = evil_library(filled.parent / "evil.so")
    digest = build.digest

    def exchange(content: bytes) -> str:
        if content == before:
            os.replace(evil, kernel)
        return digest(content)

    before = kernel.read_bytes()
    monkeypatch.setattr(build, "digest", exchange)
    assert_right()
    assert not evil.exists(), "nothing was exchanged"


@pytest.mark.usefixtures("way_to_load")
def test_kernels_that_are_opened_one_after_the_other_are_not_mixed_up(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reuses the file descriptor of the previous one, which the loader takes for its name."""
    p = torch.arange(100.0)
    for factor in [1.0, 2.0, 3.0, 4.0, 5.0] * 2:  # first built, then found
        graph = traced(functools.partial(lambda factor, p, g: p + factor * g, factor))
        (result,) = by_kernel(graph, [{"p": p, "g": p}], [[]], torch.float32)
        assert torch.equal(result["p"], p + factor * p)
    assert len(kernels(cache)) == 5


@pytest.mark.parametrize("fault", [shortened, altered, emptied])
def test_a_damaged_kernel_file_is_rebuilt(
    cache: Path, filled: Path, fault: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (original,) = kernels(filled)
    cache.mkdir(mode=0o700)
    damaged = cache / original.name
    damaged.write_bytes(fault(original.read_bytes()))
    monkeypatch.setenv("STEPFORGE_CACHE", str(cache))
    assert_right()
    assert all(map(bears_its_digest, kernels(cache)))
    assert len(kernels(cache)) == 1
    assert not leftovers(cache)


def test_a_kernel_under_another_s_name_is_not_loaded(
    cache: Path, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (original,) = kernels(filled)
    cache.mkdir(mode=0o700)
    zeros = "0" * 32
    for name in (f"{key_of(original)}-{zeros}", original.stem.replace(key_of(original), zeros)):
        (cache / f"{name}.so").write_bytes(original.read_bytes())
    monkeypatch.setenv("STEPFORGE_CACHE", str(cache))
    assert_right()
    assert (cache / original.name).exists()


def test_an_unloadable_kernel_is_rebuilt_once(
    cache: Path, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from another system that shares the disk, which the name does not tell."""
    (original,) = kernels(filled)
    unloadable(cache, original)
    monkeypatch.setenv("STEPFORGE_CACHE", str(cache))
    assert_right()
    assert (cache / original.name).exists()
    monkeypatch.setattr(tempfile, "mkdtemp", never)
    assert_right()


def test_without_a_compiler_an_unloadable_kernel_is_passed_over(
    cache: Path, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (original,) = kernels(filled)
    unloadable(cache, original)
    monkeypatch.setenv("STEPFORGE_CACHE", str(cache))
    monkeypatch.setenv("CC", "/nonexistent")
    assert "CC names '/nonexistent'" in refusal()
    (cache / original.name).write_bytes(original.read_bytes())
    assert_right()


def test_a_new_kernel_that_cannot_be_loaded_is_a_reason(cache: Path, named_compiler: Path) -> None:
    """For example from a compiler for another machine."""
    log = cache.with_name("log")
    executable(
        named_compiler,
        f"""\
if [ "$1" = --version ]; then echo 1; exit; fi
echo called >> {log}
while [ "$1" != -o ]; do shift; done
echo "no library" > "$2"
""",
    )
    for calls in (1, 2):  # one call each time
        assert "the compiled kernel cannot be loaded (" in refusal()
        assert len(log.read_text().splitlines()) == calls


def test_an_interrupted_build_does_not_matter(cache: Path) -> None:
    interrupted = cache / "build-0a1b2c3d"
    interrupted.mkdir(parents=True)
    cache.chmod(0o700)
    (interrupted / "kernel.c").write_text("half a fil")
    (interrupted / "kernel.so").write_bytes(b"\x7fELF")
    assert_right()
    assert len(kernels(cache)) == 1
    assert all(map(bears_its_digest, kernels(cache)))
    assert interrupted.exists(), "its process may still be running"


def test_builds_that_were_interrupted_days_ago_are_removed(cache: Path) -> None:
    """But no files of others, if the cache is set to a folder with other projects."""
    abandoned, theirs = cache / "build-0a1b2c3d", cache / "build-projects"
    for folder, name in ((abandoned, "kernel.c"), (theirs, "kernel.c"), (theirs, "main.c")):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / name).write_text("half a fil")
    cache.chmod(0o700)
    limit = time.time() - disk_cache.ABANDONED_S
    os.utime(abandoned, (limit - 60, limit - 60))
    os.utime(theirs, (limit - 60, limit - 60))
    young = cache / "build-4e5f6a7b"
    young.mkdir()
    os.utime(young, (limit + 60, limit + 60))
    assert_right()
    assert not abandoned.exists()
    assert len(list(theirs.iterdir())) == 2
    assert young.exists()


@pytest.mark.skipif(disk_cache.fcntl is None, reason="this system has no file locks")
def test_a_build_that_lasts_for_days_is_not_removed_while_its_process_lives(
    cache: Path, tmp_path: Path, real_compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that was suspended, or whose clock was set."""
    started = tmp_path / "started"
    waits = f'for x; do case $x in */kernel.so) echo "$x" > {started}.new; esac; done'
    waits += f"; mv {started}.new {started}; exec sleep 60"
    slow = executable(
        tmp_path / "slow-cc", f'if [ "$1" = --version ]; then echo 1; exit; fi; {waits}'
    )
    code = "from tests.backends.native.faults import assert_right; assert_right()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"CC": str(slow)}, start_new_session=True
    )
    try:
        wait_for(started)
        work = Path(started.read_text().strip()).parent
        os.utime(work, (1e9, 1e9))
        assert_right()
        assert work.exists(), "its process is running"
    finally:
        process.kill()
        process.wait()
    os.utime(work, (1e9, 1e9))
    kernels(cache)[0].unlink()
    assert_right()
    assert not work.exists()


def build_in_many_processes() -> None:
    """Fork processes that start to build at the same moment; fail if one fails."""
    gate, release = os.pipe()
    children = []
    for _ in range(PROCESSES):
        child = os.fork()
        if child == 0:
            os.close(release)
            os.read(gate, 1)
            try:
                assert_right()
            except BaseException as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        children.append(child)
    os.close(release)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * PROCESSES


def test_processes_that_start_at_once_on_an_empty_cache(cache: Path) -> None:
    in_new_process(build_in_many_processes)
    assert len(kernels(cache)) == 1
    assert all(map(bears_its_digest, kernels(cache)))
    assert not leftovers(cache)


# The key of a kernel.


@pytest.fixture
def real_compiler() -> str:
    """The compiler's command, quoted for a shell."""
    return COMPILER


@pytest.fixture
def named_compiler(real_compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a compiler that CC names, for a test to write."""
    path = tmp_path / "fake-cc"
    monkeypatch.setenv("CC", str(path))
    return path


@pytest.mark.parametrize("flag", ["-DUNUSED", "-fno-inline"])
def test_other_flags_make_another_kernel(
    cache: Path, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_right()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, flag))
    for _ in range(2):
        assert_right()
        assert len(set(map(key_of, kernels(cache)))) == 2


def test_another_version_of_the_compiler_makes_another_kernel(
    cache: Path, named_compiler: Path, real_compiler: str
) -> None:
    """Also if it replaces the old one while a process runs."""
    for count, version in enumerate(["1.0", "2.0"], start=1):
        prints = f'if [ "$1" = --version ]; then echo "cc {version}"; exit; fi'
        executable(named_compiler, f'{prints}\nexec {real_compiler} "$@"')
        os.utime(named_compiler, (count, count))
        for _ in range(2):
            assert_right()
            assert len(kernels(cache)) == count


@pytest.mark.skipif(len(INSTRUCTION_SETS) < 2, reason="this processor has one instruction set")
def test_every_instruction_set_has_its_own_kernel(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        for isa in INSTRUCTION_SETS.values():
            monkeypatch.setenv("STEPFORGE_ISA", isa)
            assert_right()
    assert len(set(map(key_of, kernels(cache)))) == len(INSTRUCTION_SETS)


def test_an_instruction_set_that_does_not_exist(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPFORGE_ISA", "x86-64-v9")
    sentence = refusal()
    assert "STEPFORGE_ISA is 'x86-64-v9'" in sentence


def test_an_instruction_set_that_the_processor_lacks(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels would crash the process at their first instruction."""
    processor_of_level_3(monkeypatch)
    assert compiler.instruction_set() == "x86-64-v3"
    monkeypatch.setenv("STEPFORGE_ISA", "x86-64-v2")
    assert compiler.instruction_set() == "x86-64-v2"
    monkeypatch.setenv("STEPFORGE_ISA", "x86-64-v4")
    assert "on this processor it must be x86-64-v3, x86-64-v2" in refusal()


# The compiler.


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [("CC", "/nonexistent", "CC names '/nonexistent'"), ("PATH", "", "no C compiler")],
)
def test_no_compiler(
    cache: Path, variable: str, value: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv(variable, value)
    sentence = refusal()
    assert problem in sentence
    assert "install gcc or clang" in sentence


def test_the_compiler_may_be_named_with_arguments(
    cache: Path, real_compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in make and every build system: CC="ccache gcc"."""
    for count, arguments in enumerate(["-DUNUSED", "-DUNUSED -fno-inline"], start=1):
        monkeypatch.setenv("CC", f"{real_compiler} {arguments}")
        assert_right()
        assert len(kernels(cache)) == count


def test_without_a_compiler_the_cache_still_serves(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "/nonexistent")
    monkeypatch.setattr(tempfile, "mkdtemp", never)
    assert_right()
    assert len(kernels(filled)) == 1


def test_a_compiler_that_fails_is_quoted(cache: Path, named_compiler: Path) -> None:
    executable(named_compiler, "echo warming up >&2; echo 'error: out of paper' >&2; exit 1")
    assert refusal() == f"{named_compiler} failed: error: out of paper"
    assert list(cache.iterdir()) == []


def test_a_compiler_that_fails_in_silence(cache: Path, named_compiler: Path) -> None:
    executable(named_compiler, "exit 1")
    assert refusal() == f"{named_compiler} failed: it said nothing"


def test_a_compiler_that_makes_nothing(cache: Path, named_compiler: Path) -> None:
    executable(named_compiler, "exit 0")
    assert "failed: it said nothing" in refusal()


def test_a_compiler_that_speaks_no_utf_8(cache: Path, named_compiler: Path) -> None:
    executable(named_compiler, "printf '\\377 error: \\344\\n' >&2; exit 1")
    assert "failed" in refusal()


def test_a_compiler_that_cannot_be_run(cache: Path, named_compiler: Path) -> None:
    named_compiler.write_bytes(b"\x7fELF but not really")
    named_compiler.chmod(0o700)
    assert f"{named_compiler} cannot be run (Exec format error)" in refusal()


@pytest.mark.parametrize("sleeps", ["exec sleep 20", "sleep 20; true"], ids=["itself", "a-child"])
def test_a_compiler_that_does_not_end(
    cache: Path, named_compiler: Path, sleeps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(named_compiler, f'if [ "$1" = --version ]; then echo 1; else {sleeps}; fi')
    monkeypatch.setattr(compiler, "COMPILE_TIMEOUT_S", 0.3)
    begin = time.monotonic()
    assert refusal() == f"{named_compiler} did not finish within 0.3 s"
    assert time.monotonic() - begin < 10
    assert list(cache.iterdir()) == []


def is_running(process: int) -> bool:
    """Return True if a process runs and is not a zombie that no parent waits for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_children_of_a_compiler_that_does_not_end_are_ended_too(
    cache: Path, named_compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler's driver runs the compiler proper as a child, which would run on for hours."""
    pid_file = tmp_path / "child"
    sleeps = f"sleep 60 & echo $! > {pid_file}.new; mv {pid_file}.new {pid_file}; wait"
    executable(named_compiler, f'if [ "$1" = --version ]; then echo 1; else {sleeps}; fi')
    monkeypatch.setattr(compiler, "COMPILE_TIMEOUT_S", 2.0)
    assert "did not finish" in refusal()
    child = int(pid_file.read_text())
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(child)


def test_a_compiler_whose_name_no_shell_can_read(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", 'gcc "')
    assert refusal() == "CC is 'gcc \"', which is no command (No closing quotation)"


def test_a_compiler_that_is_removed_meanwhile(
    cache: Path, named_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "compiler", lambda: (str(named_compiler),))
    assert refusal() == f"{named_compiler} cannot be run (No such file or directory)"


#: The script of a compiler whose library lacks the kernel's function.
MAKES_SOMETHING_ELSE = f"""\
if [ "$1" = --version ]; then echo 1; exit; fi
while [ "$1" != -o ]; do shift; done
echo "int nothing;" | {COMPILER} -shared -fPIC -x c - -o "$2"
"""


def test_a_library_without_the_function_is_a_reason_and_rebuilt(
    cache: Path, named_compiler: Path, real_compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(named_compiler, MAKES_SOMETHING_ELSE)
    assert refusal().startswith("the compiled kernel cannot be loaded (")
    assert refusal().endswith(" has no function stepforge_run)")
    prints = 'if [ "$1" = --version ]; then echo 1; exit; fi'
    executable(named_compiler, f'{prints}\nexec {real_compiler} "$@"')
    os.utime(named_compiler, (1, 1))
    assert_right()
    assert len(kernels(cache)) == 2


# A failure is retried, but not in every step.


def small_kernel_getter() -> Callable[[], Kernel | str]:
    """Return a function that asks for the kernel of one graph."""
    return functools.partial(kernel_for, spec_of(new_graph(), torch.float32))


def test_a_compiler_that_was_missing_serves_once_it_is_there(
    cache: Path,
    named_compiler: Path,
    real_compiler: str,
) -> None:
    small_kernel = small_kernel_getter()
    assert "which is not on the PATH" in str(small_kernel())
    executable(named_compiler, f'exec {real_compiler} "$@"')
    assert isinstance(small_kernel(), Kernel)


def test_a_compiler_that_failed_serves_once_it_is_repaired_or_another_is_named(
    cache: Path,
    named_compiler: Path,
    real_compiler: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, small_kernel = cache.with_name("log"), small_kernel_getter()
    executable(named_compiler, f"echo called >> {log}; exit 1")
    assert {str(small_kernel()) for _ in range(100)} == {
        f"{named_compiler} failed: it said nothing"
    }
    # One call for its version, one for the kernel.
    assert len(log.read_text().splitlines()) == 2
    executable(named_compiler, f'exec {real_compiler} "$@"')
    os.utime(named_compiler, (1, 1))
    assert isinstance(small_kernel(), Kernel)
    monkeypatch.setenv("CC", str(executable(named_compiler.with_name("other"), "exit 1")))
    small_kernel = small_kernel_getter()
    assert "failed" in str(small_kernel())
    monkeypatch.setenv("CC", real_compiler)
    assert isinstance(small_kernel(), Kernel)


def test_a_cache_that_was_not_safe_serves_once_it_is(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_kernel = small_kernel_getter()
    cache.mkdir()
    cache.chmod(0o777)
    assert "can be written to by others" in str(small_kernel())
    cache.chmod(0o700)
    assert isinstance(small_kernel(), Kernel)


def test_a_disk_that_was_full_is_tried_again_after_a_while(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_kernel, now = small_kernel_getter(), 1000.0
    monkeypatch.setattr(process_cache, "time", SimpleNamespace(monotonic=lambda: now))
    with monkeypatch.context() as full:
        full.setattr(os, "replace", raises_os_error(errno.ENOSPC))
        assert "No space left on device" in str(small_kernel())
    assert "No space left on device" in str(small_kernel())
    now += process_cache.RETRY_S + 1
    assert isinstance(small_kernel(), Kernel)


# Optimizers.


def train(fused: bool | None = None) -> tuple[torch.Tensor, str]:
    """Return a parameter after a step of -0.25, and the backend of the step."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 2.0)
    optimizer = stepforge.Adam([p], lr=0.25, fused=fused)
    served = stepforge.explain(optimizer).served[0].backend
    optimizer.step()
    return p.detach(), served


def steps_without_a_compiler(cache: str) -> None:
    """Print the error of ``fused=True``, the backends of default steps, and all warnings."""
    assert not Path(cache).exists(), "importing the library must not compile"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError) as refused:
            train(fused=True)
        assert not caught, "the error is enough"
        results = [train() for _ in range(3)]
        p = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        p.grad = torch.ones(2, dtype=torch.float64)
        stepforge.RAdam([p]).step()
    assert all(torch.equal(p, torch.full((3,), 0.75)) for p, _ in results)
    warned = [(w.category.__name__, str(w.message)) for w in caught]
    served = [backend for _, backend in results]
    print(json.dumps({"refused": str(refused.value), "served": served, "warned": warned}))


#: CC, or the script of a compiler for it to name, and the reason in messages. The failing compiler
#: prints the name of its file, as compilers do, which differs for every kernel.
BROKEN = {
    "missing": ("/nonexistent", None, "which is not on the PATH: install gcc or clang"),
    "unreadable": ('gcc "', None, "which is no command (No closing quotation)"),
    "failing": (None, 'echo "$*: error: out of paper" >&2; exit 1', "error: out of paper"),
    "making-something-else": (None, MAKES_SOMETHING_ELSE, "has no function stepforge_run"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_without_a_compiler(tmp_path: Path, broken: str) -> None:
    """``fused=True`` raises with the reason; by default foreach steps, with one warning."""
    named, script, reason = BROKEN[broken]
    cc = named or str(executable(tmp_path / "fake-cc", str(script)))
    cache = str(tmp_path / "cache")
    output = in_new_process(steps_without_a_compiler, cache, CC=cc, STEPFORGE_CACHE=cache)
    found = json.loads(output)
    assert found["refused"].startswith("fused=True cannot serve")
    assert reason in found["refused"], found["refused"]
    assert found["served"] == ["foreach"] * 3
    ((category, message),) = found["warned"]
    assert category == "RuntimeWarning"
    assert reason in message
    assert "\n" not in message


def test_fused_raises_for_a_bad_instruction_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor_of_level_3(monkeypatch)
    monkeypatch.setenv("STEPFORGE_ISA", "mmx")
    allowed = "x86-64-v3, x86-64-v2"
    with pytest.raises(RuntimeError, match=f"is 'mmx'; on this processor it must be {allowed}"):
        train(fused=True)
