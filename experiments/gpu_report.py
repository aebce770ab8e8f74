"""Compile every rule with every storage for GPUs that need not be there: ``make gpu-report``.

Prints what each kernel has become, writes all of it to out/gpu.json, and the rows of AdamW to
docs/gpus.md.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stepforge.backends.triton.inspection import GPUS, dense_paths, inspect_kernel
from stepforge.backends.triton.variant import Variant
from stepforge.cli.kernels import STORAGES, spec_of_storage
from stepforge.rules import ALL

__all__ = ["Case", "cases", "page_table", "row", "with_table"]

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gpus.md"


@dataclass(frozen=True)
class Case:
    """A path through a kernel, on a GPU."""

    rule: str
    storage: str
    target: str
    unit: int
    path: str


def cases(rules: Iterable[str] = ALL, storages: Iterable[str] = STORAGES) -> Iterator[Case]:
    """Yield the paths of dense tables, on every GPU."""
    storages = list(storages)
    for rule in rules:
        for storage in storages:
            spec = spec_of_storage(rule, storage)
            for name, gpu in GPUS.items():
                for variant, path in dense_paths(spec, gpu.target):
                    yield Case(rule, storage, name, variant.unit, path)


def row(case: Case) -> dict[str, Any]:
    """Compile a case; return its row of the report."""
    gpu = GPUS[case.target]
    spec = spec_of_storage(case.rule, case.storage)
    found = inspect_kernel(spec, Variant(unit=case.unit, target=gpu.target), gpu, case.path)
    return asdict(case) | asdict(found)


def _compile_for_gpus() -> None:
    os.environ["TRITON_INTERPRET"] = "0"


def _printed(rows: Iterable[dict[str, Any]]) -> Table:
    table = Table("rule", "storage", "target", "path")
    names = ["registers", "spills", "instructions_per_element", "load_bits", "store_bits", "rsq"]
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for each in rows:
        texts = (str(each[name]) for name in names)
        table.add_row(each["rule"], each["storage"], each["target"], each["path"], *texts)
    return table


def page_table(rows: Iterable[dict[str, Any]]) -> str:
    """Return the page's table: registers and instructions per element on each GPU, of AdamW."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for each in rows:
        if each["rule"] == "AdamW":
            cell = f"{each['registers']} / {each['instructions_per_element']:.0f}"
            found.setdefault((each["storage"], each["path"]), {})[each["target"]] = cell
    lines = [
        "| storage | path | " + " | ".join(GPUS) + " |",
        "| --- | --- " + "| --- " * len(GPUS) + "|",
    ]
    for (storage, path), cells in found.items():
        lines.append(f"| {storage} | {path} | " + " | ".join(cells[gpu] for gpu in GPUS) + " |")
    return "\n".join(lines)


def with_table(page: str, table: str, name: str = "kernels") -> str:
    """Return a page with the table between the markers of a name replaced."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    return re.sub(f"(?s){begin}.*{end}", lambda _: begin + table + end, page)


def main() -> None:
    """Compile all cases, print them, and write the file and the page."""
    _compile_for_gpus()
    with ProcessPoolExecutor(initializer=_compile_for_gpus) as pool:
        rows = list(pool.map(row, cases(), chunksize=4))
    Console().print(_printed(rows))
    report = ROOT / "out" / "gpu.json"
    report.parent.mkdir(exist_ok=True)
    report.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(
        with_table(PAGE.read_text(encoding="utf-8"), page_table(rows)), encoding="utf-8"
    )
    print(f"{len(rows)} rows in {report.relative_to(ROOT)}; AdamW's in {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
