"""The table of results as one HTML page that loads nothing. The markup is in `page.html`."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ssl_core.report.results import (
    BASELINES,
    Result,
    Row,
    Summary,
    baselines,
    groups_of,
    headline,
    headlines,
    latencies,
    parameters_of,
    priced,
    signed,
    value,
)

TEMPLATE = "page.html"
STYLE = "page.css"
# A data set with more evaluations (without seeds, with seeds), which 1280 pixels cannot show side by side, has one line
# per evaluation instead of one group of columns.
MAX_WIDE = (2, 1)
PICTURE_SIDE = 1000  # pixels, of an embedded picture
MISSING = "–"
NOTES = ("source", "epochs", "hours", "hardware", "note")  # of reported numbers


@dataclass(frozen=True)
class Bar:
    """A bar of a percentage with the baselines as marks and the standard deviation as a line."""

    width: float
    marks: dict[str, float]  # baseline -> percent
    deviation: tuple[float, float] | None  # left end and width, in percent


@dataclass(frozen=True)
class Cell:
    """A cell with a number."""

    text: str
    classes: str = ""  # CSS
    value: float | None = None  # for sorting
    deviation: str = ""
    num_runs: int | None = None
    bar: Bar | None = None
    difference: str = ""  # measured minus reported
    source: str | None = None  # of a reported number


@dataclass(frozen=True)
class Line:
    """A line of a table."""

    experiment: str
    words: list[str]  # settings, values of a sweep; evaluation and metric, if they have columns
    cells: list[Cell]
    pictures: list[tuple[str, str]] = field(default_factory=list)  # title, WebP (base64)


@dataclass(frozen=True)
class Table:
    """The results of one data set."""

    dataset: str
    headings: list[tuple[str, str]]  # of columns: text, CSS classes; a click sorts by the column
    lines: list[Line]
    groups: list[tuple[str, str, int]] = field(default_factory=list)  # evaluation, metrics, number of columns
    lead: int = 0  # columns before the first group

    @property
    def has_pictures(self) -> bool:
        """Whether any line has pictures."""
        return any(line.pictures for line in self.lines)


def as_html(rows: Sequence[Row], *, title: str, pictures: Mapping[str, Sequence[Path]] | None = None) -> str:
    """Return the page: one table per data set, an explanation, and the origin of each number.

    `pictures` has the picture files of each experiment, or of each of its seeds.
    """
    datasets = []
    for name in sorted({row.dataset for row in rows}):
        of_dataset = [row for row in rows if row.dataset == name]
        has_seeds = any(row.seeds for row in of_dataset)
        is_wide = len(groups_of(of_dataset)) <= MAX_WIDE[has_seeds]
        table = _wide_table(of_dataset) if is_wide else _long_table(of_dataset)
        _add_pictures(table.lines, of_dataset, pictures or {})
        datasets.append((table, _pictures(of_dataset)))
    reported = [row for row in rows if row.reported]
    return fill_in(
        TEMPLATE,
        title=title,
        datasets=datasets,
        has_seeds=any(row.seeds for row in rows),
        reported=_reported_notes(reported) if reported else None,
        origins=_origins(rows),
    )


def fill_in(template: str, **content: Any) -> str:
    """Fill in a template of this folder; all pages share one style sheet."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(template).render(style=STYLE, **content)


# Tables


def _wide_table(rows: Sequence[Row]) -> Table:
    """Return one line per experiment, with one group of columns per evaluation."""
    parameters, groups = parameters_of(rows), groups_of(rows)
    columns = {group: _columns(rows, group) for group in groups}
    headings = [(name, "") for name in ("experiment", *parameters)]
    group_headings = []
    for group, names in columns.items():
        metrics = " / ".join(map(_words, headlines(rows, group))) if baselines(rows, group) else ""
        group_headings.append((group, metrics, len(names)))
        headings += _number_headings(names)
    lines = []
    for row in rows:
        cells: list[Cell] = []
        for group, names in columns.items():
            cells += _cells(row, group, names)
        lines.append(_line(row, parameters, [], cells))
    return Table(rows[0].dataset, headings, lines, group_headings, 1 + len(parameters))


