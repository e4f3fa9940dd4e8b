"""The table of results as CSV."""

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

from ssl_core.report.results import Reported, Row, baselines, groups_of, headlines, parameters_of


class Column(NamedTuple):
    """A column of numbers: of the pre-trained backbone (source ""), of a baseline, or `reported`."""

    group: str
    source: str
    metric: str
    statistic: str  # "" for the mean, or "sd"

    @property
    def title(self) -> str:
        """The parts that are not empty, separated by spaces."""
        return " ".join(filter(None, self))


def as_csv(rows: Sequence[Row], reported: Reported) -> str:
    """Return the wide table. Percentages are 0-100; a cell without a measurement is empty.

    An experiment with seeds has a row of means, with standard deviations in columns beside them, and below it one row
    per seed.
    """
    parameters = parameters_of(rows)
    has_seeds = any(row.seeds for row in rows)
    all_rows: list[Row] = []
    for row in rows:
        all_rows += [row, *row.runs(reported)]
    has_sources = any(row.reported for row in all_rows)
    columns: list[Column] = []
    for group in groups_of(rows):
        columns += _columns(rows, all_rows, group, has_seeds)

    names = ["experiment", "dataset", *(["seeds"] if has_seeds else []), *parameters]
    header = [*names, *(column.title for column in columns), *(["source"] if has_sources else [])]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, header, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in all_rows:
        seeds = " ".join(map(str, row.seeds.values()))
        line = {**row.parameters, "experiment": row.experiment, "dataset": row.dataset, "seeds": seeds}
        line |= {column.title: _number(row, column) for column in columns}
        writer.writerow({**line, "source": row.reported.get("source", "")})
    return buffer.getvalue()


def _columns(rows: Sequence[Row], all_rows: Sequence[Row], group: str, has_seeds: bool) -> list[Column]:
    """Return a group's columns: all metrics of the backbone, headline first, then the baselines, then reported ones."""
    main = headlines(rows, group)[0]
    metrics = _metrics(rows, group)
    metrics.sort(key=lambda metric: (metric != main, metric))
    sources = [("", metric) for metric in metrics] + [(baseline, main) for baseline in baselines(rows, group)]
    columns = []
    for source, metric in sources:
        columns.append(Column(group, source, metric, ""))
        if has_seeds:
            columns.append(Column(group, source, metric, "sd"))
    for metric in metrics:
        if any(row.claim(group, metric) is not None for row in all_rows):
            columns.append(Column(group, "reported", metric, ""))
    return columns


def _metrics(rows: Sequence[Row], group: str) -> list[str]:
    """Return the names of the metrics that are numbers."""
    names: set[str] = set()
    for row in rows:
        for result in row.results.get(group, ()):
            names.update(name for name, value in result["metrics"].items() if isinstance(value, int | float))
    return list(names)


def _number(row: Row, column: Column) -> float | None:
    if column.source == "reported":
        return row.claim(column.group, column.metric)
    summary = row.summary(column.group, column.source, column.metric)
    if summary is None:
        return None
    number = summary.deviation if column.statistic == "sd" else summary.mean
    return None if number is None else _rounded(number)


def _rounded(number: float) -> float:
    """Keep two decimals, or three digits of a number below one."""
    return round(number, 2) if abs(number) >= 1 else float(f"{number:.3g}")
