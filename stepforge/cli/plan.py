"""``stepforge plan``: the memory and step time of a training run, before renting a machine."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import stepforge
from stepforge.accounting import Account, account
from stepforge.cli.dtypes import DTYPES, dtype_name
from stepforge.cli.options import OptimizerName
from stepforge.cli.output_files import file_option, write_json
from stepforge.cli.tables import new_table, print_whole
from stepforge.formats import BLOCK
from stepforge.state.layout import HALF_DTYPES

__all__ = ["Budget", "plan"]

_DECLARED = stepforge.Optimizer._hyperparameters


def _choices(name: str) -> list[tuple[str, str]]:
    """Return the values of an optimizer's option, without None, for an enum."""
    return [(str(choice), str(choice)) for choice in _DECLARED[name].choices or ()]


#: The values of ``--state-format``.
StateFormat = StrEnum("StateFormat", _choices("state_format"))  # type: ignore[misc]
#: The values of ``--master-weight-bits``.
MasterWeightBits = StrEnum("MasterWeightBits", _choices("master_weight_bits"))  # type: ignore[misc]
#: The values of ``--dtype`` and ``--gradient-dtype``.
DtypeName = StrEnum(  # type: ignore[misc]
    "DtypeName", [2 * (dtype_name(dtype),) for dtype in DTYPES if dtype.is_floating_point]
)

_ADAMW = OptimizerName("AdamW")

#: The suffixes of a parameter count, as in the names of models.
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
#: The largest parameter count is 10 to this power.
_MAX_EXPONENT = 18

#: The shape of a matrix that stands for all parameters. Its rows are whole blocks.
_MATRIX = (64 * BLOCK, 64 * BLOCK)

_PREFIXES = {
    **{1e18: "E", 1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1: ""},
    **{1e-3: "m", 1e-6: "µ", 1e-9: "n", 1e-12: "p"},
}

_NOT_COUNTED = """\
All parameters count as large matrices, evenly sharded. Small ones and vectors keep their states in
full precision; stepforge.explain counts those of a model. Not counted: activations, copies in other
dtypes as autocast makes, buffers of communication, and what an allocator wastes."""


@dataclass(frozen=True)
class Budget:
    """The memory and time of training.

    Attributes:
        bytes_per_parameter: bytes by purpose, with ``total``, ``checkpoint``, and ``moved``, the
            bytes that a step reads and writes.
        bytes_per_device: the same without the checkpoint.
        checkpoint_bytes: the checkpoint's bytes of all devices together.
        step_seconds: the time that memory needs to move the bytes of a step.
    """

    bytes_per_parameter: dict[str, float]
    bytes_per_device: dict[str, float]
    checkpoint_bytes: float
    step_seconds: float

    @classmethod
    def of(cls, sample: Account, params: int, world_size: int, bandwidth: float) -> Budget:
        """Return the budget of many parameters from the account of a sample.

        Args:
            sample: the account of some parameters.
            params: the number of elements of all parameters.
            world_size: the number of devices that share parameters, gradients and states.
            bandwidth: the memory bandwidth of a device, in bytes per second.

        Example:
            >>> sample = Account(elements=2, weights=4, gradients=4, states=8, read=16, written=12)
            >>> budget = Budget.of(sample, params=1000, world_size=10, bandwidth=700.0)
            >>> budget.bytes_per_parameter["total"], budget.bytes_per_device["total"]
            (8.0, 800.0)
            >>> budget.checkpoint_bytes, budget.step_seconds
            (6000.0, 2.0)
        """
        whole = {**sample.memory, "total": sample.total, "moved": sample.moved}
        per_param = {name.replace(" ", "_"): size / sample.elements for name, size in whole.items()}
        on_device = {name: size * params / world_size for name, size in per_param.items()}
        checkpoint = sample.checkpoint / sample.elements
        return cls(
            per_param | {"checkpoint": checkpoint},
            on_device,
            checkpoint * params,
            on_device["moved"] / bandwidth,
        )


