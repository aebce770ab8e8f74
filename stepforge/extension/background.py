"""A build in the background: one on a machine, for all processes that share the cache.

The process that starts it takes the lock and gives it to the builder, which holds it for its life.
So the lock of a builder that is killed is free. The builder belongs to no session and is nobody's
child: it outlives the process that started it, and leaves it no zombie.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from stepforge.backends import cache, disk_cache
from stepforge.backends.disk_cache import BuildError
from stepforge.backends.native import build
from stepforge.extension.order import Order

__all__ = ["is_running", "start"]

#: A builder imports only what it needs. The packages' own modules would import torch, which takes
#: seconds and much memory, and may look for devices.
_PROGRAM = """
import os, sys, types
order = sys.stdin.buffer.readline()  # the end may be late: a child may have inherited the pipe
if os.fork() != 0:
    os._exit(0)  # the process that started it waits no longer
os.nice(19)
for name in ("stepforge", "stepforge.backends", "stepforge.backends.native", "stepforge.extension"):
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [os.path.join(sys.argv[1], *name.split("."))]
from stepforge.extension.order import Order
Order.from_bytes(order).run()
"""
_ROOT = Path(__file__).parents[2]

#: Seconds that it may take to start a builder; it takes a fiftieth of one.
_START_TIMEOUT_S = 60.0

_CUT_SHORT = "the build of the C++ guards was cut short, as by a full memory or a shutdown"


def start(order: Order) -> None:
    """Start a build unless it runs already.

    Raises:
        BuildError: it has failed recently, or cannot be started.
        OSError: the folder cannot be written to.
    """
    python = _python()
    try:
        with disk_cache.locked(order.lock) as lock:
            if any(build.intact(Path(order.folder), order.name)):
                return  # another process has just finished
            reason = order.failure()
            if reason is not None:
                raise BuildError(reason)
            # It stands until the builder has another result.
            order.note_failure(_CUT_SHORT, cache.RETRY_S)
            try:
                _launch(python, order, lock)
            except BuildError as error:
                order.note_failure(str(error), cache.RETRY_S)
                raise
    except BlockingIOError:
        return  # it runs


def is_running(order: Order) -> bool:
    """Return True if a build runs in the folder of an order."""
    if not order.lock.exists():
        return False
    try:
        with disk_cache.locked(order.lock):
            return False
    except OSError as error:
        return isinstance(error, BlockingIOError)


def _python() -> str:
    """Return the command of Python.

    Raises:
        BuildError: this is a program of another name, which would only start once more; or this
            system has no forks.
    """
    if not hasattr(os, "fork"):
        raise BuildError("this system builds no C++ guards in the background")
    python = sys.executable or ""
    if getattr(sys, "frozen", False) or "python" not in os.path.basename(python).lower():
        raise BuildError("this program has no Python of its own, which could build the C++ guards")
    return python


def _launch(python: str, order: Order, lock: int) -> None:
    """Start a builder that holds a lock.

    Raises:
        BuildError: it does not start.
    """
    command = [python, "-I", "-S", "-c", _PROGRAM, str(_ROOT)]
    try:
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[lock],
            start_new_session=True,
        ) as process:
            try:
                process.communicate(order.to_bytes(), _START_TIMEOUT_S)
            except BaseException:
                process.kill()
                raise
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{python} cannot build the C++ guards ({error})") from None
    if process.returncode != 0:
        raise BuildError(
            f"{python} cannot build the C++ guards: it ended with {process.returncode}"
        )
