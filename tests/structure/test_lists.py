"""One list of rules, one of backends: nothing else enumerates them. Oracle: the source itself."""

import ast
from pathlib import Path

import pytest

from stepforge.backends import BACKENDS
from stepforge.rules import ALL

ROOT = Path(__file__).parents[2]
FILES = [
    path
    for folder in ("stepforge", "tests", "experiments", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def literal_names(node: ast.AST) -> set[str]:
    """Return the names and strings in a literal list, tuple or set, not in those within.

    A dict is no such list: it says something of each.
    """
    parts = node.elts if isinstance(node, (ast.List, ast.Tuple, ast.Set)) else []
    return {
        x.value if isinstance(x, ast.Constant) else x.attr if isinstance(x, ast.Attribute) else x.id
        for x in parts
        if isinstance(x, (ast.Name, ast.Attribute))
        or (isinstance(x, ast.Constant) and isinstance(x.value, str))
    }


def enumerations(names: set[str]) -> list[str]:
    """Return the places of literals that hold all of these names."""
    return [
        f"{path.relative_to(ROOT)}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if names <= literal_names(node)
    ]


def test_the_search_finds_what_it_should() -> None:
    tree = ast.parse("x = [a.Adam, Adagrad, 'NAdam', [RAdam]]")
    found = [literal_names(node) for node in ast.walk(tree) if isinstance(node, ast.List)]
    assert {"Adam", "Adagrad", "NAdam"} in found


def test_rules_are_enumerated_in_one_place() -> None:
    found = [place for place in enumerations(set(ALL)) if place.startswith("stepforge/")]
    # The places are ``ALL`` and two ``__all__``.
    assert set(found) == {"stepforge/__init__.py", "stepforge/rules/__init__.py"}


def test_backends_are_enumerated_in_one_place() -> None:
    places = [place for place in enumerations(set(BACKENDS)) if place.startswith("stepforge/")]
    assert places == ["stepforge/backends/__init__.py"]


@pytest.mark.parametrize("name", ALL)
def test_the_library_names_no_optimizer_below_its_rules(name: str) -> None:
    """Neither backends nor steps know a rule by name; examples in docstrings may."""
    for folder in ("formats", "state", "backends", "step", "checkpoint"):
        for path in (ROOT / "stepforge" / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            assert name not in names, path
