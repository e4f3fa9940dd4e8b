"""The table of results: a row an experiment and data set, a group of columns an evaluation and its protocol.

Writes a CSV for programs and, beside it, one HTML page for people that needs no network. A number stands under the full
name of its protocol (`linear/v1`), so that one measured otherwise, online or on cached features, never passes for it.
"""

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssl_core.files import read_json, write_text

BASELINES = ("untrained", "pixels")
MEASURES = ("pre-trained", "gain", *BASELINES)
REQUIRED = ("experiment", "evaluation", "protocol", "dataset", "metrics", "baselines")
Grid = Mapping[str, Mapping[str, Any]]  # experiment -> the sweep's values, `{"method.temperature": 0.1}`


@dataclass
class Row:
    """One experiment on one data set: the JSON of its evaluations by the name of their columns."""

    experiment: str
    dataset: str
    values: Mapping[str, Any]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)


def run(results: Sequence[Path], output: Path, *, grid: Grid | None = None) -> None:
    """Write `output` (.csv) and the same as .html; a sweep gives its `grid`, whose keys become columns.

    Raises ValueError for a file that is no evaluation, and for two that claim the same place.
    """
    rows = collect([(path, _load(path)) for path in results], grid or {})
    groups = sorted({group for row in rows for group in row.results})
    write_text(output, as_csv(rows, groups))
    write_text(output.with_suffix(".html"), as_html(rows, groups, title=f"Sweep {output.stem}" if grid else "Results"))


def collect(results: Sequence[tuple[Path, dict[str, Any]]], grid: Grid) -> list[Row]:
    """Sort evaluations into rows, ordered by the grid's values, then by name."""
    rows: dict[tuple[str, str], Row] = {}
    for path, result in results:
        key = (result["experiment"], _dataset(result))
        row = rows.setdefault(key, Row(*key, values=grid.get(key[0], {})))
        group = _group(result)
        if group in row.results:
            raise ValueError(f"{path}: a second {group} of {key[0]} on {key[1]}: give each evaluation its own name")
        row.results[group] = result
    return sorted(rows.values(), key=_order)


def as_csv(rows: Sequence[Row], groups: Sequence[str]) -> str:
    """Return the wide table; percentages are 0-100, what was not measured is empty."""
    parameters = _parameters(rows)
    columns = [(group, *column) for group in groups for column in _columns(rows, group)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["experiment", "dataset", *parameters, *(" ".join(column).replace("  ", " ") for column in columns)]
    )
    for row in rows:
        values = [row.values.get(name, "") for name in parameters]
        numbers = [_number(row.results.get(group), source, metric) for group, source, metric in columns]
        writer.writerow([row.experiment, row.dataset, *values, *numbers])
    return buffer.getvalue()


def as_html(rows: Sequence[Row], groups: Sequence[str], *, title: str) -> str:
    """Return the page: the table, what its words mean, and in small print where each number comes from."""
    parameters = _parameters(rows)
    parts = {
        "title": html.escape(title),
        "top": "".join(f'<th colspan="4" class="group">{html.escape(group)}</th>' for group in groups),
        "lead": 2 + len(parameters),
        "header": "".join(_heading(name) for name in ("experiment", "dataset", *parameters)),
        "measures": "".join(_heading(name, ' class="number"') for _ in groups for name in MEASURES),
        "rows": "\n".join(_html_row(row, groups, parameters) for row in rows),
        "print": "\n".join(_small_print(row, group) for row in rows for group in sorted(row.results)),
    }
    page = PAGE
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", str(text))
    return page


def _load(path: Path) -> dict[str, Any]:
    result = read_json(path)
    missing = [key for key in REQUIRED if not isinstance(result, dict) or key not in result]
    if missing:
        raise ValueError(f"{path} is no evaluation: it lacks {', '.join(missing)}; delete it and run again")
    return result


