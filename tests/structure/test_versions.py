"""The versions that ``make compat`` takes. Oracle: those that pyproject.toml allows or pins."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def compat() -> list[tuple[str, str]]:
    """Versions of Python and of torch, as the Makefile pairs them."""
    (line,) = re.findall(r"^COMPAT := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return [re.fullmatch(r"python([\d.]+)-torch([\d.]+)", name).groups() for name in line.split()]


def test_compat_begins_with_the_oldest_python_and_torch_that_are_allowed() -> None:
    (torch,) = (need for need in PROJECT["dependencies"] if need.startswith("torch"))
    python, oldest = compat()[0]
    assert PROJECT["requires-python"] == f">={python}"
    assert f"{torch}.0" == f"torch>={oldest}"


def test_compat_ends_with_the_pinned_torch_on_another_python() -> None:
    python, newest = compat()[-1]
    assert f"torch=={newest}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert python != compat()[0][0]


def test_the_readme_names_the_versions_of_compat() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    pairs = [f"torch {torch.removesuffix('.0')} on Python {python}" for python, torch in compat()]
    said = f"`make compat` runs them with {', '.join(pairs[:-1])} and {pairs[-1]}."
    assert said in readme
