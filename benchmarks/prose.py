"""Prose and density of a source tree: word rates in comments, docstrings and documents, and the shape of the code.

    python benchmarks/prose.py                        # this repository
    python benchmarks/prose.py --before 6d67f4c       # with the values of a git revision beside it
    python benchmarks/prose.py path/to/torchtitan     # any other tree

Rates are per thousand words; fenced blocks and inline code are left out. Syntax nodes are those of the `ast` module per
line of code: a line that is neither blank nor a comment nor part of a docstring.
"""

import argparse
import ast
import io
import re
import subprocess
import tarfile
import tempfile
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
SKIPPED = {
    "build",
    "site",
    "shards",
    "results",
    "checkpoints",
    "node_modules",
}  # outputs; hidden folders are skipped too
WORD = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)?")
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`[^`\n]*`")
WATCHED = {
    "what": {"what"},
    "say, says, said": {"say", "says", "said"},
    "stand, stands, stood": {"stand", "stands", "stood"},
}
APART = ("tests", "benchmarks", "workflow", "docs")  # top folders whose Python is not the package
COMMENTED = (".yaml", ".yml", ".smk")
COMMENT = re.compile(r"(?:^|\s)#(.*)$", re.MULTILINE)  # in files that are not Python
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass
class Prose:
    """Words of a part of a tree."""

    words: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Count the words of a text, its inline code excepted."""
        self.words += WORD.findall(INLINE.sub(" ", text).lower())

    def per_thousand(self, watched: set[str]) -> float:
        """Return how many of a thousand words are among `watched`."""
        count = sum(word in watched for word in self.words)
        return 1000 * count / max(1, len(self.words))


@dataclass
class Code:
    """Counts over Python files."""

    lines: int = 0  # neither blank nor comment nor docstring
    all_lines: int = 0  # not blank
    comments: int = 0  # on lines of their own and behind code
    docstring_lines: int = 0
    nodes: int = 0
    comprehensions: int = 0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", nargs="?", type=Path, default=ROOT)
    parser.add_argument("--before", metavar="REV", help="a git revision of the tree to compare with")
    arguments = parser.parse_args()
    columns = [("value", measure(arguments.tree))]
    if arguments.before:
        columns.insert(0, (arguments.before, measure_revision(arguments.tree, arguments.before)))
        columns[-1] = ("now", columns[-1][1])
    print_table(columns)


def measure_revision(tree: Path, revision: str) -> dict[str, float]:
    """Measure a git revision, unpacked into a temporary folder."""
    archive = subprocess.run(["git", "archive", revision], cwd=tree, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
        return measure(Path(folder))


def measure(tree: Path) -> dict[str, float]:
    """Return the value of each row of the table."""
    prose = {"package": Prose(), "tests, benchmarks, YAML, rules": Prose(), "documents": Prose()}
    code = {"package": Code(), "tests, benchmarks": Code()}
    for path in files(tree):
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".md":
            prose["documents"].add(FENCE.sub("", text))
        elif path.suffix == ".py" and path.relative_to(tree).parts[0] in APART:
            read_python(text, prose["tests, benchmarks, YAML, rules"], code["tests, benchmarks"])
        elif path.suffix == ".py":
            read_python(text, prose["package"], code["package"])
        else:
            prose["tests, benchmarks, YAML, rules"].add("\n".join(COMMENT.findall(text)))
    prose["all"] = Prose([word for part in prose.values() for word in part.words])
    rows: dict[str, float] = {}
    for part, counted in prose.items():
        rows[f"{part}: words"] = len(counted.words)
        for name, watched in WATCHED.items():
            rows[f"{part}: {name}, per 1,000 words"] = counted.per_thousand(watched)
    for part, counted in code.items():
        rows[f"{part}: lines of code"] = counted.lines
        rows[f"{part}: syntax nodes per line"] = counted.nodes / max(1, counted.lines)
        rows[f"{part}: comprehensions per 1,000 lines"] = 1000 * counted.comprehensions / max(1, counted.lines)
        rows[f"{part}: lines with a comment, %"] = 100 * counted.comments / max(1, counted.all_lines)
        rows[f"{part}: docstring lines, %"] = 100 * counted.docstring_lines / max(1, counted.all_lines)
    return rows


def files(tree: Path) -> Iterator[Path]:
    """Yield the files that are measured, without outputs and hidden folders."""
    for path in sorted(tree.rglob("*")):
        folders = path.relative_to(tree).parts[:-1]
        hidden = any(folder.startswith(".") or folder in SKIPPED for folder in folders)
        measured = path.suffix in (".py", ".md", *COMMENTED) or path.name in ("Snakefile", "Makefile")
        if measured and not hidden and path.is_file():
            yield path


def read_python(text: str, prose: Prose, code: Code) -> None:
    """Add the comments, docstrings and syntax nodes of one file."""
    lines = text.splitlines()
    docstring_lines: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        code.nodes += 1
        code.comprehensions += isinstance(node, COMPREHENSIONS)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose.add(node.value.value)
            docstring_lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            prose.add(token.string)
            code.comments += 1
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        code.all_lines += 1
        if number in docstring_lines:
            code.docstring_lines += 1
        elif not line.strip().startswith("#"):
            code.lines += 1


def print_table(columns: list[tuple[str, dict[str, float]]]) -> None:
    """Print a Markdown table with one column of values for each tree."""
    print("| | " + " | ".join(name for name, _ in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for row in columns[0][1]:
        values = [values[row] for _, values in columns]
        cells = [f"{value:,}" if isinstance(value, int) else f"{value:.2f}" for value in values]
        print(f"| {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
