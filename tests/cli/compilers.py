"""Skip tests on machines without a C compiler."""

from __future__ import annotations

import pytest

from stepforge.backends import disk_cache
from stepforge.backends.native import compiler


def needs_compiler() -> None:
    """Skip the calling test if there is no C compiler."""
    try:
        compiler.compiler()
    except disk_cache.BuildError as error:
        pytest.skip(str(error))
