"""The evaluations' JSON as rows: one per experiment and data set, with mean and standard deviation over seeds.

Torch-free. A number is stored under the full name of its protocol (`linear/v1`), so that numbers of different
protocols never share a column.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ssl_core.files import read_json

BASELINES = ("untrained", "pixels", "float32")
REQUIRED = ("experiment", "evaluation", "protocol", "dataset", "metrics")
Result = Mapping[str, Any]  # the content of one JSON
Grid = Mapping[str, Mapping[str, Any]]  # experiment -> the sweep's values, `{"method.temperature": 0.1}`
Seeds = Mapping[str, Mapping[str, int]]  # experiment with seeds -> its runs -> their seed
Settings = Mapping[str, Mapping[str, Any]]  # experiment -> its method, backbone and epochs
Reported = Mapping[str, Mapping[str, Any]]  # experiment -> source, results, and optional notes


class Summary(NamedTuple):
    """Mean and standard deviation of the sample (divided by n - 1; None for one run) over the `n` runs."""

    mean: float
    deviation: float | None
    n: int


class Priced(NamedTuple):
    """The accuracy of an experiment under one evaluation, and its cost: seconds of pre-training, ms per image."""

    name: str
    cost: Summary
    accuracy: Summary


@dataclass
class Row:
    """One experiment on one data set: for each group of columns, the JSON of its evaluations, one per seed."""

    experiment: str
    dataset: str
    values: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)  # of its runs; empty for a single run
    reported: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    results: dict[str, list[Result]] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Any]:
        """The settings, and the values of a sweep."""
        return {**self.settings, **self.values}

    def summary(self, group: str, source: str, metric: str) -> Summary | None:
        """Summarise a metric over the runs, of a baseline or (the empty source) of the pre-trained backbone."""
        return summarise(value(result, source, metric) for result in self.results.get(group, ()))

    def gain(self, group: str) -> Summary | None:
        """Summarise the headline metric of each run minus that of the run's untrained network."""
        gains = []
        for result in self.results.get(group, ()):
            metric = headline(result)
            pretrained, untrained = value(result, "", metric), value(result, "untrained", metric)
            if pretrained is not None and untrained is not None:
                gains.append(pretrained - untrained)
        return summarise(gains)

    def claim(self, group: str, metric: str | None = None) -> float | None:
        """Return the number that another source reports for a metric of this evaluation, by default its headline."""
        if group not in self.results:
            return None
        first = self.results[group][0]
        claims = self.reported.get("results", {})
        if metric is None or metric == headline(first):
            return claims.get(first["evaluation"])
        return claims.get(f"{first['evaluation']}.{metric}")

    def runs(self, reported: Reported) -> "list[Row]":
        """Return one row per seed that has results."""
        rows = []
        for name, seed in self.seeds.items():
            row = Row(name, self.dataset, self.values, {name: seed}, reported.get(name, {}), self.settings)
            for group, results in self.results.items():
                of_run = [result for result in results if result["experiment"] == name]
                if of_run:
                    row.results[group] = of_run
            if row.results:
                rows.append(row)
        return rows


def read_result(path: Path) -> Result:
    """Read the JSON of an evaluation; raise `ValueError` if it is another file."""
    result = read_json(path)
    if not isinstance(result, dict):
        raise ValueError(f"{path} is not an evaluation: expected a JSON object; delete it and run again")
    missing = [key for key in REQUIRED if key not in result]
    if missing:
        raise ValueError(f"{path} is not an evaluation: it lacks {', '.join(missing)}; delete it and run again")
    return result


