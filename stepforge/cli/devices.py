"""The devices that torch can use on this machine, and their descriptions."""

from __future__ import annotations

import importlib
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "CPU",
    "accelerators",
    "describe",
    "find",
    "free_memory",
    "make_current",
    "triton_version",
]

CPU = torch.device("cpu")


def accelerators() -> tuple[torch.device, ...]:
    """Return the available accelerators, all of the one type that torch is built for."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return ()
    return tuple(torch.device(kind.type, i) for i in range(torch.accelerator.device_count()))


def find(text: str) -> torch.device:
    """Return an available device by its name.

    Args:
        text: ``cpu``, or the type of an accelerator with or without an index.

    Raises:
        ValueError: if it is not available, or its steps cannot be timed. The message is one
            sentence.

    Example:
        >>> find("cpu")
        device(type='cpu')
        >>> find("gpu")
        Traceback (most recent call last):
        ValueError: 'gpu' is no device of torch; it must be cpu, or such as cuda, cuda:1 or xpu.
    """
    try:
        named = torch.device(text)
    except RuntimeError:
        raise ValueError(
            f"{text!r} is no device of torch; it must be cpu, or such as cuda, cuda:1 or xpu."
        ) from None
    if named.type == "cpu":
        return CPU
    available, device = accelerators(), torch.device(named.type, named.index or 0)
    if device not in available:
        raise ValueError(
            f"torch {torch.__version__} finds no {text} here, only "
            f"{', '.join(map(str, (CPU, *available)))}."
        )
    if not hasattr(torch.get_device_module(device), "Event"):
        raise ValueError(f"torch has no events on {text}, so a step there cannot be timed.")
    return device


def make_current(device: torch.device) -> None:
    """Make a device the current one of its type, to which events and synchronization apply."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)


def free_memory(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes, or None if it is unknown."""
    if device.type != "cpu":
        mem_get_info = getattr(torch.get_device_module(device), "mem_get_info", None)
        return None if mem_get_info is None else int(mem_get_info(device)[0])
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:  # not Linux
        return None
    return 1024 * int(found[1]) if found else None


def describe(device: torch.device) -> dict[str, str]:
    """Return an accelerator's model, driver and Triton version; an empty dict for a CPU.

    Example:
        >>> describe(torch.device("cpu"))
        {}
    """
    if device.type == "cpu":
        return {}
    return {
        "GPU": f"{device} {_model(device)}",
        "platform": f"{_toolkit(device)}, driver {_driver(device) or 'unknown'}",
        "triton": triton_version(),
    }


def triton_version() -> str:
    """Return the version of Triton, or why it cannot be imported."""
    try:
        return str(importlib.import_module("triton").__version__)
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "not installed: pip install 'stepforge[gpu]'"
        return f"cannot be imported: {error}"
    except ImportError as error:
        return f"cannot be imported: {error}"


def _model(device: torch.device) -> str:
    module = torch.get_device_module(device)
    if not hasattr(module, "get_device_properties"):
        return platform.processor() or platform.machine()  # Apple's GPUs are a part of it
    properties: Any = module.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 1e9:.1f} GB"


def _toolkit(device: torch.device) -> str:
    if device.type == "cuda":
        hip = torch.version.hip
        return f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda}"
    if device.type == "xpu":
        return f"oneAPI {getattr(torch.version, 'xpu', None)}"
    return device.type


def _driver(device: torch.device) -> str | None:
    if device.type == "xpu":
        properties: Any = torch.get_device_module(device).get_device_properties(device)
        return str(properties.driver_version)
    if device.type != "cuda":
        return platform.release()  # the driver is a part of the system
    if torch.version.hip:
        version = Path("/sys/module/amdgpu/version")  # exists if the driver is not Linux's own
        return version.read_text().strip() if version.exists() else f"of Linux {platform.release()}"
    return _nvidia_driver()


def _nvidia_driver() -> str | None:
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return None
    command = [nvidia_smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [""])[0].strip() or None
