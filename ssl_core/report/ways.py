"""Ways to start a network before fine-tuning: accuracies by share of labels and seed, differences, the verdict.

Torch-free. Differences are paired: both networks have the seed, and so the labelled images and the views, in common.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from scipy.stats import sem, t

from ssl_core.report.results import Result, Summary, headline, signed, summarise, value

CONFIDENCE = 0.95
SCRATCH, PIXELS = "scratch", "pixels"  # the baselines of `pretrained`
TITLES = {
    SCRATCH: "from scratch",
    "given": "given weights",
    "pretrained": "pre-trained here",
    "continued": "pre-trained here from given weights",
    "distilled": "distilled here",
    PIXELS: "raw pixels",
}
Share = float  # of the labels, 0 to 1
BySeed = dict[int, float]


@dataclass
class Way:
    """One way to start a network: its accuracies in percent, and the seconds of its trainings."""

    name: str
    accuracies: dict[Share, BySeed] = field(default_factory=dict)
    tunings: dict[Share, BySeed] = field(default_factory=dict)  # seconds
    pretraining: Summary | None = None  # seconds of one seed
    sources: Mapping[str, float] = field(default_factory=dict)  # seconds of each network that it starts from

    @property
    def title(self) -> str:
        """The name for readers."""
        return TITLES[self.name]

    def accuracy(self, share: Share) -> Summary | None:
        """Summarise the accuracy over seeds."""
        return summarise(self.accuracies.get(share, {}).values())

    def tuning(self, share: Share) -> Summary | None:
        """Summarise the seconds of fine-tuning over seeds."""
        return summarise(self.tunings.get(share, {}).values())


class Difference(NamedTuple):
    """The mean paired difference in points, with its 95 % interval; None for a single pair."""

    mean: float
    interval: tuple[float, float] | None
    seeds: tuple[int, ...]


def collect(results: Sequence[Result], tunings: Sequence[Any], pretrainings: Sequence[Any], plan: Any) -> list[Way]:
    """Return the ways that have results, with `scratch` first and `pixels` last.

    `tunings` are the contents of files cost.json, `pretrainings` of files pretrain.json.
    """
    seconds = {(tuning["experiment"], tuning["evaluation"]): tuning["seconds"] for tuning in tunings}
    costs = {report["experiment"]: report["cost"]["seconds"] for report in pretrainings}
    ways = {name: Way(name) for name in TITLES}
    way_of = {run: name for name, section in plan["ways"].items() for run in section["experiments"]}
    for result in results:
        way = way_of[result["experiment"]]
        _add(ways[way], result, "", seconds)
        if way == "pretrained":
            _add(ways[SCRATCH], result, "untrained", seconds)
            _add(ways[PIXELS], result, "pixels", {})
    for name, section in plan["ways"].items():
        ways[name].pretraining = summarise(costs.get(run) for run in section["experiments"])
        ways[name].sources = {source: costs[source] for source in section["sources"] if source in costs}
    return [way for way in ways.values() if way.accuracies]


def _add(way: Way, result: Result, source: str, seconds: Mapping[tuple[str, str], float]) -> None:
    """Add the accuracy of a network of `result`, the pre-trained one or a baseline, and the cost of its fine-tuning."""
    share, seed = result["hyperparameters"]["fraction"], result["seed"]
    accuracy = value(result, source, headline(result))
    if accuracy is None:
        return
    by_seed = way.accuracies.setdefault(share, {})
    if seed in by_seed:
        raise ValueError(
            f"evaluations.{result['evaluation']}: a second one with {percent(share)} of the labels and seed {seed}: "
            "change or remove one"
        )
    by_seed[seed] = accuracy
    run = (result["experiment"], result["evaluation"])
    if run in seconds:
        way.tunings.setdefault(share, {})[seed] = seconds[run]


def difference(way: Way, other: Way, share: Share) -> Difference | None:
    """Return the paired difference `way` minus `other`; None if they have no seed in common."""
    first, second = way.accuracies.get(share, {}), other.accuracies.get(share, {})
    seeds = tuple(sorted(first.keys() & second.keys()))
    if not seeds:
        return None
    return paired_difference([first[seed] for seed in seeds], [second[seed] for seed in seeds], seeds)


def paired_difference(first: Sequence[float], second: Sequence[float], seeds: Sequence[int]) -> Difference:
    """Return the mean of `first` minus `second` with Student's interval of len(seeds) - 1 degrees of freedom."""
    differences = [one - other for one, other in zip(first, second, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Difference(mean, None, tuple(seeds))
    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1) * sem(differences))
    return Difference(mean, (mean - reach, mean + reach), tuple(seeds))


# The verdict

PHRASES = {  # at the start of the sentence, later
    "better": ("Pre-training here is better than training from scratch", "it is better"),
    "worse": ("Pre-training here is worse than training from scratch", "it is worse"),
    "not shown": (
        "A difference between pre-training here and training from scratch is not shown",
        "a difference is not shown",
    ),
    "one seed": ("Pre-training here and training from scratch were measured with one seed only", "one seed only"),
}


def outcome(difference: Difference) -> str:
    """Return whether the interval is above zero, below it or holds it; a single seed has none."""
    if difference.interval is None:
        return "one seed"
    low, high = difference.interval
    if low > 0:
        return "better"
    return "worse" if high < 0 else "not shown"


def verdict(differences: Mapping[Share, Difference], seeds: Sequence[int]) -> str:
    """Return one sentence on `pretrained` minus `scratch` at each share; `seeds` are those that should be there."""
    groups: dict[str, list[Share]] = {name: [] for name in PHRASES}
    for share, measured in sorted(differences.items()):
        groups[outcome(measured)].append(share)
    clauses: list[str] = []
    for name, shares in groups.items():
        if shares:
            places = [f"at {percent(share)} {_numbers(differences[share])}" for share in shares]
            if not clauses:
                places[0] = places[0].replace("%", "% of the labels", 1)
            clauses.append(f"{PHRASES[name][bool(clauses)]} {_listed(places)}")
    clauses += _remarks(differences, seeds)
    return "; ".join(clauses) + "."


def _numbers(difference: Difference) -> str:
    """Return "(+1.2 points, −0.3 to +2.7)"."""
    points = f"{signed(difference.mean)} points"
    if difference.interval is None:
        return f"({points})"
    low, high = map(signed, difference.interval)
    return f"({points}, {low} to {high})"


def _remarks(differences: Mapping[Share, Difference], seeds: Sequence[int]) -> list[str]:
    """Return how the intervals were made, and what is missing."""
    counts = sorted({len(one.seeds) for one in differences.values() if one.interval})
    remarks = []
    if counts:
        number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        remarks.append(f"95 % intervals, paired over {number} seeds")
    if len(counts) == 0 or any(one.interval is None for one in differences.values()):
        remarks.append("an interval needs two seeds or more")
    for share, one in sorted(differences.items()):
        missing = [str(seed) for seed in seeds if seed not in one.seeds]
        if missing:
            remarks.append(f"no result of seed {_listed(missing)} at {percent(share)}")
    return remarks


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def percent(share: Share) -> str:
    """Return a share as "10 %"."""
    return f"{100 * share:g} %"
