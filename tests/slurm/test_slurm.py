"""The workflow on a real SLURM: results, limits, preemption, cancelled jobs, lost nodes and mistakes."""

import shutil
from pathlib import Path

import pytest

from .cluster import Cluster, run
from .conftest import NO_GPU, RESULT, TRAINED, Project

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]


def failed_jobs(output: str) -> list[str]:
    """Return the lines after the headline at the end of a failed workflow."""
    _, found, end = output.rpartition("Failed jobs (")
    assert found, output
    return [line for line in end.splitlines()[1:] if line.startswith("  ")]


def submissions(output: str) -> int:
    return output.count("has been submitted with SLURM jobid")


def state_of(job: str) -> str:
    return run("sacct", "-X", "-n", "-P", "-j", job, "-o", "State").strip()


Outcomes = dict[str, tuple[int, str]]  # status and output


@pytest.fixture(scope="module")
def mistaken(cluster: Cluster, local: Project, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Workflows that fail, at the same time: damaged shards, a missing GPU, a wrong partition, a wrong account."""
    projects = {name: local.untrained(tmp_path_factory.mktemp(name) / "project") for name in MISTAKES}
    projects["shards"].damage_shards()
    running = {name: projects[name].submit(TRAINED, *MISTAKES[name]) for name in MISTAKES}
    return {name: projects[name].finish(workflow) for name, workflow in running.items()}


MISTAKES = {
    "shards": (),
    "gpu": ("--set-resources", "pretrain:runtime=5"),  # in place of those without GPU
    "partition": ("--default-resources", "slurm_partition=nowhere"),
    "account": ("--default-resources", "slurm_account=nobody"),
}


@pytest.mark.parametrize(
    ("mistake", "submitted", "words"),
    [
        ("shards", 1, "bytes instead of"),
        ("gpu", 1, "error: SLURM gave this job 1 GPU(s), torch can use 0 on n"),
        ("partition", 0, "not submitted: sbatch: error: invalid partition specified: nowhere"),
        ("account", 0, "not submitted: The given account nobody appears to be invalid"),
    ],
)
def test_a_mistake_ends_in_one_line_and_is_submitted_once(
    mistake: str, submitted: int, words: str, mistaken: Outcomes
) -> None:
    status, output = mistaken[mistake]
    assert status == 1
    assert submissions(output) == submitted
    (line,) = failed_jobs(output)
    assert words in line


def test_the_plain_command_continues_after_scancel(cluster: Cluster, local: Project, project: Project) -> None:
    workflow = project.submit(TRAINED, "--retries", "0")
    writer = project.pause_training()
    run("scancel", writer.job)
    status, output = project.finish(workflow)
    assert status == 1, output
    (line,) = failed_jobs(output)
    assert "SLURM status is" in line
    status, output = project.finish(project.submit(TRAINED))
    assert status == 0, output
    assert "continuing at step" in project.log()
    assert project.weights() == local.weights()


def test_a_training_on_two_nodes_gives_the_bytes_of_two_processes(
    cluster: Cluster, project: Project, local: Project, tmp_path: Path
) -> None:
    one_node = local.untrained(tmp_path / "one")
    one_node.change_training(gpus=2)
    alone = one_node.start("--cores", "1", TRAINED)
    project.change_training(nodes=2)
    workflow = project.submit(TRAINED, "--set-resources", "pretrain:gres=none", "pretrain:tasks=2")
    status, output = project.finish(workflow)
    assert status == 0, output
    assert submissions(output) == 1
    status, output = one_node.finish(alone)
    assert status == 0, output
    assert project.weights() == one_node.weights()


def test_a_preempted_training_continues(cluster: Cluster, local: Project, project: Project) -> None:
    workflow = project.submit(TRAINED)
    writer = project.pause_training()
    run("sbatch", "-p", "urgent", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3")
    status, output = project.finish(workflow)
    assert status == 0, output
    assert state_of(writer.job) == "PREEMPTED"
    assert "continuing at step" in project.log()
    assert project.weights() == local.weights()


def test_the_chain_gives_the_bytes_of_a_local_run(cluster: Cluster, local: Project, project: Project) -> None:
    shutil.rmtree(project.folder / "shards")
    status, output = project.finish(project.submit(RESULT))
    assert status == 0, output
    assert submissions(output) == 3
    assert (project.folder / RESULT).read_bytes() == (local.folder / RESULT).read_bytes()
    assert project.weights() == local.weights()


def test_a_training_continues_after_its_time_limit(cluster: Cluster, local: Project, project: Project) -> None:
    workflow = project.submit(TRAINED, "--set-resources", *NO_GPU, "pretrain:runtime=1")
    writer = project.pause_training()
    status, output = project.finish(workflow)
    assert status == 0, output
    assert state_of(writer.job) in ("TIMEOUT", "FAILED")
    assert submissions(output) == 2
    assert "continuing at step" in project.log()
    assert project.weights() == local.weights()


def test_a_training_continues_on_the_other_node(cluster: Cluster, local: Project, project: Project) -> None:
    workflow = project.submit(TRAINED)
    writer = project.pause_training()
    node = run("squeue", "-h", "-j", writer.job, "-o", "%N").strip()
    cluster.kill_node(node, writer.job)
    try:
        status, output = project.finish(workflow)
    finally:
        cluster.start_node(node)
        cluster.wait_until_idle()
    assert status == 0, output
    assert state_of(writer.job) == "NODE_FAIL"
    assert submissions(output) == 2  # one writer at a time: SLURM has not started the job again
    assert "continuing at step" in project.log()
    assert project.weights() == local.weights()


def test_jobs_end_without_accounting(cluster: Cluster, local: Project, project: Project, tmp_path: Path) -> None:
    damaged = local.untrained(tmp_path / "damaged")
    damaged.damage_shards()
    cluster.stop("slurmctld")
    cluster.configure(accounting=False)
    cluster.start_controller()
    try:
        cluster.wait_until_idle()
        running = [project.submit(TRAINED), damaged.submit(TRAINED)]
        status, output = project.finish(running[0])
        assert status == 0, output
        assert project.weights() == local.weights()
        status, output = damaged.finish(running[1])
        assert status == 1, output
        assert submissions(output) == 1
    finally:
        cluster.stop("slurmctld")
        cluster.configure(accounting=True)
        cluster.start_controller()
