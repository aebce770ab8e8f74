"""Extras that are not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from stepforge.cli import main, make_app


@pytest.mark.parametrize(
    ("module", "package"),
    [("jinja2", "jinja2"), ("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")],
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
    extras = {"typer", "rich", "matplotlib", "sklearn"}
    code = f"import sys, stepforge; print({extras} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
