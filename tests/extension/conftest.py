"""Fixtures for tests that build the extension."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stepforge import extension
from stepforge.backends import disk_cache
from stepforge.backends.cache import made_once
from stepforge.backends.native import compiler
from stepforge.extension import compiler as cpp
from tests.extension.compilers import copying, ready_made


@pytest.fixture(autouse=True)
def afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded or prebuilt, and the cache is a folder that does not exist yet."""
    try:
        compiler.compiler()
        cpp.checked_tool()
    except disk_cache.BuildError as error:
        pytest.skip(str(error))
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    monkeypatch.setattr(extension, "_module", None)
    monkeypatch.setattr(extension, "_next_look", 0.0)
    needed = made_once(extension._circumstances)(extension.build_into_cache)
    monkeypatch.setattr(extension, "_needed", needed)
    monkeypatch.setenv("STEPFORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STEPFORGE_PREBUILT", "")
    monkeypatch.delenv("STEPFORGE_GUARDS", raising=False)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The folder of extensions in the cache, which does not exist yet."""
    return tmp_path / "cache" / "extension"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with a module ``_guards``."""
    return ready_made(tmp_path_factory.mktemp("ready"))


@pytest.fixture
def cxx(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script of a compiler that logs its calls and copies the library."""
    script = copying(tmp_path, library)
    monkeypatch.setenv("CXX", str(script))
    return script
