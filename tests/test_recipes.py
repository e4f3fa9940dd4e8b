"""Every YAML file of the repository parses to its last key, states expected numbers, and trains."""

import json
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from ssl_core.config import Adopted, Backbone
from ssl_core.data.card import load_card
from ssl_core.data.loader import Loader
from ssl_core.data.shards import Manifest
from ssl_core.evaluations import base
from ssl_core.experiments import checks, overlays, sweeps
from ssl_core.methods import dino
from ssl_core.methods.base import load_method_module, method_class, method_names, resolve, views_of
from ssl_core.networks.backbones import build_backbone, save_backbone, write_tensors
from ssl_core.training.loop import Trainer
from tests.markdown import braces

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PUBLISHED = [path for path in RECIPES if not path.stem.startswith("demo_")]  # the others extend the demonstration
DEFAULT = yaml.safe_load((ROOT / "config.yaml").read_text())
STAND_IN = Backbone(name="resnet18", stem="tiny")
QUICK = {"moco", "npid", "ressl", "simsiam"}  # `make test` trains one combination of each, `make test-long` all


@cache
def laid_over(path: Path) -> dict[str, Any]:
    """Return what `--configfile` makes of a recipe and `config.yaml`."""
    recipe = yaml.load(path.read_text(), yaml.CSafeLoader)  # `safe_load` without libyaml is slow
    return overlays.without_nulls(overlays.merge(DEFAULT, recipe))


@pytest.fixture(scope="module", params=RECIPES, ids=lambda path: path.stem)
def recipe(request):
    return request.param


@pytest.fixture(scope="module", params=PUBLISHED, ids=lambda path: path.stem)
def published(request):
    return request.param


@pytest.mark.parametrize("path", [ROOT / "config.yaml", *RECIPES], ids=lambda path: path.stem)
def test_every_configuration_is_valid_down_to_the_last_key(path):
    structure = json.loads((ROOT / "workflow/schemas/config.schema.json").read_text())
    configuration = laid_over(path)
    checks.check(configuration, structure, [card.stem for card in (ROOT / "datasets").glob("*.yaml")])
    for experiment in sweeps.experiments(configuration).values():
        if "weights" in experiment:
            Adopted.model_validate(experiment)
            continue
        resolved = resolve(experiment)
        card = load_card(ROOT / "datasets" / f"{resolved.dataset.name}.yaml")
        assert resolved.dataset.split in card.source.splits
        assert views_of(resolved, card.image_size, avoid=card.avoid)
    for name, section in (configuration.get("evaluations") or {}).items():
        base.load(section, name).Config.model_validate({"dataset": {"name": "demo"}, **section})


def test_a_recipe_leaves_out_the_demonstration_and_inherits_none_of_its_settings(published):
    alone, merged = yaml.safe_load(published.read_text()), laid_over(published)
    own = {section: overlays.without_nulls(alone)[section] for section in ("experiments", "evaluations")}
    assert {section: merged[section] for section in own} == own


def test_a_recipe_reports_numbers_for_every_experiment(published):
    configuration = laid_over(published)
    for name in configuration["experiments"]:
        reported = configuration["reported"][name]
        assert all(reported[key] for key in ("source", "epochs", "hours", "hardware")), name
    seeds, experiments = sweeps.seeds(configuration["experiments"]), sweeps.experiments(configuration)
    for name, reported in configuration["reported"].items():
        for run in seeds.get(name, [name]):
            spec, kept = trained(experiments, run)
            assert (kept or resolve(spec).training.epochs) == reported["epochs"], run


def trained(experiments: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], int | None]:
    """Return the experiment that trains a network, and the epoch after which it was kept if that is not the last."""
    weights = experiments[name].get("weights")
    if weights is None:
        return experiments[name], None
    parent, epoch = re.fullmatch(r"results/(.*)/epoch-(\d+)\.safetensors", weights).groups()  # pyright: ignore
    assert int(epoch) in experiments[parent]["training"]["keep_epochs"]
    assert experiments[parent]["backbone"] == experiments[name]["backbone"]
    return experiments[parent], int(epoch)


# The papers' own rows, in tests/papers/<paper>.yaml: a list of tables. `all` has the settings of each row, `rows` is a
# CSV whose columns are further settings, by their path, or results. A table with `across` is wide: its last columns are
# values of that setting, with numbers of one `result`. Empty cells state nothing.
PAPERS = sorted((ROOT / "tests" / "papers").glob("*.yaml"))
SECTIONS = ("dataset.", "backbone.", "method.", "training.", "views.")


class PaperRow(NamedTuple):
    settings: Mapping[str, Any]
    results: Mapping[str, float]


def cell(text: str) -> Any:
    """Parse a cell of a table: YAML, with semicolons inside lists, and fractions."""
    if re.fullmatch(r"\d+/\d+", text):
        return float(Fraction(text))
    return yaml.safe_load(text.replace(";", ","))


