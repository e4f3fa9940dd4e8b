"""The table of results as one HTML page that loads nothing."""

import base64
import html
import json
from collections.abc import Iterator, Sequence
from typing import Any

from ssl_core.report.results import (
    BASELINES,
    Result,
    Row,
    Summary,
    baselines,
    groups_of,
    headline,
    headlines,
    parameters_of,
    priced,
    value,
)

WIDE = 4  # evaluations of one data set that stand beside each other; more stand below each other
SEEDS = """<p>Where an experiment has several <b>seeds</b>, its row is their mean ± standard deviation (of the
sample), in brackets how many; gains are taken seed by seed, baselines are means. The line at the end of the bar spans
the deviation. The small print has each run.</p>"""
REPORTED = """<p><b>Reported</b> numbers are quoted, not measured here; below them measured minus reported, in points.
Compare them only as far as their sources did the same.</p>"""


def as_html(rows: Sequence[Row], *, title: str) -> str:
    """Return the page: a table a data set, what its words mean, and in small print where each number comes from."""
    tables = [[row for row in rows if row.dataset == name] for name in sorted({row.dataset for row in rows})]
    sources = [row for row in rows if row.reported]
    parts = {
        "title": html.escape(title),
        "tables": "\n".join(
            (_wide(part) if len(groups_of(part)) <= WIDE else _long(part)) + _cost(part) for part in tables
        ),
        "seeds": SEEDS if any(row.seeds for row in rows) else "",
        "reported": REPORTED + _sources(sources) if sources else "",
        "print": "\n".join(line for row in rows for group in groups_of(rows) for line in _small_print(row, group)),
    }
    page = PAGE
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text)
    return page


def _wide(rows: Sequence[Row]) -> str:
    """Write a row an experiment, a group of columns an evaluation."""
    parameters, groups = parameters_of(rows), groups_of(rows)
    columns = {group: _columns(rows, group) for group in groups}
    top = "".join(_group_heading(rows, group, len(columns[group])) for group in groups)
    head = "".join(map(_heading, ("experiment", "dataset", *parameters)))
    head += "".join(_measures(columns[group]) for group in groups)
    body = []
    for row in rows:
        cells = [
            _html_cell(row, group, name, "" if index else "first")
            for group, names in columns.items()
            for index, name in enumerate(names)
        ]
        body.append(f"<tr>{_lead(row, parameters)}{''.join(cells)}</tr>")
    return _table(f'<th colspan="{2 + len(parameters)}"></th>{top}', head, body)


def _long(rows: Sequence[Row]) -> str:
    """Write a row an experiment and evaluation, one evaluation after the other, where columns would be too many."""
    parameters, groups = parameters_of(rows), groups_of(rows)
    found = {name for group in groups for name in _columns(rows, group)}
    columns = ["pre-trained", *(name for name in ("gain", *BASELINES, "reported") if name in found)]
    head = "".join(map(_heading, ("experiment", "dataset", *parameters, "evaluation", "measure"))) + _measures(columns)
    body = []
    for group in groups:
        for row in rows:
            if group not in row.results:
                continue
            metric = headline(row.results[group][0])
            shown = columns if baselines([row], group) else [metric, *columns[1:]]  # a count has no bar
            cells = [_html_cell(row, group, name, "first" if name == shown[0] else "") for name in shown]
            named = f"<td>{html.escape(group)}</td><td>{html.escape(_words(metric))}</td>"
            body.append(f"<tr>{_lead(row, parameters)}{named}{''.join(cells)}</tr>")
    return _table("", head, body)


