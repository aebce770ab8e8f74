"""Fixtures for tests that compile kernels."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepforge.backends import disk_cache
from stepforge.backends.native import compiler
from tests.backends.native.faults import assert_right


@pytest.fixture(autouse=True)
def _a_compiler() -> None:
    try:
        compiler.compiler()
    except disk_cache.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, which does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("STEPFORGE_CACHE", str(folder))
    return folder


@pytest.fixture(params=[0o000, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The least and the most restrictive umask."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a kernel that no process has loaded from there."""
    folder = tmp_path / "filled"
    monkeypatch.setenv("STEPFORGE_CACHE", str(folder))
    assert_right()
    return folder
