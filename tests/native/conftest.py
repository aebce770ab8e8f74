"""All of this folder compiles."""

import pytest

from stepforge.backends.native import build


@pytest.fixture(autouse=True)
def _a_compiler() -> None:
    try:
        build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
