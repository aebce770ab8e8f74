"""First words of docstrings. Oracle: functions open with a verb, everything else with a noun."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "stepforge").rglob("*.py"))

#: Words that open no docstring: they leave the subject of the sentence for later.
NEVER = {
    *("What", "Whether", "Of", "Those", "How", "Where", "Who", "Whose", "Why", "When", "Which"),
    *("That", "This", "These", "It", "As", "All", "If", "So", "Also", "And"),
}
#: Words that open no function's docstring, which says what the function does.
NO_VERB = {*NEVER, "The", "A", "An", "Its", "One", "Each", "Every", "For", "True", "False", "No"}


def first_words() -> Iterator[tuple[str, str, bool]]:
    """Yield the place and first word of each docstring, and True if it is a function's."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            docstring = ast.get_docstring(node) if isinstance(node, kinds) else None
            if docstring:
                name = getattr(node, "name", "the module")
                decorators = [ast.unparse(x) for x in getattr(node, "decorator_list", [])]
                is_property = any("property" in x for x in decorators)
                is_function = isinstance(node, ast.FunctionDef) and not is_property
                yield f"{path.relative_to(ROOT)}: {name}", docstring.split()[0], is_function


WORDS = list(first_words())


def test_docstrings_open_with_a_verb_or_a_noun() -> None:
    wrong = [
        f"{place}: {word}"
        for place, word, is_function in WORDS
        if word.strip(",.:") in (NO_VERB if is_function else NEVER)
    ]
    assert not wrong, "\n".join(wrong)


def test_functions_open_with_an_imperative() -> None:
    """Third persons end in s; so do few verbs."""
    wrong = [
        f"{place}: {word}"
        for place, word, is_function in WORDS
        if is_function and word.endswith("s") and not word.endswith("ss")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("comment", ["#: What ", "#: Whether ", "#: Of ", "#: Those ", "#: How "])
def test_comments_of_constants_open_with_a_noun(comment: str) -> None:
    for path in FILES:
        assert comment not in path.read_text(), path.relative_to(ROOT)
