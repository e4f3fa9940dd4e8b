"""Adds the pages outside docs/ and notebooks to the site, with links to and from the other pages; renders formulas."""

import base64
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = {  # file in the repository -> page of the site
    "README.md": "index.md",
    "recipes/README.md": "recipes.md",
    "datasets/README.md": "datasets.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "docs/notebooks/use_a_network.ipynb": "notebooks/use_a_network.md",
}
LINK = re.compile(r"(?<=\]\()([^)#\s:]+\.(?:md|svg|png|ipynb))(?=[)#])")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Render blocks of LaTeX, which GitHub renders too, as MathML, which browsers show without a script."""
    config.mdx_configs["pymdownx.superfences"] = {
        "custom_fences": [{"name": "math", "class": "math", "format": _formula}]
    }
    return config


def _formula(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="formula">{convert(source, display="block")}</div>'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/ and those of notebooks."""
    for source, page in OUTSIDE.items():
        content, pictures = (ROOT / source).read_text(encoding="utf-8"), {}
        if source.endswith(".ipynb"):
            content, pictures = notebook_page(content, posixpath.splitext(page)[0])
        for name, picture in {page: content, **pictures}.items():
            files.append(File.generated(config, name, content=picture))
    return files


def notebook_page(notebook: str, name: str) -> tuple[str, dict[str, bytes]]:
    """Return an executed notebook as Markdown, and the pictures of its outputs by path, `name` with a number."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                path = f"{name}_{len(pictures) + 1}.png"
                pictures[path] = base64.b64decode(data["image/png"])
                parts.append(f"![Figure of this cell]({posixpath.basename(path)})")
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts), pictures


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    here = page.file.src_uri
    sources = {target: source for source, target in OUTSIDE.items()}
    folder = posixpath.dirname(sources.get(here, f"docs/{here}"))

    def link(match: re.Match[str]) -> str:
        file = posixpath.normpath(posixpath.join(folder, match[1]))
        target = OUTSIDE.get(file, file.removeprefix("docs/"))
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    return LINK.sub(link, markdown)
