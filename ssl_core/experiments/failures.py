"""The last lines of a workflow: finished jobs, failed jobs with reason and log, and where to look next. Torch-free."""

import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ssl_core.terminal import coloured

FAILED = re.compile(r"^Error in rule (\w+):$")
STARTED = re.compile(r"^(local)?rule \w+:$")
FINISHED = re.compile(r"^Finished jobid: (\d+) ")
STARTED_DETAIL = re.compile(r"^    (output|jobid): ([^,]+)")
MAX_FILES = 12  # listed
AGAIN = "The same command runs the failed jobs again and keeps what is finished."
PAGES = {"results/table.csv": "results/table.html", "results/should_i_pretrain.html": "results/should_i_pretrain.html"}
DETAIL = re.compile(r"^    (output|log|message): (?!None$)(.+)$")
# Messages of Snakemake's SLURM plugin for a job that SLURM has not accepted.
NOT_SUBMITTED = re.compile(r"^(SLURM sbatch failed\. The error message was|Job submission failed with exception:) '?")
AT_THE_END = "Exiting because a job execution failed."  # then Snakemake repeats the failed jobs
KILLED = "it ended without an error message, most likely killed: for want of memory, by a scheduler or by hand"

Job = tuple[str, str]  # rule and outputs


def print_end(logs: Sequence[Path], *, failed: bool) -> None:
    """Print the files that the jobs of a workflow made, its failed jobs, and where to look next."""
    files = made(logs)
    if files:
        print(coloured(f"Finished jobs ({len(files)}):", "green", sys.stderr), file=sys.stderr)
        print(*(f"  {name}" for name in files[:MAX_FILES]), sep="\n", file=sys.stderr)
    if len(files) > MAX_FILES:
        print(f"  and {len(files) - MAX_FILES} more", file=sys.stderr)
    if failed:
        headline, _, lines = summary(logs).partition("\n")
        print(f"{AGAIN}\n{coloured(headline, 'red', sys.stderr)}\n{lines}", file=sys.stderr)
    elif files:
        print(f"Look next: {look_next(files, sys.argv[1:])}", file=sys.stderr)


def look_next(files: Sequence[str], arguments: Sequence[str]) -> str:
    """Return where to look at the results of Snakemake with these arguments; a report needs the same ones."""
    pages = [f"{page} in a browser, " for file, page in PAGES.items() if file in files]
    report = shlex.join(["snakemake", "--report", "report.html", *arguments])
    return f"{''.join(pages)}`ssl-core ui` shows the runs, `{report}` makes one page of all results."


def made(logs: Iterable[Path]) -> list[str]:
    """Return the first output of each job that Snakemake's `logs` record as finished."""
    files = []
    for log in logs:
        outputs: dict[str, str] = {}
        details: dict[str, str] = {}
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            detail, finished = STARTED_DETAIL.match(line), FINISHED.match(line)
            if STARTED.match(line):
                details = {}
            elif detail is not None:
                details.setdefault(detail[1], detail[2])
                outputs[details.get("jobid", "")] = details.get("output", "")
            elif finished is not None and outputs.get(finished[1]):
                files.append(outputs[finished[1]])
    return files


def summary(logs: Iterable[Path]) -> str:
    """Return one line per failed job of Snakemake's `logs`, under a headline; empty if none is recorded."""
    lines: dict[str, None] = {}
    for log in logs:
        for (rule, _), details in _failed_jobs(log.read_text(encoding="utf-8", errors="replace")).items():
            lines[_describe(rule, details)] = None
    if not lines:
        return ""
    return "\n".join([f"Failed jobs ({len(lines)}):", *lines])


def _failed_jobs(text: str) -> dict[Job, dict[str, str]]:
    """Return the details of each failed job; a job that succeeded when it was retried is none."""
    before, _, end = text.partition(AT_THE_END)
    jobs: dict[Job, dict[str, str]] = {}
    for job, details in [*_errors(before), *_errors(end)]:
        jobs[job] = {**jobs.get(job, {}), **details}  # Snakemake repeats a failed job without its message
    failed = {job for job, _ in _errors(end)} or set(jobs)
    return {job: details for job, details in jobs.items() if job in failed}


def _errors(text: str) -> Iterator[tuple[Job, dict[str, str]]]:
    """Yield each reported failure: the job and its output, log and message."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        failed = FAILED.match(line)
        if failed is None:
            continue
        details: dict[str, str] = {}
        for detail in lines[number + 1 :]:
            if detail.startswith(("[", "Error in ")):  # the time of the next event; messages may have several lines
                break
            match = DETAIL.match(detail)
            if match is not None:
                details.setdefault(match[1], match[2])
        yield (failed[1], details.get("output", "")), details


def _describe(rule: str, details: dict[str, str]) -> str:
    output = details.get("output", "").split(", ")[0]
    log = details.get("log", "").removesuffix(" (check log file(s) for error details)").split(", ")[0]
    message = details.get("message", "").partition("For further error details see ")[0]
    if NOT_SUBMITTED.match(message):
        return f"  {rule} {output}: {NOT_SUBMITTED.sub('not submitted: ', message)}"
    if not log:
        return f"  {rule} {output}: it has no log"
    reason = error_line(Path(log)) or message or KILLED
    return f"  {rule} {output}: {reason} (log: {log})"


def error_line(log: Path) -> str | None:
    """Return the last error message in a stage's log, None if the stage was killed or did not start."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1].removesuffix(f" (log: {log})") if errors else None
