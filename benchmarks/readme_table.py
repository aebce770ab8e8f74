"""Print the README's table of speed: ``python benchmarks/readme_table.py NAME.json ...``.

Each file is the JSON of a run of ``stepforge bench``; together they have all workloads. A ratio is
always one of a single run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["table"]

#: The rows: a label, a workload, and the implementation that is compared with torch.optim.
ROWS = (
    ("50 million elements in one tensor", "large", "stepforge"),
    ("a transformer's 148 tensors", "model", "stepforge"),
    ("1000 tensors of 1000", "small", "stepforge"),
    ("the same in 250 param groups", "groups", "stepforge"),
    ("8 tensors of 64 x 32, on one thread", "tiny", "stepforge"),
    ("144 small DTensors, as of FSDP2", "sharded", "stepforge"),
    ("`torch.compile(step)`, 148 small tensors", "compiled", "stepforge"),
    ("gradients clipped, 1000 tensors of 1000", "clipped", "stepforge"),
    ("gradients clipped, 50 million elements", "clipped-large", "stepforge"),
    ("with metrics, 1000 tensors of 1000", "metrics", "stepforge"),
    ("with metrics, 50 million elements", "metrics-large", "stepforge"),
    ("with metrics, 8 tensors of 64 x 32", "metrics-tiny", "stepforge"),
    ("no compiler, 50 million elements in one tensor", "large", "stepforge foreach"),
    ("no compiler, 1000 tensors of 1000", "small", "stepforge foreach"),
)


def table(*reports: Mapping[str, Any]) -> str:
    """Return the table in Markdown: the ratios to torch.optim's default and its best.

    Args:
        reports: the JSON of runs of ``stepforge bench``, each of other workloads.
    """
    arms = {(s["workload"], s["optimizer"]): s["arms"] for r in reports for s in r["steps"]}
    optimizers = list(dict.fromkeys(optimizer for _, optimizer in arms))
    lines = [["", *optimizers, "of the limit", "of plain"], ["---"] * (len(optimizers) + 3)]
    for label, workload, name in ROWS:
        row = [arms[workload, optimizer][name] for optimizer in optimizers]
        lines.append(
            [
                label,
                *(f"{rounded(x['against_default'])} / {rounded(x['against_best'])}" for x in row),
                # No arranged step comes near the limit of plain tensors.
                "" if row[0].get("of_plain") else spread(x["of_limit"] for x in row),
                spread(x.get("of_plain") for x in row),
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def rounded(value: float) -> str:
    """Return a ratio in about two digits."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def spread(values: Iterable[float | None]) -> str:
    """Return the smallest and the largest ratio; an empty string if none is known."""
    known = sorted(value for value in values if value is not None)
    ends = list(dict.fromkeys(map(rounded, known[:1] + known[-1:])))
    return " to ".join(ends)


if __name__ == "__main__":
    print(table(*(json.loads(Path(name).read_text()) for name in sys.argv[1:])), end="")
