"""A small rule, and faults to inject on the way to its kernel."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from stepforge.backends.native import compiler, kernel_for
from stepforge.program import Graph
from tests.backends.graphs import by_kernel, run_compiler, spec_of, traced


def new_graph() -> Graph:
    """Return the graph of a small rule, whose kernel no process has in memory."""
    return traced(lambda p, g: p + 2.0 * g)


def assert_right() -> None:
    """Step by a newly loaded kernel, and check the result."""
    p, g = torch.arange(100.0), torch.arange(100.0).flip(0)
    (result,) = by_kernel(new_graph(), [{"p": p, "g": g}], [[]], torch.float32)
    assert torch.equal(result["p"], p + 2 * g)


def refusal() -> str:
    """Return the one sentence that says why there is no kernel."""
    sentence = kernel_for(spec_of(new_graph(), torch.float32))
    assert isinstance(sentence, str)
    assert "\n" not in sentence
    assert len(sentence) > 20
    return sentence


def kernels(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


def leftovers(folder: Path) -> list[str]:
    """Return the names of files in the cache that are not kernels."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".so")


def bears_its_digest(kernel: Path) -> bool:
    """Return True if a kernel's name ends in the digest of its content."""
    digest = hashlib.sha256(kernel.read_bytes()).hexdigest()
    return kernel.stem.split("-")[-1] == digest[:32]


def key_of(kernel: Path) -> str:
    """Return the part of a kernel's name that identifies its source, flags and compiler."""
    return kernel.stem.rsplit("-", 1)[0]


def never(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("this must not be called")


def raises_os_error(code: int) -> Callable[..., NoReturn]:
    def fail(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return fail


def shortened(content: bytes) -> bytes:
    return content[: len(content) // 2]


def altered(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def emptied(content: bytes) -> bytes:
    return b""


def unloadable(cache: Path, like: Path) -> Path:
    """Return a kernel's file that has the right digest but is not a library."""
    content = b"no library"
    cache.mkdir(mode=0o700)
    digest = hashlib.sha256(content).hexdigest()[:32]
    path = cache / f"{key_of(like)}-{digest}.so"
    path.write_bytes(content)
    return path


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def wait_for(path: Path) -> None:
    """Wait until a file exists."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not exist"
        time.sleep(0.01)


def evil_library(path: Path) -> Path:
    """Return a library whose function has the same name and writes nothing."""
    c_file = path.with_suffix(".c")
    c_file.write_text("void stepforge_run(void) {}\n")
    done = run_compiler(["-shared", "-fPIC", c_file, "-o", path])
    assert done.returncode == 0, done.stderr
    return path


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return path


def processor_of_level_3(monkeypatch: pytest.MonkeyPatch) -> None:
    features = compiler.LEVELS["x86-64-v3"] | compiler.LEVELS["x86-64-v2"]
    monkeypatch.setattr(compiler, "_processor_features", lambda: features)
