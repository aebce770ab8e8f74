"""Faults on the way to a kernel. Oracle: ``p + 2 * g`` by torch, exact in small whole numbers; each
fault ends in that or in one sentence.
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
from stepforge.backends import trust
from stepforge.backends.native import Kernel, build, kernel_for
from tests.backends.graphs import INSTRUCTION_SETS, by_kernel, in_new_process, traced
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
#: The command of the compiler, as a shell takes it.
try:
    COMPILER = shlex.join(build.compiler())
except build.BuildError:  # all tests skip
    COMPILER = "cc"


# The cache.


def test_a_kernel_is_compiled_once_and_kept_in_private(
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
    assert build.cache_folder() == tmp_path / "home" / ".cache" / "stepforge"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_folder() == tmp_path / "xdg" / "stepforge"
    monkeypatch.setenv("STEPFORGE_CACHE", str(tmp_path / "named"))
    assert build.cache_folder() == tmp_path / "named"
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
    # As for an ordinary user in a folder of mode 0500; permissions do not bind the superuser.
    monkeypatch.setattr(tempfile, "mkdtemp", raises_os_error(errno.EACCES))
    assert "cannot be written to (Permission denied): set STEPFORGE_CACHE" in refusal()
    monkeypatch.undo()
    monkeypatch.setenv("STEPFORGE_CACHE", str(cache))
    assert_right()
    monkeypatch.setattr(tempfile, "mkdtemp", raises_os_error(errno.EACCES))
    assert_right()


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
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
    """Also the folders on the way that are missing, such as ~/.cache."""
    cache = tmp_path / "home" / "cache"
    monkeypatch.setenv("STEPFORGE_CACHE", str(cache))
    assert_right()
    (kernel,) = kernels(cache)
    assert [mode_of(place) for place in (kernel, cache, cache.parent)] == [0o600, 0o700, 0o700]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_kernel_file_that_others_may_write_to_is_built_anew(filled: Path, mode: int) -> None:
    (kernel,) = kernels(filled)
    kernel.chmod(mode)
    before = kernel.stat().st_ino
    assert_right()
    (kernel,) = kernels(filled)
    assert mode_of(kernel) == 0o600
    assert kernel.stat().st_ino != before


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser gives files away")
def test_a_kernel_file_that_belongs_to_another_is_built_anew(filled: Path) -> None:
    (kernel,) = kernels(filled)
    os.chown(kernel, 2, 2)
    assert_right()
    assert kernels(filled) == [kernel]
    assert kernel.stat().st_uid == os.geteuid()


def test_a_cache_in_a_folder_that_others_may_write_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They could put another cache in its place, unless the folder has the sticky bit."""
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


