"""The workflow outside its clone: in folders that `ssl-core init` makes, and with `--directory`."""

import re
from pathlib import Path

import pytest
import yaml

from ssl_core.experiments import bundled, user_folder

from .conftest import CARD, STUB, finish

TARGET = "results/ressl_r18/knn.json"
JOBS = {"shard", "pretrain", "evaluate"}
OWN_RULES = """
rule summary:
    input:
        "results/ressl_r18/knn.json",
    output:
        "summary.txt",
    shell:
        "cp {input} {output}"
"""


def jobs(output: str) -> set[str]:
    """Return the rules whose jobs a dry run lists."""
    return set(re.findall(r"^(?:local)?rule (\w+):", output, flags=re.MULTILINE))


def new_folder(folder: Path) -> Path:
    """Make a folder of the user's with a stub for the stages."""
    user_folder.create(folder)
    (folder / "bin").mkdir()
    (folder / "bin" / "ssl-core").write_text(STUB)
    (folder / "bin" / "ssl-core").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def finished_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = new_folder(tmp_path_factory.mktemp("users") / "finished")
    finish(folder, TARGET)
    return folder


def test_results_and_shards_are_in_the_folder(finished_folder: Path) -> None:
    for name in (TARGET, "shards/demo/manifest.json", "logs"):
        assert (finished_folder / name).exists(), name
    assert "Nothing to be done" in finish(finished_folder, "-n", TARGET)


def test_two_folders_do_not_disturb_each_other(finished_folder: Path, tmp_path: Path) -> None:
    assert jobs(finish(new_folder(tmp_path / "second"), "-n", TARGET)) == JOBS
    assert "Nothing to be done" in finish(finished_folder, "-n", TARGET)


def test_all_is_the_default_target(tmp_path: Path) -> None:
    assert jobs(finish(new_folder(tmp_path / "mine"), "-n")) == JOBS | {
        "all",
        "table",
        "curves",
        "views",
        "pictures",
        "draw",
    }


def test_users_add_rules_cards_and_recipes(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "mine")
    (folder / "Snakefile").write_text((folder / "Snakefile").read_text() + OWN_RULES)
    (folder / "datasets" / "tiny.yaml").write_text(yaml.safe_dump(CARD))
    recipe = bundled.recipe_path("demo_all_methods")
    overlay = {"experiments": {"ressl_r18": {"dataset": {"name": "tiny"}}}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(overlay))
    output = finish(folder, "-n", "-p", "summary.txt", "--configfile", str(recipe), "mine.yaml")
    assert jobs(output) == JOBS | {"summary"}
    assert "ssl-core shard tiny --output shards/tiny" in output


def test_a_fault_ends_in_one_line(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "mine")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("queue_size", "queue_sise"))
    message = "error: experiments.ressl_r18.method.queue_sise: unknown key; did you mean 'queue_size'?"
    with pytest.raises(AssertionError, match=re.escape(message)):
        finish(folder, "-n")


def test_the_clones_snakefile_works_on_another_directory(root: Path, tmp_path: Path) -> None:
    """Without a configuration of its own, the directory uses the demonstration's."""
    snakefile = str(root / "Snakefile")
    assert jobs(finish(tmp_path, "-n", "--snakefile", snakefile, "--directory", "empty", TARGET)) == JOBS
    configured = tmp_path / "configured"
    configured.mkdir()
    configuration = yaml.safe_load(bundled.CONFIG.read_text())
    configuration["experiments"] = {"mine": configuration["experiments"]["ressl_r18"]}
    (configured / "config.yaml").write_text(yaml.safe_dump(configuration))
    target = "results/mine/knn.json"
    assert jobs(finish(tmp_path, "-n", "--snakefile", snakefile, "--directory", str(configured), target)) == JOBS
