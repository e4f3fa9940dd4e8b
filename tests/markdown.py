"""Read fenced blocks, commands, links and anchors from the documents, as a reader would copy and follow them."""

import re
import shlex
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / folder / "README.md" for folder in ("recipes", "datasets")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
TOOLS = ("snakemake", "ssl-core", "make")
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(rf"(?<!`)`((?:{'|'.join(TOOLS)}) [^`]+)`(?!`)")
PLACEHOLDER = re.compile(r"<|\.\.\.|\b[A-Z]{4,}\b(?!=)")  # <experiment>, ..., FILE
ASSIGNMENT = re.compile(r"[A-Z_]\w*=")


class Block(NamedTuple):
    """A fenced block; `title` is the file that it is to be written to."""

    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    return [Block(*match) for match in FENCE.findall(page.read_text(encoding="utf-8"))]


def files(page: Path) -> dict[str, str]:
    """Return the files that a page has its reader write."""
    return {block.title: block.text for block in blocks(page) if block.title}


def script(page: Path) -> str:
    """Return all shell blocks of a page, one after the other."""
    return "\n".join(block.text for block in blocks(page) if block.language in ("bash", "sh", "console"))


def commands(page: Path) -> list[list[str]]:
    """Return all commands of a page as words: those of shell blocks, and those in the text that have no placeholder."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    inline = [" ".join(code.split()) for code in INLINE.findall(prose)]
    lines = script(page).replace("\\\n", " ").splitlines()
    lines += [code for code in inline if not PLACEHOLDER.search(code)]
    return [command for line in lines for command in _split(line)]


def links(page: Path) -> list[str]:
    """Return the targets of a page's links that are not addresses on the web."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page: its headings, as GitHub and MkDocs write them, and explicit `<a id="...">`."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)"></a>', text))


def _split(line: str) -> list[list[str]]:
    """Split a line as a shell does at `&&`; drop comments, assignments before a command, and where output goes."""
    found: list[list[str]] = [[]]
    for word in shlex.split(line, comments=True):
        if word == "&&":
            found.append([])
        elif found[-1] or not ASSIGNMENT.match(word):
            found[-1] += braces(word)
    return [words[: words.index(">")] if ">" in words else words for words in found if words]


def braces(word: str) -> list[str]:
    """Expand {a,b} as a shell does."""
    parts = [part[1:-1].split(",") if part.startswith("{") else [part] for part in re.split(r"({[^}]*,[^}]*})", word)]
    return ["".join(choice) for choice in product(*parts)]
