"""The documents' commands run, their YAML is valid, their links and references resolve, and their code trains."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from PIL import Image

from ssl_core import cli
from ssl_core.data.card import load_card
from ssl_core.experiments import bundled, checks, overlays
from tests.markdown import PAGES, ROOT, TOOLS, Block, anchors, blocks, commands, files, links, script
from tests.methods.harness import trainer
from tests.warm_snakemake import run_snakemake

BIN = Path(sys.executable).parent
HARMLESS = {"source", "export", "cd", "cp", "mv", "python"}  # shell commands that need no test
RULES = {"all", "all_evaluations"}
TUTORIALS = ROOT / "docs" / "tutorials"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
pages_with_commands = pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)


@pytest.fixture
def project(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project with the files that `page` tells its reader to write. Tests run in it."""
    folder = tmp_path / "project"
    for name in (
        "Snakefile",
        "Makefile",
        "config.yaml",
        "pyproject.toml",
        "requirements.lock",
        "requirements-slurm.lock",
    ):
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder)
    for name in ("workflow", "ssl_core", "datasets", "recipes", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in files(page).items():
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    for command in commands(page):
        if command[0] == "cp":
            shutil.copy(*command[1:])
    monkeypatch.setattr(bundled, "SCHEMA", folder / "workflow" / "schemas" / "config.schema.json")
    return folder


@each_page
def test_links_lead_to_files_and_headings_that_there_are(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_modules_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`(ssl_core/[\w/]+\.py)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if name not in files(page) and not (ROOT / name).is_file()] == []


@pages_with_commands
def test_commands_can_be_understood(page: Path, project: Path) -> None:
    register_methods(page)
    for command in commands(page):
        check(command, project)


def register_methods(page: Path) -> None:
    """Add the methods that a reader of the page writes to the schema, as `ssl-core schema` would."""
    path = Path("workflow/schemas/config.schema.json")
    structure = json.loads(path.read_text())
    names = structure["$defs"]["experiment"]["properties"]["method"]["properties"]["name"]["enum"]
    names += [Path(name).stem for name in files(page) if name.startswith("ssl_core/methods/")]
    path.write_text(json.dumps(structure))


def check(command: list[str], project: Path) -> None:
    """Check the options, files and targets of one command, without running it."""
    tool, *words = command
    if tool == "make":
        for planned in made_by(words, project):
            check(planned, project)
    elif tool == "snakemake":
        check_snakemake(words)
    elif tool == "ssl-core":
        check_ssl_core(words)
    elif tool == "pytest":
        assert [word for word in words if not Path(word).exists()] == []
    elif tool == "pip":
        assert (ROOT / words[-1]).is_file()  # a lock file
    else:
        assert tool in HARMLESS, command


def made_by(words: list[str], project: Path) -> list[list[str]]:
    """Return the Snakemake commands that `make` would run; an unknown target fails."""
    (project / ".venv").mkdir(exist_ok=True)
    (project / ".venv" / ".installed").touch()
    # Without the arguments of `make test ARGS=...` itself.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES")
    }
    run = subprocess.run(["make", "--dry-run", *words], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [line.split() for line in run.stdout.splitlines() if line.startswith("snakemake ")]


def check_snakemake(words: list[str]) -> None:
    from snakemake.cli import get_argument_parser

    chosen = get_argument_parser().parse_args(words)
    settings = overlays.load_configuration(chosen.configfile).settings
    checks.check_targets(settings, chosen.targets)
    for target in chosen.targets:
        if target.startswith("shards/"):
            load_card(Path("datasets", f"{Path(target).parent.name}.yaml"))
        else:
            assert target in RULES or target.startswith("results/"), target
    if chosen.workflow_profile:
        profile = yaml.safe_load(Path(chosen.workflow_profile, "config.yaml").read_text())
        assert profile["executor"] == "slurm"


def check_ssl_core(words: list[str]) -> None:
    if len(words) == 1:  # a command named in passing
        with pytest.raises(SystemExit, match="0"):
            cli._parser().parse_args([*words, "--help"])
        return
    chosen = cli._parser().parse_args(words)
    if hasattr(chosen, "configfile"):
        found = overlays.load_configuration(chosen.configfile)
        if hasattr(chosen, "experiment"):
            found.experiment(chosen.experiment)
    if words[0] == "compare":
        assert cli.main(words) == 0


def in_yaml(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "yaml"]


@pytest.mark.parametrize("page", [page for page in PAGES if in_yaml(page)], ids=name_of)
def test_yaml_is_valid_to_the_last_key(page: Path, project: Path) -> None:
    register_methods(page)
    cards = [path.stem for path in Path("datasets").glob("*.yaml")]
    structure = json.loads(bundled.SCHEMA.read_text())
    below = overlays.read_yaml(overlays.CONFIG)
    for block in in_yaml(page):
        content = yaml.safe_load(block.text)
        if "source" in content:
            card = Path("datasets", f"{content.get('name', 'fragment')}.yaml")
            card.write_text(yaml.safe_dump({"name": card.stem, "image_size": 32, **content}))
            load_card(card)
        elif block.title:  # an overlay, checked with the page's commands
            assert any(block.title in command for command in commands(page)), block.title
        else:
            checks.check(overlays.without_nulls(overlays.merge(below, content)), structure, cards)


# Snakemake plans the commands

quick = name_of(ROOT / "README.md")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name_of(page), marks=[] if name_of(page) == quick else [pytest.mark.long])
        for page in PAGES
        if any(command[0] in ("snakemake", "make") for command in commands(page))
    ],
)
def test_snakemake_plans_every_command(page: Path, project: Path) -> None:
    """All targets of one configuration are planned together."""
    register_methods(page)
    profile = Path("workflow/profiles/slurm/config.yaml")
    lines = (
        profile.read_text().replace("executor: slurm", "executor: local").splitlines()
    )  # its plugin is not installed
    profile.write_text("\n".join(line for line in lines if not line.startswith("slurm-")))
    planned: dict[tuple[str, ...], list[str]] = {}
    for options, targets in runs(page, project):
        planned.setdefault(options, []).extend(targets)
    for options, targets in planned.items():
        run = snakemake(project, "-n", *targets, *options)
        assert run.returncode == 0, run.stdout + run.stderr


def runs(page: Path, project: Path) -> list[tuple[tuple[str, ...], list[str]]]:
    """Return each of a page's runs of Snakemake: the options that change the configuration, and the targets."""
    from snakemake.cli import get_argument_parser

    called = [command for command in commands(page) if command[0] == "snakemake"]
    called += [
        planned for command in commands(page) if command[0] == "make" for planned in made_by(command[1:], project)
    ]
    found = []
    for _, *words in called:
        chosen = get_argument_parser().parse_args(words)
        if chosen.report or chosen.unlock:
            continue
        options = ["--configfile", *map(str, chosen.configfile)] if chosen.configfile else []
        options += ["--workflow-profile", str(chosen.workflow_profile)] if chosen.workflow_profile else []
        found.append((tuple(options), list(chosen.targets) or ["all"]))
    return found


def snakemake(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_snakemake(project, "--cores", "1", *arguments, environment=environment(project))


def environment(project: Path) -> dict[str, str]:
    path = os.pathsep.join([str(project / "bin"), str(BIN), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(project)}


# The tutorials, run from top to bottom


def draw(folder: Path, images: int) -> None:
    """Draw noise around one colour per class, so that a network can learn the classes."""
    random = np.random.default_rng(0)
    for kind, colour in {"robin": (200, 60, 40), "wren": (90, 120, 60)}.items():
        (folder / kind).mkdir(parents=True)
        for number in range(images):
            picture = np.clip(random.normal(colour, 40, (72, 96, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(folder / kind / f"{number}.jpg")


def your_images(project: Path) -> None:
    draw(project / "data" / "birds" / "train", 40)
    draw(project / "data" / "birds" / "test", 8)


def a_table(project: Path) -> None:
    draw(project / "data" / "garden", 60)
    lines = ["path,species,part"]
    for kind in ("robin", "wren"):
        lines += [f"{kind}/{number}.jpg,{kind},{'train' if number < 45 else 'test'}" for number in range(60)]
    (project / "data" / "garden.csv").write_text("\n".join(lines))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("page", "prepare", "written"),
    [
        (
            TUTORIALS / "your_images.md",
            your_images,
            ["results/birds/linear.json", "views.png", "results/birds/export/backbone.onnx"],
        ),
        (
            TUTORIALS / "use_the_network.md",
            your_images,
            ["features.parquet", "predictions.csv", "results/birds/finetune/classifier.int8.onnx"],
        ),
        (TUTORIALS / "compare_methods.md", None, ["results/simsiam-seed1/knn.json", "results/sweeps/ressl_rates.csv"]),
        (TUTORIALS / "add_a_dataset.md", a_table, ["results/garden/transfer.json", "results/table.html", "views.png"]),
        (TUTORIALS / "add_a_method.md", None, ["results/alignment/knn.json"]),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else "",
)
def test_a_tutorial_runs_as_it_stands(
    page: Path, prepare: Callable[[Path], None] | None, written: list[str], project: Path
) -> None:
    if prepare is not None:
        prepare(project)
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "activate").write_text("")
    (project / "bin").mkdir()
    (project / "bin" / "make").symlink_to(shutil.which("true") or "/bin/true")
    (project / "page.sh").write_text(script(page))
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "page.sh"], env=environment(project), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert [name for name in written if not (project / name).is_file()] == []


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The method of the tutorial, as a module."""
    path = tmp_path_factory.mktemp("method") / "alignment.py"
    path.write_text(files(TUTORIALS / "add_a_method.md")["ssl_core/methods/alignment.py"])
    spec = importlib.util.spec_from_file_location("alignment", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_method_of_the_tutorial_trains_two_steps(example: ModuleType) -> None:
    training = trainer(example.Alignment, example.Config(embedding_dim=12), warmup_epochs=0)
    training.total_steps = 2
    before = next(training.method.parameters()).clone()
    training.run(save=lambda: None, log=lambda row: None)
    assert [row["step"] for row in training.history] == [1, 2]
    assert not before.equal(next(training.method.parameters()))


# References to published facts

SOURCES = ROOT / "docs" / "sources.md"
TEXTS = (".py", ".md", ".yaml", ".yml", ".smk", ".rst", ".toml", ".html")
OUTDATED = re.compile(
    r"\b[Rr]ecipes?,? [AEMT]\d+\b"  # a sheet of notes that is not part of the repository
    r"|\b[Rr]ecipes? (?:section |rule )?\d"
    r"|\b(?:rule|fixtures?) \d+\b"
    r"|(?<![\w./:#-])[AEMT]\d{1,2}(?![\w%-])"
    r"|\b(?:CW|SH|RS)\b"
    r"|\bdesign(?:\.md)? \d"
)


def texts() -> dict[Path, str]:
    """Return the text of every file of the repository in which a person writes."""
    folders = ("ssl_core", "tests", "benchmarks", "workflow", "recipes", "datasets", "docs")
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.suffix in TEXTS]
    paths += [*ROOT.glob("*.md"), *ROOT.glob("*.yaml"), ROOT / "Snakefile", ROOT / "Makefile"]
    return {path: path.read_text(encoding="utf-8") for path in paths if path != Path(__file__)}


def test_references_to_sources_resolve() -> None:
    there = anchors(SOURCES)
    missing = {
        f"{name_of(path)}: #{anchor}"
        for path, text in texts().items()
        for anchor in re.findall(r"\bsources\.md#([\w-]+)", text)
        if anchor not in there
    }
    assert sorted(missing) == []


def test_no_reference_names_notes_outside_of_the_repository() -> None:
    outdated = [f"{name_of(path)}: {match[0]}" for path, text in texts().items() for match in OUTDATED.finditer(text)]
    assert outdated == []


# Facts that must stay complete and consistent


def test_the_readme_takes_its_numbers_from_the_page_of_results() -> None:
    section = re.search(r"^## Results\n(.*?)^## ", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert section is not None
    numbers = re.findall(r"\b\d+\.\d\b", section[1])
    assert len(numbers) > 10
    known = re.findall(r"\b\d+\.\d\b", (ROOT / "docs" / "results.md").read_text())
    assert [number for number in numbers if number not in known] == []


def test_every_method_has_a_page_and_every_protocol_a_section() -> None:
    methods = {path.stem for path in (ROOT / "ssl_core" / "methods").glob("[a-z]*.py")} - {"base"}
    assert methods == {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
    text = (ROOT / "docs" / "evaluations.md").read_text()
    structure = json.loads((ROOT / "workflow/schemas/config.schema.json").read_text())
    protocols = re.findall(r"^## `(\w+)`", text, flags=re.MULTILINE)
    known = structure["properties"]["evaluations"]["additionalProperties"]["properties"]["protocol"]["enum"]
    assert sorted(protocols) == sorted(known)


def test_the_architecture_names_every_room() -> None:
    rooms = {path.parent.name for path in (ROOT / "ssl_core").glob("*/__init__.py")}
    named = re.findall(r"^\| `(\w+)/` \|", (ROOT / "docs" / "architecture.md").read_text(), flags=re.MULTILINE)
    assert sorted(named) == sorted(rooms)


def test_the_tools_that_documents_use_are_the_ones_tested_here() -> None:
    used = {command[0] for page in PAGES for command in commands(page)}
    assert used == {*TOOLS, "pytest", "pip", *HARMLESS}
