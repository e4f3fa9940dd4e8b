"""The recipe "should_i_pretrain" in a user's own folder: its jobs, and its page of made-up numbers."""

import sys
from pathlib import Path

import yaml

from ssl_core.experiments import bundled, user_folder
from ssl_core.experiments.should_i_pretrain import TARGET

from .conftest import STUB, finish
from .test_user_folder import jobs, new_folder

RECIPE = str(bundled.recipe_path("should_i_pretrain"))
# The last stage is the real one; the others write numbers that it can read.
NUMBERS = """#!/bin/sh
main='import sys; from ssl_core.cli import main; sys.exit(main())'
if [ "$1" = should-i-pretrain ]; then exec PYTHON -c "$main" "$@"; fi
sh bin/stub "$@"
case $1 in
pretrain) echo '{"experiment": "'$2'", "cost": {"seconds": 60.5}, "hardware": "abacus"}' > "results/$2/pretrain.json" ;;
esac
[ "$1" = finetune ] || exit 0
share=${3#labels_} && share=${share%-seed*} && seed=${3##*-seed}
case $share in 1) fraction=0.01 ;; 10) fraction=0.1 ;; *) fraction=1.0 ;; esac
cat > "results/$2/$3.json" <<END
{"experiment": "$2", "evaluation": "$3", "protocol": "finetune-full/v1", "dataset": "tiny", "metrics": {"top1": 6$seed},
 "baselines": {"untrained": {"top1": 5$seed}, "pixels": {"top1": 20}}, "num_train": 9, "num_test": 9, "seed": $seed,
 "hyperparameters":
 {"fraction": $fraction, "epochs": 1, "batch_size": 2, "learning_rate": 1, "backbone_learning_rate": 1}}
END
echo '{"experiment": "'$2'", "evaluation": "'$3'", "seconds": 7, "hardware": "abacus"}' > "results/$2/$3/cost.json"
"""


def test_the_package_brings_the_recipe_and_a_dry_run_lists_the_runs_of_equal_seeds(tmp_path: Path) -> None:
    output = finish(new_folder(tmp_path / "mine"), "-n", TARGET, "--configfile", RECIPE)
    assert jobs(output) == {"shard", "pretrain", "finetune", "should_i_pretrain"}
    counts = [line.split() for line in output.splitlines()]
    assert ["pretrain", "7"] in counts  # three seeds of two ways, and the teacher
    assert ["finetune", "18"] in counts  # those at three shares


def test_the_rule_writes_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    user_folder.create(folder)
    (folder / "bin").mkdir()
    (folder / "bin" / "stub").write_text(STUB)
    (folder / "bin" / "ssl-core").write_text(NUMBERS.replace("PYTHON", sys.executable))
    (folder / "bin" / "ssl-core").chmod(0o755)
    given = yaml.safe_load(Path(RECIPE).read_text())["experiments"]["pretrained"]
    given = {"dataset": given["dataset"], "backbone": given["backbone"], "weights": "there.safetensors"}
    (folder / "there.safetensors").touch()
    overlay = {"experiments": {"distilled": None, "larger": None, "given": given}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(overlay))
    finish(folder, TARGET, "--configfile", RECIPE, "mine.yaml")
    page = (folder / TARGET).read_text(encoding="utf-8")
    places = "at 1 % of the labels (+10.0 points, +10.0 to +10.0), at 10 % (+10.0 points, +10.0 to +10.0) and at 100 %"
    assert f"Pre-training here is better than training from scratch {places}" in page
    assert page.count("61.0") >= 2  # both ways, mean of three seeds
    assert "Nothing to be done" in finish(folder, "-n", TARGET, "--configfile", RECIPE, "mine.yaml")
    card = "results/pretrained-seed1/export/README.md"
    assert jobs(finish(folder, "-n", card, "--configfile", RECIPE, "mine.yaml")) == {"export"}
