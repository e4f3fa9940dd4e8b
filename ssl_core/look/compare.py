"""Reported numbers beside measured ones, as text for a terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_core.experiments import sweeps
from ssl_core.report.results import Summary, headline, read_result, summarise, value

HEADER = ("experiment", "evaluation", "reported", "measured", "difference", "protocol", "source")
RIGHT = range(2, 5)  # columns of numbers


def run(config: Mapping[str, Any], folder: Path) -> str:
    """Return one line per reported number; "not run" if `folder` has no result for it.

    Raises `ValueError` if the configuration reports nothing, and for a file that is not an evaluation.
    """
    reported = config.get("reported") or {}
    if not reported:
        raise ValueError("nothing to compare: add published numbers in the section `reported` of the configuration")
    runs = sweeps.seeds(sweeps.before_seeds(config))
    lines: list[tuple[str, ...]] = [HEADER]
    evaluations = config.get("evaluations") or {}
    for name, entry in reported.items():
        for key, claim in entry["results"].items():
            evaluation, metric = sweeps.split_claim(key, evaluations)
            paths = [folder / run / f"{evaluation}.json" for run in runs.get(name, [name])]
            lines.append((name, key, *_numbers(claim, metric, paths), entry["source"]))
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return "\n".join(_aligned(line, widths) for line in lines)


def _numbers(claim: float, metric: str | None, paths: Sequence[Path]) -> tuple[str, str, str, str]:
    """Return the reported number, the measured one, their difference and the protocol with its metric."""
    results = [read_result(path) for path in paths if path.is_file()]
    summary = summarise(value(result, "", metric or headline(result)) for result in results)
    if summary is None:
        return (f"{claim:.1f}", "not run", "", "")
    protocol = f"{results[0]['protocol']} {metric or headline(results[0])}"
    difference = f"{round(summary.mean - claim, 1) + 0.0:+.1f}"  # no "-0.0"
    return (f"{claim:.1f}", _measured(summary, len(paths)), difference, protocol)


def _measured(summary: Summary, seeds: int) -> str:
    if seeds == 1:
        return f"{summary.mean:.1f}"
    deviation = "" if summary.deviation is None else f" ± {summary.deviation:.1f}"
    count = f"{summary.n}" if summary.n == seeds else f"{summary.n} of {seeds}"
    return f"{summary.mean:.1f}{deviation} ({count})"


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = []
    for column, (cell, width) in enumerate(zip(line, widths, strict=True)):
        cells.append(cell.rjust(width) if column in RIGHT else cell.ljust(width))
    return "  ".join(cells).rstrip()
