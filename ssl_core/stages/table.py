"""The table of results: a row an experiment and data set, a group of columns an evaluation and its protocol.

Writes a CSV for programs and, beside it, one HTML page for people that needs no network.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_core.files import write_text
from ssl_core.report.page import as_html
from ssl_core.report.results import (
    Grid,
    Reported,
    Row,
    Seeds,
    baselines,
    collect,
    groups_of,
    headlines,
    load,
    parameters_of,
)


def run(
    results: Sequence[Path],
    output: Path,
    *,
    grid: Grid | None = None,
    seeds: Seeds | None = None,
    reported: Reported | None = None,
) -> None:
    """Write `output` (.csv) and the same as .html; a sweep gives its `grid`, whose keys become columns.

    `seeds` says which experiments are one but for their seed, and `reported` which numbers to set beside the measured
    ones. Raises ValueError for a file that is no evaluation, and for two that claim the same place.
    """
    found = [(path, load(path)) for path in results]
    rows = collect(found, grid=grid or {}, seeds=seeds or {}, reported=reported or {})
    write_text(output, as_csv(rows, reported or {}))
    write_text(output.with_suffix(".html"), as_html(rows, title=f"Sweep {output.stem}" if grid else "Results"))


def as_csv(rows: Sequence[Row], reported: Reported) -> str:
    """Return the wide table; percentages are 0-100, what was not measured is empty.

    Experiments with seeds have a row of means, with standard deviations beside them, and below it one for each seed.
    """
    parameters, repeated = parameters_of(rows), any(row.seeds for row in rows)
    all_rows = [each for row in rows for each in (row, *row.runs(reported))]
    sourced = any(row.reported for row in all_rows)
    columns = [column for group in groups_of(rows) for column in _columns(rows, all_rows, group, repeated)]
    lines: list[list[Any]] = [["experiment", "dataset", *(["seeds"] if repeated else []), *parameters]]
    lines[0] += [" ".join(filter(None, column)) for column in columns] + (["source"] if sourced else [])
    for row in all_rows:
        line: list[Any] = [row.experiment, row.dataset]
        line += [" ".join(map(str, row.seeds.values()))] if repeated else []
        line += [row.values.get(name, "") for name in parameters]
        line += [_cell(row, *column) for column in columns]
        lines.append(line + ([row.reported.get("source", "")] if sourced else []))
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()


def _columns(
    rows: Sequence[Row], all_rows: Sequence[Row], group: str, repeated: bool
) -> list[tuple[str, str, str, str]]:
    """List a group's (group, source, metric, what): the backbone's, headline first, the baselines', reported."""
    results = [result for row in rows for result in row.results.get(group, ())]
    main = headlines(rows, group)[0]
    found = {name for result in results for name, value in result["metrics"].items() if isinstance(value, int | float)}
    metrics = sorted(found, key=lambda metric: (metric != main, metric))
    numbers = [("", metric) for metric in metrics] + [(baseline, main) for baseline in baselines(rows, group)]
    columns = [(group, *number, what) for number in numbers for what in (("", "sd") if repeated else ("",))]
    if any(row.claim(group) is not None for row in all_rows):
        columns.append((group, "reported", main, ""))
    return columns


def _cell(row: Row, group: str, source: str, metric: str, what: str) -> float | None:
    if source == "reported":
        return row.claim(group)
    summary = row.summary(group, source, metric)
    number = summary and (summary.deviation if what else summary.mean)
    return None if number is None else _rounded(number)


def _rounded(number: float) -> float:
    """Keep hundredths, or three digits of what is smaller than one."""
    return round(number, 2) if abs(number) >= 1 else float(f"{number:.3g}")
