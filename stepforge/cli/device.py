"""The devices that torch sees here, in words and numbers."""

from __future__ import annotations

import importlib
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

__all__ = ["CPU", "accelerators", "describe", "find", "free_memory", "triton_version", "use"]

CPU = torch.device("cpu")


def accelerators() -> tuple[torch.device, ...]:
    """The accelerators that torch can use here, of the one type that it is built for."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return ()
    return tuple(torch.device(kind.type, i) for i in range(torch.accelerator.device_count()))


def find(text: str) -> torch.device:
    """The device that somebody asks for.

    Args:
        text: ``cpu``, or the type of an accelerator with or without a number.

    Raises:
        ValueError: it is not here, or its steps cannot be timed. The message is one sentence.

    Example:
        >>> find("cpu")
        device(type='cpu')
        >>> find("gpu")
        Traceback (most recent call last):
        ValueError: 'gpu' is no device of torch; it must be cpu, or such as cuda, cuda:1 or xpu.
    """
    try:
        asked = torch.device(text)
    except RuntimeError:
        raise ValueError(
            f"{text!r} is no device of torch; it must be cpu, or such as cuda, cuda:1 or xpu."
        ) from None
    if asked.type == "cpu":
        return CPU
    here, device = accelerators(), torch.device(asked.type, asked.index or 0)
    if device not in here:
        raise ValueError(
            f"torch {torch.__version__} finds no {text} here, only "
            f"{', '.join(map(str, (CPU, *here)))}."
        )
    if not hasattr(torch.get_device_module(device), "Event"):
        raise ValueError(f"torch has no events on {text}, so a step there cannot be timed.")
    return device


def use(device: torch.device) -> None:
    """Makes a device the current one of its type: the one that events and waits are about."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)


def free_memory(device: torch.device) -> int | None:
    """How many bytes are free on a device; None if nobody tells."""
    if device.type != "cpu":
        ask = getattr(torch.get_device_module(device), "mem_get_info", None)
        return None if ask is None else int(ask(device)[0])
    try:
        told = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:  # not Linux
        return None
    return 1024 * int(told[1]) if told else None


def describe(device: torch.device) -> dict[str, str]:
    """An accelerator, what drives it and what compiles for it; nothing for a CPU.

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
    """The version of Triton, or why there is none."""
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
        return platform.release()  # it is a part of the system
    if torch.version.hip:
        kept = Path("/sys/module/amdgpu/version")  # where it is not a part of Linux itself
        return kept.read_text().strip() if kept.exists() else f"of Linux {platform.release()}"
    return _nvidia_driver()


def _nvidia_driver() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    question = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(question, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return (asked.stdout.splitlines() or [""])[0].strip() or None
