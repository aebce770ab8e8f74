"""Fixtures for tests that run Triton kernels: interpreted on a CPU, compiled on a GPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stepforge.backends import batch
from stepforge.backends.grad_scale import GradScale
from stepforge.backends.triton.kernel import is_interpreted
from tests.backends.triton.kernels import DEVICES


@pytest.fixture(autouse=True)
def _triton() -> None:
    pytest.importorskip("triton")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The CPU if kernels are interpreted, the GPU if there is one."""
    device = torch.device(request.param)
    if device.type == "cpu" and not is_interpreted():
        pytest.skip("kernels are compiled here, for the GPU")
    if device.type == "cuda" and (is_interpreted() or not torch.cuda.is_available()):
        pytest.skip("no GPU")
    yield device
    if device.type == "cuda":
        torch.cuda.synchronize()  # so that an error on the device fails this test, not a later one


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, which does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("STEPFORGE_CACHE", str(folder))
    return folder


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """A function that starts and ends a pretended CUDA graph capture on a CPU."""
    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")
    gpu = SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setattr(batch, "_capturing_gpu", lambda: gpu)

    def set_capturing(now: bool) -> None:
        gpu.is_current_stream_capturing = lambda: now

    set_capturing(False)
    return set_capturing


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gradient scales count as device tensors, and reading one fails."""

    def read(self: GradScale) -> GradScale:
        raise AssertionError("synchronizes the device")

    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")
    monkeypatch.setattr(GradScale, "on_host", property(lambda self: False))
    with monkeypatch.context() as patch:
        patch.setattr(GradScale, "read", read)
        yield
