"""Cells of the benchmark's tables."""

from __future__ import annotations

from rich.text import Text

__all__ = ["at_most", "marked", "number", "peak_megabytes", "percent"]

#: The resolution of peak memory in bytes. The system counts pages, and some of them late, so the
#: temporary of a smaller parameter does not stand out.
_RESOLUTION = 2**21


def number(value: float | None, factor: float = 1) -> str:
    """Return a value in about three digits, never in scientific notation; "" for None.

    Example:
        >>> number(0.0012345, 1e3), number(1234.5)
        ('1.23', '1,234')
    """
    if value is None:
        return ""
    value *= factor
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """Return a share in percent; "" for None."""
    return "" if value is None else f"{value:.0%}"


def marked(value: float | None, reached: bool | None, format_spec: str = "") -> Text:
    """Return a value with a mark that shows if it reached its target; a blank without a target."""
    mark = {
        True: Text(" \N{CHECK MARK}", style="green"),
        False: Text(" \N{BALLOT X}", style="red"),
        None: Text("  "),
    }[reached]
    text = format(value, format_spec) if format_spec and value is not None else number(value)
    return Text.assemble(text, mark)


def at_most(value: float, target: float | None, factor: float = 1) -> tuple[Text, str]:
    """Return a value with its mark, and its upper target.

    Args:
        value: the value.
        target: the largest value that reaches it; None without a target.
        factor: the factor of both to the table's unit.

    Example:
        >>> [str(cell) for cell in at_most(0.25, 0.5, 1e3)]
        ['250 \N{CHECK MARK}', '500']
    """
    reached = None if target is None else value <= target
    return marked(value * factor, reached), number(target, factor)


def peak_megabytes(extra: int | None, largest_parameter: int) -> Text:
    """Return peak memory in MB, marked by whether a temporary is as large as a parameter.

    Args:
        extra: the bytes that a step adds at its peak; None if not measured.
        largest_parameter: the bytes of the largest parameter. A small one gets no mark.
    """
    if extra is None:
        return Text()
    is_large = largest_parameter > 2 * _RESOLUTION
    return marked(extra / 1e6, extra < largest_parameter - _RESOLUTION if is_large else None, ".1f")
