"""Refused configurations and their messages, the arguments of jobs, their resources, sweeps, imports of a dry run."""

import os
import re
import subprocess
import sys

import pytest

from .conftest import Project


def refusal(project: Project, *arguments: str) -> str:
    """Return the one line of a refused configuration."""
    run = project.snakemake("-n", *arguments)
    assert run.returncode != 0, run.stdout
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, run.stderr
    assert "Traceback" not in run.stderr + run.stdout
    return lines[0]


def test_a_misspelt_hyper_parameter_ends_in_one_line(fresh: Project) -> None:
    fresh.change("experiments/first/method/queue_sise", 3)
    assert refusal(fresh) == "error: experiments.first.method.queue_sise: unknown key; did you mean 'queue_size'?"


def test_a_fault_in_a_card_ends_in_one_line(fresh: Project) -> None:
    path = fresh.folder / "datasets" / "tiny.yaml"
    path.write_text(path.read_text() + "image_sise: 3\n")
    line = refusal(fresh)
    assert "tiny.yaml" in line
    assert "image_sise" in line
    assert "image_size" in line


def test_a_misspelt_target_ends_in_one_line(fresh: Project) -> None:
    message = "error: results/frist/linear.json: there is no experiment 'frist'; did you mean 'first'?"
    assert refusal(fresh, "results/frist/linear.json").startswith(message)


def test_an_overlay_adds_its_experiments(fresh: Project) -> None:
    experiment = "{dataset: {name: tiny}, backbone: {name: resnet18}, method: {name: ressl}}"
    (fresh.folder / "overlay.yaml").write_text(f"experiments: {{third: {experiment}}}\n")
    targets = {"results/third/knn.json", "results/first/knn.json"}
    assert targets <= fresh.pending(*targets, "--configfile", "overlay.yaml")


def test_a_null_in_an_overlay_leaves_an_experiment_out(fresh: Project) -> None:
    (fresh.folder / "overlay.yaml").write_text("{experiments: {first: null}, sweeps: {heat: null}}\n")
    pending = fresh.pending("--configfile", "overlay.yaml")
    assert {path.split("/")[1] for path in pending if path.endswith(".json")} - {"tiny"} == {"second"}


def test_a_missing_file_of_weights_ends_in_one_line(fresh: Project) -> None:
    first = fresh.config["experiments"]["first"]
    del first["method"]
    fresh.change("experiments/taken", {**first, "weights": "gone.safetensors"})
    message = f"error: experiments.taken.weights: there is no file 'gone.safetensors' (looked in {fresh.folder})"
    assert refusal(fresh) == message


def test_a_sweep_makes_its_experiments_and_one_table(fresh: Project) -> None:
    pending = fresh.pending("results/sweeps/heat.csv")
    experiments = {path.split("/")[1] for path in pending if path.endswith("backbone.safetensors")}
    assert experiments == {"heat-0.1", "heat-0.2"}
    assert "results/sweeps/heat.csv" in pending


def test_sweeps_run_only_as_targets(finished: Project) -> None:
    assert not any("heat" in call for call in finished.calls())


def test_commands_have_the_settings_of_their_stage(finished: Project) -> None:
    (call,) = [call for call in finished.calls() if call.startswith("pretrain first")]
    spec = '{"backbone":{"name":"resnet18","stem":"tiny"},"dataset":{"name":"tiny"},'
    assert f'--spec {spec}"method":{{"name":"ressl","queue_size":16}}}}' in call
    assert "--checkpoint checkpoints/first.pt" in call
    assert "--threads 2" in call


def test_an_evaluation_uses_all_labelled_images_of_the_experiments_data_set(fresh: Project) -> None:
    fresh.change("experiments/first/dataset", {"name": "tiny", "split": "unlabelled", "subset": {"images": 4}})
    run = fresh.snakemake("results/first/knn.json")
    assert run.returncode == 0, run.stderr
    (call,) = [call for call in fresh.calls() if call.startswith("evaluate first knn")]
    assert '--spec {"dataset":{"name":"tiny"},"protocol":"knn"}' in call


def test_one_job_at_a_time_uses_the_gpu(fresh: Project) -> None:
    tool = fresh.folder / "bin" / "nvidia-smi"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    run = fresh.snakemake("--cores", "64")
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("rule pretrain") == 2
    for started in run.stderr.split("Execute ")[1:]:  # the rounds in which Snakemake starts jobs
        assert len(re.findall(r"rule (?:pretrain|evaluate):", started)) <= 1, started


