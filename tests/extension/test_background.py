"""Builds in the background. Oracles: the calls that a compiler logs, the files in the cache, and
the processes that the system lists.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from stepforge import extension
from stepforge.backends import cache as process_cache
from stepforge.backends import disk_cache
from stepforge.backends.native import build
from stepforge.extension import background, order
from tests.backends.graphs import in_new_process
from tests.backends.native.faults import bears_its_digest, mode_of, wait_for
from tests.extension.compilers import calls, children, copying, wait_until_unlocked

BUILDING = "the C++ guards are being built in the background"
PROCESSES = 16


def waited() -> ModuleType | str:
    """Return the extension, or the reason why it is none once nothing is being built."""
    for _ in range(3000):
        extension._next_look = 0.0
        found = extension.module()
        if not str(found).startswith(BUILDING):
            return found
        time.sleep(0.01)
    raise AssertionError("a build does not end")


def built(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so"))


def held_back(folder: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name a compiler that creates ``started`` and waits for ``go``, for at most 30 seconds."""
    wait = f"for x in $(seq 600); do [ -e {folder}/go ] && break; sleep 0.05; done"
    script = copying(folder, library, f"echo $$ > {folder}/pid; touch {folder}/started; {wait}")
    monkeypatch.setenv("CXX", str(script))


