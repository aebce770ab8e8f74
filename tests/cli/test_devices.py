"""Devices: found by name, described, and refused with one sentence."""

from __future__ import annotations

import types

import pytest
import torch

from stepforge.cli import devices


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuple(torch.device("cuda", index) for index in range(2))
    monkeypatch.setattr(devices, "accelerators", lambda: found)


@pytest.mark.usefixtures("two_gpus")
def test_devices_by_name():
    assert devices.find("cpu") == devices.find("cpu:0") == torch.device("cpu")
    assert devices.find("cuda") == torch.device("cuda:0")
    assert devices.find("cuda:1") == torch.device("cuda:1")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["cuda:2", "xpu", "meta"])
def test_a_device_that_is_not_here(name):
    with pytest.raises(ValueError, match=rf"finds no {name} here, only cpu, cuda:0, cuda:1\.$"):
        devices.find(name)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "cuda:-1", "nvidia"])
def test_what_is_no_device(name):
    with pytest.raises(ValueError, match=r"is no device of torch; it must be cpu, or such as"):
        devices.find(name)


@pytest.mark.usefixtures("two_gpus")
def test_a_device_without_events(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda _: types.SimpleNamespace())
    with pytest.raises(ValueError, match=r"^torch has no events on cuda:1, so a step there cannot"):
        devices.find("cuda:1")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module", name="triton"), "not installed: pip install 'stepforge["),
        (ModuleNotFoundError("No module 'x'", name="x"), "cannot be imported: No module 'x'"),
        (ImportError("libcuda"), "cannot be imported: libcuda"),
    ],
)
def test_why_there_is_no_triton(monkeypatch, error, message):
    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr(devices.importlib, "import_module", fail)
    assert devices.triton_version().startswith(message)


@pytest.mark.parametrize(
    ("versions", "platform"),
    [
        ({"hip": None, "cuda": "12.8"}, "CUDA 12.8, driver 570.1"),
        ({"hip": "6.4", "cuda": None}, "ROCm 6.4, driver "),
    ],
)
def test_a_gpu_in_words(monkeypatch, versions, platform):
    properties = types.SimpleNamespace(name="GPU Y", total_memory=8 * 10**9)
    module = types.SimpleNamespace(get_device_properties=lambda _: properties)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    monkeypatch.setattr(devices, "_nvidia_driver", lambda: "570.1")
    for name, value in versions.items():
        monkeypatch.setattr(torch.version, name, value)
    description = devices.describe(torch.device("cuda:1"))
    assert description["GPU"] == "cuda:1 GPU Y, 8.0 GB"
    assert description["platform"].startswith(platform)
    assert description["triton"] == devices.triton_version()