def _long_table(rows: Sequence[Row]) -> Table:
    """Return one line per experiment and evaluation, for data sets with many evaluations."""
    parameters, groups = parameters_of(rows), groups_of(rows)
    names: set[str] = set()
    for group in groups:
        names.update(_columns(rows, group))
    columns = ["pre-trained", *(name for name in ("gain", *BASELINES, "reported") if name in names)]
    headings = [(name, "") for name in ("experiment", *parameters, "evaluation", "measure")]
    lines = []
    for group in groups:
        for row in rows:
            if group not in row.results:
                continue
            metric = headline(row.results[group][0])
            is_percentage = bool(baselines([row], group))
            shown = columns if is_percentage else [metric, *columns[1:]]  # other numbers have no bar
            lines.append(_line(row, parameters, [group, _words(metric)], _cells(row, group, shown)))
    return Table(rows[0].dataset, headings + _number_headings(columns), lines)


def _line(row: Row, parameters: Sequence[str], words: list[str], cells: list[Cell]) -> Line:
    values = [str(row.parameters.get(name, MISSING)) for name in parameters]
    return Line(row.experiment, [*values, *words], cells)


def _add_pictures(lines: Sequence[Line], rows: Sequence[Row], pictures: Mapping[str, Sequence[Path]]) -> None:
    """Embed the pictures of each experiment, those of its first seed, in its first line."""
    first_lines = {line.experiment: line for line in reversed(lines)}
    for row in rows:
        runs = list(row.seeds) or [row.experiment]
        for path in pictures.get(runs[0], ()):
            first_lines[row.experiment].pictures.append((f"{runs[0]}: {path.stem}", _embedded(path)))


def _embedded(path: Path) -> str:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=75)
    return base64.b64encode(buffer.getvalue()).decode()


def _columns(rows: Sequence[Row], group: str) -> list[str]:
    """Return a group's columns; without baselines only its headline metrics."""
    names = baselines(rows, group)
    if not names:
        columns = headlines(rows, group)
    elif "untrained" in names:
        columns = ["pre-trained", "gain", *names]
    else:
        columns = ["pre-trained", *names]
    if any(row.claim(group) is not None for row in rows):
        columns = [*columns, "reported"]
    return columns


def _number_headings(columns: Sequence[str]) -> list[tuple[str, str]]:
    first, *others = map(_words, columns)
    return [(first, "number first"), *((name, "number") for name in others)]


def _words(metric: str) -> str:
    return metric.replace("_", " ").replace("top1", "top 1").replace("top5", "top 5").replace("map ", "mAP ")


# Cells


def _cells(row: Row, group: str, columns: Sequence[str]) -> list[Cell]:
    first, *others = columns
    return [_cell(row, group, first, "first"), *(_cell(row, group, column, "") for column in others)]


def _cell(row: Row, group: str, column: str, classes: str) -> Cell:
    if group not in row.results:
        return Cell(MISSING, classes)
    metric = headline(row.results[group][0])
    if column == "reported":
        return _reported_cell(row, group, metric, classes)
    if column == "gain":
        gain = row.gain(group)
        return _summary_cell(gain, f"{classes} gain", text=signed(gain.mean) if gain else MISSING)
    if column in BASELINES:
        baseline = row.summary(group, column, metric)
        return Cell(number_text(baseline.mean), classes, baseline.mean) if baseline else Cell(MISSING, classes)
    is_percentage = column == "pre-trained"
    summary = row.summary(group, "", metric if is_percentage else column)
    if summary is None:
        return Cell(MISSING, f"{classes} best")
    bar = _bar(row, group, metric, summary) if is_percentage else None
    num_runs = None if summary.deviation is None else summary.n
    return _summary_cell(summary, f"{classes} best", text=number_text(summary.mean), num_runs=num_runs, bar=bar)


