"""Import direction, circles and declared dependencies. Oracle: the layers below, read top down."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "stepforge"

#: A module may import those of earlier lines and of its own. The longest matching name counts; a
#: name ends in a dot if it stands for a whole folder.
LAYERS = """
expr
program
ops hyperparameter
metrics
rule formats.float_bits
declare formats.format
formats.
formats
state.sharding
state.alike
state.elements
state.layout
state.values state
backends.spec backends.trust backends.exact backends.grad_scale backends.cache
backends.disk_cache
backends.batch
backends.aliasing backends.reduction
backends.reference backends.chunk
backends.foreach backends.native. backends.triton.
backends.native backends.triton
backends
extension.compiler extension.order extension.load
extension.target extension.background
extension
step.params step.signals step.garbage step.scalar_states
step.uniform
step.launch step.traced
step.passes
step.metric_values
step.control
step.guards
step.plan
step.kept_plans
step.stepper
step.compiled step
accounting
explain
checkpoint.result checkpoint.save checkpoint.match
checkpoint.check_state
checkpoint.load
checkpoint.reshard
checkpoint saving
optimizer param_groups logging
rules.
rules
stepforge
cli.
cli
"""
RANKS = {
    "stepforge" if name == "stepforge" else f"stepforge.{name}": rank
    for rank, line in enumerate(LAYERS.split("\n"))
    for name in line.split()
}

#: Folders of which one may not import the other.
APART = [
    ("stepforge.backends.native", "stepforge.backends.triton"),
    ("stepforge.backends.foreach", "stepforge.backends.native"),
    ("stepforge.backends.foreach", "stepforge.backends.triton"),
    ("stepforge.cli.bench", "stepforge.cli.demo"),
]

MODULES = sorted(PACKAGE.rglob("*.py"))
#: Names of packages on PyPI whose modules are called otherwise.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "_signal": "signal"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rank_of(module: str) -> int:
    """Return the line of a module in LAYERS."""
    found = [n for n in RANKS if module == n or (n.endswith(".") and module.startswith(n))]
    assert found, f"{module} is in no layer: give it one"
    return RANKS[max(found, key=len)]


def imports_of(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert PACKAGE not in path.parents, f"{path.name} imports relatively"
                continue
            for alias in node.names:
                submodule = ROOT.joinpath(*f"{node.module}.{alias.name}".split("."))
                is_module = submodule.is_dir() or submodule.with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if is_module else str(node.module)


def own_imports_of(path: Path) -> set[str]:
    return {name for name in imports_of(path) if name.split(".")[0] == "stepforge"}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_run_one_way(path: Path) -> None:
    own = rank_of(module_name(path))
    for imported in own_imports_of(path):
        assert rank_of(imported) <= own, f"{module_name(path)} imports {imported}"


def test_no_modules_import_each_other() -> None:
    """Oracle: depth first search; imports within functions count too."""
    graph = {module_name(path): own_imports_of(path) for path in MODULES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for imported in sorted(graph[module] - {module}):
                visit(imported, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("pair", APART, ids=" ".join)
def test_folders_stay_apart(pair: tuple[str, str]) -> None:
    for own, other in (pair, pair[::-1]):
        for path in MODULES:
            if module_name(path).startswith(own):
                crossing = [x for x in own_imports_of(path) if x.startswith(other)]
                assert not crossing, f"{module_name(path)} imports {crossing}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "rules").glob("*.py")), ids=module_name)
def test_a_rule_names_no_tensor_library_and_no_backend(path: Path) -> None:
    for imported in imports_of(path):
        assert imported.split(".")[0] not in ("torch", "numpy", "math"), imported
        assert not imported.startswith("stepforge.backends"), imported


def test_every_module_has_tests_that_import_it() -> None:
    """A module that no test reaches, directly or through others, is dead or untested."""
    graph = {module_name(path): own_imports_of(path) for path in MODULES}
    pending = [
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in imports_of(path)
        if name in graph
    ]
    reached: set[str] = set()
    while pending:
        module = pending.pop()
        if module not in reached:
            reached.add(module)
            parent = module.rpartition(".")[0]
            pending += [name for name in {*graph[module], parent} if name in graph]
    assert set(graph) <= reached


# Dependencies.

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def required(lines: list[str]) -> set[str]:
    """Return the names of the packages that requirements name, with those of their extras."""
    names: set[str] = set()
    for line in lines:
        name, _, extras = line.partition("[")
        if name == "stepforge":
            for extra in extras.partition("]")[0].split(","):
                names |= required(PROJECT["optional-dependencies"][extra])
        else:
            names.add(line.split(">")[0].split("[")[0])
    return names


def outside(paths: list[Path]) -> set[str]:
    """Return the packages, neither ours nor Python's, that files import."""
    found = {name.split(".")[0] for path in paths for name in imports_of(path)}
    ours = {path.name for path in ROOT.iterdir()} | {path.stem for path in paths}
    scripts = [*(ROOT / "experiments").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    local = {"stepforge", *ours, *(path.stem for path in scripts)}
    foreign = found - set(sys.stdlib_module_names) - local
    return {DISTRIBUTIONS.get(name, name) for name in foreign} - {"signal"}


def test_run_time_needs_torch_and_numpy_alone() -> None:
    library = [path for path in MODULES if "cli" not in path.relative_to(PACKAGE).parts]
    optional = {"triton"}  # imported by name, where a GPU is
    assert outside(library) - optional == required(PROJECT["dependencies"]) == {"torch", "numpy"}


def test_commands_import_declared_packages_only() -> None:
    commands = [path for path in MODULES if "cli" in path.relative_to(PACKAGE).parts]
    extras = PROJECT["optional-dependencies"]
    declared = required([*PROJECT["dependencies"], *extras["cli"], *extras["gpu"], *extras["demo"]])
    assert outside(commands) <= declared


def test_tests_import_declared_packages_only() -> None:
    tests = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    names = {path.stem for path in tests}
    declared = required([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
    assert outside(tests) - names - {"tests"} <= declared


def test_each_dependency_has_a_line_in_contributing() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    every = required([x for lines in PROJECT["optional-dependencies"].values() for x in lines])
    for name in every | required(PROJECT["dependencies"]):
        assert f"| {name}" in text or f"**{name}**" in text or f", {name}" in text, name


def test_no_catch_all_modules() -> None:
    assert not {path.stem for path in MODULES} & {"utils", "helpers", "common", "misc"}
