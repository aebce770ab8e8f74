"""Made once: kernels and their failures, cached in the process.

A missing compiler, a full disk or a locked cache may be repaired later, so a failure is not final.
But a broken compiler must not run in every step. A failure stands until

* the cheap circumstances of a build have changed (settings, the compiler's file, the folders and
  their permissions), or
* some time has passed, since a full disk or a killed compiler leaves no trace: :data:`RETRY_S`, or
  :data:`RETRY_FACTOR` times as long as the failure took. So a compiler that hangs takes at most a
  hundredth of a run.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, TypeVarTuple

__all__ = ["made_once", "stands_s"]

#: Seconds after which a failure is retried though nothing seems to have changed.
RETRY_S = 60.0
#: A failure stands at least this many times as long as it took.
RETRY_FACTOR = 100.0

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

# One at a time, so that threads that ask for a kernel at once do not all compile it. A signal
# handler may step while the thread that it interrupts compiles: it enters again.
_making = threading.RLock()


def _after_fork() -> None:
    """Take a new lock: in the child, no thread can release the old one."""
    global _making
    _making = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class _Failure:
    """A failure, and until when it stands.

    Attributes:
        reason: why, in one sentence.
        circumstances: the settings and files it may depend on.
        until: the :func:`time.monotonic` time after which it is retried in any case.
    """

    reason: str
    circumstances: Any
    until: float


def stands_s(took_s: float) -> float:
    """Return the seconds for which a failure stands that took so many seconds."""
    return max(RETRY_S, RETRY_FACTOR * took_s)


def made_once(
    circumstances: Callable[[], Any],
) -> Callable[[Callable[[*Arguments], T | str]], Callable[[*Arguments], T | str]]:
    """Keep the result of a function for its arguments, and a failure for a while.

    Args:
        circumstances: returns everything a failure may depend on; cheap, as it is called whenever
            a failed result is wanted.

    Returns:
        A decorator for functions of hashable arguments that return a ``str`` only to say why they
        have failed.
    """

    def decorated(make: Callable[[*Arguments], T | str]) -> Callable[[*Arguments], T | str]:
        made: dict[Any, T] = {}
        failures: dict[Any, _Failure] = {}

        @functools.wraps(make)
        def get(*args: *Arguments) -> T | str:
            with _making:
                if args in made:
                    return made[args]
                failure, begin = failures.get(args), time.monotonic()
                if failure and begin < failure.until and failure.circumstances == circumstances():
                    return failure.reason
                result = make(*args)
                if isinstance(result, str):
                    end = time.monotonic()
                    until = end + stands_s(end - begin)
                    failures[args] = _Failure(result, circumstances(), until)
                else:
                    made[args] = result
                    failures.pop(args, None)
                return result

        return get

    return decorated
