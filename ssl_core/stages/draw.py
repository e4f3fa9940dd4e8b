"""The stage `draw`: the pictures of an evaluation, from the arrays that it measured."""

import json
import zipfile
import zlib
from pathlib import Path

import numpy as np

from ssl_core.drawing.representation import draw_all
from ssl_core.drawing.style import render
from ssl_core.files import write_bytes
from ssl_core.tracking.run import start


def run(experiment: str, evaluation: str, *, data: Path, output: Path) -> None:
    """Draw the arrays in `data` (.npz) as PNG and SVG in the folder `output`; MLflow gets them in the evaluation's run.

    Raises `ValueError` for a file that is missing or damaged.
    """
    arrays = read_arrays(data)
    tracked = json.loads(str(arrays["run"]))
    with start(evaluation, experiment, digest=tracked["version"], parameters=tracked["parameters"]) as tracking:
        for name, figure in draw_all(arrays).items():
            for extension, content in render(figure).items():
                picture = output / f"{name}.{extension}"
                write_bytes(picture, content)
                tracking.artifact(picture, folder="pictures")
    print(f"pictures of {experiment}/{evaluation} -> {output}")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run the evaluation first") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and run the evaluation again") from None
