"""Kernels compiled for GPUs that need not be there: `make gpu-report`, on a few cases.

Oracle: the machine code of Triton's own compilers. The budgets leave a tenth over what it was when
they were set, for other versions of Triton; a path through which a kernel becomes a quarter slower
shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.gpu_report import cases, page_table, row, with_table
from stepforge.cli.kernels import STORAGES, spec_of_storage
from stepforge.rules import ALL
from tests.backends.triton.kernels import compiled_in_new_process

pytest.importorskip("triton")

RULES = ["AdamW"]
#: A rule of few instructions, for which a mask costs the largest share, and storages.
SHORT_RULE, ITS_STORAGES = "Adagrad", ["float16", "int8"]
#: Instructions for an element of AdamW on sm_80 or sm_90, and on gfx942, on the whole path: at
#: 30 T instructions a second and 4 TB/s, moving 28 bytes takes as long as 200 instructions.
BUDGETS = {
    "float32": (65, 72),
    "bfloat16": (70, 88),
    "bfloat16, float32 states": (80, 80),
    "int8": (115, 146),
    "24 bits, int8": (129, 170),
}


def print_rows() -> None:
    listed = [*cases(RULES, BUDGETS), *cases([SHORT_RULE], ITS_STORAGES)]
    print(json.dumps([row(case) for case in listed]))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("compiled")
    found: list[dict[str, Any]] = compiled_in_new_process(print_rows, folder, timeout_s=400)
    return found


def is_amd(each: dict[str, Any]) -> bool:
    return bool(each["target"] == "gfx942")


def test_every_path_of_every_storage_is_compiled_for_every_gpu(rows: list[dict[str, Any]]) -> None:
    """Oracle: dense tables have three kinds of rows with shared scales, and two of sizes."""
    paths = {storage: set() for storage in BUDGETS}
    found = [each for each in rows if each["rule"] in RULES]
    for each in found:
        paths[each["storage"]].add(each["path"])
    for storage, names in paths.items():
        divisor = 16 if "int8" in storage else 8 if "bfloat16" in storage else 4
        assert names == {"whole", f"masked, multiple of {divisor}", "masked"}
    assert len(found) == len(RULES) * 3 * 3 * len(BUDGETS)


def test_nothing_is_spilled(rows: list[dict[str, Any]]) -> None:
    assert [each for each in rows if each["spills"]] == []


def test_registers(rows: list[dict[str, Any]]) -> None:
    """20 warps of 32 threads fit the 65,536 registers of a multiprocessor with up to 102 each."""
    assert [each for each in rows if each["registers"] > 100] == []


def test_the_paths_of_aligned_tables_move_wide_words(rows: list[dict[str, Any]]) -> None:
    """128 bits; on AMD 4 elements of a thread, which are 64 bits where all columns are narrow."""
    for each in rows:
        if each["path"] != "masked":
            narrow = each["storage"] in ("bfloat16", "float16", "24 bits, int8")
            bits = 64 if is_amd(each) and narrow else 128
            assert (each["load_bits"], each["store_bits"]) == (bits, bits), each


def test_no_root_is_that_of_a_denormal(rows: list[dict[str, Any]]) -> None:
    """AMD's reciprocal root takes a denormal for 0, so its root would be NaN."""
    assert [each for each in rows if each["rsq"]] == []


def test_instructions_for_an_element(rows: list[dict[str, Any]]) -> None:
    for each in rows:
        if each["rule"] == "AdamW" and each["path"] == "whole":
            assert each["instructions_per_element"] <= BUDGETS[each["storage"]][is_amd(each)], each


def test_masks_cost_little(rows: list[dict[str, Any]]) -> None:
    """1.3 times the instructions of the path without a mask."""
    whole = {
        (each["rule"], each["storage"], each["target"]): each["instructions_per_element"]
        for each in rows
        if each["path"] == "whole"
    }
    for each in rows:
        limit = 1.3 * whole[each["rule"], each["storage"], each["target"]]
        assert each["instructions_per_element"] <= limit, each


def test_the_report_has_every_rule_and_storage() -> None:
    listed = {(case.rule, case.storage) for case in cases()}
    assert listed == {(rule, storage) for rule in ALL for storage in STORAGES}
    specs = [spec_of_storage("AdamW", storage) for storage in STORAGES]
    assert len(set(specs)) == len(STORAGES)


def test_the_page_has_the_rows_of_the_table(rows: list[dict[str, Any]]) -> None:
    table = page_table(rows)
    assert table.count("\n") == 1 + 3 * len(BUDGETS)
    page = "before\n<!-- kernels -->\nold\n<!-- end of kernels -->\nafter\n"
    assert with_table(page, table) == page.replace("old", table)


def test_the_page_is_up_to_date() -> None:
    """Oracle: the storages and paths of the report. Its figures are those of one version."""
    page = Path(__file__).parents[2].joinpath("docs", "gpus.md").read_text(encoding="utf-8")
    for case in cases(["AdamW"]):
        assert f"| {case.storage} | {case.path} |" in page