def test_a_link_to_a_cache_is_as_safe_as_where_it_leads(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind = tmp_path / "shared" / "cache"
    behind.mkdir(mode=0o700, parents=True)
    cache.symlink_to(behind)
    behind.parent.chmod(0o777)
    assert f"{behind.parent} can be written to by others" in refusal()
    behind.parent.chmod(0o755)
    assert_right()
    assert build.cache_folder() == behind
    assert len(kernels(behind)) == 1


def test_without_a_home_there_is_no_cache_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for the user of a container that its list of users lacks."""
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
    assert build.cache_folder() == tmp_path / "home" / "kernels"


def test_a_relative_folder_for_caches_is_ignored_as_its_specification_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STEPFORGE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert build.cache_folder() == tmp_path / ".cache" / "stepforge"


@pytest.fixture(params=["/proc/self/fd", "/nonexistent"], ids=["by-number", "by-copy"])
def way_to_load(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its number where a process finds its open files, by a private copy elsewhere."""
    monkeypatch.setattr(build, "_OPEN_FILES", request.param)


@pytest.mark.usefixtures("way_to_load")
def test_what_was_checked_is_what_is_loaded(
    cache: Path, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if another library takes its name in between."""
    (original,) = kernels(filled)
    cache.mkdir(mode=0o700)
    kernel = Path(shutil.copy(original, cache))  # which no process has loaded
    monkeypatch.setenv("STEPFORGE_CACHE", str(cache))
    evil = evil_library(filled.parent / "evil.so")
    digest = build._digest

    def exchange(content: bytes) -> str:
        if content == before:
            os.replace(evil, kernel)
        return digest(content)

    before = kernel.read_bytes()
    monkeypatch.setattr(build, "_digest", exchange)
    assert_right()
    assert not evil.exists(), "nothing was exchanged"


@pytest.mark.usefixtures("way_to_load")
def test_kernels_that_are_opened_one_after_the_other_are_not_mixed_up(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has the number of the one before when it is open, which is a name for the loader."""
    p = torch.arange(100.0)
    for factor in [1.0, 2.0, 3.0, 4.0, 5.0] * 2:  # built, then found
        graph = traced(functools.partial(lambda factor, p, g: p + factor * g, factor))
        (result,) = by_kernel(graph, [{"p": p, "g": p}], [[]], torch.float32)
        assert torch.equal(result["p"], p + factor * p)
    assert len(kernels(cache)) == 5


@pytest.mark.parametrize("fault", [shortened, altered, emptied])
def test_a_kernel_file_that_is_not_what_it_was_is_built_anew(
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


def test_what_cannot_be_loaded_is_built_anew_once(
    cache: Path, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a disk that others share, of another system: its name tells nothing of that."""
    (original,) = kernels(filled)
    unloadable(cache, original)
    monkeypatch.setenv("STEPFORGE_CACHE", str(cache))
    assert_right()
    assert (cache / original.name).exists()
    monkeypatch.setattr(tempfile, "mkdtemp", never)
    assert_right()


def test_without_a_compiler_what_cannot_be_loaded_is_passed_over(
    cache: Path, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (original,) = kernels(filled)
    unloadable(cache, original)
    monkeypatch.setenv("STEPFORGE_CACHE", str(cache))
    monkeypatch.setenv("CC", "/nonexistent")
    assert "CC names '/nonexistent'" in refusal()
    (cache / original.name).write_bytes(original.read_bytes())
    assert_right()


def test_what_cannot_be_loaded_although_it_is_new_is_said(
    cache: Path, named_compiler: Path
) -> None:
    """By a compiler for another machine, say."""
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
    for calls in (1, 2):  # once each time
        assert "the compiled kernel cannot be loaded (" in refusal()
        assert len(log.read_text().splitlines()) == calls


def test_a_build_that_was_cut_off_does_not_matter(cache: Path) -> None:
    cut_off = cache / "build-0a1b2c3d"
    cut_off.mkdir(parents=True)
    cache.chmod(0o700)
    (cut_off / "kernel.c").write_text("half a fil")
    (cut_off / "kernel.so").write_bytes(b"\x7fELF")
    assert_right()
    assert len(kernels(cache)) == 1
    assert all(map(bears_its_digest, kernels(cache)))
    assert cut_off.exists(), "its process may still be at work"


def test_builds_that_were_cut_off_days_ago_are_removed(cache: Path) -> None:
    """And nothing that is not ours, should someone name a folder of projects as the cache."""
    abandoned, theirs = cache / "build-0a1b2c3d", cache / "build-projects"
    for folder, name in ((abandoned, "kernel.c"), (theirs, "kernel.c"), (theirs, "main.c")):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / name).write_text("half a fil")
    cache.chmod(0o700)
    beyond = time.time() - build.ABANDONED_S
    os.utime(abandoned, (beyond - 60, beyond - 60))
    os.utime(theirs, (beyond - 60, beyond - 60))
    young = cache / "build-4e5f6a7b"
    young.mkdir()
    os.utime(young, (beyond + 60, beyond + 60))
    assert_right()
    assert not abandoned.exists()
    assert len(list(theirs.iterdir())) == 2
    assert young.exists()


@pytest.mark.skipif(build.fcntl is None, reason="there are no locks of files here")
def test_a_build_that_lasts_for_days_is_not_removed_while_its_process_lives(
    cache: Path, tmp_path: Path, real_compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that slept, or whose clock was set."""
    begun = tmp_path / "begun"
    waits = f'for x; do case $x in */kernel.so) echo "$x" > {begun}.new; esac; done'
    waits += f"; mv {begun}.new {begun}; exec sleep 60"
    slow = executable(
        tmp_path / "slow-cc", f'if [ "$1" = --version ]; then echo 1; exit; fi; {waits}'
    )
    code = "from tests.backends.native.faults import assert_right; assert_right()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"CC": str(slow)}, start_new_session=True
    )
    try:
        wait_for(begun)
        work = Path(begun.read_text().strip()).parent
        os.utime(work, (1e9, 1e9))
        assert_right()
        assert work.exists(), "its process is at work"
    finally:
        process.kill()
        process.wait()
    os.utime(work, (1e9, 1e9))
    kernels(cache)[0].unlink()
    assert_right()
    assert not work.exists()


def build_in_many_processes() -> None:
    """Forks processes that all begin to build at the same moment; fails if one fails."""
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


# The key.


@pytest.fixture
def real_compiler() -> str:
    """The command of the compiler, as a shell takes it."""
    return COMPILER


@pytest.fixture
def named_compiler(real_compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a test may put the compiler that CC names."""
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
    """Also when it takes the place of the old one while a process runs."""
    for count, version in enumerate(["1.0", "2.0"], start=1):
        tells = f'if [ "$1" = --version ]; then echo "cc {version}"; exit; fi'
        executable(named_compiler, f'{tells}\nexec {real_compiler} "$@"')
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


def test_an_instruction_set_that_the_processor_has_not(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels would end the process at their first instruction."""
    processor_of_level_3(monkeypatch)
    assert build.instruction_set() == "x86-64-v3"
    monkeypatch.setenv("STEPFORGE_ISA", "x86-64-v2")
    assert build.instruction_set() == "x86-64-v2"
    monkeypatch.setenv("STEPFORGE_ISA", "x86-64-v4")
    assert "on this processor it must be x86-64-v3, x86-64-v2" in refusal()


# The compiler.


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [("CC", "/nonexistent", "CC names '/nonexistent'"), ("PATH", "", "no C compiler")],
)
def test_no_compiler(
    cache: Path, variable: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv(variable, value)
    sentence = refusal()
    assert says in sentence
    assert "install gcc or clang" in sentence


def test_the_compiler_may_be_named_with_arguments(
    cache: Path, real_compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As make and every build system take it: CC="ccache gcc"."""
    for count, arguments in enumerate(["-DUNUSED", "-DUNUSED -fno-inline"], start=1):
        monkeypatch.setenv("CC", f"{real_compiler} {arguments}")
        assert_right()
        assert len(kernels(cache)) == count


def test_without_a_compiler_what_is_in_the_cache_still_serves(
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
    monkeypatch.setattr(build, "COMPILE_TIMEOUT_S", 0.3)
    begin = time.monotonic()
    assert refusal() == f"{named_compiler} did not finish within 0.3 s"
    assert time.monotonic() - begin < 10
    assert list(cache.iterdir()) == []


def is_running(process: int) -> bool:
    """Whether a process runs that may no longer have a parent to wait for it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_children_of_a_compiler_that_does_not_end_are_ended_too(
    cache: Path, named_compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler's driver runs the compiler proper as a child, which would go on for hours."""
    told = tmp_path / "child"
    sleeps = f"sleep 60 & echo $! > {told}.new; mv {told}.new {told}; wait"
    executable(named_compiler, f'if [ "$1" = --version ]; then echo 1; else {sleeps}; fi')
    monkeypatch.setattr(build, "COMPILE_TIMEOUT_S", 2.0)
    assert "did not finish" in refusal()
    child = int(told.read_text())
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


#: The script of a compiler that makes a library without what it was asked for.
MAKES_SOMETHING_ELSE = f"""\
if [ "$1" = --version ]; then echo 1; exit; fi
while [ "$1" != -o ]; do shift; done
echo "int nothing;" | {COMPILER} -shared -fPIC -x c - -o "$2"
"""


def test_a_library_without_the_function_is_said_and_built_anew(
    cache: Path, named_compiler: Path, real_compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(named_compiler, MAKES_SOMETHING_ELSE)
    assert refusal().startswith("the compiled kernel cannot be loaded (")
    assert refusal().endswith(" has no function stepforge_run)")
    tells = 'if [ "$1" = --version ]; then echo 1; exit; fi'
    executable(named_compiler, f'{tells}\nexec {real_compiler} "$@"')
    os.utime(named_compiler, (1, 1))
    assert_right()
    assert len(kernels(cache)) == 2


# What fails is tried again, but not in every step.


def asking() -> Callable[[], Kernel | str]:
    """Asks for the kernel of one graph, again and again."""
    return functools.partial(kernel_for, new_graph(), (torch.float32,) * 2, torch.float32)


def test_a_compiler_that_was_missing_serves_once_it_is_there(
    cache: Path,
    named_compiler: Path,
    real_compiler: str,
) -> None:
    small_kernel = asking()
    assert "which is not on the PATH" in str(small_kernel())
    executable(named_compiler, f'exec {real_compiler} "$@"')
    assert isinstance(small_kernel(), Kernel)


def test_a_compiler_that_failed_serves_once_it_is_repaired_or_another_is_named(
    cache: Path,
    named_compiler: Path,
    real_compiler: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, small_kernel = cache.with_name("log"), asking()
    executable(named_compiler, f"echo called >> {log}; exit 1")
    assert {str(small_kernel()) for _ in range(100)} == {
        f"{named_compiler} failed: it said nothing"
    }
    # Once for its version, once for the kernel.
    assert len(log.read_text().splitlines()) == 2
    executable(named_compiler, f'exec {real_compiler} "$@"')
    os.utime(named_compiler, (1, 1))
    assert isinstance(small_kernel(), Kernel)
    monkeypatch.setenv("CC", str(executable(named_compiler.with_name("other"), "exit 1")))
    small_kernel = asking()
    assert "failed" in str(small_kernel())
    monkeypatch.setenv("CC", real_compiler)
    assert isinstance(small_kernel(), Kernel)


def test_a_cache_that_was_not_safe_serves_once_it_is(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_kernel = asking()
    cache.mkdir()
    cache.chmod(0o777)
    assert "can be written to by others" in str(small_kernel())
    cache.chmod(0o700)
    assert isinstance(small_kernel(), Kernel)


def test_a_disk_that_was_full_is_tried_again_after_a_while(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_kernel, now = asking(), 1000.0
    monkeypatch.setattr(cache, "time", SimpleNamespace(monotonic=lambda: now))
    with monkeypatch.context() as full:
        full.setattr(os, "replace", raises_os_error(errno.ENOSPC))
        assert "No space left on device" in str(small_kernel())
    assert "No space left on device" in str(small_kernel())
    now += cache.RETRY_S + 1
    assert isinstance(small_kernel(), Kernel)


# What an optimizer makes of it.


def train(fused: bool | None = None) -> tuple[torch.Tensor, str]:
    """A parameter after a step of 0.25 downwards, and the backend that served it."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 2.0)
    optimizer = stepforge.Adam([p], lr=0.25, fused=fused)
    served = stepforge.explain(optimizer).served[0].backend
    optimizer.step()
    return p.detach(), served


def steps_without_a_compiler(cache: str) -> None:
    """Prints what fused=True says, which backends serve otherwise, and what was warned of."""
    assert not Path(cache).exists(), "to import the library is not to compile"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError) as refused:
            train(fused=True)
        assert not caught, "an error says it already"
        ends = [train() for _ in range(3)]
        p = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        p.grad = torch.ones(2, dtype=torch.float64)
        stepforge.RAdam([p]).step()
    assert all(torch.equal(p, torch.full((3,), 0.75)) for p, _ in ends)
    told = [(w.category.__name__, str(w.message)) for w in caught]
    found = {"refused": str(refused.value), "served": [by for _, by in ends], "told": told}
    print(json.dumps(found))


#: CC, or what the compiler that it names does, and what is told of it. One that fails names, as
#: compilers do, the file, which is another for every kernel.
BROKEN = {
    "missing": ("/nonexistent", None, "which is not on the PATH: install gcc or clang"),
    "unreadable": ('gcc "', None, "which is no command (No closing quotation)"),
    "failing": (None, 'echo "$*: error: out of paper" >&2; exit 1', "error: out of paper"),
    "making-something-else": (None, MAKES_SOMETHING_ELSE, "has no function stepforge_run"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_without_a_compiler(tmp_path: Path, broken: str) -> None:
    """``fused=True`` says what is wrong; by default foreach serves, with one warning."""
    named, script, reason = BROKEN[broken]
    cc = named or str(executable(tmp_path / "fake-cc", str(script)))
    cache = str(tmp_path / "cache")
    output = in_new_process(steps_without_a_compiler, cache, CC=cc, STEPFORGE_CACHE=cache)
    found = json.loads(output)
    assert found["refused"].startswith("fused=True cannot serve")
    assert reason in found["refused"], found["refused"]
    assert found["served"] == ["foreach"] * 3
    ((category, message),) = found["told"]
    assert category == "RuntimeWarning"
    assert reason in message
    assert "\n" not in message


def test_a_bad_instruction_set_is_told_to_who_asks_for_a_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor_of_level_3(monkeypatch)
    monkeypatch.setenv("STEPFORGE_ISA", "mmx")
    allowed = "x86-64-v3, x86-64-v2"
    with pytest.raises(RuntimeError, match=f"is 'mmx'; on this processor it must be {allowed}"):
        train(fused=True)
