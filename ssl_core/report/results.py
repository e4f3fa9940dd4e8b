"""What the evaluations' JSON say together: a row an experiment and data set, seeds as mean and standard deviation.

Torch-free. A number is found under the full name of its protocol (`linear/v1`), so that one measured otherwise, online
or on cached features, never passes for it.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ssl_core.files import read_json

BASELINES = ("untrained", "pixels")
REQUIRED = ("experiment", "evaluation", "protocol", "dataset", "metrics")
Result = Mapping[str, Any]  # the content of one JSON
Grid = Mapping[str, Mapping[str, Any]]  # experiment -> the sweep's values, `{"method.temperature": 0.1}`
Seeds = Mapping[str, Mapping[str, int]]  # experiment with seeds -> the runs it stands for -> their seed
Reported = Mapping[str, Mapping[str, Any]]  # experiment -> source, results and what else is said


class Summary(NamedTuple):
    """Mean and standard deviation of the sample (divided by n - 1; None for one run) over the `n` runs."""

    mean: float
    deviation: float | None
    n: int


class Priced(NamedTuple):
    """What an experiment reached under one evaluation, and how long it was pre-trained."""

    name: str
    seconds: Summary
    accuracy: Summary


@dataclass
class Row:
    """One experiment on one data set: by the name of their columns, the JSON of its evaluations, one a seed."""

    experiment: str
    dataset: str
    values: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)  # of its runs; empty where it is one itself
    reported: Mapping[str, Any] = field(default_factory=dict)
    results: dict[str, list[Result]] = field(default_factory=dict)

    def summary(self, group: str, source: str, metric: str) -> Summary | None:
        """Summarise a metric over the runs; the empty source is the pre-trained backbone, others are baselines."""
        return summarise(value(result, source, metric) for result in self.results.get(group, ()))

    def gain(self, group: str) -> Summary | None:
        """Summarise what pre-training brought: each run's headline minus that of its own untrained network."""
        pairs = [
            (value(result, "", headline(result)), value(result, "untrained", headline(result)))
            for result in self.results.get(group, ())
        ]
        return summarise(after - before for after, before in pairs if after is not None and before is not None)

    def claim(self, group: str) -> float | None:
        """Return the number that is reported elsewhere for this evaluation."""
        if group not in self.results:
            return None
        return self.reported.get("results", {}).get(self.results[group][0]["evaluation"])

    def runs(self, reported: Reported) -> "list[Row]":
        """Return a row for each seed."""
        rows = []
        for name, seed in self.seeds.items():
            own = {group: [one for one in all_ if one["experiment"] == name] for group, all_ in self.results.items()}
            found = {group: results for group, results in own.items() if results}
            rows.append(Row(name, self.dataset, self.values, {name: seed}, reported.get(name, {}), found))
        return [row for row in rows if row.results]


def load(path: Path) -> Result:
    """Read an evaluation's JSON; a `ValueError` names a file that is none."""
    result = read_json(path)
    missing = [key for key in REQUIRED if not isinstance(result, dict) or key not in result]
    if missing:
        raise ValueError(f"{path} is no evaluation: it lacks {', '.join(missing)}; delete it and run again")
    return result


def collect(results: Sequence[tuple[Path, Result]], *, grid: Grid, seeds: Seeds, reported: Reported) -> list[Row]:
    """Sort evaluations into rows, by the grid's values, then by name; a `ValueError` names two that claim one place."""
    stands_in: dict[str, str] = {run: name for name, runs in seeds.items() for run in runs}
    rows: dict[tuple[str, str], Row] = {}
    for path, result in results:
        run: str = result["experiment"]
        name, dataset = stands_in.get(run, run), dataset_of(result)
        new = Row(name, dataset, grid.get(name, {}), seeds.get(name, {}), reported.get(name, {}))
        row = rows.setdefault((name, dataset), new)
        group = group_of(result)
        of_group = row.results.setdefault(group, [])
        if any(other["experiment"] == run for other in of_group):
            raise ValueError(f"{path}: a second {group} of {run} on {dataset}: give each evaluation its own name")
        of_group.append(result)
    for row in rows.values():
        for of_group in row.results.values():
            of_group.sort(key=lambda result: list(row.seeds).index(result["experiment"]) if row.seeds else 0)
    return sorted(rows.values(), key=_order)


def summarise(values: Iterable[float | None]) -> Summary | None:
    """Summarise the numbers among `values`; None where there are none."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    return Summary(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


def value(result: Result, source: str, metric: str) -> float | None:
    """Look a number up; the empty source is the pre-trained backbone."""
    metrics = result.get("baselines", {}).get(source, {}) if source else result["metrics"]
    found = metrics.get(metric)
    return found if isinstance(found, int | float) else None


def headline(result: Result) -> str:
    """Name the metric that stands for an evaluation: what it says itself, else top1 or what is like it."""
    metrics = result["metrics"]
    if "headline" in result:
        return result["headline"]
    return "top1" if "top1" in metrics else next((name for name in sorted(metrics) if name.endswith("top1")), "top1")


def group_of(result: Result) -> str:
    """Name an evaluation's columns: its protocol, after its own name if that says something else."""
    name, protocol = result["evaluation"], result["protocol"]
    return protocol if protocol.split("/")[0] == name else f"{name} ({protocol})"


def groups_of(rows: Sequence[Row]) -> list[str]:
    """Name all groups of columns: those with baselines, in percent, before others such as costs."""
    return sorted(
        {group for row in rows for group in row.results}, key=lambda group: (not baselines(rows, group), group)
    )


def baselines(rows: Sequence[Row], group: str) -> list[str]:
    """Name the baselines that stand beside a group's numbers."""
    found = {name for row in rows for result in row.results.get(group, ()) for name in result.get("baselines") or ()}
    return [name for name in BASELINES if name in found]


def headlines(rows: Sequence[Row], group: str) -> list[str]:
    """Name the metrics that stand for a group; more than one where its evaluations measured different things."""
    return list(dict.fromkeys(headline(result) for row in rows for result in row.results.get(group, ())))


def priced(rows: Sequence[Row]) -> dict[str, list[Priced]]:
    """Return, for each evaluation in percent, the experiments whose cost was measured too; two or more."""
    found: dict[str, list[Priced]] = {}
    for row in rows:
        costs = [group for group, results in row.results.items() if results[0]["protocol"].startswith("cost/")]
        seconds = next(filter(None, (row.summary(group, "", "seconds") for group in costs)), None)
        for group in row.results:
            accuracy = row.summary(group, "", headline(row.results[group][0]))
            if seconds and accuracy and baselines([row], group):
                found.setdefault(group, []).append(Priced(row.experiment, seconds, accuracy))
    return {group: found[group] for group in groups_of(rows) if len(found.get(group, ())) > 1}


def parameters_of(rows: Sequence[Row]) -> list[str]:
    """Name what a sweep varies."""
    return list(dict.fromkeys(name for row in rows for name in row.values))


def dataset_of(result: Result) -> str:
    """Name the data set, and the subset if it is one."""
    dataset = result["dataset"]
    if isinstance(dataset, str):
        return dataset
    subset = dataset.get("subset")
    return f"{dataset['name']} ({subset['images']} images, seed {subset['seed']})" if subset else dataset["name"]


def _order(row: Row) -> tuple[Any, ...]:
    numbers_first = [
        (not isinstance(value, int | float), value if isinstance(value, int | float) else str(value))
        for value in row.values.values()
    ]
    return (numbers_first, row.experiment, row.dataset)
