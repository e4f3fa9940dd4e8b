"""The table of results: a CSV for programs and one self-contained HTML page for people."""

from collections.abc import Sequence
from pathlib import Path

from ssl_core.files import write_text
from ssl_core.report.page import as_html
from ssl_core.report.results import Grid, Reported, Seeds, collect, read_result, read_settings
from ssl_core.report.table import as_csv


def run(
    results: Sequence[Path],
    output: Path,
    *,
    grid: Grid | None = None,
    seeds: Seeds | None = None,
    reported: Reported | None = None,
    settings: Sequence[Path] = (),
    pictures: Sequence[Path] = (),
) -> None:
    """Write `output` (.csv) and the same table as .html; the keys of a sweep's `grid` become columns.

    `seeds` groups experiments that differ in their seed alone; `reported` has published numbers to show beside the
    measured ones. `settings` are files pretrain.json, `pictures` are files below <folder of output>/<experiment>.
    Raises `ValueError` for a file that is not an evaluation and for two results in one cell.
    """
    read = [(path, read_result(path)) for path in results]
    rows = collect(read, grid=grid or {}, seeds=seeds or {}, reported=reported or {}, settings=read_settings(settings))
    by_experiment: dict[str, list[Path]] = {}
    for path in pictures:
        by_experiment.setdefault(path.relative_to(output.parent).parts[0], []).append(path)
    write_text(output, as_csv(rows, reported or {}))
    title = f"Sweep {output.stem}" if grid else "Results"
    write_text(output.with_suffix(".html"), as_html(rows, title=title, pictures=by_experiment))