def test_steps_go_on_while_it_is_built_and_take_it_when_it_is_there(
    cache: Path, tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_back(tmp_path, library, monkeypatch)
    assert extension.module() == BUILDING
    wait_for(tmp_path / "started")
    assert [extension.module() for _ in range(3)] == [BUILDING] * 3
    assert extension.status() == BUILDING
    assert built(cache) == []
    (tmp_path / "go").touch()
    module = waited()
    assert module.made_by == "a test"
    assert extension.module() is module
    assert extension.status() is module
    (path,) = built(cache)
    assert module.__file__ == str(path)
    assert bears_its_digest(path)
    assert [mode_of(x) for x in (path, cache, cache.parent)] == [0o600, 0o700, 0o700]
    wait_until_unlocked(cache / "lock")
    assert sorted(x.name for x in cache.iterdir()) == sorted([path.name, "lock"])
    assert calls(tmp_path) == 1


def test_a_look_is_at_most_one_a_second(cxx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, now = [], 1000.0
    monkeypatch.setattr(extension, "time", SimpleNamespace(monotonic=lambda: now))
    find = extension._find
    monkeypatch.setattr(extension, "_find", lambda: looks.append(now) or find())
    monkeypatch.setattr(background, "start", lambda order: None)
    for _ in range(100):
        assert extension.module() == BUILDING
        now += 0.1
    assert len(looks) == 10


def cold_start(name: str) -> None:
    """Start processes at once; each waits until it has the extension."""
    folder = Path(name)
    processes = []
    for _ in range(PROCESSES):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            while not (folder / "gun").exists():
                time.sleep(0.001)
            while isinstance(extension.module(), str):
                time.sleep(0.01)
            os._exit(0)
        processes.append(child)
    (folder / "gun").touch()
    assert [os.waitpid(child, 0)[1] for child in processes] == [0] * PROCESSES


def test_processes_that_start_at_once_build_one_extension(
    cache: Path, tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(copying(tmp_path, library, "sleep 1.5")))
    in_new_process(cold_start, str(tmp_path), timeout_s=120)
    assert calls(tmp_path) == 1
    assert len(built(cache)) == 1


@pytest.mark.parametrize("which", ["the builder", "the compiler", "both"])
def test_a_killed_build_leaves_nothing_to_load_and_a_later_one_builds(
    cache: Path, tmp_path: Path, library: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure stands for a while, as a full memory would kill each build."""
    held_back(tmp_path, library, monkeypatch)
    assert extension.module() == BUILDING
    wait_for(tmp_path / "started")
    compiler_id = int((tmp_path / "pid").read_text())
    parent = Path(f"/proc/{compiler_id}/stat").read_text().rpartition(")")[2].split()[1]
    for process in {"the builder": [parent], "the compiler": [compiler_id]}.get(
        which, [parent, compiler_id]
    ):
        os.kill(int(process), signal.SIGKILL)
    wait_until_unlocked(cache / "lock")
    (tmp_path / "go").touch()
    assert built(cache) == []
    reason = waited()
    assert ("was cut short" if which != "the compiler" else "failed: ") in reason
    assert "\n" not in reason
    assert calls(tmp_path) == 1, "a build has started again at once"
    (note,) = cache.glob("*.failed")
    long_ago = time.time() - process_cache.RETRY_S - 60
    os.utime(note, (long_ago, long_ago))
    assert waited().made_by == "a test"
    assert calls(tmp_path) == 2
    wait_until_unlocked(cache / "lock")
    assert not list(cache.glob("*.failed"))


def test_a_failure_is_one_sentence_for_all_processes_and_is_not_tried_again_at_once(
    cache: Path, tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = copying(tmp_path, library, 'echo "g.cpp:1: error: out of paper" >&2; exit 1')
    monkeypatch.setenv("CXX", str(script))
    reason = waited()
    assert reason.startswith(f"{script} failed: ")
    assert reason.endswith("error: out of paper")
    code = "from stepforge import extension; print(extension.module())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == reason
    assert done.stderr == ""
    assert calls(tmp_path) == 1
    assert built(cache) == []
    # Another compiler is tried at once.
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("CXX", str(copying(other, library)))
    assert waited().made_by == "a test"


def test_an_old_compiler(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "c++: error: unrecognized command line option '-std=c++20'"
    script = copying(tmp_path, library, f'echo "{said}" >&2; exit 1')
    monkeypatch.setenv("CXX", str(script))
    assert waited() == f"{script} failed: {said}: name a newer compiler with CXX"


def test_nothing_is_printed_and_no_process_is_left(
    tmp_path: Path,
    library: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held_back(tmp_path, library, monkeypatch)
    before = children()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert extension.module() == BUILDING
    wait_for(tmp_path / "started")
    assert children() == before, "the builder is a child of this process"
    (tmp_path / "go").touch()
    assert isinstance(waited(), ModuleType)
    assert children() == before
    assert capfd.readouterr() == ("", "")


def test_the_builder_is_in_another_session_and_of_low_priority(
    cache: Path, tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_back(tmp_path, library, monkeypatch)
    assert extension.module() == BUILDING
    wait_for(tmp_path / "started")
    process = int((tmp_path / "pid").read_text())
    assert os.getsid(process) != os.getsid(0)
    assert os.getpriority(os.PRIO_PROCESS, process) == 19
    (tmp_path / "go").touch()
    assert isinstance(waited(), ModuleType)


def test_a_build_outlives_the_process_that_started_it(
    cache: Path, tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_back(tmp_path, library, monkeypatch)
    code = "from stepforge import extension; print(extension.module())"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert (done.stdout.strip(), done.stderr) == (BUILDING, "")
    wait_for(tmp_path / "started")
    (tmp_path / "go").touch()
    assert waited().made_by == "a test"
    assert calls(tmp_path) == 1


def test_a_builder_imports_neither_torch_nor_numpy(
    cache: Path, tmp_path: Path, cxx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = tmp_path / "modules"
    code = f"open({str(modules)!r}, 'w').write(' '.join(sys.modules))\n"
    monkeypatch.setattr(background, "_PROGRAM", background._PROGRAM + code)
    assert extension.module() == BUILDING
    wait_until_unlocked(cache / "lock")
    imported = modules.read_text().split()
    assert "stepforge.extension.order" in imported
    assert not {"torch", "numpy"} & set(imported)


def test_threads_that_ask_at_once_start_one_build(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_back(tmp_path, library, monkeypatch)
    barrier, found = threading.Barrier(8), []

    def ask() -> None:
        barrier.wait()
        found.append(extension.module())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (tmp_path / "go").touch()
    assert set(found) == {BUILDING}
    assert isinstance(waited(), ModuleType)
    assert calls(tmp_path) == 1


def test_a_child_that_is_forked_during_a_build_takes_its_result(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_back(tmp_path, library, monkeypatch)
    assert extension.module() == BUILDING
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if isinstance(waited(), ModuleType) else 1)
    (tmp_path / "go").touch()
    assert os.waitpid(child, 0)[1] == 0
    assert calls(tmp_path) == 1


def fork_while_a_thread_builds(name: str) -> None:
    folder = Path(name)
    os.environ["STEPFORGE_GUARDS"] = "cpp"
    signal.alarm(120)
    thread = threading.Thread(target=extension.module)
    thread.start()
    wait_for(folder / "started")
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os.environ["CXX"] = str(folder / "other" / "copying-c++")
        os._exit(0 if isinstance(extension.module(), ModuleType) else 1)
    assert os.waitpid(child, 0)[1] == 0, "the child waits for its parent"
    (folder / "go").touch()
    thread.join()


def test_a_child_that_is_forked_while_a_thread_builds_builds_its_own(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    copying(other, library)
    held_back(tmp_path, library, monkeypatch)
    in_new_process(fork_while_a_thread_builds, str(tmp_path), timeout_s=180)
    assert (calls(tmp_path), calls(other)) == (1, 1)


def test_a_program_without_a_python_of_its_own_starts_nothing(
    cxx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that embeds Python: its command would start it once more."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my-trainer"))
    assert waited() == "this program has no Python of its own, which could build the C++ guards"
    assert calls(tmp_path) == 0


def test_a_system_without_forks_starts_nothing(
    cxx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Windows, which cannot pass a lock on either."""
    monkeypatch.delattr(os, "fork")
    assert waited() == "this system builds no C++ guards in the background"
    assert calls(tmp_path) == 0


def test_a_python_that_does_not_start(
    cxx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false-python")
    reason = waited()
    assert reason.startswith("/bin/false-python cannot build the C++ guards (")
    assert calls(tmp_path) == 0


def test_work_files_are_known_to_the_sweep_of_abandoned_folders(cache: Path, cxx: Path) -> None:
    assert {order.SOURCE_NAME, Path(order.SOURCE_NAME).with_suffix(".so").name, "failed"} <= set(
        disk_cache._WORK_FILES
    )


def test_a_file_system_without_locks_builds_all_the_same(
    cache: Path, tmp_path: Path, cxx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_cache, "fcntl", None)
    assert extension.module() == BUILDING
    wait_until_unlocked(cache / "lock")
    for _ in range(1000):
        if built(cache):
            break
        time.sleep(0.01)
    extension._next_look = 0.0
    assert isinstance(extension.module(), ModuleType)
    assert any(build.intact(cache, "guards-*"))