def _summary_cell(summary: Summary | None, classes: str, *, text: str, **parts: Any) -> Cell:
    if summary is None:
        return Cell(text, classes)
    return Cell(text, classes, summary.mean, deviation=deviation_text(summary), **parts)


def _reported_cell(row: Row, group: str, metric: str, classes: str) -> Cell:
    claim, measured = row.claim(group), row.summary(group, "", metric)
    if claim is None:
        return Cell(MISSING, classes)
    difference = signed(measured.mean - claim) if measured else ""
    source = str(row.reported.get("source", ""))
    return Cell(f"{claim:.1f}", classes, claim, difference=difference, source=source)


def _bar(row: Row, group: str, metric: str, summary: Summary) -> Bar:
    marks = {}
    for name in BASELINES:
        baseline = row.summary(group, name, metric)
        if baseline:
            marks[name] = baseline.mean
    if summary.deviation is None:
        return Bar(summary.mean, marks, None)
    left = max(0, summary.mean - summary.deviation)
    right = min(100, summary.mean + summary.deviation)
    return Bar(summary.mean, marks, (left, right - left))


# Numbers as text


def deviation_text(summary: Summary) -> str:
    """Return the standard deviation with the decimals of the mean; its own digits for a mean below a tenth."""
    if summary.deviation is None:
        return ""
    if 0.1 <= abs(summary.mean) < 1000:
        return f"{summary.deviation:.1f}"
    return number_text(summary.deviation)


def number_text(number: float) -> str:
    """Return a number with one decimal; two digits below a tenth, none from 1,000 on."""
    if abs(number) >= 1000:
        return f"{number:,.0f}"
    if abs(number) >= 0.1 or number == 0:
        return f"{number:.1f}"
    return f"{number:.2g}"


# Below the tables


def _pictures(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Draw accuracy over the time of pre-training, if two experiments were timed, and that of 8-bit networks over the
    latency; return titles and SVGs (base64)."""
    costs, milliseconds = priced(rows), latencies(rows)
    if not costs and not milliseconds:
        return []
    from ssl_core.drawing.style import render  # matplotlib, which few tables need
    from ssl_core.report.cost_picture import draw_costs, draw_latencies

    figures = {}
    if costs:
        title = f"Accuracy against the time of pre-training, {rows[0].dataset}"
        figures[title] = draw_costs(rows, costs, title=title)
    if milliseconds:
        title = f"Accuracy against the latency, {rows[0].dataset}"
        figures[title] = draw_latencies(milliseconds, title=title)
    return [(title, base64.b64encode(render(figure)["svg"]).decode()) for title, figure in figures.items()]


def _reported_notes(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the sources of the reported numbers as a table without empty columns."""
    names = [name for name in NOTES if any(name in row.reported for row in rows)]
    lines = [(row.experiment, *(str(row.reported.get(name, "")) for name in names)) for row in rows]
    return {"names": ["experiment", *names], "lines": list(dict.fromkeys(lines))}


def _origins(rows: Sequence[Row]) -> list[list[str]]:
    """Return a line for each run and evaluation: data, seed, hyper-parameters, digests and hardware."""
    lines = []
    for row in rows:
        for group in groups_of(rows):
            for result in row.results.get(group, ()):
                lines.append(_origin(row, group, result))
    return lines


def _origin(row: Row, group: str, result: Result) -> list[str]:
    number = value(result, "", headline(result))
    digests = [f"{name} {str(text)[:12]}" for name, text in sorted(result.get("digests", {}).items())]
    return [
        result["experiment"],
        group,
        MISSING if number is None else number_text(number),
        f"{row.dataset} / {result.get('split', '')}",
        *(str(result.get(name, "")) for name in ("num_train", "num_test", "seed")),
        json.dumps(result.get("hyperparameters", {}), sort_keys=True, ensure_ascii=False),
        " ".join(digests),
        str(result.get("hardware", "")),
    ]
