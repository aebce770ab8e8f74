"""Time what a kept step costs the host, without a GPU: ``make host-time``.

Prints a table, and writes it to docs/gpus.md.

The parameters are on the CPU, and Triton's interpreter is to step them; but launches do nothing, so
what is left is the host's part of a step on a GPU: guards, uniform values, tables. Parameters have
one element each. ``fused=True`` keeps step counts where the parameters are: on a CPU the host would
read them, so they are declared to be on a device.

It leaves out what needs a GPU: Triton's launcher (two launches with ``capturable=True`` or
``fused=True`` if a kernel computes uniform values, otherwise one), copies to the GPU, and the
difference between an operation of torch on a small CPU tensor and its launch on a GPU.

torch.optim steps one-element tensors on the CPU, and once more with its operations doing nothing.
Its time on a GPU's host is expected between the two: the first has its CPU kernel, the second lacks
the packing of arguments for the GPU's.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import stepforge
from experiments.gpu_report import with_table
from stepforge import extension
from stepforge.cli.timing.turns import measure
from stepforge.step import params as step_params

__all__ = ["COUNTS", "WAYS", "Way", "measured", "page_table", "without_launches"]

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gpus.md"

#: The numbers of tensors: a transformer's, and many.
COUNTS = (148, 1000)
#: The steps of a way in each round, of which the median counts.
_STEPS = 15


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Let the Triton backend serve tensors on the CPU, and launch nothing.

    Step counts of ``fused=True`` count as on a device, as they are on a GPU.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    environment = {"TRITON_INTERPRET": "1", "STEPFORGE_BACKEND": "triton"}
    kind: Any = step_params.ParamKind

    def on_device(group: Mapping[str, Any], *rest: Any) -> Any:
        return kind(group, *rest[:-1], rest[-1] or bool(group["fused"]))

    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(interpreter.InterpretedFunction, "run", _nothing),
        mock.patch.object(step_params, "ParamKind", on_device),
    ):
        yield


class _Operations:
    """The operations of torch's fused AdamW, which do nothing while :attr:`are_left_out`."""

    def __init__(self) -> None:
        self.are_left_out = False

    @contextlib.contextmanager
    def switched(self) -> Iterator[None]:
        """Put the switch into torch."""
        names = ("_fused_adamw_", "_foreach_add_")
        with contextlib.ExitStack() as stack:
            for name in names:
                switched = self._switch(getattr(torch, name))
                stack.enter_context(mock.patch.object(torch, name, switched))
            yield

    def _switch(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def switched(*args: Any, **options: Any) -> Any:
            return None if self.are_left_out else operation(*args, **options)

        return switched


def _nothing(*_: object, **__: object) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Way:
    """A way to step AdamW.

    Attributes:
        name: its name in the table.
        library: the module of the optimizer.
        options: the optimizer's options.
        leaves_out: True if torch's operations do nothing in its steps.
    """

    name: str
    library: ModuleType
    options: tuple[str, ...] = ()
    leaves_out: bool = False


DEFAULT = Way("default", stepforge)
TORCH = Way("torch.optim, `fused=True`", torch.optim, ("fused",))
#: The ways, in the table's order.
WAYS = (
    DEFAULT,
    Way("`fused=True`", stepforge, ("fused",)),
    Way("`capturable=True`", stepforge, ("capturable",)),
    TORCH,
    Way("torch.optim, `fused=True`, operations left out", torch.optim, ("fused",), leaves_out=True),
)


class _Runner:
    """Parameters of one element, stepped in one way."""

    def __init__(self, way: Way, count: int, operations: _Operations) -> None:
        self._way, self._operations = way, operations
        self.params = [torch.ones(1, requires_grad=True) for _ in range(count)]
        options = dict.fromkeys(way.options, True)
        self.optimizer: torch.optim.Optimizer = way.library.AdamW(list(self.params), **options)

    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Give every parameter a fresh gradient, as ``zero_grad`` and ``backward`` do."""
        self._operations.are_left_out = self._way.leaves_out
        for p, gradient in zip(self.params, gradients):
            p.grad = gradient.clone()

    def step(self) -> object:
        """Step all parameters."""
        return self.optimizer.step()


def measured(count: int, rounds: int, steps: int = _STEPS) -> dict[Way, float]:
    """Return the median seconds of a step of each way, in turn.

    Args:
        count: the number of tensors.
        rounds: the number of measured rounds.
        steps: the steps of a way in each round.
    """
    operations = _Operations()
    with without_launches(), operations.switched():
        runners = {way.name: _Runner(way, count, operations) for way in WAYS}
        gradients = [torch.ones(1) for _ in range(count)]
        times = measure(runners, gradients, rounds=rounds, steps=steps)
    return {way: statistics.median(time.host for time in times[way.name]) for way in WAYS}


def page_table(found: Mapping[int, Mapping[Way, float]]) -> str:
    """Return the page's table: milliseconds, and ratios to the default and to torch's.

    Args:
        found: the seconds of each way, by the number of tensors.
    """
    heads = [f"{count} tensors, ms | of the default | of torch's" for count in found]
    lines = [f"| AdamW | {' | '.join(heads)} |", "| --- " + 3 * len(heads) * "| --- " + "|"]
    for way in WAYS:
        cells = [
            f"{seconds[way] * 1e3:.2f} | {seconds[way] / seconds[DEFAULT]:.2f} | "
            f"{seconds[way] / seconds[TORCH]:.2f}"
            for seconds in found.values()
        ]
        lines.append(f"| {way.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Time all ways, print the table and write the page."""
    torch.set_num_threads(1)
    guards = extension.described(extension.build_into_cache())
    found = {count: measured(count, rounds=15) for count in COUNTS}
    table = page_table(found)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {guards}\n{table}")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_table(page, table, "host time"), encoding="utf-8")


if __name__ == "__main__":
    main()
