"""A change runs exactly the jobs again whose results it can change."""

import re
from pathlib import Path

import pytest
import yaml

from .conftest import Project

FILES = ("backbone.safetensors", "views.png", "curves.png", "linear.json", "knn.json")
FIRST = {f"results/first/{file}" for file in FILES}
SECOND = {file.replace("first", "second") for file in FIRST}
TABLE = {"results/table.csv"}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path} has no {old!r}"
    path.write_text(text.replace(old, new, 1))


def test_a_temperature_runs_its_experiment_again(done: Project) -> None:
    done.change("experiments/first/method/teacher_temperature", 0.05)
    assert done.pending() == FIRST | TABLE


def test_a_new_experiment_runs_alone(done: Project) -> None:
    done.change("experiments/third", done.config["experiments"]["first"] | {"training": {"seed": 1}})
    assert done.pending() == {file.replace("first", "third") for file in FIRST} | TABLE


def test_an_option_of_an_evaluation_runs_that_evaluation_again(done: Project) -> None:
    done.change("evaluations/knn/k", 5)
    assert done.pending() == {"results/first/knn.json", "results/second/knn.json"} | TABLE


def test_a_second_run_and_changes_without_effect_on_results_run_nothing(done: Project) -> None:
    assert done.pending() == set()
    for path in done.folder.rglob("*.py"):  # a comment, a docstring and, as after a checkout, new modification times
        text = path.read_text()
        path.write_text("# A remark.\n" + text.replace('"""', '"""New words. ', 1))
    for path in [*done.folder.glob("workflow/**/*.smk"), done.folder / "Snakefile"]:
        path.write_text(path.read_text() + "\n# A remark.\n")
    edit(done.folder / "datasets" / "tiny.yaml", "name: tiny", "name: tiny  # a remark")
    manifest = done.folder / "shards" / "tiny" / "manifest.json"
    manifest.write_text(manifest.read_text())
    experiment = done.config["experiments"]["first"]
    done.change("experiments/first", {key: experiment[key] for key in sorted(experiment, reverse=True)})
    (done.folder / "checkpoints").mkdir()
    (done.folder / "checkpoints" / "first.pt").write_text("state")
    assert done.pending() == set()


def test_shards_at_another_address_run_nothing(done: Project) -> None:
    done.change("shards", "s3://bucket/prefix")
    assert done.pending() == set()


def test_a_reported_number_changes_the_table_alone(done: Project) -> None:
    done.change("reported/first", {"source": "Table 2", "results": {"linear": 90.8}})
    assert done.pending() == TABLE


def test_seeds_run_an_experiment_each(done: Project) -> None:
    done.change("experiments/first/seeds", [0, 4])
    assert done.pending() == {file.replace("first", f"first-seed{seed}") for file in FIRST for seed in (0, 4)} | TABLE


def test_a_file_of_weights_runs_its_experiments_again(fresh: Project) -> None:
    config = fresh.config
    second = config["experiments"]["second"]
    second["method"]["initial"] = "start.safetensors"
    taken = {key: second[key] for key in ("dataset", "backbone")} | {"weights": "start.safetensors"}
    chained = taken | {"weights": "results/second/backbone.safetensors"}
    config["experiments"] |= {"taken": taken, "chained": chained}
    fresh.configure(config)
    (fresh.folder / "start.safetensors").write_text("weights")
    backbones = {f"results/{name}/backbone.safetensors" for name in ("first", "second", "taken", "chained")}
    run = fresh.snakemake(*backbones)
    assert run.returncode == 0, run.stderr
    assert sorted(call.split()[1] for call in fresh.calls() if call.startswith("adopt")) == ["chained", "taken"]
    assert fresh.pending(*backbones) == set()
    (fresh.folder / "start.safetensors").write_text("other weights")
    assert fresh.pending(*backbones) == backbones - {"results/first/backbone.safetensors"}


@pytest.mark.long
def test_another_teacher_makes_the_bags_again_and_other_settings_do_not(fresh: Project) -> None:
    teacher = {"weights": "teacher.safetensors", "projector": "head.safetensors"}
    config = fresh.config
    config["experiments"]["second"]["method"] = {"name": "bingo", "teacher": teacher, "queue_size": 16}
    fresh.configure(config)
    for file in teacher.values():
        (fresh.folder / file).write_text("weights", encoding="utf-8")
    targets = ["results/first/backbone.safetensors", "results/second/backbone.safetensors"]
    run = fresh.snakemake(*targets)
    assert run.returncode == 0, run.stderr
    assert sorted(call.split()[0] for call in fresh.calls()) == ["bags", "pretrain", "pretrain", "shard"]
    bags, student = {"results/second/bags.npy"}, {"results/second/backbone.safetensors"}
    fresh.change("experiments/second/method/queue_size", 8)
    assert fresh.pending(*targets) == student
    fresh.change("experiments/second/method/bag_size", 3)
    assert fresh.pending(*targets) == bags | student
    fresh.configure(config)
    (fresh.folder / "head.safetensors").write_text("other weights", encoding="utf-8")
    assert fresh.pending(*targets) == student
    (fresh.folder / "teacher.safetensors").write_text("other weights", encoding="utf-8")
    assert fresh.pending(*targets) == bags | student


def add_statement(path: Path, function: str) -> None:
    """Let a function that has a docstring of one line do one thing more."""
    text = path.read_text()
    edited = re.sub(rf'(def {function}\(.*?\n( +)""".*?""")', r"\1\n\2more = abs(-1)", text, count=1, flags=re.DOTALL)
    assert edited != text, f"{path} has no {function} with a docstring"
    path.write_text(edited)


def test_moved_and_reworded_code_and_a_moved_card_run_nothing(done: Project) -> None:
    """The package's card is used until the folder has one; the same content is the same data set."""
    package = done.folder / "ssl_core"
    (package / "networks" / "heads.py").rename(package / "blocks" / "projectors.py")
    for path in package.rglob("*.py"):
        path.write_text(path.read_text().replace("ssl_core.networks.heads", "ssl_core.blocks.projectors"))
    edit(package / "training" / "monitor.py", "training diverged: ", "oh no, it diverged: ")
    (done.folder / "datasets").rename(done.folder / "package_cards")
    bundled = package / "experiments" / "bundled.py"
    edit(bundled, 'CARDS = ROOT / "datasets"', 'CARDS = ROOT / "package_cards"')
    assert done.pending() == set()


def test_code_of_a_method_runs_its_experiments_again(done: Project) -> None:
    add_statement(done.folder / "ssl_core" / "methods" / "ressl.py", "forward")
    assert done.pending() == FIRST | TABLE


def test_code_of_a_protocol_runs_its_evaluations_again(done: Project) -> None:
    add_statement(done.folder / "ssl_core" / "evaluations" / "knn.py", "run")
    assert done.pending() == {"results/first/knn.json", "results/second/knn.json"} | TABLE


def test_code_of_a_picture_draws_that_picture_again_and_trains_nothing(done: Project) -> None:
    add_statement(done.folder / "ssl_core" / "drawing" / "views.py", "draw_views")
    assert done.pending() == {"results/first/views.png", "results/second/views.png"} | TABLE
    run = done.snakemake()
    assert run.returncode == 0, run.stderr
    assert done.pending() == set()
    assert [call.split()[0] for call in done.calls()[-3:]] == ["sample-views", "sample-views", "table"]


def test_a_card_shards_its_data_set_again(done: Project) -> None:
    path = done.folder / "datasets" / "tiny.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"image_size": 32}))
    assert done.pending() == {"shards/tiny/manifest.json"} | FIRST | SECOND | TABLE
