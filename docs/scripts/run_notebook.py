"""Run the code cells of a notebook in the current folder and write their outputs into it: run_notebook.py NOTEBOOK

Outputs are the printed lines, the value of a cell's last line, and the figures as small PNG files.
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from PIL import Image

COLOURS = 64  # of a figure


def run(notebook: dict[str, Any]) -> None:
    """Run all code cells in one namespace and replace their outputs."""
    matplotlib.use("agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            value = execute("".join(cell["source"]), namespace)
        cell["execution_count"] = number
        cell["outputs"] = outputs(printed.getvalue(), value, number)


def execute(source: str, namespace: dict[str, Any]) -> Any:
    """Run the source of one cell and return the value of its last line, or None if that is a statement."""
    tree = ast.parse(source)
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        exec(compile(tree, "cell", "exec"), namespace)
        return None
    tree.body.pop()
    exec(compile(tree, "cell", "exec"), namespace)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)


def outputs(printed: str, value: Any, number: int) -> list[dict[str, Any]]:
    """Return the outputs of one cell in the notebook's format; its figures are closed."""
    found: list[dict[str, Any]] = []
    if printed:
        found.append({"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        found.append({"output_type": "execute_result", "execution_count": number, "data": data, "metadata": {}})
    for figure in map(plt.figure, plt.get_fignums()):
        data = {"image/png": base64.b64encode(_png(figure)).decode()}
        found.append({"output_type": "display_data", "data": data, "metadata": {}})
    plt.close("all")
    return found


def _png(figure: Any) -> bytes:
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=100, bbox_inches="tight")
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(small, "PNG", optimize=True)
    return small.getvalue()


if __name__ == "__main__":
    path = Path(sys.argv[1])
    notebook = json.loads(path.read_text(encoding="utf-8"))
    run(notebook)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