def read_settings(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Read method, backbone and epochs of each experiment from its pretrain.json."""
    settings = {}
    for path in paths:
        report = read_json(path)
        resolved = report["resolved"]
        settings[report["experiment"]] = {
            "method": resolved["method"]["name"],
            "backbone": resolved["backbone"]["name"],
            "epochs": resolved["training"]["epochs"],
        }
    return settings


def collect(
    results: Sequence[tuple[Path, Result]],
    *,
    grid: Grid,
    seeds: Seeds,
    reported: Reported,
    settings: Settings | None = None,
) -> list[Row]:
    """Sort evaluations into rows, ordered by the grid's values, then by name.

    Raises `ValueError` for two results of one experiment, data set and group of columns.
    """
    experiment_of: dict[str, str] = {}
    for name, runs in seeds.items():
        experiment_of.update(dict.fromkeys(runs, name))
    rows: dict[tuple[str, str], Row] = {}
    for path, result in results:
        run: str = result["experiment"]
        name, dataset = experiment_of.get(run, run), dataset_of(result)
        new = Row(name, dataset, grid.get(name, {}), seeds.get(name, {}), reported.get(name, {}))
        new.settings = (settings or {}).get(run, {})
        row = rows.setdefault((name, dataset), new)
        group = group_of(result)
        in_group = row.results.setdefault(group, [])
        if any(other["experiment"] == run for other in in_group):
            raise ValueError(f"{path}: a second {group} of {run} on {dataset}: give each evaluation its own name")
        in_group.append(result)
    for row in rows.values():
        if row.seeds:
            _sort_by_seed(row)
    return sorted(rows.values(), key=_order)


def _sort_by_seed(row: Row) -> None:
    position = {run: index for index, run in enumerate(row.seeds)}
    for results in row.results.values():
        results.sort(key=lambda result: position[result["experiment"]])


def summarise(values: Iterable[float | None]) -> Summary | None:
    """Summarise the numbers among `values`; None if there are none."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Summary(statistics.fmean(numbers), deviation, len(numbers))


def value(result: Result, source: str, metric: str) -> float | None:
    """Return a metric of a baseline or (the empty source) of the pre-trained backbone; None if it is no number."""
    metrics = result.get("baselines", {}).get(source, {}) if source else result["metrics"]
    number = metrics.get(metric)
    return number if isinstance(number, int | float) else None


def headline(result: Result) -> str:
    """Return the main metric of an evaluation: its own `headline`, else top1, else the first name that ends in top1."""
    if "headline" in result:
        return result["headline"]
    metrics = result["metrics"]
    if "top1" in metrics:
        return "top1"
    similar = sorted(name for name in metrics if name.endswith("top1"))
    return similar[0] if similar else "top1"


def group_of(result: Result) -> str:
    """Return the name of an evaluation's columns: its protocol, with its own name if that differs."""
    name, protocol = result["evaluation"], result["protocol"]
    return protocol if protocol.split("/")[0] == name else f"{name} ({protocol})"


def groups_of(rows: Sequence[Row]) -> list[str]:
    """Return all groups of columns: those with baselines, in percent, before others such as costs."""
    groups: set[str] = set()
    for row in rows:
        groups.update(row.results)
    return sorted(groups, key=lambda group: (not baselines(rows, group), group))


def baselines(rows: Sequence[Row], group: str) -> list[str]:
    """Return the baselines that any result of a group has."""
    names: set[str] = set()
    for result in _results_of(rows, group):
        names.update(result.get("baselines") or ())
    return [name for name in BASELINES if name in names]


def headlines(rows: Sequence[Row], group: str) -> list[str]:
    """Return the headline metrics of a group, more than one if its evaluations measured different things."""
    return list(dict.fromkeys(headline(result) for result in _results_of(rows, group)))


def priced(rows: Sequence[Row]) -> dict[str, list[Priced]]:
    """Return, for each evaluation in percent, the experiments with a measured cost, if there are two or more."""
    by_group: dict[str, list[Priced]] = {}
    for row in rows:
        seconds = _seconds(row)
        if seconds is None:
            continue
        for group, results in row.results.items():
            accuracy = row.summary(group, "", headline(results[0]))
            if accuracy and "untrained" in baselines([row], group):
                by_group.setdefault(group, []).append(Priced(row.experiment, seconds, accuracy))
    return {group: by_group[group] for group in groups_of(rows) if len(by_group.get(group, ())) > 1}


def latencies(rows: Sequence[Row]) -> dict[str, list[Priced]]:
    """Return, for each evaluation of 8-bit networks, these and their originals with accuracy and latency."""
    by_group: dict[str, list[Priced]] = {}
    for row in rows:
        for group in row.results:
            for source, kind in (("", "int8"), ("float32", "float32")):
                accuracy = row.summary(group, source, "top1")
                milliseconds = row.summary(group, source, "latency_ms")
                if "float32" in baselines([row], group) and accuracy and milliseconds:
                    by_group.setdefault(group, []).append(Priced(f"{row.experiment} {kind}", milliseconds, accuracy))
    return by_group


def parameters_of(rows: Sequence[Row]) -> list[str]:
    """Return the names of the settings and of the values that a sweep varies."""
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row.parameters))
    return list(names)


def dataset_of(result: Result) -> str:
    """Return the name of the data set, with the subset if there is one."""
    dataset = result["dataset"]
    if isinstance(dataset, str):
        return dataset
    subset = dataset.get("subset")
    if not subset:
        return dataset["name"]
    return f"{dataset['name']} ({subset['images']} images, seed {subset['seed']})"


def signed(number: float) -> str:
    """Return a difference with its sign and one decimal."""
    return f"{round(number, 1) + 0.0:+.1f}".replace("-", "−")  # no "-0.0"


def _results_of(rows: Sequence[Row], group: str) -> list[Result]:
    return [result for row in rows for result in row.results.get(group, ())]


def _seconds(row: Row) -> Summary | None:
    """Return the time of pre-training that a cost evaluation recorded."""
    for group, results in row.results.items():
        if results[0]["protocol"].startswith("cost/"):
            seconds = row.summary(group, "", "seconds")
            if seconds is not None:
                return seconds
    return None


def _order(row: Row) -> tuple[Any, ...]:
    return [_numbers_first(value) for value in row.values.values()], row.experiment, row.dataset


def _numbers_first(value: Any) -> tuple[bool, Any]:
    if isinstance(value, int | float):
        return (False, value)
    return (True, str(value))
