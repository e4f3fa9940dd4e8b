"""Cost of the workflow itself: a dry run, a run with nothing to do, and the overhead of each job.

Runs a copy of the project in which `ssl-core` is replaced by a script that writes a stage's outputs at once, so that
only Snakemake and the rules take time. Wall-clock, median of the repeats; "bare" is Snakemake with an empty
Snakefile.

    python benchmarks/workflow.py --output workflow.json
"""

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.workflow.conftest import CONFIG, Project, make_project  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--experiments", type=int, default=20, help="of the run that measures the cost of a job")
    parser.add_argument("--large", type=int, nargs=2, default=(500, 10), help="experiments and evaluations; 0 0: none")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    about = machine.describe()
    with tempfile.TemporaryDirectory(prefix="ssl-core-benchmark-") as folder:
        seconds = measure(Path(folder), arguments.repeats, arguments.experiments, arguments.large)
    for name, value in seconds.items():
        print(f"{name:<32}{value:>8.2f} s")
    machine.write(arguments.output, about, {"seconds": seconds})


def measure(folder: Path, repeats: int, count: int, large: Sequence[int]) -> dict[str, float]:
    """Return seconds by name."""
    (folder / "bare").mkdir()
    (folder / "bare" / "Snakefile").write_text("rule all:\n    input: []\n")
    (folder / "copy").mkdir()
    project = make_project(ROOT, folder / "copy")
    seconds = {"bare snakemake": median(lambda: bare(folder / "bare"), repeats)}
    seconds["dry run, everything to do"] = median(lambda: finish(project, "-n"), repeats)
    first = timed(lambda: finish(project))
    seconds["nothing to do"] = median(lambda: finish(project), repeats)
    config: dict[str, Any] = copy.deepcopy(CONFIG)
    for number in range(count):
        config["experiments"][f"more{number}"] = copy.deepcopy(config["experiments"]["first"])
    project.configure(config)
    seconds[f"dry run, {3 * count} jobs to do"] = median(lambda: finish(project, "-n"), repeats)
    more = timed(lambda: finish(project))
    seconds["a run of 9 jobs"], seconds[f"a run of {3 * count + 1} jobs"] = first, more
    seconds["each job"] = (more - seconds["nothing to do"]) / (3 * count + 1)
    experiments, evaluations = large
    if experiments:
        base = CONFIG["experiments"]["first"]
        config["experiments"] = {f"large{number}": copy.deepcopy(base) for number in range(experiments)}
        config["evaluations"] = {f"knn{k}": {"protocol": "knn", "k": k} for k in range(1, evaluations + 1)}
        del config["sweeps"]
        project.configure(config)
        seconds[f"dry run of {experiments} x {evaluations}"] = timed(lambda: finish(project, "-n"))
    return seconds


def finish(project: Project, *arguments: str) -> None:
    run = project.snakemake(*arguments)
    if run.returncode:
        sys.exit(run.stdout + run.stderr)


def bare(folder: Path) -> None:
    subprocess.run(["snakemake", "--cores", "2"], cwd=folder, check=True, capture_output=True)


def median(work: Any, repeats: int) -> float:
    return statistics.median(timed(work) for _ in range(repeats))


def timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
