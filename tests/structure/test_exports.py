"""The public surface. Oracle: ``__all__`` of each module, and inspection of what it names."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import stepforge
from stepforge.rules import ALL
from stepforge.step.control import Control

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "stepforge"

#: The modules whose names users may rely on.
PUBLIC_MODULES = [
    "stepforge",
    "stepforge.accounting",
    "stepforge.checkpoint",
    "stepforge.declare",
    "stepforge.explain",
    "stepforge.logging",
    "stepforge.ops",
    "stepforge.optimizer",
    "stepforge.param_groups",
    "stepforge.rules",
]
PUBLIC = [
    (module, name) for module in PUBLIC_MODULES for name in importlib.import_module(module).__all__
]


def modules() -> dict[str, Path]:
    """Every module of the library, its commands and entry points excluded."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path
    return found


MODULES = modules()


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda x: x)
def test_public_names_exist_and_are_documented(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    if inspect.isclass(thing) or inspect.isroutine(thing):
        assert inspect.getdoc(thing), f"{module}.{name} has no docstring"


def defined_in(path: Path) -> set[str]:
    """Return the classes, functions and constants with public names that a file defines."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {x.id for x in node.targets if isinstance(x, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_public_modules_export_what_they_define(module: str) -> None:
    """Helpers for the rest of the library may stay out, if their name is not of the interface."""
    exported = set(importlib.import_module(module).__all__)
    internal = {
        "stepforge.declare": {"read_body", "signature_of"},
        "stepforge.ops": {"scalar_dtype", "scalar_numpy_dtype"},
    }
    assert defined_in(MODULES[module]) - exported == internal.get(module, set())


@pytest.mark.parametrize("module", [name for name in MODULES if "cli" not in name])
def test_other_modules_import_exported_names_only(module: str) -> None:
    """A name that another module imports is in ``__all__`` of the module that defines it."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            exported = getattr(importlib.import_module(node.module), "__all__", None)
            for alias in node.names:
                if f"{node.module}.{alias.name}" not in MODULES and exported is not None:
                    internal = {"read_body", "signature_of", "scalar_dtype", "scalar_numpy_dtype"}
                    assert alias.name in {*exported, *internal}, f"{node.module}.{alias.name}"


def documented_arguments(docstring: str) -> list[str]:
    """Return the names that a docstring's section ``Args:`` explains, in order."""
    (section,) = re.findall(r"^Args:\n((?:    .*\n|\n)+)", docstring + "\n", re.MULTILINE)
    heads = re.findall(r"^    (\w+(?:,\s+\w+)*):", section, re.MULTILINE)
    return [name for head in heads for name in re.split(r",\s+", head)]


def test_documented_arguments_are_read_exactly() -> None:
    text = (
        "One.\n\nArgs:\n    a: x.\n    b, c,\n        d: y.\n        e: no.\n\nRaises:\n    f: z."
    )
    assert documented_arguments(text) == ["a", "b", "c", "d"]


#: The keyword arguments of all optimizers: options of groups, then those of the optimizer.
OF_ALL = [*stepforge.Optimizer._hyperparameters, *Control.DEFAULTS]


@pytest.mark.parametrize("name", ALL)
def test_every_argument_is_documented_and_no_other(name: str) -> None:
    """Keyword-only arguments of the base are documented there."""
    taken = inspect.signature(ALL[name]).parameters
    inherited = {
        argument
        for argument, parameter in taken.items()
        if parameter.kind == parameter.KEYWORD_ONLY and argument in OF_ALL
    }
    documented = documented_arguments(inspect.getdoc(ALL[name]) or "")
    assert sorted(documented) == sorted(taken.keys() - inherited)


def test_every_argument_of_all_optimizers_is_documented() -> None:
    documented = documented_arguments(inspect.getdoc(stepforge.Optimizer) or "")
    assert documented == ["params", *OF_ALL]


def test_all_optimizers_are_public() -> None:
    """Oracle: subclasses of Optimizer in the folder of rules."""
    for name, cls in ALL.items():
        assert getattr(stepforge, name) is cls
        assert name in stepforge.__all__
    made = {
        thing
        for path in (PACKAGE / "rules").glob("*.py")
        for thing in vars(importlib.import_module(f"stepforge.rules.{path.stem}")).values()
        if inspect.isclass(thing) and thing.__module__ == f"stepforge.rules.{path.stem}"
    }
    assert made == set(ALL.values())