def plan(
    params: Annotated[
        str,
        typer.Option(
            metavar="COUNT", help="Parameters of the model, such as 8B, 350M or 7_241_732_096."
        ),
    ],
    optimizer: Annotated[
        OptimizerName, typer.Option(case_sensitive=False, help="The optimizer.")
    ] = _ADAMW,
    state_format: Annotated[
        StateFormat | None,
        typer.Option(
            case_sensitive=False,
            help="Storage of states; the dtype of the weights if not given.",
        ),
    ] = None,
    master_weight_bits: Annotated[
        MasterWeightBits | None,
        typer.Option(help="Bits of a weight, including its low bits."),
    ] = None,
    stochastic_rounding: Annotated[
        bool,
        typer.Option(
            "--stochastic-rounding",
            help="Round weights stochastically; excludes --master-weight-bits.",
        ),
    ] = False,
    dtype: Annotated[
        DtypeName | None,
        typer.Option(
            case_sensitive=False,
            help="Dtype of the weights; if not given bfloat16 with --master-weight-bits or "
            "--stochastic-rounding, else float32.",
        ),
    ] = None,
    gradient_dtype: Annotated[
        DtypeName | None,
        typer.Option(
            case_sensitive=False,
            help="Dtype of the gradients; that of the weights if not given.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Another argument of the optimizer, such as amsgrad=True; repeat it for several.",
        ),
    ] = None,
    world_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Devices that share weights, gradients and states; 1 if each has all of them.",
        ),
    ] = 1,
    bandwidth: Annotated[
        float,
        typer.Option(
            help="Memory bandwidth of a device, in GB/s. An H100 SXM has 3350; "
            "`stepforge bench --device cuda` measures yours."
        ),
    ] = 3350.0,
    json_: Annotated[
        Path | None,
        file_option("File for all results, in bytes", "--json"),
    ] = None,
) -> None:
    """Compute memory, checkpoint and step time of training.

    The same training in float32 is shown for comparison. Nothing is allocated or measured: bytes
    follow from the optimizer's storage of its tensors, and the time from the bytes that a fused
    step reads and writes, at memory speed. A GB has 10**9 bytes.
    """
    count = _count(params)
    if not 0 < bandwidth < math.inf:
        raise typer.BadParameter(
            f"{bandwidth:g} is no speed; it must be a number above 0.", param_hint="--bandwidth"
        )
    weights = _weights(dtype, master_weight_bits, stochastic_rounding)
    gradients = gradient_dtype or weights
    options = _options(option or ())
    formats: dict[str, Any] = {
        "state_format": state_format and str(state_format),
        "master_weight_bits": master_weight_bits and int(master_weight_bits),
        "stochastic_rounding": stochastic_rounding,
    }

    def budget(weights: str, gradients: str, **options: Any) -> Budget:
        sample = _account(str(optimizer), weights, gradients, options)
        return Budget.of(sample, count, world_size, 1e9 * bandwidth)

    planned = budget(weights, gradients, **options, **formats)
    float32 = budget("float32", "float32", **options)  # as in torch.optim

    console = Console(highlight=False)
    console.print(
        f"[bold]{optimizer}[/], {count:,} parameters on {world_size} "
        f"device{'' if world_size == 1 else 's'}: {_summary(weights, gradients, **formats)}\n",
        soft_wrap=True,
    )
    print_whole(console, _table(planned, float32))
    for line in _conclusions(planned, float32, bandwidth):
        console.print(line, soft_wrap=True)
    console.print(f"\n{_NOT_COUNTED}", soft_wrap=True)
    if json_ is not None:
        report = {
            "optimizer": optimizer,
            "parameters": count,
            "world_size": world_size,
            "bytes_per_second": 1e9 * bandwidth,
            "dtype": weights,
            "gradient_dtype": gradients,
            **formats,
            "options": options,
            "planned": dataclasses.asdict(planned),
            "float32": dataclasses.asdict(float32),
        }
        write_json(json_, report)
        console.print(f"All numbers: [bold]{escape(str(json_))}[/]", soft_wrap=True)


# Options. -----------------------------------------------------------------------------------------


def _count(text: str) -> int:
    """Return the number of parameters from its text.

    Example:
        >>> _count("8B"), _count("1.5b"), _count("350 k"), _count("8e9"), _count("7_000_000_000")
        (8000000000, 1500000000, 350000, 8000000000, 7000000000)
    """
    stripped = text.strip()
    unit = _UNITS.get(stripped[-1:].upper())
    try:
        count = (unit or 1) * Decimal(stripped[:-1] if unit else stripped)
    except ArithmeticError:  # the text is not a number, or too large for a Decimal
        count = Decimal("inf")
    if not (count.is_finite() and 1 <= count <= 10**_MAX_EXPONENT and count == int(count)):
        raise typer.BadParameter(
            f"{text!r} is no number of parameters; it must be a whole one from 1 to "
            f"10**{_MAX_EXPONENT}, as 8B, 350M or 8e9.",
            param_hint="--params",
        )
    return int(count)


