"""Garbage collection waits while a plan is built.

A plan, its guards and new states are several Python objects per tensor, and all of them stay. With
thousands of tensors Python's collector starts again and again meanwhile, looks at every object of
the process, and finds nothing to free.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["uncollected"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def uncollected(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return a function during which Python collects no garbage.

    Collection is then as it was before. Reference counts free objects as ever.

    Example:
        >>> import gc
        >>> uncollected(gc.isenabled)(), gc.isenabled()
        (False, True)
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # No context manager of contextlib: an interrupt within it would leave collection off.
        was_enabled = gc.isenabled()
        try:
            gc.disable()
            result = function(*args, **kwargs)  # stored within: a signal may follow a call
            return result  # noqa: RET504
        finally:
            if was_enabled:
                gc.enable()

    return call
