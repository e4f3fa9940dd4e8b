"""The table, Snakemake's report and MLflow's pages in a real browser without a network.

Needs Debian's package chromium (or Chrome) on the path; skipped without it.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.stages.test_should_i_pretrain import made_up_page

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
# The demonstration's data and network, trained just long enough for the pages.
METHOD = {"name": "ressl", "queue_size": 64, "projector_hidden": 64, "embedding_dim": 32}
CONFIG = {
    "experiments": {
        "shown": {
            "dataset": {"name": "demo"},
            "backbone": {"name": "mobilenet_v3_small", "stem": "small"},
            "method": METHOD,
            "training": {"epochs": 2, "batch_size": 64, "warmup_epochs": 0},
        }
    },
    "evaluations": {  # three, which are below each other in the table
        "knn": {"protocol": "knn", "k": 5},
        "nearest": {"protocol": "knn", "k": 1},
        "pictures": {"protocol": "pictures", "images": 200},
    },
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without access to other machines."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no chromium on the path: apt install chromium")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options.append("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page; failed requests and script errors fail the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("requestfailed", lambda request: faults.append(f"{request.url}: {request.failure}"))
    yield page
    page.close()
    assert faults == []


@pytest.fixture(scope="module")
def project(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the workflow has run with tracking, with its report."""
    folder = tmp_path_factory.mktemp("pages") / "project"
    folder.mkdir()
    shutil.copy(root / "Snakefile", folder)
    for name in ("workflow", "datasets", "ssl_core"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    tracked = {"SSL_TRACKING": "on", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "PYTHONPATH": str(folder)}
    for arguments in (["--cores", "2"], ["--report", "report.html"]):
        command = ["snakemake", "--nocolor", *arguments]
        run = subprocess.run(
            command, cwd=folder, env=os.environ | tracked | {"PATH": path}, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout + run.stderr
    return folder


def fits(page: Page) -> bool:
    """Return whether nothing is cut off at the right."""
    return page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_the_table_opens_without_a_network(page: Page, project: Path) -> None:
    page.goto((project / "results" / "table.html").as_uri())
    expect(page.get_by_text("shown").first).to_be_visible()
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert fits(page), width
        assert page.evaluate("document.querySelector('.scroll').scrollWidth") <= width
    rows = page.locator(".results tbody tr:visible")
    assert rows.count() == 3  # an evaluation each
    page.locator("button.picture").first.click()
    expect(page.locator("dialog img")).to_be_visible()
    page.locator("dialog").click()
    page.locator("#filter").fill("shown pictures")
    assert rows.count() == 1


def test_the_page_should_i_pretrain_fits_a_screen_and_a_phone(page: Page, tmp_path: Path) -> None:
    made_up_page(tmp_path)
    page.goto((tmp_path / "page.html").as_uri())
    expect(page.get_by_text("Pre-training here is better than training from scratch")).to_be_visible()
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert fits(page), width
        assert page.evaluate("document.querySelector('.scroll').scrollWidth") <= width
        assert 300 < page.evaluate("document.images[0].clientWidth") < width


SHOWN = """() => [...document.querySelectorAll('iframe')].some(frame => frame.offsetHeight > 300)
  || [...document.images].some(image => image.naturalWidth > 300)"""


@pytest.mark.parametrize(
    ("category", "entries"), [("Results", 1), ("Pictures", 5), ("Pre-training", 1)]
)  # a switch: curves or views
def test_every_entry_of_the_report_opens_without_a_network(
    category: str, entries: int, page: Page, project: Path
) -> None:
    for number in range(entries):
        page.goto("about:blank")
        page.goto((project / "report.html").as_uri())
        page.get_by_text(category, exact=True).last.click()
        shows = page.locator("tr a[iconname=eye]")
        expect(shows).to_have_count(entries)
        shows.nth(number).click()
        page.wait_for_function(SHOWN)


def test_mlflow_shows_the_experiment_as_one_row_with_its_numbers(browser: Browser, project: Path) -> None:
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from ssl_core.cli import main; main()", "ui", "--port", str(port)]
    environment = os.environ | {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db", "PYTHONPATH": str(project)}
    server = subprocess.Popen(command, cwd=project, env=environment, start_new_session=True, stdout=subprocess.PIPE)
    assert server.stdout is not None
    address = server.stdout.readline().decode().split()[-1]
    try:
        for _ in range(120):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            page.wait_for_timeout(500)
        page.goto(address)
        expect(page.get_by_role("link", name="shown", exact=True)).to_be_visible(timeout=60_000)
        expect(page.get_by_text("knn/v1 top1").first).to_be_visible()
        page.get_by_role("link", name="shown", exact=True).click()
        expect(page.get_by_text("knn/v1 top1").first).to_be_visible(timeout=60_000)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
        server.stdout.close()
