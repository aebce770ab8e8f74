"""Descriptions of this machine: versions, processor, and whatever compiles kernels."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

import stepforge
from stepforge import extension
from stepforge.backends import disk_cache
from stepforge.backends.native import compiler, openmp, prebuilt
from stepforge.cli import devices, kernels
from stepforge.extension import target

__all__ = ["as_line", "describe", "describe_in_detail"]

#: The environment variables that change which kernels and guards run.
_VARIABLES = (
    "STEPFORGE_BACKEND",
    "STEPFORGE_GUARDS",
    "STEPFORGE_ISA",
    "STEPFORGE_PREBUILT",
    "STEPFORGE_CACHE",
    "CC",
    "CXX",
    "TRITON_INTERPRET",
)


def describe() -> dict[str, str]:
    """Return versions, processor and threads, for people to read.

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


def describe_in_detail() -> dict[str, str]:
    """Return versions, processor, compiler, kernels, guards, GPUs and environment variables."""
    machine = describe()
    return {
        "stepforge": machine["stepforge"],
        "torch": machine["torch"],
        "numpy": np.__version__,
        "system": f"{machine['system']}, Python {machine['Python']}",
        "CPU": machine["CPU"],
        "instruction set": _or_error(lambda: compiler.instruction_set() or "the plain one"),
        "compiler": _or_error(_compiler),
        "prebuilt kernels": _or_error(_prebuilt_kernels),
        "kernel cache": _or_error(_kernel_cache),
        "guards": _guards(),
        "threads": _threads(),
        "accelerators": _accelerators(),
        "triton": devices.triton_version(),
        "environment": _environment(),
    }


def as_line(description: Mapping[str, str]) -> str:
    """Return a description as one line.

    Example:
        >>> as_line({"torch": "2.10.0", "threads": "2 used by torch"})
        'torch 2.10.0, threads 2 used by torch'
    """
    return ", ".join(f"{name} {value}" for name, value in description.items())


def _cpu() -> str:
    try:
        if platform.system() == "Darwin":
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return done.stdout.strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except (OSError, subprocess.SubprocessError):
        pass  # not worth failing for: the fallback below names the architecture at least
    return platform.processor() or platform.machine()


def _or_error(describe_part: Callable[[], str]) -> str:
    try:
        return describe_part()
    except disk_cache.BuildError as error:
        return f"none: {error}"


def _compiler() -> str:
    command = compiler.compiler()
    return f"{' '.join(command)}: {compiler.compiler_version(command)}"


def _prebuilt_kernels() -> str:
    folder = prebuilt.folder()
    if folder is None:
        return "none: STEPFORGE_PREBUILT is empty"
    sources = kernels.c_sources()
    counts, size = [], 0
    for isa in (*compiler.LEVELS, ""):
        files = list(prebuilt.shelf(folder, isa).glob("*.so"))
        if files:
            # Kernels of another version and altered kernels are not used.
            usable = sum(any(prebuilt.find(folder, source, isa)) for source in sources)
            counts.append(f"{usable} of {len(sources)} for {kernels.isa_name(isa)}")
            size += sum(path.stat().st_size for path in files)
    return f"{folder}: {', '.join(counts)}; {size / 1e6:.1f} MB" if counts else f"none in {folder}"


def _kernel_cache() -> str:
    folder = disk_cache.cache_folder()
    sizes = [path.stat().st_size for path in folder.glob("*.so")]
    plural = "" if len(sizes) == 1 else "s"
    content = f"{folder}: {len(sizes)} kernel{plural}, {sum(sizes) / 1e6:.1f} MB"
    return content if os.access(folder, os.W_OK) else f"{content}; it cannot be written to"


def _guards() -> str:
    try:
        found = extension.status()
    except ValueError as error:  # STEPFORGE_GUARDS
        return f"none: {error}"
    if isinstance(found, str):
        return extension.described(found)
    folder = Path(str(found.__file__)).parent
    return f"{extension.described(found)} (built for {target.description()}) in {folder}"


def _threads() -> str:
    if openmp.thread_pool() is None:
        pool = "torch's OpenMP pool was not found, so kernels use one"
    else:
        pool = "torch's OpenMP pool was found"
    return f"{torch.get_num_threads()}; {pool}"


def _accelerators() -> str:
    descriptions = (devices.describe(device) for device in devices.accelerators())
    return "; ".join(f"{gpu['GPU']}, {gpu['platform']}" for gpu in descriptions) or "none"


def _environment() -> str:
    values = {name: os.environ.get(name) for name in _VARIABLES}
    settings = [f"{name}={value}" for name, value in values.items() if value is not None]
    return ", ".join(settings) or f"none of {', '.join(_VARIABLES)} is set"