@cache
def paper_rows(path: Path) -> list[PaperRow]:
    rows = []
    for table in yaml.safe_load(path.read_text()):
        lines = [[part.strip() for part in line.split(",")] for line in table["rows"].splitlines()]
        for values in lines[1:]:
            named = {name: cell(text) for name, text in zip(lines[0], values, strict=True) if text}
            settings = {name: value for name, value in named.items() if name.startswith(SECTIONS)}
            settings = {**table["all"], **settings}
            numbers = {name: value for name, value in named.items() if name not in settings}
            if "across" not in table:
                rows.append(PaperRow(settings, numbers))
                continue
            for name, number in numbers.items():
                rows.append(PaperRow({**settings, table["across"]: cell(name)}, {table["result"]: number}))
    return rows


def flat(section: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of nested sections by their path."""
    yield name.removeprefix("."), section
    if isinstance(section, Mapping):
        for key, value in section.items():
            yield from flat(value, f"{name}.{key}")


def settings_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resolved settings and views of an experiment by their path."""
    resolved = resolve(spec)
    card = load_card(ROOT / "datasets" / f"{resolved.dataset.name}.yaml")
    views = views_of(resolved, card.image_size, avoid=card.avoid)
    settings = dict(flat(resolved.model_dump(mode="json", serialize_as_any=True)))
    return settings | dict(flat({"views": {group: view.model_dump(mode="json") for group, view in views.items()}}))


@cache
def published_experiments(paper: str) -> dict[str, tuple[Mapping[str, Any], Mapping[str, float]]]:
    """Return resolved settings and reported numbers of each experiment of a paper's recipes."""
    experiments = {}
    for path in [path for path in PUBLISHED if path.stem.startswith(paper) and not path.stem.endswith("_short")]:
        configuration = laid_over(path)
        for name in (every := sweeps.experiments(configuration)):
            reported = configuration["reported"].get(name, {}).get("results", {})
            spec, kept = trained(every, name)
            experiments[f"{path.stem}:{name}"] = ({**settings_of(spec), "training.kept": kept}, reported)
    return experiments


def is_row_of(settings: Mapping[str, Any], row: PaperRow) -> bool:
    return all(settings.get(name) == expected for name, expected in row.settings.items())


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_each_reported_number_is_the_papers_for_these_settings(path):
    rows = paper_rows(path)
    for label, (settings, reported) in published_experiments(path.stem).items():
        matching = [row for row in rows if is_row_of(settings, row)]
        for name, number in reported.items():
            printed = {row.results[name] for row in matching if name in row.results}
            assert number in printed, f"{label}: {name} {number}, the paper's rows of these settings have {printed}"


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_each_number_of_a_papers_tables_has_its_experiment(path):
    experiments = published_experiments(path.stem)
    for row in paper_rows(path):
        matching = {label: reported for label, (settings, reported) in experiments.items() if is_row_of(settings, row)}
        assert matching, f"no experiment has the settings of {row}"
        for name in row.results:
            assert any(name in reported for reported in matching.values()), f"{name} of {row}: {list(matching)}"


def test_the_commands_in_a_recipes_first_lines_name_targets_that_there_are(recipe):
    configuration, text = laid_over(recipe), recipe.read_text().replace("\\\n#", "")
    commands = re.findall(r"^#   .*?snakemake (.*)$", text, re.M)
    assert commands
    for command in commands:
        cores, count, overlay, *targets = command.split()
        assert (cores, count, overlay) == ("--cores", "all", f"--configfile=recipes/{recipe.name}")
        checks.check_targets(configuration, [target for words in targets for target in braces(words)])


def test_the_list_of_recipes_is_complete(recipe):
    assert f"`{recipe.name}`" in (ROOT / "recipes" / "README.md").read_text()


# Two steps of every combination of a method and its switches


# Keys of all experiments of a method that select no code; the test sets the first.
AMOUNTS = {"queue_size", "temperature", "student_temperature", "teacher_temperature", "bank_momentum"}


def switches(section: Any) -> Any:
    """Reduce a method's section to the values that select code: names, flags and keys; all numbers are equal."""
    if isinstance(section, Mapping):
        return tuple((key, switches(value)) for key, value in sorted(section.items()) if key not in AMOUNTS)
    if isinstance(section, list):
        return tuple(map(switches, section))
    return section if isinstance(section, str | bool) or not section else "a number"


def combinations() -> dict[Any, tuple[str, Mapping[str, Any]]]:
    """Return the first experiment of each combination; files of weights are replaced by the test."""
    found = {}
    for path in [ROOT / "config.yaml", *RECIPES]:
        for name, experiment in sweeps.experiments(laid_over(path)).items():
            if "weights" in experiment:
                continue
            method = {key: value for key, value in experiment["method"].items() if key not in ("teacher", "initial")}
            key = switches([method, experiment.get("views") or {}, "initial" in experiment["method"]])
            found.setdefault(key, (f"{path.stem}:{name}", experiment))
    return found


def training_parameters() -> list[Any]:
    """Mark all combinations `long` except the first of a few methods."""
    seen, parameters = set(), []
    for label, experiment in combinations().values():
        method = experiment["method"]["name"]
        marks = [] if method in QUICK - seen else [pytest.mark.long]
        seen.add(method)
        parameters.append(pytest.param(experiment, id=label, marks=marks))
    return parameters


@pytest.fixture(scope="module")
def demo(demo):
    return Manifest.load(demo)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Untrained weights in place of the trained networks that an experiment starts from."""
    folder = tmp_path_factory.mktemp("weights")
    backbone = build_backbone(STAND_IN, 64)
    save_backbone(folder / "backbone.safetensors", backbone, STAND_IN, 64, {})
    model = {f"backbone.{name}": weight for name, weight in backbone.state_dict().items()}
    write_tensors(folder / "model.safetensors", model, {"experiment": "stand-in"})
    head = dino.Head(backbone.num_features, dino.Config(num_outputs=256, head_hidden=8, bottleneck_dim=8))
    outputs = {f"head.{name}": weight for name, weight in head.state_dict().items()}
    write_tensors(folder / "head.safetensors", outputs, {"experiment": "stand-in"})
    return folder


@pytest.mark.parametrize("experiment", training_parameters())
def test_a_shipped_experiment_trains_two_steps(experiment, demo, weights):
    # Small replacements: 64 digits of 32 px (64 with smaller views), batches of 8, the smallest network, short queues.
    method = method_class(experiment["method"]["name"])
    own = {"queue_size": 64, "local_size": 32, "initial": str(weights / "model.safetensors")}
    section = {key: own.get(key, value) for key, value in experiment["method"].items()}
    if "queue_size" in method.Config.model_fields:
        section["queue_size"] = 64
    presets = load_method_module(section["name"]).PRESETS
    if presets[section.get("preset", next(iter(presets)))].method.get("local_size"):
        section["local_size"] = 32
    if "teacher" in section:
        section["teacher"] = {"weights": str(weights / "backbone.safetensors")}
        if section["name"] == "dino":  # which learns the outputs of a head
            section["teacher"]["projector"] = str(weights / "head.safetensors")
    training = {**experiment.get("training", {}), "batch_size": 8, "precision": "fp32"}
    dataset = {"name": "demo", "subset": {"images": 64}}
    backbone = STAND_IN.model_dump()
    resolved = resolve(
        {**experiment, "dataset": dataset, "backbone": backbone, "method": section, "training": training}
    )
    size = 64 if len({view.size for view in views_of(resolved, 64).values()}) > 1 else 32
    views = views_of(resolved, size, avoid=demo.avoid)
    with Loader(demo, resolved.dataset, views, batch_size=8, seed=0) as loader:
        network = build_backbone(STAND_IN, size)
        model = method(resolved.method, network, num_images=loader.num_images, batch_size=8, seed=0)
        trainer = Trainer(model, loader, resolved.training, device=torch.device("cpu"))
        trainer.total_steps, trainer.log_steps = 2, 1
        model.prepare(loader, trainer.device)
        before = next(model.backbone.parameters()).clone()
        trainer.run(save=lambda: None, log=lambda row: None)
    assert [row["step"] for row in trainer.history] == [1, 2]
    assert not torch.equal(next(model.backbone.parameters()), before)


def linked(source: str, prefix: str) -> str:
    return re.sub(r"docs/sources\.md#([\w-]+)", rf"[sources]({prefix}sources.md#\1)", source)


@pytest.mark.parametrize("method", method_names())
def test_each_preset_has_a_source_that_the_pages_print(method):
    presets = load_method_module(method).PRESETS
    anchors = (ROOT / "docs" / "sources.md").read_text()
    page = (ROOT / "docs" / "methods" / f"{method}.md").read_text()
    for name, preset in presets.items():
        (anchor,) = re.findall(r"docs/sources\.md#([\w-]+)", preset.source)
        assert f'id="{anchor}"' in anchors or re.search(rf"^### {anchor}$", anchors, re.M | re.I), anchor
        assert f"| `{name}` | {linked(preset.source, '../')} |" in page
    first = next(iter(presets))
    assert f"`{first}`: {linked(presets[first].source, '')} |" in (ROOT / "docs" / "methods.md").read_text()


@pytest.mark.parametrize(
    ("section", "name", "numbers"),
    [  # rows that recipes once had wrong: Table 5's blur with the baseline's colours, the NeurIPS rows with LARS
        (
            {"backbone": {"name": "mobilenet_v3_large"}, "training": {"batch_size": 1024, "learning_rate": 0.06},
            "method": {"name": "moco", "preset": "moco_v2", "temperature": 0.05,
            "query_augmentation": {"policy": "contrastive", "blur": 1.0},
            "key_augmentation": {"policy": "contrastive", "blur": 1.0}}},
            "shi", {"linear_moco": 35.2},
        ),
        (
            {"backbone": {"name": "resnet50"},
            "method": {"name": "ressl", "preset": "imagenet", "predictor": False, "warmup": 0.0}},
            "ressl", {"linear_ressl_imagenet": 69.9},
        ),
    ],
)  # fmt: skip
def test_the_tables_find_rows_with_other_settings(section, name, numbers):
    settings = settings_of({"dataset": {"name": "imagenet"}, **section})
    rows = [row for row in paper_rows(ROOT / "tests" / "papers" / f"{name}.yaml") if is_row_of(settings, row)]
    assert not any(row.results.items() >= numbers.items() for row in rows)
