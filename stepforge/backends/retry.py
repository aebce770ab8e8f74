"""Kernels are made once; what failed is made again, but seldom.

A compiler may be missing, a disk full or a cache locked now and not later: a failure does not last
for ever. Nor does a broken compiler run in every step. A failure stands until

* the answers to cheap questions that a build begins with are others (the settings, the compiler's
  file, the folders and who may write to them), or
* some time has passed, as a full disk or a killed compiler leaves no trace: :data:`RETRY_S`, or
  :data:`PATIENCE` times as long as the failure took, so that a compiler that hangs takes no more
  than a hundredth of a run.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, TypeVarTuple

__all__ = ["made_once"]

#: Seconds after which what failed is tried again though nothing seems to have changed.
RETRY_S = 60.0
#: How many times as long as it took it stays, at least.
PATIENCE = 100.0

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

# One at a time, so that threads that ask for a kernel at once do not all compile it. A signal
# handler may step while the thread that it interrupts compiles: it enters again.
_making = threading.RLock()


def _after_fork() -> None:
    """Takes a new lock: the thread that held the old one is not in the child to release it."""
    global _making
    _making = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class _Failure:
    """A failure, and until when it stands.

    Attributes:
        reason: why, in one sentence.
        circumstances: what it may have depended on.
        until: the time of :func:`time.monotonic` at which it is tried again in any case.
    """

    reason: str
    circumstances: Any
    until: float


def made_once(
    circumstances: Callable[[], Any],
) -> Callable[[Callable[[*Arguments], T | str]], Callable[[*Arguments], T | str]]:
    """Keeps what a function makes of its arguments, and for a while why it cannot.

    Args:
        circumstances: asks for what a failure may depend on; cheap, as it is asked whenever
            something is wanted that has failed.

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
                    until = end + max(RETRY_S, PATIENCE * (end - begin))
                    failures[args] = _Failure(result, circumstances(), until)
                else:
                    made[args] = result
                    failures.pop(args, None)
                return result

        return get

    return decorated
