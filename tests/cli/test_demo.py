"""The demo, run as a user runs it, and the comparison that it stands on."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from stepforge.cli import main, make_app
from stepforge.cli.arms import ARMS, OURS, TWIN, tabulate
from stepforge.cli.digits import LEARNING_RATES, load_digits
from stepforge.cli.lockstep import Arm, largest_difference, one_step_difference, train

TWO = ("Adagrad", "NAdam")


@pytest.fixture(autouse=True)
def _threads():
    """The command sets the number of threads, which is the process's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Page(HTMLParser):
    """Collects what the tests ask of the page, and fails where tags do not nest."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.cells: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, str]:
    # The path has "[/]" in it, which ends a style where it is taken for markup.
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
        assert [len(cells) for cells in rows] == [6, 6]  # what was computed, how long it took
        assert all("e-" in cell for cell in rows[0][3:])
        assert all(float(cell.replace(",", "")) > 0 for cell in rows[1][1:])
    assert not any("…" in line for line in lines)  # nothing is cut off on 80 columns


def test_times_say_what_they_are_of(run):
    _, times = tabulate([], ARMS)
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
    headings = ["", "optimizer"]  # of a table's two first rows
    assert [row[0] for row in page.cells] == [*headings, *TWO] * 2
    assert {len(row) for row in page.cells if row[0]} == {6}
    labels = [value for name, value in page.attributes if name == "aria-label"]
    for name in TWO:
        assert sum(label.startswith(f"{name}:") for label in labels) == 2
        assert f"{name}\ngroup 0: " in page.text  # what explain says
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


@pytest.fixture(scope="module")
def against_itself():
    again = Arm("again", "the twin again", TWIN.make)
    return train(load_digits(), "RAdam", 3e-3, [TWIN, again], TWIN, epochs=1, seed=3)


def test_a_twin_does_not_differ_from_itself(against_itself):
    trace = against_itself.traces["again"]
    assert trace.one_step == 0
    assert set(trace.differences) == {0.0}
    assert trace.losses == against_itself.traces["twin"].losses


def test_the_comparison_sees_a_difference():
    """The oracle for zeros: another learning rate must show, in one step and in all."""
    faster = Arm("faster", "", lambda name, params, lr: TWIN.make(name, params, 2 * lr))
    trace = train(load_digits(), "Adagrad", 1e-2, [TWIN, faster], TWIN, epochs=1, seed=0).traces[
        "faster"
    ]
    assert trace.differences[0] > 5e-3


@pytest.mark.parametrize("optimizer", LEARNING_RATES)
def test_ours_stays_with_the_twin(optimizer):
    """One epoch; a step rounds by about 1e-7 and this network does not amplify it."""
    lr = LEARNING_RATES[optimizer]
    result = train(load_digits(), optimizer, lr, ARMS, TWIN, epochs=1, seed=0)
    ours, twin = result.traces[OURS.name], result.traces[TWIN.name]
    assert ours.one_step is not None
    assert ours.one_step < 2.5e-7  # two units of a weight near 1
    assert ours.differences[-1] < 1e-5
    assert ours.accuracies == pytest.approx(twin.accuracies, abs=1.5 / 360)
    assert ours.losses == pytest.approx(twin.losses, rel=1e-4)
    assert twin.one_step is None
    assert [len(table.rows[0]) for table in tabulate([result])] == [6, 6]


@pytest.mark.parametrize("optimizer", LEARNING_RATES)
def test_torch_s_fastest_way_is_its_fused_one_if_there_is_one(optimizer):
    """The oracle is torch.optim itself: it refuses ``fused`` where it has no such path."""
    try:
        getattr(torch.optim, optimizer)([torch.zeros(1)], fused=True)
        way = "fused"
    except TypeError:
        way = "foreach"
    (arm,) = (arm for arm in ARMS if arm.follows)
    (group,) = arm.make(optimizer, [torch.zeros(1)], 0.1).param_groups
    assert {flag for flag in ("fused", "foreach") if group.get(flag)} == {way}


def test_who_follows_the_twin_steps_as_it_does():
    """It trains no network, and has nothing but times; the oracle is the twin's weights."""
    shadow = Arm("shadow", "", TWIN.make, follows=True)
    result = train(load_digits(), "Adam", 1e-2, [TWIN, shadow], TWIN, epochs=1, seed=0)
    theirs, own = (
        [*result.traces[name].optimizer.param_groups[0]["params"]] for name in ("twin", "shadow")
    )
    assert all(map(torch.equal, own, theirs))
    assert not {p.data_ptr() for p in own} & {p.data_ptr() for p in theirs}
    trace = result.traces["shadow"]
    assert len(trace.step_seconds) == len(result.traces["twin"].step_seconds) > 0
    assert trace.losses == trace.accuracies == trace.differences == []
    assert trace.one_step is None


def test_one_step_leaves_the_original_alone():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    trained = torch.optim.Adam([p], lr=0.1)
    p.grad = torch.tensor([0.3, -0.2])
    trained.step()
    before, moment = p.detach().clone(), trained.state[p]["exp_avg"].clone()
    assert one_step_difference(OURS, TWIN, "Adam", 0.1, trained) < 2.5e-7
    assert torch.equal(p, before)
    assert torch.equal(trained.state[p]["exp_avg"], moment)
    assert trained.state[p]["step"] == 1


def test_largest_difference_shows_nan():
    assert largest_difference([torch.ones(2), torch.ones(1)], [torch.ones(2), torch.zeros(1)]) == 1
    difference = largest_difference(
        [torch.ones(1), torch.ones(1)], [torch.full((1,), torch.nan), torch.ones(1)]
    )
    assert difference != difference


@pytest.mark.parametrize(
    ("option", "value"), [("--optimizer", "SGD"), ("--epochs", "0"), ("--seed", "-1")]
)
def test_bad_values_get_one_sentence(option, value):
    result = CliRunner().invoke(make_app(), ["demo", option, value])
    assert result.exit_code == 2
    # What follows is typer's wording, which changes from version to version.
    assert result.output.splitlines()[-1].startswith(f"Error: Invalid value for '{option}': ")


def test_an_output_that_cannot_be_written_is_said_before_training(tmp_path: Path):
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file" / "demo.html"):
        result = CliRunner().invoke(make_app(), ["demo", "--output", str(output)])
        assert result.exit_code == 2
        assert "--output" in result.output


@pytest.mark.parametrize(
    ("module", "package"), [("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")]
)
def test_demo_says_which_extra_is_missing(monkeypatch, tmp_path, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    result = CliRunner().invoke(make_app(), ["demo", "--output", str(tmp_path / "x.html")])
    assert result.exit_code == 1
    assert result.output == (
        f"stepforge: this command needs {package}: pip install 'stepforge[demo]'\n"
    )


def test_the_bare_command_says_which_extra_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"needs typer: pip install 'stepforge\[cli\]'"):
        main()


def test_the_library_does_not_import_the_extras():
    code = (
        "import sys, stepforge; print({'typer', 'rich', 'matplotlib', 'sklearn'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
