"""The README's table of speed. Oracle: the runs that the README links to."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

from stepforge.cli.bench.targets import TARGETS

ROOT = Path(__file__).parents[3]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))


def test_the_table_is_that_of_the_runs_below_it() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Speed\n")[1].split("\n## ")[0]
    links = re.findall(r"\((benchmarks/results/cpu-[^)]*)\.txt\)", section)
    assert links
    expected = SCRIPT["table"](*(json.loads((ROOT / f"{x}.json").read_text()) for x in links))
    assert expected in section, f"benchmarks/readme_table.py prints:\n{expected}"


def test_the_table_has_every_workload_with_targets_on_a_cpu() -> None:
    assert {workload for _, workload, _ in SCRIPT["ROWS"]} == {name for name, _, _ in TARGETS}


def test_ratios_by_hand() -> None:
    rounded, spread = SCRIPT["rounded"], SCRIPT["spread"]
    assert [rounded(x) for x in (0.0616, 0.98, 0.996, 5.55, 9.96, 123.4)] == [
        *("0.06", "0.98", "1.0", "5.5", "10", "123"),
    ]
    assert spread([0.9, None, 0.84]) == "0.84 to 0.90"
    assert spread([1.01, 0.999]) == "1.0"
    assert spread([None]) == ""
