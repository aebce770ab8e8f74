"""Compilation with forks, signals and threads. Oracle: ``p + 2 * g`` by torch; an alarm ends a
process that deadlocks, which fails the test.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from pathlib import Path

import pytest

from stepforge.backends.native import compiler
from tests.backends.graphs import in_new_process
from tests.backends.native.faults import assert_right, executable, kernels, leftovers, wait_for

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def waiting_compiler(folder: Path, then: str = "") -> str:
    """Return the command of a compiler that creates ``started`` and waits for ``go``."""
    script = f"""\
if [ "$1" = --version ]; then echo 1; exit; fi
touch {folder}/started
{then}
for wait in $(seq 3000); do [ -e {folder}/go ] && break; sleep 0.05; done
exec {shlex.join(compiler.compiler())} "$@"
"""
    return str(executable(folder / "waiting-cc", script))


def fork_while_a_thread_compiles(name: str) -> None:
    folder, real = Path(name), shlex.join(compiler.compiler())
    os.environ["CC"] = waiting_compiler(folder)
    signal.alarm(120)
    failures: list[BaseException] = []

    def compile_one() -> None:
        try:
            assert_right()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=compile_one)
    thread.start()
    wait_for(folder / "started")
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os.environ["CC"] = real
        assert_right()
        sys.exit()  # with all exit handlers, unlike os._exit
    assert os.waitpid(child, 0)[1] == 0, "the child hung, or has no kernel"
    (folder / "go").touch()
    thread.join()
    assert not failures, failures


def test_a_child_compiles_while_a_thread_of_its_parent_does(tmp_path: Path) -> None:
    """Neither waits for the other, nor removes the other's working folder."""
    cache = tmp_path / "cache"
    in_new_process(
        fork_while_a_thread_compiles, str(tmp_path), timeout_s=300, STEPFORGE_CACHE=str(cache)
    )
    assert len(kernels(cache)) == 2  # by two compilers
    assert not leftovers(cache)


def step_in_a_signal_handler(name: str) -> None:
    folder, real = Path(name), shlex.join(compiler.compiler())
    waiting = waiting_compiler(folder, then=f"kill -USR1 {os.getpid()}")
    handled = []

    def handle(signum: int, frame: object) -> None:
        os.environ["CC"] = real
        assert_right()
        handled.append(signum)
        (folder / "go").touch()

    signal.signal(signal.SIGUSR1, handle)
    signal.alarm(120)
    os.environ["CC"] = waiting
    assert_right()
    assert handled == [signal.SIGUSR1]


def test_a_signal_handler_steps_while_the_interrupted_code_compiles(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    in_new_process(
        step_in_a_signal_handler, str(tmp_path), timeout_s=300, STEPFORGE_CACHE=str(cache)
    )
    assert len(kernels(cache)) == 2
    assert not leftovers(cache)
