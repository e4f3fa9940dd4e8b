"""The page that compares pre-training with training from scratch and other ways to start a network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_core.files import read_json, write_text
from ssl_core.report.results import read_result
from ssl_core.report.ways_page import page_of_ways


def run(
    results: Sequence[Path],
    output: Path,
    *,
    plan: Any,
    tunings: Sequence[Path] = (),
    pretrainings: Sequence[Path] = (),
) -> None:
    """Write the page `output`, whose links are relative to its folder.

    `results` are the fine-tunings, `tunings` the files cost.json beside them, `pretrainings` files pretrain.json.
    `plan` is that of `experiments.should_i_pretrain`. Raises `ValueError` for a file that is not an evaluation and for
    two results of one seed and share.
    """
    read = [read_result(path) for path in results]
    write_text(output, page_of_ways(read, list(map(read_json, tunings)), list(map(read_json, pretrainings)), plan))
