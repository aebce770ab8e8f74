"""The report, run as a user runs it, on trainings with stepforge's own optimizer.

Oracles: the faults that were put into the trainings; Python's parser of HTML.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stepforge.cli import make_app
from stepforge.cli.report.charts import LOST_COLORS, RATIO_COLORS
from tests.cli.pages import Page
from tests.cli.report.trainings import Trouble, train

TROUBLE = Trouble(frozen=True, nan_step=80, exploding_step=130)


def invoke(path: Path, output: Path | None = None) -> tuple[int, str, str]:
    """Return the exit code, what was printed, and the page."""
    output = output or path.with_name("report.html")
    arguments = ["report", str(path), "--output", str(output)]
    result = CliRunner().invoke(make_app(), arguments, catch_exceptions=False)
    page = output.read_text(encoding="utf-8") if output.exists() else ""
    return result.exit_code, result.output, page


def written(folder: Path, text: str) -> Path:
    path = folder / "run.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def troubled(tmp_path_factory) -> tuple[int, str, str]:
    # "[/]" in the path would end a style if it were taken for markup.
    folder = tmp_path_factory.mktemp("report") / "["
    folder.mkdir()
    return invoke(written(folder, train(TROUBLE, steps=200)), folder / "].html")


def test_all_that_is_wrong_is_found_and_nothing_else(troubled) -> None:
    code, printed, page = troubled
    assert code == 1
    *sentences, last = printed.splitlines()
    assert last.startswith("Charts: ")
    assert last.endswith("/[/].html")
    kinds = {line.split(":")[0] for line in sentences}
    assert kinds == {
        "error, exploding ratio",
        "error, frozen by rounding",
        "warning, skipped steps",
    }
    explosions = [line for line in sentences if "explod" in line]
    assert any("net.2.weight is exploding" in line for line in explosions)
    assert all("net.2." in line and "(steps 130 to" in line for line in explosions)
    assert any("net.4.weight is frozen by rounding" in line for line in sentences)
    assert any("1 step was skipped" in line and "(step 80)" in line for line in sentences)

    text = " ".join(Page(page).text.split())
    for line in sentences:
        sentence = line.split(": ", 1)[1].split(" (")[0]
        assert sentence in text
    assert f"{len(sentences)} things look wrong" in text


def test_nothing_is_said_of_a_healthy_training(tmp_path: Path) -> None:
    code, printed, page = invoke(written(tmp_path, train(steps=100)))
    assert code == 0
    assert printed.startswith("Nothing looks wrong in ")
    assert "nothing looks wrong" in Page(page).text
    assert "as far as the file tells" not in Page(page).text


def test_nothing_is_claimed_of_what_was_not_measured(tmp_path: Path) -> None:
    """A run without telemetry."""
    lines = [{"step": s, "grad_norm": 1.0, "nonfinite": 0, "skipped": 0} for s in range(1, 21)]
    code, _, page = invoke(written(tmp_path, "\n".join(map(json.dumps, lines))))
    assert code == 0
    assert "as far as the file tells" in " ".join(Page(page).text.split())


def test_the_page_is_self_contained(troubled) -> None:
    page = Page(troubled[2])
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    references = [v for n, v in page.attributes if n in ("src", "href", "xlink:href", "data")]
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in references)
    assert "@import" not in troubled[2]
    assert "http" not in re.sub(r"base64,[^\"]*", "", troubled[2])
    assert troubled[2].count("url(") == troubled[2].count("url(#")


def test_ids_are_unique_and_references_find_theirs(troubled) -> None:
    page = Page(troubled[2])
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = [v for n, v in page.attributes if n in ("href", "xlink:href") and v[0] == "#"]
    references += re.findall(r"url\((#[^)]*)\)", troubled[2])
    assert references
    assert {reference.removeprefix("#") for reference in references} <= set(ids)


def test_no_color_is_left_that_only_one_of_light_and_dark_has(troubled) -> None:
    """Oracle: the placeholders of figures, which all must have become colors of the page."""
    assert not re.findall(r"#0[14]0[25]0[36]|#0a0[bc]0\d", troubled[2])
    assert "prefers-color-scheme: dark" in troubled[2]
    for name in set(re.findall(r"var\((--[\w-]+)\)", troubled[2])):
        assert troubled[2].count(f"{name}:") >= 2  # a light one and a dark one


def test_the_charts_show_each_layer(troubled) -> None:
    page = Page(troubled[2])
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert labels == [
        "Loss by step",
        "Learning rate by step",
        "Norms by step",
        "Update-to-weight ratio by step",
        "Skipped and clipped steps",
        "Update-to-weight ratio by layer, by step",
        "Updates lost to rounding by layer, by step",
    ]
    for name in ("net.0.bias", "net.6.weight"):
        assert page.text.count(name) == 2


@pytest.mark.parametrize(
    "records",
    [
        [{"step": 5}],
        [{"step": 5, "loss": None, "lr": []}],
        [{"step": s, "grad_norm": 0.0, "lr": [0.0]} for s in range(3)],
        [{"step": s, "parameters": {"w<b>": {"update_ratio": 0}}} for s in range(3)],
        [{"step": 10**15 * s, "loss": -1.0, "skipped": 0} for s in range(3)],
    ],
    ids=["bare", "no-numbers", "zeros", "layers-only", "far"],
)
def test_a_file_with_little_in_it_gets_a_page(tmp_path: Path, records) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    code, printed, page = invoke(written(tmp_path, text))
    assert code in (0, 1), printed
    assert "<b>" not in page
    Page(page)


def test_a_long_run_of_many_layers_gets_a_small_page(tmp_path: Path) -> None:
    def line(step: int) -> str:
        wave = 1 + 0.5 * math.sin(step)
        layers = {f"layer.{i}.weight": {"update_ratio": 1e-3 * wave} for i in range(400)}
        layers["layer.211.weight"]["update_ratio"] = 1e-9
        return json.dumps({"step": step, "loss": wave, "lr": [1e-3], "parameters": layers})

    # Most lines are without layers, as parsing takes the time.
    lines = [
        line(step) if step % 50 == 0 else json.dumps({"step": step, "loss": 2.0, "lr": [1e-3]})
        for step in range(5000)
    ]
    code, printed, page = invoke(written(tmp_path, "\n".join(lines)))
    assert code == 1
    assert "layer.211.weight hardly moves" in printed
    assert len(page) < 2_000_000
    text = " ".join(Page(page).text.split())
    assert "of 400 layers are shown" in text
    assert text.count("layer.211.weight") == 3  # its finding, its name, its label in the map


def test_broken_lines_and_resumes_are_told(tmp_path: Path) -> None:
    path = written(tmp_path, '{"step": 1}\n{"step": 2, "lo\n{"step": 2}\n{"step": 1}\n')
    code, printed, page = invoke(path)
    assert code == 0
    first, second = printed.splitlines()[:2]
    assert first == f"Line 2 of {path} is not JSON; it is left out."
    assert second.startswith("The run was resumed at step 1: ")
    text = Page(page).text
    assert first in text
    assert second in text


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "has no metrics, it is empty."), ("?\n", "has no metrics: line 1 of ")],
)
def test_a_file_without_metrics_gets_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    code, printed, page = invoke(path)
    assert code == 2
    assert f"Error: Invalid value for RUN: {path} {said}" in printed
    assert page == ""


def test_bad_paths_get_one_sentence(tmp_path: Path) -> None:
    assert invoke(tmp_path / "no.jsonl")[0] == 2
    assert invoke(tmp_path, tmp_path / "x.html")[0] == 2
    code, printed, _ = invoke(written(tmp_path, ""), tmp_path / "no" / "report.html")
    assert code == 2
    assert "--output" in printed


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(monkeypatch, tmp_path: Path, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    code, printed, _ = invoke(written(tmp_path, '{"step": 1}'))
    assert code == 1
    assert printed == f"stepforge: this command needs {module}: pip install 'stepforge[report]'\n"


def test_a_browser_shows_it_light_and_dark(troubled, tmp_path: Path) -> None:
    """Oracle: the pixels of headless Chromium, which are mostly paper."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium")
    (tmp_path / "page.html").write_text(troubled[2], encoding="utf-8")
    # One start of the browser: a frame takes light or dark from the element that holds it.
    frame = '<iframe src="page.html#layers" style="width: 1000px; height: 900px; color-scheme: '
    both = tmp_path / "both.html"
    both.write_text(
        f'<!doctype html><body style="margin: 0; display: flex">{frame}light"></iframe>'
        f'{frame}dark"></iframe>'
    )
    picture = tmp_path / "both.png"
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--window-size=2000,900", f"--user-data-dir={tmp_path / 'profile'}"),
        *(f"--screenshot={picture}", both.as_uri()),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    pixels = imread(picture)[..., :3]
    light, dark = pixels[:, :1000], pixels[:, 1000:]
    assert light.mean() > 0.8
    assert dark.mean() < 0.3
    for half in (light, dark):
        for color in (RATIO_COLORS[0], LOST_COLORS[-1]):  # the frozen layer in both heat maps
            distance = abs(half - to_rgb(color)).max(axis=-1)
            assert (distance < 0.02).sum() > 1000