def test_jobs_request_a_gpu_on_a_host_without_one(fresh: Project) -> None:
    fresh.change("experiments/first/training", {"gpus": 4, "nodes": 2})
    run = fresh.snakemake("-n", "results/first/knn.json", "results/second/knn.json", "--resources", "gpu=8")
    requests = re.findall(r"^    resources: .*gpu=(\d)", run.stdout + run.stderr, re.MULTILINE)
    assert sorted(requests) == ["1", "1", "1", "4"]
    assert (run.stdout + run.stderr).count("nodes=2") == 1


@pytest.mark.parametrize(("message", "calls"), [("error: no", 1), ("", 3)])
def test_a_stage_is_retried_unless_it_ends_with_an_error_message(message: str, calls: int, fresh: Project) -> None:
    """Without a message it was killed: by a time limit, preemption, or with its node."""
    log = f"mkdir -p logs/shard; echo '{message}' > logs/shard/tiny.log"
    (fresh.folder / "bin" / "ssl-core").write_text(f"#!/bin/sh\necho call >> calls.txt; {log}; exit 2\n")
    run = fresh.snakemake("--retries", "2", "shards/tiny/manifest.json")
    assert run.returncode == 1
    assert len(fresh.calls()) == calls


def test_jobs_together_never_take_more_cores_than_there_are(fresh: Project) -> None:
    run = fresh.snakemake("--cores", "2")
    assert run.returncode == 0, run.stderr
    rounds = run.stderr.split("Execute ")[1:]
    assert "rule shard:" in rounds[0]  # alone: the job for which Snakemake 9.12 reserves nothing
    for started in rounds:
        assert sum(int(threads) for threads in re.findall(r"^    threads: (\d+)", started, re.M)) <= 2, started


def test_a_failed_stage_fails_the_run(fresh: Project) -> None:
    (fresh.folder / "bin" / "ssl-core").write_text("#!/bin/sh\necho 'error: no' >&2\nexit 2\n")
    run = fresh.snakemake("shards/tiny/manifest.json")
    assert run.returncode != 0
    assert "error: no" in run.stderr


FAILING = """case "$1 $2" in
'pretrain first') mkdir -p logs/pretrain; echo 'error: no GPU' | tee logs/pretrain/first.log >&2; exit 2 ;;
'evaluate second') kill -9 $$ ;;
esac
"""


def test_the_last_lines_of_a_failed_run_name_each_failed_job(fresh: Project) -> None:
    stub = fresh.folder / "bin" / "ssl-core"
    stub.write_text(f"#!/bin/sh\n{FAILING}{stub.read_text()}")
    run = fresh.snakemake(
        "--keep-going", "results/first/knn.json", "results/second/knn.json", "results/first/views.png"
    )
    assert run.returncode == 1
    assert (fresh.folder / "results/first/views.png").exists()
    killed = "it ended without an error message, most likely killed: for want of memory, by a scheduler or by hand"
    headline, *lines = run.stderr.rstrip().splitlines()[-3:]
    assert headline == "Failed jobs (2):"
    assert sorted(lines) == [
        f"  evaluate results/second/knn.json: {killed} (log: logs/evaluate/second/knn.log)",
        "  pretrain results/first/backbone.safetensors: error: no GPU (log: logs/pretrain/first.log)",
    ]