def _group(result: dict[str, Any]) -> str:
    """Name an evaluation's columns: its protocol, after its own name if that says something else."""
    name, protocol = result["evaluation"], result["protocol"]
    return protocol if protocol.split("/")[0] == name else f"{name} ({protocol})"


def _dataset(result: dict[str, Any]) -> str:
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


def _parameters(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.values))


def _accuracy(result: dict[str, Any]) -> str:
    """Name the metric that stands for an evaluation: what it says itself, else top1 or what is like it."""
    metrics = result["metrics"]
    if "headline" in result:
        return result["headline"]
    return "top1" if "top1" in metrics else next((name for name in sorted(metrics) if name.endswith("top1")), "top1")


def _columns(rows: Sequence[Row], group: str) -> list[tuple[str, str]]:
    """List a group's (source, metric): the pre-trained backbone's, its accuracy first, then the baselines' accuracy."""
    results = [row.results[group] for row in rows if group in row.results]
    accuracy = _accuracy(results[0])
    found = {name for result in results for name, value in result["metrics"].items() if isinstance(value, int | float)}
    metrics = sorted(found, key=lambda metric: (metric != accuracy, metric))
    return [*(("", metric) for metric in metrics), *((baseline, accuracy) for baseline in BASELINES)]


def _number(result: dict[str, Any] | None, source: str, metric: str) -> float | None:
    """Look a percentage up, rounded to hundredths; the empty source is the pre-trained backbone."""
    if result is None:
        return None
    values = result["baselines"].get(source, {}) if source else result["metrics"]
    return round(values[metric], 2) if values.get(metric) is not None else None


def _heading(name: str, kind: str = "") -> str:
    return f'<th{kind}><button type="button">{html.escape(name)}</button></th>'


def _html_row(row: Row, groups: Sequence[str], parameters: Sequence[str]) -> str:
    cells = [f"<th>{html.escape(row.experiment)}</th><td>{html.escape(row.dataset)}</td>"]
    cells += [f'<td class="number">{html.escape(str(row.values.get(name, "")))}</td>' for name in parameters]
    cells += [_html_group(row.results.get(group)) for group in groups]
    return f"<tr>{''.join(cells)}</tr>"


def _html_group(result: dict[str, Any] | None) -> str:
    """Draw the four cells of an evaluation; the bar is the accuracy, its two marks are the baselines."""
    if result is None:
        return '<td class="number">–</td>' * 4
    accuracy = _accuracy(result)
    top1 = _number(result, "", accuracy)
    if top1 is None:
        return '<td class="number">–</td>' * 4
    baselines = {name: _number(result, name, accuracy) for name in BASELINES}
    marks = "".join(
        f'<i class="{name}" style="left:{value}%"></i>' for name, value in baselines.items() if value is not None
    )
    bar = f'<span class="bar"><b style="width:{top1}%"></b>{marks}</span>'
    untrained = baselines["untrained"]
    gain = "–" if untrained is None else f"{top1 - untrained:+.1f}".replace("-", "−")
    cells = f'<td class="number best">{top1:.1f}{bar}</td><td class="number gain">{gain}</td>'
    others = ("–" if value is None else f"{value:.1f}" for value in baselines.values())
    return cells + "".join(f'<td class="number">{value}</td>' for value in others)


def _small_print(row: Row, group: str) -> str:
    """Say where one number comes from."""
    result = row.results[group]
    digests = " ".join(f"{name} {str(value)[:12]}" for name, value in sorted(result.get("digests", {}).items()))
    chosen = json.dumps(result.get("hyperparameters", {}), sort_keys=True, ensure_ascii=False)
    cells = (row.experiment, group, f"{row.dataset} / {result.get('split', '')}", result.get("num_train", ""))
    cells += (result.get("num_test", ""), result.get("seed", ""), chosen, digests, result.get("hardware", ""))
    return "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title><!--title--></title>
