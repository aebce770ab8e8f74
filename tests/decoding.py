"""Decode stored states and weights by the definition of their formats, in float64.

This is an oracle: it shares no code with the package.
"""

from __future__ import annotations

from typing import Any

import torch


def float_of_upper_bits(upper: int) -> float:
    """Return the float32 whose bits from 20 up are these: 8 of exponent, 3 of fraction."""
    return (1 + upper % 8 / 8) * 2.0 ** (upper // 8 - 127)


#: The value of each code, before it is multiplied by the scale.
UNSIGNED = [0.0] + [float_of_upper_bits(code + 0x3FF - 255) for code in range(1, 256)]
MAGNITUDES = [0.0] + [float_of_upper_bits(code + 0x3FF - 127) for code in range(1, 128)]
SIGNED = MAGNITUDES + [-magnitude for magnitude in MAGNITUDES]


def decode_state(param_state: dict[str, Any], key: str) -> torch.Tensor:
    """Return the values of a state in float64, whatever its format."""
    if key in param_state:
        return param_state[key].double()
    codes = param_state[f"{key}_codes"]
    assert codes.dtype == torch.uint8
    values = torch.tensor(SIGNED if key == "exp_avg" else UNSIGNED, dtype=torch.float64)
    rows = values[codes.long()].view(len(codes), -1)
    scales = param_state[f"{key}_scale"].double()
    return (rows * scales.repeat_interleave(128, 1)[:, : rows.shape[1]]).view(codes.shape)


def join_low_bits(p: torch.Tensor, param_state: dict[str, Any]) -> torch.Tensor:
    """Return the weight that a step reads, in float32: the parameter and its low bits, if any."""
    for key, shift in (("low_bits_8", 8), ("low_bits_16", 0)):
        if key in param_state:
            assert p.dtype == torch.bfloat16
            upper = p.detach().float().view(torch.int32)
            return (upper + (param_state[key].to(torch.int32) << shift)).view(torch.float32)
    return p.detach().float()
