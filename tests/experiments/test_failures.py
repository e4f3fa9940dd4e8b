"""The last lines of a failed workflow name each failed job once, its reason and its log."""

from pathlib import Path

import pytest

from ssl_core.experiments.failures import look_next, made, print_end, summary

JOB = """\
[Fri Nov 27 19:43:12 2026]
Error in rule {rule}:
    message: None
    jobid: 2
    output: {output}
    log: {log} (check log file(s) for error details)
    shell:
        ssl-core {rule} ...
        (command exited with non-zero exit code)
"""


def test_each_failed_job_is_named_once_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.log").write_text("line\nerror: nowhere does not exist (log: one.log)\n", encoding="utf-8")
    shard = JOB.format(rule="shard", output="shards/one/manifest.json", log="one.log")
    pretrain = JOB.format(rule="pretrain", output="results/x/backbone.safetensors, results/x/m", log="two.log")
    Path("snakemake.log").write_text(f"{shard}1 of 10 steps (10%) done\n{pretrain}Exiting\n{shard}", encoding="utf-8")
    headline, first, second = summary([Path("snakemake.log")]).splitlines()
    assert headline == "Failed jobs (2):"
    assert first == "  shard shards/one/manifest.json: error: nowhere does not exist (log: one.log)"
    assert second.startswith("  pretrain results/x/backbone.safetensors: it ended without an error message")
    assert second.endswith("(log: two.log)")


def failed_on_slurm(message: str) -> str:
    job = JOB.format(rule="pretrain", output="results/x/backbone.safetensors", log="two.log, /logs/slurm/12.log")
    return job.replace("message: None", f"message: {message}")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "SLURM-job '12' failed, SLURM status is: 'TIMEOUT'.For further error details see the cluster/cloud log",
            "SLURM-job '12' failed, SLURM status is: 'TIMEOUT'. (log: two.log)",
        ),
        ("SLURM sbatch failed. The error message was 'sbatch: error: no\nmore", "not submitted: sbatch: error: no"),
        ("Job submission failed with exception: The account x is\nmore", "not submitted: The account x is"),
    ],
)
def test_the_reason_of_slurm_is_named(
    message: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("snakemake.log").write_text(failed_on_slurm(message), encoding="utf-8")
    assert summary([Path("snakemake.log")]).splitlines()[1] == f"  pretrain results/x/backbone.safetensors: {reason}"


def test_a_retried_job_counts_only_if_its_last_attempt_failed(tmp_path: Path) -> None:
    first = JOB.format(rule="shard", output="a", log="a.log")
    second = JOB.format(rule="shard", output="b", log="b.log")
    attempts = second.replace("None", "SLURM-job '1' failed") + second.replace("None", "SLURM-job '2' failed")
    end = f"Exiting because a job execution failed. Look below for error messages\n{second}"
    (tmp_path / "snakemake.log").write_text(f"{first}Trying to restart job 1.\n{attempts}{end}", encoding="utf-8")
    _, line = summary([tmp_path / "snakemake.log"]).splitlines()
    assert line == "  shard b: SLURM-job '2' failed (log: b.log)"


def test_a_log_without_failed_jobs_gives_no_summary(tmp_path: Path) -> None:
    (tmp_path / "snakemake.log").write_text("Building DAG of jobs...\n", encoding="utf-8")
    assert summary([tmp_path / "snakemake.log"]) == ""


STARTED = """\
[Fri Nov 27 19:43:12 2026]
localrule {rule}:
    input: a
    output: {output}, results/x/other
    jobid: {number}
"""


def test_the_end_of_a_run_lists_the_finished_jobs_and_where_to_look_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    knn = STARTED.format(rule="evaluate", output="results/x/knn.json", number=3)
    table = STARTED.format(rule="table", output="results/table.csv", number=4)
    log = tmp_path / "snakemake.log"
    log.write_text(f"{knn}{table}Finished jobid: 3 (Rule: evaluate)\n", encoding="utf-8")
    assert made([log]) == ["results/x/knn.json"]
    log.write_text(f"{log.read_text()}Finished jobid: 4 (Rule: table)\n", encoding="utf-8")
    print_end([log], failed=False)
    *lines, last = capsys.readouterr().err.splitlines()
    assert lines == ["Finished jobs (2):", "  results/x/knn.json", "  results/table.csv"]
    assert last.startswith("Look next: results/table.html in a browser, `ssl-core ui` shows the runs")
    page = "results/should_i_pretrain.html"
    assert look_next([page], ["--cores", "1", page, "--configfile", "my data.yaml"]) == (
        f"{page} in a browser, `ssl-core ui` shows the runs, `snakemake --report report.html --cores 1 {page} "
        "--configfile 'my data.yaml'` makes one page of all results."
    )
    log.write_text("Nothing to be done\n")
    print_end([log], failed=False)
    assert capsys.readouterr().err == ""
