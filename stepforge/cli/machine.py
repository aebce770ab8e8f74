"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

import stepforge

__all__ = ["describe"]


def describe() -> dict[str, str]:
    """Versions, processor and threads, for people to read.

    Example:
        >>> list(describe())
        ['stepforge', 'torch', 'Python', 'system', 'CPU', 'threads']
    """
    return {
        "stepforge": stepforge.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "CPU": f"{_cpu()}, {os.cpu_count()} logical cores",
        "threads": f"{torch.get_num_threads()} used by torch",
    }


def _cpu() -> str:
    try:
        if platform.system() == "Darwin":
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            asked = subprocess.run(command, capture_output=True, text=True, check=True)
            return asked.stdout.strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except (OSError, subprocess.SubprocessError):
        pass  # not worth failing for: the fallback below names the architecture at least
    return platform.processor() or platform.machine()