def _weights(
    chosen: DtypeName | None, master_weight_bits: str | None, stochastic_rounding: bool
) -> DtypeName:
    """Return the dtype of the weights. Options for 16-bit weights require a 16-bit dtype."""
    if master_weight_bits and stochastic_rounding:
        raise typer.BadParameter(
            "it excludes --master-weight-bits: weights that keep their low bits are not rounded at "
            "random.",
            param_hint="--stochastic-rounding",
        )
    if not (master_weight_bits or stochastic_rounding):
        return chosen or DtypeName("float32")
    dtype = chosen or DtypeName("bfloat16")
    if _dtype(dtype) not in HALF_DTYPES:
        why, option = (
            ("have no low bits", "--master-weight-bits")
            if master_weight_bits
            else ("are not rounded at random", "--stochastic-rounding")
        )
        raise typer.BadParameter(
            f"weights in {dtype} {why}; --dtype must be bfloat16 or float16.", param_hint=option
        )
    return dtype


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def _options(given: Iterable[str]) -> dict[str, Any]:
    """Return the optimizer's arguments from texts like ``name=value``, with Python values."""
    options: dict[str, Any] = {}
    for text in given:
        name, separator, value = text.partition("=")
        own_option = f"--{name.replace('_', '-')}"
        if not separator:
            why = f"{text!r} has no value; it must be as in amsgrad=True."
        elif name in ("params", "state_format", "master_weight_bits", "stochastic_rounding"):
            why = f"{name} has an option of its own, {own_option}."
        else:
            try:
                options[name] = ast.literal_eval(value)
                continue
            except (ValueError, TypeError, SyntaxError):
                why = f"{value!r} is no value of Python such as True, 0.9 or (0.9, 0.99)."
        raise typer.BadParameter(why, param_hint="--option")
    return options


def _account(optimizer: str, weights: str, gradients: str, options: Mapping[str, Any]) -> Account:
    """Return the account of one large matrix. It is on the meta device and takes no memory."""
    p = torch.empty(_MATRIX, dtype=_dtype(weights), device="meta")
    try:
        instance = getattr(stepforge, optimizer)([p], **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise typer.BadParameter(f"{str(error).rstrip('.')}.", param_hint="--option") from None
    return account(instance.rule, instance.param_groups[0], p, p.to(_dtype(gradients)))


# Output. ------------------------------------------------------------------------------------------


def _summary(
    weights: str,
    gradients: str,
    *,
    state_format: str | None,
    master_weight_bits: int | None,
    stochastic_rounding: bool,
) -> str:
    width = f" of {master_weight_bits} bits" if master_weight_bits else ""
    rounding = " rounded at random" if stochastic_rounding else ""
    states = state_format or weights
    return f"weights {weights}{width}{rounding}, gradients {gradients}, states {states}"


def _table(planned: Budget, float32: Budget) -> Table:
    table = new_table(
        [""], ["bytes a\nparameter", "a device", "bytes in\nfloat32", "a device", "ratio"]
    )
    both = (planned, float32)
    for name in planned.bytes_per_device:
        if not any(budget.bytes_per_device[name] for budget in both):
            continue
        if name == "total":
            table.add_section()
        table.add_row(
            "a step moves" if name == "moved" else name.replace("_", " "),
            *(
                cell
                for budget in both
                for cell in (
                    f"{budget.bytes_per_parameter[name]:.4f}".rstrip("0").rstrip("."),
                    _with_unit(budget.bytes_per_device[name], "B"),
                )
            ),
            _ratio(*(budget.bytes_per_device[name] for budget in both)),
            style="bold" if name == "total" else "",
            end_section=name == "total",
        )
    return table


def _conclusions(planned: Budget, float32: Budget, bandwidth: float) -> list[str]:
    checkpoints = planned.checkpoint_bytes, float32.checkpoint_bytes
    times = planned.step_seconds, float32.step_seconds
    size, size_in_float32 = (_with_unit(x, "B") for x in checkpoints)
    time, time_in_float32 = (_with_unit(x, "s") for x in times)
    return [
        f"\nA checkpoint has [bold]{size}[/] in all; in float32 {size_in_float32}: "
        f"{_ratio(*checkpoints)} of it.",
        f"A step takes at least [bold]{time}[/] at {bandwidth:,.0f} GB/s; in float32 "
        f"{time_in_float32}: {_ratio(*times)} of it.",
    ]


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.2f}" if whole else ""


def _with_unit(value: float, unit: str) -> str:
    """Return a value in three digits, with a prefix that leaves up to three before the point.

    Example:
        >>> _with_unit(56.5e9, "B"), _with_unit(0.00362, "s"), _with_unit(0.0, "B")
        ('56.5 GB', '3.62 ms', '0 B')
    """
    fitting = [factor for factor in _PREFIXES if value >= 0.9995 * factor]
    factor = max(fitting, default=1.0)
    return f"{value / factor:.3g} {_PREFIXES[factor]}{unit}"
