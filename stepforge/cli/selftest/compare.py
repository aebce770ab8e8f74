"""Outcomes of a case on one backend, and their bitwise comparison."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from stepforge.cli.selftest.cases import STEPS, Case

__all__ = ["Outcome", "Result", "bits", "digest", "find_differences", "forced", "outcomes"]

#: The bit patterns of a tensor, as integers.
Bits: TypeAlias = "np.ndarray[Any, Any]"
#: The bits of parameters and states after a step. A key is the parameter's index, a dot, and the
#: state's key or ``parameter``.
Outcome: TypeAlias = dict[str, Bits]

#: The limits of a report: tensors per step, and elements per tensor.
_MAX_TENSORS, _MAX_ELEMENTS = 4, 4


@contextlib.contextmanager
def forced(backend: str) -> Iterator[None]:
    """Make every step inside run on a backend, or raise a RuntimeError."""
    before = os.environ.get("STEPFORGE_BACKEND")
    os.environ["STEPFORGE_BACKEND"] = backend
    try:
        yield
    finally:
        os.environ.pop("STEPFORGE_BACKEND")
        if before is not None:
            os.environ["STEPFORGE_BACKEND"] = before


def outcomes(case: Case, backend: str, device: torch.device) -> list[Outcome]:
    """Step a case on one backend and return the outcome of each step.

    Raises:
        RuntimeError: if the backend cannot serve the case.
    """
    case_params = case.params()
    params = [param.make(seed, case.dtype, device) for seed, param in enumerate(case_params)]
    optimizer = case.build(params)
    found = []
    with forced(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a slower backend is intended here
        for step in range(STEPS):
            for index, (param, p) in enumerate(zip(case_params, params)):
                seed = 1000 * (step + 1) + index
                is_missing = step % 3 == 1 and index % 3 == 1  # so that step counts differ
                p.grad = None if is_missing else param.make_gradient(seed, case.gradient, device)
            optimizer.step()
            found.append(
                {
                    f"{index}.{key}": bits(x)
                    for index, p in enumerate(params)
                    for key, x in {"parameter": p, **optimizer.state.get(p, {})}.items()
                }
            )
    return found


def bits(x: Tensor) -> Bits:
    """Return the bit patterns of a tensor, little-endian.

    All NaNs get the same pattern, as their bits differ between backends.
    """
    x = x.detach()
    x = torch.view_as_real(x) if x.is_complex() else x
    x = x.cpu().contiguous()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    # All ones are a NaN in every floating-point dtype, so no number has this pattern.
    array = x.view(integers[x.itemsize]).masked_fill(x.isnan(), -1).numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def digest(outcome: Outcome) -> str:
    """Return a hash of names, dtypes, shapes and bits."""
    hashed = hashlib.sha256()
    for name, array in outcome.items():
        hashed.update(f"{name} {array.dtype.str} {array.shape};".encode())
        hashed.update(np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """The comparison of a case's bits with the expected ones.

    Attributes:
        case: the case.
        backend: the backend that stepped it.
        against: the source of the expected bits.
        expected: the expected hash of each step.
        found: the hash of each step; empty if a step raised an error.
        differing: the tensors that differ in the first step that differs, if known.
        error: the message of the error that a step raised.
    """

    case: Case
    backend: str
    against: str
    expected: tuple[str, ...]
    found: tuple[str, ...]
    differing: tuple[dict[str, Any], ...] = ()
    error: str = ""

    @property
    def agrees(self) -> bool:
        """True if all steps have the expected hashes."""
        return self.expected == self.found

    def report(self) -> dict[str, Any]:
        """Return the result's JSON object for a report."""
        entry: dict[str, Any] = {
            "case": self.case.name,
            "backend": self.backend,
            "against": self.against,
            "agrees": self.agrees,
            "expected": list(self.expected),
            "found": list(self.found),
        }
        if self.error:
            entry["error"] = self.error
        if not self.agrees and self.found:
            pairs = enumerate(itertools.zip_longest(self.expected, self.found), start=1)
            entry["step"] = next(step for step, (x, y) in pairs if x != y)
            entry["differing"] = list(self.differing)
        return entry


def find_differences(
    expected: Sequence[Outcome], found: Sequence[Outcome]
) -> Iterator[dict[str, Any]]:
    """Yield the first differing tensors of the first differing step, with their first elements."""
    for wanted, got in zip(expected, found):
        names = [name for name in wanted | got if not _equal(wanted.get(name), got.get(name))]
        for name in names[:_MAX_TENSORS]:
            yield {"tensor": name, **_elements(wanted.get(name), got.get(name))}
        if names:
            return


def _equal(x: Bits | None, y: Bits | None) -> bool:
    return x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y)


def _elements(wanted: Bits | None, got: Bits | None) -> dict[str, Any]:
    if wanted is None or got is None or (wanted.dtype, wanted.shape) != (got.dtype, got.shape):
        described = [None if x is None else f"{x.dtype.name} {x.shape}" for x in (wanted, got)]
        return dict(zip(("expected", "found"), described))
    indices = np.argwhere(wanted != got)
    return {
        "elements": wanted.size,
        "differing": len(indices),
        "first": [
            {"index": index.tolist(), "expected": _hex(wanted, index), "found": _hex(got, index)}
            for index in indices[:_MAX_ELEMENTS]
        ],
    }


def _hex(x: Bits, index: Bits) -> str:
    pattern = int(x[tuple(index)]) & ((1 << 8 * x.itemsize) - 1)
    return f"0x{pattern:0{2 * x.itemsize}x}"
