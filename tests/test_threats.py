"""docs/threats.md: every threat has tests, and the tests it names exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "threats.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| (\d+) \| (.*) \|$", PAGE, re.MULTILINE))


def test_every_threat_has_its_row():
    assert list(map(int, ROWS)) == list(range(1, 32))


@pytest.mark.parametrize("number", ROWS)
def test_the_tests_that_a_row_names_exist(number):
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", ROWS[number].rpartition(" | ")[2])
    assert "TODO" not in ROWS[number]
    if not named:
        assert ROWS[number].endswith("| later")
    for file, test in named:
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert test in defined, f"{file} has no {test}"
