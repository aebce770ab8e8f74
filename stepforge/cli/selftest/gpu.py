"""Inspection of what kernels are compiled to for a GPU, for a report."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from stepforge.backends.triton.inspection import GPU, dense_paths, inspect_kernel
from stepforge.backends.triton.variant import target_of
from stepforge.cli.kernels import STORAGES, spec_of_storage

__all__ = ["gpu_of", "kernels"]

_OPTIMIZER = "AdamW"


def gpu_of(device: torch.device) -> GPU | None:
    """Return a device as a GPU to compile for; None if its machine code cannot be read."""
    if device.type != "cuda":
        return None
    found = importlib.import_module("triton.runtime").driver.active.get_current_target()
    return GPU(found.backend, found.arch, target_of(device))


def kernels(gpu: GPU, storages: Sequence[str] = tuple(STORAGES)) -> Iterator[dict[str, Any]]:
    """Compile AdamW's kernels for a GPU, and yield what each path has become.

    Args:
        gpu: the GPU.
        storages: the storages of weights and states.
    """
    for storage in storages:
        spec = spec_of_storage(_OPTIMIZER, storage)
        for variant, path in dense_paths(spec, gpu.target):
            found = inspect_kernel(spec, variant, gpu, path)
            yield {"storage": storage, "path": path} | asdict(found)
