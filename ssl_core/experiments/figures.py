"""The section `figures`: a figure of results/figures/ by kind, and the files that it is drawn from.

Torch-free, because each dry run lists these files. `stages/figure.py` draws.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from ssl_core.config import Strict, nearest, parse

Series = dict[str, tuple[str, ...]]  # label -> experiments


class Figure(Strict):
    """A figure; the kinds below say what it shows and from which experiments."""

    reads_json: ClassVar[bool] = True  # whether it reads the JSON of the evaluation, else its pictures.npz
    title: str

    def experiments(self) -> list[str]:
        """Return the experiments that are shown."""
        return []

    def evaluations(self) -> list[str]:
        """Return the evaluations that are shown of each experiment."""
        return [value for key, value in dict(self).items() if key.startswith("evaluation")]

    def files(self) -> list[str]:
        """Return the files below results/ that the figure is drawn from."""
        names = [f"{name}.json" if self.reads_json else f"{name}/pictures.npz" for name in self.evaluations()]
        return [f"{experiment}/{name}" for experiment in self.experiments() for name in names]


class Lines(Figure):
    """A metric of an evaluation over a setting: a line per series."""

    draw: Literal["lines"] = "lines"
    evaluation: str
    metric: str | None = None  # default: the evaluation's headline
    series: Series
    # The place of the setting in pretrain.json, such as resolved.method.alpha or resolved.method.area.0, or its values
    # in the order of each series.
    x: str | tuple[float, ...]
    x_label: str

    @model_validator(mode="after")
    def _as_many_values(self) -> Self:
        for label, names in self.series.items():
            if not isinstance(self.x, str) and len(names) != len(self.x):
                raise ValueError(f"series '{label}' has {len(names)} experiments, x {len(self.x)} values: give as many")
        return self

    def experiments(self) -> list[str]:
        return _all_of(self.series)

    def files(self) -> list[str]:
        settings = [f"{experiment}/pretrain.json" for experiment in self.experiments()]
        return super().files() + (settings if isinstance(self.x, str) else [])


class Seeds(Figure):
    """Several settings side by side: a point per seed, and the paired difference from the first setting."""

    draw: Literal["seeds"] = "seeds"
    measures: tuple[str, ...] = Field(min_length=1)  # evaluations, or metrics of them: [linear, metrics.uniformity]
    series: Series  # setting -> its experiments, in the same order of seeds

    @model_validator(mode="after")
    def _as_many_seeds(self) -> Self:
        counts = {label: len(names) for label, names in self.series.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"series have {counts} experiments: give one per seed, as many in each")
        return self

    def experiments(self) -> list[str]:
        return _all_of(self.series)

    def evaluations(self) -> list[str]:
        return list(dict.fromkeys(measure.partition(".")[0] for measure in self.measures))


class History(Figure):
    """A column of history.csv over the epochs: a line per experiment."""

    draw: Literal["history"] = "history"
    column: str
    series: dict[str, str]  # label -> experiment

    def experiments(self) -> list[str]:
        return list(self.series.values())

    def files(self) -> list[str]:
        return [f"{experiment}/history.csv" for experiment in self.experiments()]


class Costs(Figure):
    """The headline of an evaluation over the hours of pre-training: a point per experiment."""

    draw: Literal["costs"] = "costs"
    evaluation: str
    series: dict[str, str]

    def experiments(self) -> list[str]:
        return list(self.series.values())

    def files(self) -> list[str]:
        return super().files() + [f"{experiment}/pretrain.json" for experiment in self.experiments()]


class Plane(Figure):
    """Intra-class alignment and uniformity (Shi et al.): a disc per network, an arrow to the next one of its series.

    The disc's area grows with the number of parameters; its colour is the headline of `evaluation`.
    """

    draw: Literal["plane"] = "plane"
    evaluation_metrics: str  # of the protocol `metrics`
    evaluation: str
    series: Series

    def experiments(self) -> list[str]:
        return _all_of(self.series)

    def files(self) -> list[str]:
        return super().files() + [f"{experiment}/backbone.safetensors" for experiment in self.experiments()]


class Points(Figure):
    """The t-SNE of several experiments side by side, or that of images with two augmented copies (`triangles`)."""

    reads_json: ClassVar[bool] = False

    draw: Literal["points"] = "points"
    shows: Literal["tsne", "triangles"] = "tsne"
    evaluation: str  # of the protocol `pictures`
    series: dict[str, str]
    columns: PositiveInt = 3

    def experiments(self) -> list[str]:
        return list(self.series.values())


class Neighbours(Figure):
    """Training images under each policy of `query_views` and their nearest neighbours (ReSSL, Figure 2)."""

    reads_json: ClassVar[bool] = False

    draw: Literal["neighbours"] = "neighbours"
    evaluation: str  # of the protocol `pictures` with `query_views`
    experiment: str

    def experiments(self) -> list[str]:
        return [self.experiment]


KINDS: Mapping[str, type[Figure]] = {
    "lines": Lines,
    "seeds": Seeds,
    "history": History,
    "costs": Costs,
    "plane": Plane,
    "points": Points,
    "neighbours": Neighbours,
}


def read(section: Mapping[str, Any], place: str) -> Any:
    """Return the typed section of a figure; its first mistake is a one-line `ValueError` with the key's `place`."""
    return parse(KINDS[section["draw"]], section, place)


def check(figures: Mapping[str, Any], experiments: Mapping[str, Any], evaluations: Iterable[str]) -> None:
    """Raise a one-line `ValueError` for the first figure of an experiment or evaluation that does not exist."""
    evaluations = list(evaluations)
    for name, section in figures.items():
        figure = read(section, f"figures.{name}")
        for kind, used, known in (
            ("experiment", figure.experiments(), experiments),
            ("evaluation", figure.evaluations(), evaluations),
        ):
            for one in used:
                if one not in known:
                    raise ValueError(f"figures.{name}: there is no {kind} '{one}'{nearest(one, known)}")
        for file in figure.files():
            experiment, _, rest = file.partition("/")
            if rest in ("pretrain.json", "history.csv") and "weights" in experiments[experiment]:
                raise ValueError(f"figures.{name}: '{experiment}' was trained elsewhere and has no {rest}")


def pairs(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Iterate over the experiments and evaluations that figures need."""
    for name, section in figures.items():
        figure = read(section, f"figures.{name}")
        for experiment in figure.experiments():
            for evaluation in figure.evaluations():
                yield experiment, evaluation


def _all_of(series: Series) -> list[str]:
    experiments = []
    for names in series.values():
        experiments += names
    return list(dict.fromkeys(experiments))
