"""The dtypes of parameters in every command."""

from __future__ import annotations

import torch

__all__ = ["DTYPES", "dtype_name"]

#: The dtypes of parameters. Their order determines the cases of ``stepforge selftest``.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype.

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")
