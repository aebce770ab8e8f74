"""A kernel in Triton: a spec made into a module, and its launch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import linecache
import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepforge.backends import cache, disk_cache, trust
from stepforge.backends.batch import is_capturing
from stepforge.backends.disk_cache import BuildError
from stepforge.backends.spec import KernelSpec
from stepforge.backends.triton.source import KernelArgs, named, triton_source, writer_source
from stepforge.backends.triton.variant import Variant, elements_of_thread
from stepforge.backends.triton.words import words_of

_PLAIN = Variant()

#: Elements that one program of a launch steps. A launch can have 2**31 programs, which is more
#: elements than any memory holds.
BLOCK = 1024


def is_interpreted() -> bool:
    """Return True if Triton runs kernels in Python, on a CPU: ``TRITON_INTERPRET=1``."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


class Kernel:
    """A kernel, which Triton compiles when it is launched.

    Args:
        spec: its computation and storage.
        variant: the tables and the GPU that it is for.

    Attributes:
        args: the record of a parameter in its tables.
        options: Triton's options of a launch.

    Raises:
        BuildError: its source cannot be kept.
        ImportError: Triton cannot be imported.
    """

    def __init__(self, spec: KernelSpec, variant: Variant) -> None:
        self.args = KernelArgs.of(spec, variant.dims)
        self.options = launch_options(spec, variant)
        self._step = load(triton_source(spec, variant)).step
        self._coefficients = len(spec.graph.coefficients)
        self._arithmetic = spec.arithmetic
        self._compiled: set[tuple[tuple[torch.device, bool, bool], tuple[int, ...]]] = set()

    def launch(
        self,
        blocks: int,
        owners: torch.Tensor,
        rows: torch.Tensor,
        gradients: torch.Tensor,
        coefficients: torch.Tensor | Sequence[float],
        step_seeds: torch.Tensor | None,
        aligned: Mapping[str, int],
        grad_scale: tuple[torch.Tensor, torch.Tensor] | None = None,
        partial: torch.Tensor | None = None,
    ) -> None:
        """Step parameters.

        Args:
            blocks: the number of blocks of all parameters.
            owners: int32, blocks: the parameter of each block.
            rows: int64, parameters x width: the records of :class:`KernelArgs`.
            gradients: int64, parameters: the addresses of their gradients.
            coefficients: parameters x coefficients; or numbers, if all parameters share them.
            step_seeds: int64, parameters: the seeds of their random bits; None if rounding takes
                none.
            aligned: for each tensor, the power of two in bytes that divides all its addresses.
            grad_scale: the factor of gradients, in the dtype of the arithmetic, and a number that
                is not zero if the step is to be skipped; one element each.
            partial: float64, reductions x blocks: takes the reductions of each block.

        Raises:
            RuntimeError: a graph is captured, and the kernel has not been compiled.
        """
        elements = () if self.args.dims else self.args.elements
        numbers = coefficients if isinstance(coefficients, torch.Tensor) else None
        kind = (rows.device, grad_scale is not None, numbers is None)
        bytes_ = self._compiled_for(kind, tuple(aligned[x] for x in elements))
        shared = [0.0] * self._coefficients if numbers is not None else coefficients
        given: dict[str, Any] = {named(x, "aligned"): n for x, n in zip(elements, bytes_)}
        if step_seeds is not None:
            given["keys"] = step_seeds
        if partial is not None:
            given |= {"partial": partial, "blocks": blocks}
        with launch_context(rows.device):
            self._step[(blocks,)](
                owners,
                rows,
                gradients,
                numbers,
                *(word for x in shared for word in words_of(x, self._arithmetic)),
                *(grad_scale or (None, None)),
                **given,
                SCALED=grad_scale is not None,
                BLOCK=BLOCK,
                **self.options,
            )

    def _compiled_for(
        self, kind: tuple[torch.device, bool, bool], aligned: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Return the bytes that addresses are taken to be multiples of, for each tensor.

        Args:
            kind: the device, and whether a gradient scale and shared coefficients are given.
            aligned: the bytes that addresses are multiples of.

        While a graph is captured nothing can be compiled, but what is compiled for multiples of
        fewer bytes serves, too.
        """
        if not is_capturing():
            self._compiled.add((kind, aligned))
            return aligned
        fitting = (
            known
            for compiled, known in self._compiled
            if compiled == kind and all(n % k == 0 for n, k in zip(aligned, known))
        )
        found = max(fitting, default=None)
        if found is None:
            scaled = "with" if kind[1] else "without"
            raise RuntimeError(
                "a graph cannot capture the compilation of a kernel: before the capture, step once "
                f"{scaled} a gradient scaler, with gradients in memory as in the capture"
            )
        return found


def launch_options(spec: KernelSpec, variant: Variant) -> dict[str, Any]:
    """Return Triton's options of a kernel's launches."""
    threads = BLOCK // elements_of_thread(spec, variant)
    return {"num_warps": threads // variant.target.lanes, "enable_fp_fusion": False}


def launch_context(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a launch on a device."""
    if device.type == "cpu":
        return np.errstate(all="ignore")  # the interpreter computes with numpy
    guard: contextlib.AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return guard


def load(source: str) -> types.ModuleType:
    """Return the module of a source, and keep the source in a file, for Triton and for readers.

    The module runs the given source, whatever the file holds.

    Raises:
        BuildError: it cannot be kept.
        ImportError: Triton cannot be imported.
    """
    name = f"stepforge-{hashlib.sha256(source.encode()).hexdigest()[:32]}"
    path = disk_cache.cache_folder() / f"{name}.py"
    _keep(source, path)
    # Triton reads a function's source through this cache. Without a time it is never outdated.
    linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
    module = types.ModuleType(name)
    module.__file__ = str(path)
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def _keep(source: str, path: Path) -> None:
    content = source.encode()
    with contextlib.suppress(OSError), trust.open_trusted(path) as file:
        if file.read() == content:
            return
    try:
        with disk_cache.work_folder(path.parent) as work:
            written = work / "kernel.py"
            written.write_bytes(content)
            written.chmod(disk_cache.PRIVATE)
            os.replace(written, path)  # readers see the whole file or none
    except OSError as error:
        raise disk_cache.unwritable(path.parent, error) from None


#: The numbers that one launch of :func:`write` carries: a quarter of what any GPU takes.
_WORDS = 256


def write(table: torch.Tensor, words: np.ndarray[Any, Any]) -> None:
    """Write numbers into a table by launches that carry them as arguments.

    Args:
        table: int32, on a device.
        words: int32, of the same length.
    """
    kernel = _writer().write[(1,)]
    with launch_context(table.device):
        for begin in range(0, len(words), _WORDS):
            given = words[begin : begin + _WORDS].tolist()
            kernel(table, begin, len(given), *given, *[0] * (_WORDS - len(given)))


@functools.cache
def load_writer(device: torch.device) -> None:
    """Load the kernel of :func:`write`, which cannot be loaded while a graph is captured."""
    write(torch.empty(1, dtype=torch.int32, device=device), np.zeros(1, np.int32))


@functools.cache
def _writer() -> types.ModuleType:
    return load(writer_source(_WORDS))


def kernel_for(spec: KernelSpec, variant: Variant = _PLAIN) -> Kernel | str:
    """Return the kernel of a spec; or why there is none.

    Args:
        spec: its computation and storage.
        variant: the tables and the GPU that it is for.
    """
    return _kernel_for(spec, variant, is_interpreted())


@cache.made_once(disk_cache.cache_circumstances)
def _kernel_for(spec: KernelSpec, variant: Variant, _interpreted: bool) -> Kernel | str:
    try:
        return Kernel(spec, variant)
    except BuildError as error:
        return str(error)
    except ImportError as error:
        return f"triton cannot be imported ({error})"
