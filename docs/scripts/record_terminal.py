"""Run a shell command in a terminal and write its output as an animated SVG: record_terminal.py PICTURE COMMAND

Pauses longer than a second are shortened to one; a line that is written over appears in its last state.
"""

import html
import os
import pty
import re
import sys
import time
from pathlib import Path

COLUMNS = 110
ROW, CHARACTER, MARGIN = 18, 7.85, 14  # pixels
PAUSE = 1.0  # seconds
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
STYLE = """<style>
text { font: 13px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #e6e6e6; white-space: pre;
  animation: appear 0.01s both }
.prompt { fill: #7ee787 }
@keyframes appear { from { opacity: 0 } to { opacity: 1 } }
</style>"""


def record(command: str) -> list[tuple[float, str]]:
    """Run the command in a pseudo-terminal; return its lines with the seconds at which each was first written to."""
    os.environ["COLUMNS"] = str(COLUMNS)
    lines: list[tuple[float, str]] = []
    line, begun = "", None
    start = time.monotonic()
    process, terminal = pty.fork()
    if process == 0:
        os.execvp("bash", ["bash", "-c", command])
    while output := _read(terminal):
        for character in output:
            if begun is None:
                begun = time.monotonic() - start
            if character == "\n":
                lines.append((begun, _last_state(line)))
                line, begun = "", None
            else:
                line += character
    os.waitpid(process, 0)
    return lines


def _read(terminal: int) -> str:
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:  # the command has ended
        return ""


def _last_state(line: str) -> str:
    states = [state for state in ESCAPES.sub("", line).split("\r") if state.strip()]
    return states[-1].rstrip()[:COLUMNS] if states else ""


def draw(command: str, lines: list[tuple[float, str]]) -> str:
    """Return the SVG."""
    width, height = COLUMNS * CHARACTER + 2 * MARGIN, (len(lines) + 1) * ROW + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}">',
        f"<title>{html.escape(command)}</title>",
        STYLE,
        f'<rect width="{width:.0f}" height="{height}" rx="8" fill="#161b22"/>',
        f'<text x="{MARGIN}" y="{MARGIN + 13}" class="prompt">$ {html.escape(command)}</text>',
    ]
    shown, before = 1.0, 0.0
    for row, (seconds, text) in enumerate(lines, start=1):
        shown += min(PAUSE, seconds - before)
        before = seconds
        place = f'x="{MARGIN}" y="{MARGIN + 13 + row * ROW}" style="animation-delay: {shown:.1f}s"'
        parts.append(f"<text {place}>{html.escape(text)}</text>")
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    picture, command = sys.argv[1:]
    Path(picture).write_text(draw(command, record(command)))
