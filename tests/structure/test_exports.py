"""The public surface. Oracle: ``__all__`` of each module, and inspection of what it names."""

import importlib
import inspect

import pytest

import stepforge

PUBLIC_MODULES = [
    "stepforge",
    "stepforge.accounting",
    "stepforge.checkpoint",
    "stepforge.declare",
    "stepforge.explain",
    "stepforge.ops",
    "stepforge.optimizer",
]
PUBLIC = [
    (module, name) for module in PUBLIC_MODULES for name in importlib.import_module(module).__all__
]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda x: x)
def test_exported_names_exist_and_are_documented(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    if inspect.isclass(thing) or inspect.isroutine(thing):
        assert inspect.getdoc(thing), f"{module}.{name} has no docstring"


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_all_is_sorted_and_complete(module: str) -> None:
    loaded = importlib.import_module(module)
    assert list(loaded.__all__) == sorted(loaded.__all__)
    defined_here = {
        name
        for name, thing in vars(loaded).items()
        if not name.startswith("_")
        and (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing.__module__.startswith(loaded.__name__)
        and thing.__module__.split(".")[-1] != "stepforge"
    }
    if module == "stepforge":
        assert defined_here <= set(loaded.__all__)


@pytest.mark.parametrize("name", ["Adagrad", "Adam", "AdamW", "NAdam", "RAdam"])
def test_every_argument_is_documented(name: str) -> None:
    cls = getattr(stepforge, name)
    documented = inspect.getdoc(cls) or ""
    for argument in inspect.signature(cls).parameters:
        assert argument in documented, f"{name} does not explain {argument}"
