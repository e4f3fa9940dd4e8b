"""docs/reliability.md names tests that exist."""

import ast
import re
from pathlib import Path

TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`")


def test_each_test_that_the_page_names_exists(root: Path) -> None:
    named = set(TEST.findall((root / "docs" / "reliability.md").read_text(encoding="utf-8")))
    assert len(named) > 50
    for file, test in named:
        functions = [
            node.name for node in ast.parse((root / file).read_text()).body if isinstance(node, ast.FunctionDef)
        ]
        assert not test or test in functions, f"{file}::{test}"