def _table(top: str, head: str, body: Sequence[str]) -> str:
    top = f"<tr>{top}</tr>" if top else ""
    rows = "\n".join(body)
    return (
        f'<div class="scroll"><table class="results">\n<thead>{top}<tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _cost(rows: Sequence[Row]) -> str:
    """Draw accuracy over the time of pre-training where two experiments or more were timed."""
    panels = priced(rows)
    if not panels:
        return ""
    from ssl_core.drawing.style import render  # matplotlib, which few tables need
    from ssl_core.report.cost_picture import draw_costs

    title = f"Accuracy against the time of pre-training, {rows[0].dataset}"
    figure = draw_costs(rows, panels, title=title)
    data = base64.b64encode(render(figure)["svg"]).decode()
    return f'\n<img class="picture" alt="{html.escape(title)}" src="data:image/svg+xml;base64,{data}">'


def _lead(row: Row, parameters: Sequence[str]) -> str:
    """Write the cells that say which experiment this is."""
    values = "".join(f'<td class="number">{html.escape(str(row.values.get(name, "")))}</td>' for name in parameters)
    return f"<th>{html.escape(row.experiment)}</th><td>{html.escape(row.dataset)}</td>{values}"


def _columns(rows: Sequence[Row], group: str) -> list[str]:
    """Name a group's columns; without baselines its headlines, whatever they count, stand alone."""
    beside = baselines(rows, group)
    gain = ["gain"] if "untrained" in beside else []
    columns = ["pre-trained", *gain, *beside] if beside else headlines(rows, group)
    return [*columns, *(["reported"] if any(row.claim(group) is not None for row in rows) else [])]


def _group_heading(rows: Sequence[Row], group: str, width: int) -> str:
    metrics = " / ".join(map(_words, headlines(rows, group)))
    small = f" <small>{html.escape(metrics)}</small>" if baselines(rows, group) else ""
    return f'<th colspan="{width}" class="group">{html.escape(group)}{small}</th>'


def _words(metric: str) -> str:
    return metric.replace("_", " ").replace("top1", "top 1").replace("top5", "top 5").replace("map ", "mAP ")


def _measures(columns: Sequence[str]) -> str:
    return "".join(_heading(_words(name), "number" if index else "number first") for index, name in enumerate(columns))


def _heading(name: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<th{kind}><button type="button">{html.escape(name)}</button></th>'


def _html_cell(row: Row, group: str, column: str, kind: str) -> str:
    if group not in row.results:
        return _cell(None, "–", kind)
    metric = headline(row.results[group][0])
    if column == "reported":
        return _claim(row, group, metric, kind)
    if column == "gain":
        gain = row.gain(group)
        return _cell(gain and gain.mean, _text(gain, signed=True), f"{kind} gain")
    if column in ("untrained", "pixels"):
        baseline = row.summary(group, column, metric)
        return _cell(baseline and baseline.mean, _text(baseline, short=True), kind)
    summary = row.summary(group, "", metric if column == "pre-trained" else column)
    bar = _bar(row, group, metric, summary) if summary and column == "pre-trained" else ""
    count = f"<small> ({summary.n})</small>" if summary and summary.deviation is not None else ""
    return _cell(summary and summary.mean, _text(summary) + count + bar, f"{kind} best")


def _cell(number: float | None, text: str, kind: str) -> str:
    """Write a cell; what it sorts by stands beside its text."""
    sorts = "" if number is None else f' data-value="{number:.6g}"'
    return f'<td class="number{" " + kind.strip() if kind.strip() else ""}"{sorts}>{text}</td>'


def _claim(row: Row, group: str, metric: str, kind: str) -> str:
    claim, own = row.claim(group), row.summary(group, "", metric)
    if claim is None:
        return _cell(None, "–", kind)
    apart = f'<span class="apart">{_signed(own.mean - claim)}</span>' if own else ""
    source = html.escape(str(row.reported.get("source", "")), quote=True)
    return _cell(claim, f'<span title="{source}">{claim:.1f}</span>{apart}', kind)


def _text(summary: Summary | None, *, signed: bool = False, short: bool = False) -> str:
    """Write "87.8" for one run or in `short`, "87.8 ± 0.4" for several."""
    if summary is None:
        return "–"
    text = _signed(summary.mean) if signed else _number(summary.mean)
    if summary.deviation is None or short:
        return text
    # As many digits as the mean has; of a mean below a tenth its own, for "0.1 ± 0.0" would say nothing.
    deviation = f"{summary.deviation:.1f}" if 0.1 <= abs(summary.mean) < 1000 else _number(summary.deviation)
    return f"{text}<small> ± {deviation}</small>"


def _number(number: float) -> str:
    if abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:.1f}" if abs(number) >= 0.1 or not number else f"{number:.2g}"


def _signed(number: float) -> str:
    return f"{round(number, 1) + 0.0:+.1f}".replace("-", "−")  # no "-0.0"


def _bar(row: Row, group: str, metric: str, summary: Summary) -> str:
    """Draw the accuracy as a bar, its standard deviation as a line at the end, the baselines as marks."""
    marks = ""
    for name in ("untrained", "pixels"):
        baseline = row.summary(group, name, metric)
        marks += f'<i class="{name}" style="left:{baseline.mean:.2f}%"></i>' if baseline else ""
    if summary.deviation is not None:
        left, right = max(0, summary.mean - summary.deviation), min(100, summary.mean + summary.deviation)
        marks += f'<u style="left:{left:.2f}%;width:{right - left:.2f}%"></u>'
    return f'<span class="bar"><b style="width:{summary.mean:.2f}%"></b>{marks}</span>'


def _sources(rows: Sequence[Row]) -> str:
    """Say where the reported numbers come from."""
    names = [
        name for name in ("source", "epochs", "hours", "hardware", "note") if any(name in row.reported for row in rows)
    ]
    head = "".join(f"<th>{name}</th>" for name in ("experiment", *names))
    lines = dict.fromkeys(_line((row.experiment, *(row.reported.get(name, "") for name in names))) for row in rows)
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll sources"><table>{body}</table></div>'


def _small_print(row: Row, group: str) -> Iterator[str]:
    """Say of each run where its number comes from."""
    for result in row.results.get(group, ()):
        digests = " ".join(f"{name} {str(text)[:12]}" for name, text in sorted(result.get("digests", {}).items()))
        chosen = json.dumps(result.get("hyperparameters", {}), sort_keys=True, ensure_ascii=False)
        yield _line(
            (
                result["experiment"],
                group,
                _own(result),
                f"{row.dataset} / {result.get('split', '')}",
                *(result.get(name, "") for name in ("num_train", "num_test", "seed")),
                chosen,
                digests,
                result.get("hardware", ""),
            )
        )


def _own(result: Result) -> str:
    number = value(result, "", headline(result))
    return "–" if number is None else _number(number)


def _line(cells: Sequence[Any]) -> str:
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
th, td { padding: .45rem .7rem; text-align: left; vertical-align: baseline; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
.results tr > :first-child { position: sticky; left: 0; z-index: 1; background: var(--page); }
th.group { text-align: center; } .first, th.group { border-left: 1px solid var(--line); } th small { font-weight: 400; }
thead th.number { text-align: right; } thead th { border-bottom-color: var(--soft); font-weight: 600; }
.results tbody tr:hover > :first-child, tbody tr:hover { background: var(--track); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.best { font-weight: 650; min-width: 5rem; } .gain { color: var(--soft); }
button { all: unset; cursor: pointer; } button:hover { text-decoration: underline; }
button:focus-visible { outline: 2px solid var(--bar); }
[aria-sort=ascending] button::after { content: " ▲"; } [aria-sort=descending] button::after { content: " ▼"; }
.bar { display: block; position: relative; height: 5px; margin-top: 4px; border-radius: 3px; background: var(--track); }
.bar b { display: block; height: 100%; border-radius: 3px; background: var(--bar); }
.best small { font-weight: 400; } .apart { display: block; color: var(--soft); font-size: 12px; line-height: 1; }
.bar u { position: absolute; top: 1px; height: 3px; border: solid var(--ink); border-width: 0 1px;
  box-sizing: border-box; background: linear-gradient(var(--ink), var(--ink)) center / 100% 1px no-repeat; }
.sources { margin: 0; font-size: 13px; } .sources table { min-width: 0; } .sources td { white-space: normal; }
.bar i { position: absolute; top: -2px; width: 2px; height: 9px; } .key { white-space: nowrap; }
.picture { display: block; max-width: 100%; border-radius: 4px; }
i.untrained { background: var(--untrained); } i.pixels { background: var(--pixels); }
.key i { display: inline-block; width: 3px; height: 12px; } details { margin-top: 2rem; font-size: 12px; }
details td, details th { white-space: normal; vertical-align: top; padding: .3rem .6rem; overflow-wrap: break-word; }
</style>
</head>
<body>
<h1><!--title--></h1>
<p class="soft">In percent, but for what says that it counts something. Click a heading to sort.</p>
<!--tables-->
<p><b>Pre-trained</b> is the experiment's own backbone, frozen. The same probe is also given two things that learnt
nothing: <span class="key"><i class="untrained"></i> <b>untrained</b></span>, the same network with its random initial
weights, and <span class="key"><i class="pixels"></i> <b>pixels</b></span>, the raw image without any network.
<b>Gain</b> is pre-trained minus untrained, in points: what pre-training brought. Pre-training that does not beat
the pixels has learnt nothing that was not lying on the surface.</p>
<p>Each evaluation stands under the full name of its <b>protocol</b>; numbers compare only within one
protocol, at the same settings, and one data set.</p>
<!--seeds-->
<!--reported-->
<details><summary>Where each number comes from</summary>
<div class="scroll"><table><thead><tr><th>experiment</th><th>evaluation</th><th>result</th><th>data / split</th>
<th>train images</th><th>test images</th><th>seed of the evaluation</th>
<th>hyper-parameters</th><th>digests</th><th>hardware</th></tr></thead>
<tbody>
<!--print-->
</tbody></table></div></details>
<script>
for (const table of document.querySelectorAll(".results")) {
const body = table.tBodies[0], heads = [...[...table.tHead.rows].at(-1).cells];
heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
  const down = head.ariaSort !== "descending";
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.ariaSort = down ? "descending" : "ascending";
  const value = row => row.cells[column].textContent;
  const number = row => parseFloat(row.cells[column].dataset.value ?? value(row));
  const compare = (a, b) => isNaN(number(a)) || isNaN(number(b))
    ? isNaN(number(a)) - isNaN(number(b)) || value(a).localeCompare(value(b)) * (down ? -1 : 1)
    : (number(a) - number(b)) * (down ? -1 : 1);
  body.append(...[...body.rows].sort(compare));
}));
}
</script>
</body>
</html>
"""
