"""Options of several commands: ``--optimizer`` and ``--device``."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, TypeAlias

import torch
import typer

from stepforge.cli import devices
from stepforge.rules import ALL

__all__ = ["OptimizerName", "OptimizerNames", "current_device", "optimizer_names"]

#: The values of ``--optimizer``.
OptimizerName = StrEnum("OptimizerName", [(name, name) for name in ALL])  # type: ignore[misc]
#: A repeatable ``--optimizer``.
OptimizerNames: TypeAlias = Annotated[
    list[OptimizerName] | None,
    typer.Option(case_sensitive=False, help="Repeat it for several; all if not given."),
]


def optimizer_names(given: Iterable[OptimizerName] | None) -> list[str]:
    """Return the optimizers of a repeatable ``--optimizer``, each once; all if none is given.

    Example:
        >>> optimizer_names([OptimizerName("NAdam"), OptimizerName("Adam"), OptimizerName("NAdam")])
        ['NAdam', 'Adam']
    """
    return [str(name) for name in dict.fromkeys(given or OptimizerName)]


def current_device(text: str) -> torch.device:
    """Return the device that ``--device`` names, and make it the current one of its type.

    Raises:
        typer.BadParameter: if it is not available, or torch has no events for it.
    """
    try:
        device = devices.find(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None
    devices.make_current(device)
    return device
