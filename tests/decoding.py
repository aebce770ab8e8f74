"""What stored states and weights mean by their definition, written out in float64."""

from __future__ import annotations

from typing import Any

import torch


def in_first(upper: int) -> float:
    """A float of which these are the bits from 20 up: 8 of exponent and 3 of fraction."""
    return (1 + upper % 8 / 8) * 2.0 ** (upper // 8 - 127)


#: What the codes mean, before they are multiplied by their scale.
UNSIGNED = [0.0] + [in_first(code + 0x3FF - 255) for code in range(1, 256)]
SIZES = [0.0] + [in_first(code + 0x3FF - 127) for code in range(1, 128)]
SIGNED = SIZES + [-size for size in SIZES]


def numbers(entry: dict[str, Any], key: str) -> torch.Tensor:
    """What a state holds, in float64."""
    if key in entry:
        return entry[key].double()
    stored = entry[f"{key}_codes"]
    assert stored.dtype == torch.uint8
    meaning = torch.tensor(SIGNED if key == "exp_avg" else UNSIGNED, dtype=torch.float64)
    rows = meaning[stored.long()].view(len(stored), -1)
    scales = entry[f"{key}_scale"].double()
    return (rows * scales.repeat_interleave(128, 1)[:, : rows.shape[1]]).view(stored.shape)


def weight(p: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
    """The weight that is stepped, in float32, with the lower bits that its entry has of it."""
    for key, spare in (("low_bits_8", 8), ("low_bits_16", 0)):
        if key in entry:
            assert p.dtype == torch.bfloat16
            upper = p.detach().float().view(torch.int32)
            return (upper + (entry[key].to(torch.int32) << spare)).view(torch.float32)
    return p.detach().float()
