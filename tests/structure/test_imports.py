"""The walls of the house. Oracle: the order of layers that docs and style prescribe."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "stepforge"

# Each layer may import those above it, and its own.
LAYERS = [
    ["stepforge.expr", "stepforge.sharding", "stepforge.signals"],
    ["stepforge.ops"],
    ["stepforge.declare"],
    ["stepforge.formats"],
    ["stepforge.backends", "stepforge.entries"],
    ["stepforge.rows", "stepforge.coefficients"],
    ["stepforge.plan"],
    ["stepforge.accounting", "stepforge.explain", "stepforge.saving"],
    ["stepforge.checkpoint", "stepforge.resharding"],
    ["stepforge.optimizer", "stepforge.compiled"],
    ["stepforge.rules"],
    ["stepforge"],
    ["stepforge.cli"],
]

MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int:
    """The layer whose longest name is a prefix of the module's."""
    prefixes = {name: rank for rank, names in enumerate(LAYERS) for name in names}
    candidates = [
        n for n in prefixes if module == n or (module.startswith(n + ".") and n != "stepforge")
    ]
    assert candidates, f"{module} is in no layer: give it one"
    return prefixes[max(candidates, key=len)]


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            for alias in node.names:
                submodule = PACKAGE.parent.joinpath(*f"{node.module}.{alias.name}".split("."))
                is_module = submodule.is_dir() or submodule.with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if is_module else str(node.module)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_run_one_way(path: Path) -> None:
    own = layer_of(module_name(path))
    for imported in imports_of(path):
        if imported.split(".")[0] == "stepforge":
            assert layer_of(imported) <= own, f"{module_name(path)} imports {imported}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "rules").glob("*.py")), ids=module_name)
def test_a_rule_names_no_tensor_library_and_no_backend(path: Path) -> None:
    for imported in imports_of(path):
        assert imported.split(".")[0] not in ("torch", "numpy", "math"), imported
        assert not imported.startswith("stepforge.backends"), imported


@pytest.mark.parametrize("path", sorted((PACKAGE / "backends").glob("*.py")), ids=module_name)
def test_a_backend_names_no_optimizer(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"Adagrad", "Adam", "AdamW", "NAdam", "RAdam"}


def test_only_torch_and_numpy_are_needed_at_run_time() -> None:
    import sys

    outside_cli = [path for path in MODULES if "cli" not in path.relative_to(PACKAGE).parts]
    needed = {name.split(".")[0] for path in outside_cli for name in imports_of(path)}
    assert needed - set(sys.stdlib_module_names) == {"stepforge", "torch", "numpy"}


def test_no_catch_all_modules() -> None:
    assert not {path.stem for path in MODULES} & {"utils", "helpers", "common", "misc"}
