"""Steps a case by one backend, and finds where its bits are not those of another."""

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

__all__ = ["Outcome", "Result", "bits", "differing", "digest", "forced", "outcomes"]

#: The bit patterns of a tensor, as integers.
Bits: TypeAlias = "np.ndarray[Any, Any]"
#: Those of parameters and states after a step, by the parameter's number and the state's key.
Outcome: TypeAlias = dict[str, Bits]


@contextlib.contextmanager
def forced(backend: str) -> Iterator[None]:
    """Has that backend serve every step inside, or raise a RuntimeError."""
    before = os.environ.get("STEPFORGE_BACKEND")
    os.environ["STEPFORGE_BACKEND"] = backend
    try:
        yield
    finally:
        os.environ.pop("STEPFORGE_BACKEND")
        if before is not None:
            os.environ["STEPFORGE_BACKEND"] = before


def outcomes(case: Case, backend: str, device: torch.device) -> list[Outcome]:
    """Steps a case by one backend; gives an outcome for each step.

    Raises:
        RuntimeError: the backend cannot serve it.
    """
    members = case.members()
    params = [m.parameter(seed, case.dtype, device) for seed, m in enumerate(members)]
    optimizer = case.build(params)
    found = []
    with forced(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing faster runs: it is not to
        for step in range(STEPS):
            for number, (member, p) in enumerate(zip(members, params)):
                seed = 1000 * (step + 1) + number
                is_missing = step % 3 == 1 and number % 3 == 1  # so that step counts differ
                p.grad = None if is_missing else member.gradient(seed, case.gradient, device)
            optimizer.step()
            found.append(
                {
                    f"{number}.{key}": bits(x)
                    for number, p in enumerate(params)
                    for key, x in {"parameter": p, **optimizer.state.get(p, {})}.items()
                }
            )
    return found


def bits(x: Tensor) -> Bits:
    """The bit patterns of a tensor, little-endian; one for all NaNs, as backends share no other."""
    x = x.detach()
    x = torch.view_as_real(x) if x.is_complex() else x
    x = x.cpu().contiguous()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    # All ones are a NaN of every dtype of floating point, so they stand for no number.
    array = x.view(integers[x.itemsize]).masked_fill(x.isnan(), -1).numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def digest(outcome: Outcome) -> str:
    """A hash of names, dtypes, shapes and bits."""
    hashed = hashlib.sha256()
    for name, array in outcome.items():
        hashed.update(f"{name} {array.dtype.str} {array.shape};".encode())
        hashed.update(np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """Comparison of the bits that a case stores with those that it should.

    Attributes:
        case: the case.
        backend: the backend that stepped it.
        against: name of what its bits were compared with.
        expected: the hash of each step that it should have.
        found: the hash of each step that it has; empty if a step could not be taken.
        differing: of the first step that differs the tensors that do, as far as they are known.
        error: why a step could not be taken.
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
        """True if all steps have the hashes that they should."""
        return self.expected == self.found

    def report(self) -> dict[str, Any]:
        """The entry of a report."""
        told: dict[str, Any] = {
            "case": self.case.name,
            "backend": self.backend,
            "against": self.against,
            "agrees": self.agrees,
            "expected": list(self.expected),
            "found": list(self.found),
        }
        if self.error:
            told["error"] = self.error
        if not self.agrees and self.found:
            pairs = enumerate(itertools.zip_longest(self.expected, self.found), start=1)
            told["step"] = next(step for step, (x, y) in pairs if x != y)
            told["differing"] = list(self.differing)
        return told


#: How many tensors of a step, and elements of each, are told of.
_TENSORS, _ELEMENTS = 4, 4


def differing(expected: Sequence[Outcome], found: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """The first tensors that differ in the first step that does, with their first elements."""
    for wanted, got in zip(expected, found):
        names = [name for name in wanted | got if not _equal(wanted.get(name), got.get(name))]
        for name in names[:_TENSORS]:
            yield {"tensor": name, **_elements(wanted.get(name), got.get(name))}
        if names:
            return


def _equal(x: Bits | None, y: Bits | None) -> bool:
    return x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y)


def _elements(wanted: Bits | None, got: Bits | None) -> dict[str, Any]:
    if wanted is None or got is None or (wanted.dtype, wanted.shape) != (got.dtype, got.shape):
        described = [None if x is None else f"{x.dtype.name} {x.shape}" for x in (wanted, got)]
        return dict(zip(("expected", "found"), described))
    where = np.argwhere(wanted != got)
    return {
        "elements": wanted.size,
        "differing": len(where),
        "first": [
            {"index": index.tolist(), "expected": _hex(wanted, index), "found": _hex(got, index)}
            for index in where[:_ELEMENTS]
        ],
    }


def _hex(x: Bits, index: Bits) -> str:
    word = int(x[tuple(index)]) & ((1 << 8 * x.itemsize) - 1)
    return f"0x{word:0{2 * x.itemsize}x}"
