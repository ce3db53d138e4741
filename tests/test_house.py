"""The rules of the house that a program can check: sizes of files, and where the tests of each file are."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE, TESTS, EXAMPLES = ROOT / "lightning_basin", ROOT / "tests", ROOT / "examples"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(EXAMPLES / "claims").rglob("*.py")])
TEST_FILES = sorted(TESTS.rglob("test_*.py"))
# What these test is no file of the package.
OTHERS = {"test_benchmarks.py", "test_docs.py", "test_fuzz.py", "test_house.py", "test_public_names.py"}


def num_lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def size_of_body(function):
    statements = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return function.end_lineno - statements[0].lineno + 1 if statements else 0


@pytest.mark.parametrize(("paths", "limit"), [(SOURCES, 330), (TEST_FILES, 500)], ids=["sources", "tests"])
def test_no_file_is_longer_than_its_limit(paths, limit):
    assert {path.name: num_lines(path) for path in paths if num_lines(path) > limit} == {}


def test_no_class_has_over_200_lines_and_no_function_body_over_40():
    long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno + 1 > 200:
                long.append(node.name)
            if isinstance(node, ast.FunctionDef) and size_of_body(node) > 40:
                long.append(node.name)
    assert long == []


# A source file with much to test has a folder of its own name.
def has_source(path):
    relative = path.relative_to(TESTS)
    file = relative.with_name(path.name.removeprefix("test_"))
    return (
        (PACKAGE / file).is_file()
        or (EXAMPLES / file).is_file()
        or (PACKAGE / relative.parent).with_suffix(".py").is_file()
    )


def test_tests_mirror_the_package():
    assert [path.name for path in TEST_FILES if path.name not in OTHERS and not has_source(path)] == []
