"""The site builds without a warning, loads nothing from elsewhere, is complete, and works from files in a browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from tests.markdown import PAGES, ROOT

BIN = Path(sys.executable).parent

pytestmark = pytest.mark.long  # the site is built


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    command = ["mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    return folder


@pytest.fixture(scope="module")
def html(site: Path) -> dict[str, str]:
    """The text of each page by its path in the site."""
    return {str(path.relative_to(site)): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def test_pages_load_nothing_from_elsewhere(html: dict[str, str]) -> None:
    assert len(html) > len(PAGES)  # the page of a missing address, too
    for name, text in html.items():
        assert not re.search(r'(<script[^>]*src|<link[^>]*href|<img[^>]*src)="?https?:', text), name


def test_diagrams_and_formulas_are_rendered(html: dict[str, str]) -> None:
    assert [name for name, text in html.items() if "mermaid" in text or "\\begin{align" in text] == []
    without = [name for name, text in html.items() if name.startswith("methods/") and "<math" not in text]
    assert without == []


def test_placeholders_are_not_taken_for_html(html: dict[str, str]) -> None:
    placeholders = re.compile(r"<(?:experiment|evaluation|finetune|run|name|class|anchor|revision|n)>")
    assert {name: found for name, text in html.items() if (found := placeholders.findall(text))} == {}


def test_every_key_of_the_schema_has_an_entry(html: dict[str, str]) -> None:
    structure = json.loads((ROOT / "workflow/schemas/config.schema.json").read_text())
    sections = structure["$defs"] | {
        "reported": structure["properties"]["reported"]["additionalProperties"],
        "export": structure["properties"]["export"],
        "quantise": structure["properties"]["quantise"],
    }
    entries = set(re.findall(r'<a id="([^"]+)"', html["keys.html"]))
    keys = {
        f"{name}.{key}"
        for name, section in sections.items()
        for key in section.get("properties") or section["anyOf"][-1]["properties"]
    }
    assert len(keys) > 400
    assert sorted(keys - entries) == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a network."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no chromium on the path: apt install chromium")
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
        browser = playwright.chromium.launch(executable_path=executable, args=options)
        yield browser
        browser.close()


def test_the_search_finds_a_key_on_a_page_opened_as_a_file(site: Path, browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto((site / "index.html").as_uri())
    page.get_by_placeholder("Search").fill("queue_size")
    first = page.locator(".md-search-result__link").first
    expect(first).to_be_attached(timeout=30_000)
    assert "queue_size" in page.locator(".md-search-result__list").inner_text()
    page.close()


CUT_OFF = """() => {
  const width = document.documentElement.clientWidth;
  const frame = (element) => /auto|scroll/.test(getComputedStyle(element).overflowX);
  const scrolls = (element) => element && (frame(element) || scrolls(element.parentElement));
  const parts = [...document.querySelectorAll("article table, article pre, article img, article math")];
  const cut = parts.filter((part) => part.getBoundingClientRect().right > width + 1 && !scrolls(part));
  return document.documentElement.scrollWidth > width + 1 || cut.length > 0;
}"""


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off(width: int, site: Path, html: dict[str, str], browser: Browser) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    cut_off = []
    for name in html:
        page.goto((site / name).as_uri(), wait_until="load")
        if page.evaluate(CUT_OFF):
            cut_off.append(name)
    page.close()
    assert cut_off == []
