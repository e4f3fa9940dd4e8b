"""What the workflow refuses, and in which words; how jobs are started; sweeps; torch stays out of a dry run."""

import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Project


def refusal(project: Project, *arguments: str) -> str:
    """Return the one line with which Snakemake ends."""
    run = project.snakemake("-n", *arguments)
    assert run.returncode != 0, run.stdout
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, run.stderr
    assert "Traceback" not in run.stderr + run.stdout
    return lines[0]


def test_a_misspelt_hyper_parameter_ends_in_one_line(fresh: Project) -> None:
    config = fresh.config
    config["experiments"]["first"]["method"]["queue_sise"] = 3
    fresh.configure(config)
    assert refusal(fresh) == "error: experiments.first.method.queue_sise: unknown key; did you mean 'queue_size'?"


def test_an_unknown_data_set_ends_in_one_line(fresh: Project) -> None:
    config = fresh.config
    config["experiments"]["first"]["dataset"]["name"] = "tinny"
    fresh.configure(config)
    line = refusal(fresh)
    assert line.startswith("error: experiments.first.dataset.name: there is no data set 'tinny'")
    assert line.endswith("did you mean 'tiny'?")


def test_a_fault_in_a_card_ends_in_one_line(fresh: Project) -> None:
    path = fresh.folder / "datasets" / "tiny.yaml"
    path.write_text(path.read_text() + "image_sise: 3\n")
    line = refusal(fresh)
    assert "tiny.yaml" in line
    assert "image_sise" in line
    assert "image_size" in line


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("results/frist/linear.json", "there is no experiment 'frist'; did you mean 'first'?"),
        ("results/first/liner.json", "there is no evaluation 'liner'; did you mean 'linear'?"),
        ("results/sweeps/heet.csv", "there is no sweep 'heet'; did you mean 'heat'?"),
    ],
)
def test_a_misspelt_target_ends_in_one_line(fresh: Project, target: str, words: str) -> None:
    assert refusal(fresh, target).startswith(f"error: {target}: {words}")


def test_an_overlay_adds_its_experiments(fresh: Project) -> None:
    overlay = fresh.folder / "overlay.yaml"
    overlay.write_text(
        "experiments: {third: {dataset: {name: tiny}, backbone: {name: resnet18}, method: {name: ressl}}}\n"
    )
    arguments = ("--configfile", "overlay.yaml", "results/third/knn.json", "results/first/knn.json")
    assert {"results/third/knn.json", "results/first/knn.json"} <= fresh.pending(*arguments)


def test_a_sweep_makes_its_experiments_and_one_table(fresh: Project) -> None:
    pending = fresh.pending("results/sweeps/heat.csv")
    experiments = {path.split("/")[1] for path in pending if path.endswith("backbone.safetensors")}
    assert experiments == {"heat-0.1", "heat-0.2"}
    assert "results/sweeps/heat.csv" in pending


def test_sweeps_run_only_when_asked_for(fresh: Project) -> None:
    assert not any("heat" in path for path in fresh.pending())


def test_commands_carry_the_stages_own_section(finished: Project) -> None:
    (call,) = [call for call in finished.calls() if call.startswith("pretrain first")]
    spec = '{"backbone":{"name":"resnet18","stem":"tiny"},"dataset":{"name":"tiny"},'
    assert f'--spec {spec}"method":{{"name":"ressl","queue_size":16}}}}' in call
    assert "--checkpoint checkpoints/first.pt" in call
    assert "--threads 2" in call


def test_an_evaluation_takes_all_labelled_images_of_the_experiments_data_set(fresh: Project) -> None:
    config = fresh.config
    config["experiments"]["first"]["dataset"] = {"name": "tiny", "split": "unlabelled", "subset": {"images": 4}}
    fresh.configure(config)
    run = fresh.snakemake("results/first/knn.json")
    assert run.returncode == 0, run.stderr
    (call,) = [call for call in fresh.calls() if call.startswith("evaluate first knn")]
    assert '--spec {"dataset":{"name":"tiny"},"protocol":"knn"}' in call


def test_one_job_at_a_time_uses_the_gpu(fresh: Project) -> None:
    rules = fresh.folder / "workflow" / "rules" / "common.smk"
    text = rules.read_text()
    assert "\nGPU = " in text
    rules.write_text(text.replace("\nGPU = ", "\nGPU = 1 or "))
    run = fresh.snakemake("--cores", "64")
    assert run.returncode == 0, run.stderr
    assert "Provided resources: gpu=1" in run.stdout + run.stderr
    assert (run.stdout + run.stderr).count("resources: tmpdir") < (run.stdout + run.stderr).count("gpu=1")


def test_a_failed_stage_fails_the_run(fresh: Project) -> None:
    (fresh.folder / "bin" / "ssl-core").write_text("#!/bin/sh\necho 'error: no' >&2\nexit 2\n")
    run = fresh.snakemake("shards/tiny/manifest.json")
    assert run.returncode != 0
    assert "error: no" in run.stderr


def test_a_dry_run_imports_neither_torch_nor_mlflow(fresh: Project) -> None:
    probe = (
        "import sys\n"
        "from snakemake.cli import main\n"
        "try:\n    main(['-n', '--quiet'])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print({'torch', 'mlflow', 'nvidia.dali', 'torchvision'} & set(sys.modules))\n"
    )
    run = subprocess.run([sys.executable, "-c", probe], cwd=fresh.folder, capture_output=True, text=True, timeout=60)
    assert run.stdout.splitlines()[-1] == "set()", run.stdout + run.stderr


def test_rules_are_started_from_the_environment(root: Path) -> None:
    assert (Path(sys.executable).parent / "ssl-core").exists()
