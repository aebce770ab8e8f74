"""The demo, run as a user runs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from stepforge.cli import make_app
from stepforge.cli.demo.result_tables import tabulate
from stepforge.cli.demo.variants import VARIANTS
from tests.cli.pages import Page

TWO = ("Adagrad", "NAdam")


@pytest.fixture(autouse=True)
def _threads():
    """Restore the number of threads, which the command sets for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, str]:
    # "[/]" in the path would end a style if it were taken for markup.
    output = tmp_path_factory.mktemp("demo") / "[" / "].html"
    output.parent.mkdir()
    chosen = ["--optimizer", "adagrad", "--optimizer", "NAdam", "--optimizer", "nadam"]
    arguments = ["demo", "--epochs", "2", "--output", str(output), *chosen]
    result = CliRunner().invoke(make_app(), arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.output.endswith(f"\n  How to read it, with pictures: {output}\n")
    return result.output, output.read_text(encoding="utf-8")


def test_prints_a_row_for_each_optimizer(run):
    lines = run[0].splitlines()
    for name in TWO:
        rows = [line.split() for line in lines if line.startswith(name) and "epochs" not in line]
        assert [len(cells) for cells in rows] == [6, 6]  # the training results, the step times
        assert all("e-" in cell for cell in rows[0][3:])
        assert all(float(cell.replace(",", "")) > 0 for cell in rows[1][1:])
    assert not any("…" in line for line in lines)  # nothing is cut off at 80 columns


def test_times_say_what_they_are_of(run):
    _, times = tabulate([], VARIANTS)
    assert [(column.group, column.name) for column in times.columns[1:]] == [
        ("step(), µs", "ours"),
        ("torch.optim, µs", "default flags"),
        ("torch.optim, µs", "fastest way"),
        ("torch.optim / ours", "default flags"),
        ("torch.optim / ours", "fastest way"),
    ]
    for text in {text for column in times.columns for text in (column.group, column.name)}:
        assert text in run[0]
        assert text in Page(run[1]).text


def test_page_has_the_table_and_the_pictures(run):
    page = Page(run[1])
    headings = ["", "optimizer"]  # of the two heading rows
    assert [row[0] for row in page.cells] == [*headings, *TWO] * 2
    assert {len(row) for row in page.cells if row[0]} == {6}
    labels = [value for name, value in page.attributes if name == "aria-label"]
    for name in TWO:
        assert sum(label.startswith(f"{name}:") for label in labels) == 2
        assert f"{name}\ngroup 0: " in page.text  # from explain
    assert torch.__version__ in page.text


def test_page_is_self_contained(run):
    page = Page(run[1])
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    references = [v for n, v in page.attributes if n in ("src", "href", "xlink:href", "data")]
    assert all(reference.startswith("#") for reference in references)
    assert "@import" not in run[1]
    assert "http" not in run[1]
    assert run[1].count("url(") == run[1].count("url(#")


def test_ids_are_unique_and_references_find_theirs(run):
    page = Page(run[1])
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = [v for n, v in page.attributes if n in ("href", "xlink:href")]
    references += re.findall(r"url\((#[^)]*)\)", run[1])
    assert references  # lines are clipped to their axes
    assert {reference.removeprefix("#") for reference in references} <= set(ids)


@pytest.mark.parametrize(
    ("option", "value"), [("--optimizer", "SGD"), ("--epochs", "0"), ("--seed", "-1")]
)
def test_bad_values_get_one_sentence(option, value):
    result = CliRunner().invoke(make_app(), ["demo", option, value])
    assert result.exit_code == 2
    # The rest is typer's wording, which changes from version to version.
    assert result.output.splitlines()[-1].startswith(f"Error: Invalid value for '{option}': ")


def test_an_output_that_cannot_be_written_is_said_before_training(tmp_path: Path):
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file" / "demo.html"):
        result = CliRunner().invoke(make_app(), ["demo", "--output", str(output)])
        assert result.exit_code == 2
        assert "--output" in result.output
