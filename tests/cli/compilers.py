"""Skip tests on machines without a C compiler."""

from __future__ import annotations

import pytest

from stepforge.backends.native import build


def needs_compiler() -> None:
    """Skip the calling test if there is no C compiler."""
    try:
        build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