def test_a_dry_run_imports_neither_torch_nor_mlflow(fresh: Project) -> None:
    probe = (
        "import sys\n"
        "from snakemake.cli import main\n"
        "try:\n    main(['-n', '--quiet'])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print({'torch', 'mlflow', 'nvidia.dali', 'torchvision'} & set(sys.modules))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(fresh.folder)}
    command = [sys.executable, "-c", probe]
    run = subprocess.run(command, cwd=fresh.folder, env=environment, capture_output=True, text=True, timeout=60)
    assert run.stdout.splitlines()[-1] == "set()", run.stdout + run.stderr


def test_a_cost_needs_the_export_and_the_export_all_other_evaluations(fresh: Project) -> None:
    fresh.change("evaluations/price", {"protocol": "cost"})
    run = fresh.snakemake("results/first/price.json")
    assert run.returncode == 0, run.stderr
    (export,) = [call for call in fresh.calls() if call.startswith("export first")]
    assert "--results results/first/linear.json results/first/knn.json --output results/first/export" in export
    assert "--card tiny" in export
    (cost,) = [call for call in fresh.calls() if call.startswith("cost first price")]
    assert "--onnx results/first/export/backbone.onnx --pretrain results/first/pretrain.json" in cost
    assert '--spec {"dataset":{"name":"tiny"},"protocol":"cost"}' in cost
    assert fresh.pending("results/first/export/README.md", "results/first/price.json") == set()


def test_an_8_bit_file_is_made_of_the_export_and_the_images_of_the_pretraining(fresh: Project) -> None:
    fresh.change("quantise", {"images": 64})
    target = "results/first/export/backbone.int8.onnx"
    run = fresh.snakemake(target)
    assert run.returncode == 0, run.stderr
    (quantise,) = [call for call in fresh.calls() if call.startswith("quantise first")]
    assert '--spec {"images":64} --dataset {"name":"tiny"} --onnx results/first/export/backbone.onnx' in quantise
    assert "--manifest shards/tiny/manifest.json" in quantise
    assert fresh.pending(target) == set()
    fresh.change("evaluations/small", {"protocol": "quantised"})
    run = fresh.snakemake("results/first/small.json")
    assert run.returncode == 0, run.stderr
    (quantised,) = [call for call in fresh.calls() if call.startswith("quantised first small")]
    assert f"--int8 {target} --manifest shards/tiny/manifest.json" in quantised


def test_an_8_bit_classifier_is_made_of_the_classifier_and_the_images_of_the_fine_tuning(fresh: Project) -> None:
    fresh.change("evaluations/few", {"protocol": "finetune", "dataset": {"name": "tiny", "split": "train"}})
    run = fresh.snakemake("results/first/few/classifier.int8.onnx")
    assert run.returncode == 0, run.stderr
    (quantise,) = [call for call in fresh.calls() if call.startswith("quantise first")]
    assert '--dataset {"name":"tiny","split":"train"} --onnx results/first/few/classifier.onnx' in quantise
    assert "--manifest shards/tiny/manifest.json --output results/first/few/classifier.int8.onnx" in quantise


@pytest.mark.parametrize("format", ["tflite", "pte"])
def test_files_for_phones_are_made_of_the_backbone(fresh: Project, format: str) -> None:
    fresh.change("evaluations/small", {"protocol": "quantised", "format": format})
    run = fresh.snakemake("results/first/small.json")
    assert run.returncode == 0, run.stderr
    folder = "results/first/export"
    (export,) = [call for call in fresh.calls() if call.startswith("export-device first")]
    assert f"--backbone results/first/backbone.safetensors --output {folder}/backbone.{format}" in export
    (quantise,) = [call for call in fresh.calls() if call.startswith("quantise-device first")]
    assert "--manifest shards/tiny/manifest.json" in quantise
    (quantised,) = [call for call in fresh.calls() if call.startswith("quantised first small")]
    assert f"--float32 {folder}/backbone.{format} --int8 {folder}/backbone.int8.{format}" in quantised
    assert not any(call.startswith("export first") for call in fresh.calls())


def test_adopted_weights_have_pictures_but_no_curves(fresh: Project) -> None:
    first = fresh.config["experiments"]["first"]
    del first["method"]
    fresh.change("experiments/taken", first | {"weights": "w.safetensors"})
    fresh.change("evaluations/looks", {"protocol": "pictures"})
    (fresh.folder / "w.safetensors").write_text("weights")
    run = fresh.snakemake("-n", "all", "results/taken/looks/tsne.svg")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("rule pictures:") == 3
    assert run.stdout.count("rule draw:") == 3
    assert "results/taken/looks/neighbours.png" in run.stdout
    assert "results/first/curves.png" in run.stdout
    assert "results/taken/curves.png" not in run.stdout


# Prints a version, or runs the command of `singularity exec OPTIONS IMAGE sh -c COMMAND` and notes the image.
APPTAINER = """#!/bin/sh
[ "$1" = --version ] && echo "apptainer version 1.3.0" && exit
while [ "${1%.sif}" = "$1" ]; do shift; done
echo "$1" >> images.txt
shift
exec "$@"
"""


def test_jobs_run_in_the_image_that_the_configuration_names_and_another_image_runs_nothing_again(done: Project) -> None:
    singularity = done.folder / "bin" / "singularity"
    singularity.write_text(APPTAINER, encoding="utf-8")
    singularity.chmod(0o755)
    done.change("container", "one.sif")
    assert done.pending("--sdm=apptainer") == set()
    run = done.snakemake("--sdm", "apptainer", "--force", "results/first/knn.json")
    assert run.returncode == 0, run.stdout + run.stderr
    assert (done.folder / "images.txt").read_text(encoding="utf-8") == "one.sif\n"
    done.change("container", "two.sif")
    assert done.pending("results/first/knn.json", "--sdm", "apptainer") == set()