<style>
:root { color-scheme: light dark; --ink: light-dark(#1c2430, #e6e9ee); --soft: light-dark(#667080, #98a2b1);
  --line: light-dark(#dfe3ea, #333b47); --page: light-dark(#ffffff, #14181e); --track: light-dark(#e9edf3, #2a313c);
  --bar: light-dark(#3867d6, #7aa2ff); --untrained: #e67e22; --pixels: light-dark(#1c2430, #e6e9ee); }
body { margin: 2.5rem auto; padding: 0 1.5rem; max-width: 110rem; color: var(--ink); background: var(--page);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } p { max-width: 46rem; } .soft, small { color: var(--soft); }
.scroll { overflow-x: auto; margin: 1.5rem 0; } table { border-collapse: collapse; min-width: 100%; }
th, td { padding: .45rem .7rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th.group { text-align: center; border-left: 1px solid var(--line); }
thead th.number { text-align: right; } thead th { border-bottom-color: var(--soft); font-weight: 600; }
tbody tr:hover { background: var(--track); } .number { text-align: right; font-variant-numeric: tabular-nums; }
.best { font-weight: 650; min-width: 5rem; } .gain { color: var(--soft); }
button { all: unset; cursor: pointer; } button:hover { text-decoration: underline; }
button:focus-visible { outline: 2px solid var(--bar); }
[aria-sort=ascending] button::after { content: " ▲"; } [aria-sort=descending] button::after { content: " ▼"; }
.bar { display: block; position: relative; height: 5px; margin-top: 4px; border-radius: 3px; background: var(--track); }
.bar b { display: block; height: 100%; border-radius: 3px; background: var(--bar); }
.bar i { position: absolute; top: -2px; width: 2px; height: 9px; } .key { padding: 0 .35rem; }
i.untrained { background: var(--untrained); } i.pixels { background: var(--pixels); }
.key i { display: inline-block; width: 3px; height: 12px; } details { margin-top: 2rem; font-size: 12px; }
details td, details th { white-space: normal; vertical-align: top; padding: .3rem .6rem; overflow-wrap: break-word; }
</style>
</head>
<body>
<h1><!--title--></h1>
<p class="soft">Accuracy in percent (top 1). Click a heading to sort.</p>
<div class="scroll"><table id="results">
<thead><tr><th colspan="<!--lead-->"></th><!--top--></tr><tr><!--header--><!--measures--></tr></thead>
<tbody>
<!--rows-->
</tbody></table></div>
<p><b>Pre-trained</b> is the experiment's own backbone, frozen. The same probe is also given two things that learnt
nothing: <span class="key"><i class="untrained"></i></span><b>untrained</b>, the same network with its random initial
weights, and <span class="key"><i class="pixels"></i></span><b>pixels</b>, the raw image without any network.
<b>Gain</b> is pre-trained minus untrained, in points: what pre-training brought. Pre-training that does not beat
the pixels has learnt nothing that was not lying on the surface.</p>
<p>Each group of columns is one evaluation under the full name of its <b>protocol</b>; numbers compare only within one
protocol and one data set.</p>
<details><summary>Where each number comes from</summary>
<div class="scroll"><table><thead><tr><th>experiment</th><th>evaluation</th><th>data / split</th><th>train images</th>
<th>test images</th><th>seed</th><th>hyper-parameters</th><th>digests</th><th>hardware</th></tr></thead>
<tbody>
<!--print-->
</tbody></table></div></details>
<script>
const table = document.getElementById("results"), body = table.tBodies[0];
const heads = [...table.tHead.rows[1].cells];
heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
  const down = head.ariaSort !== "descending";
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.ariaSort = down ? "descending" : "ascending";
  const value = row => row.cells[column].textContent.replace("−", "-"), number = row => parseFloat(value(row));
  const compare = (a, b) => isNaN(number(a)) || isNaN(number(b))
    ? isNaN(number(a)) - isNaN(number(b)) || value(a).localeCompare(value(b)) * (down ? -1 : 1)
    : (number(a) - number(b)) * (down ? -1 : 1);
  body.append(...[...body.rows].sort(compare));
}));
</script>
</body>
</html>
"""
