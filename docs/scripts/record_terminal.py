"""Run a shell command in a terminal and write its output as an animated SVG: record_terminal.py PICTURE COMMAND

Pauses are shortened, to a second after a line and to a tenth of one within a progress bar; a clock shows the real
time. The path of the folder is replaced.
"""

import fcntl
import html
import os
import pty
import re
import struct
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

COLUMNS, ROWS = 110, 26
ROW, CHARACTER, MARGIN, BAR = 18, 7.85, 14, 30  # pixels; BAR is the height of the title
PAUSE, REDRAWN, FRAME = 1.0, 0.1, 0.4  # seconds: longest pause after a line, after a redrawn line, shortest frame
TYPING, END = 1.5, 12.0  # seconds that the command alone and the end are shown
FIRST = 5.0  # seconds of the end that a reader sees first, instead of an empty terminal
ESCAPES = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")
COLOURS = {31: "red", 32: "green", 33: "yellow", 34: "blue", 35: "red", 36: "blue"}
CLOCK = "waiting is shortened; real time"
STYLE = """<style>
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre; fill: #e6edf3 }
.dim { fill: #9198a1 } .green { fill: #7ee787 } .yellow { fill: #e3b341 } .red { fill: #ff7b72 } .blue { fill: #79c0ff }
"""


class Event(NamedTuple):
    """Output of the command, `seconds` after its start."""

    seconds: float
    text: str


class State(NamedTuple):
    """A line's text, with its colours, from `start` to `end` of the picture's time in seconds; None is for ever."""

    row: int
    text: tuple[tuple[str, str], ...]  # colour and text of each part
    start: float
    end: float | None


def record(command: str) -> Iterator[Event]:
    """Run the command in a pseudo-terminal and yield its output."""
    start = time.monotonic()
    process, terminal = pty.fork()
    if process == 0:
        os.execvp("bash", ["bash", "-c", command])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    while output := _read(terminal):
        yield Event(time.monotonic() - start, output.replace(str(Path.cwd()), "~/ssl_core"))
    os.waitpid(process, 0)


def _read(terminal: int) -> str:
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:  # the command has ended
        return ""


class Screen:
    """The lines of a terminal that is as high as its output."""

    def __init__(self) -> None:
        self.lines: list[list[tuple[str, str]]] = [[]]  # colour and character of each cell
        self._row = self._column = 0
        self._colour = ""

    def write(self, text: str) -> None:
        """Write text with line ends, carriage returns, colours and movements of the cursor by lines."""
        position = 0
        for escape in ESCAPES.finditer(text):
            self._plain(text[position : escape.start()])
            self._obey(escape[1], escape[2])
            position = escape.end()
        self._plain(text[position:])

    def texts(self) -> list[tuple[tuple[str, str], ...]]:
        """Return the lines, each as parts of one colour."""
        return [_parts(line) for line in self.lines]

    def _obey(self, numbers: str, letter: str) -> None:
        values = [int(number) for number in numbers.split(";") if number.isdigit()]
        if letter == "m":
            self._colour = next((COLOURS[value] for value in values if value in COLOURS), "")
        elif letter == "A":
            self._row = max(0, self._row - (values or [1])[0])
        elif letter == "K":
            del self.lines[self._row][self._column :]

    def _plain(self, text: str) -> None:
        for character in text:
            if character == "\n":
                self._row, self._column = self._row + 1, 0
                if self._row == len(self.lines):
                    self.lines.append([])
            elif character == "\r":
                self._column = 0
            elif character >= " ":
                self._put(character)

    def _put(self, character: str) -> None:
        if self._column == COLUMNS:
            self._plain("\n")
        line = self.lines[self._row]
        line.extend([("", " ")] * (self._column + 1 - len(line)))
        line[self._column] = (self._colour, character)
        self._column += 1


def _parts(line: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    parts: list[tuple[str, str]] = []
    for colour, character in line:
        if parts and (parts[-1][0] == colour or character == " "):
            parts[-1] = (parts[-1][0], parts[-1][1] + character)
        else:
            parts.append((colour, character))
    return tuple(parts) if "".join(text for _, text in parts).strip() else ()


def play(events: list[Event]) -> tuple[list[State], list[State], list[tuple[float, int]], float]:
    """Return the states of the lines and of the clock, when how many lines have scrolled out, and the end."""
    screen, shown = Screen(), {}
    states: list[State] = []
    clock: list[State] = []
    scrolls: list[tuple[float, int]] = []
    now, before, longest = TYPING, 0.0, PAUSE
    for number, event in enumerate(events):
        now += min(longest, event.seconds - before)
        before, longest = event.seconds, PAUSE if "\n" in event.text else REDRAWN
        screen.write(event.text)
        if clock and now < clock[-1].start + FRAME and number + 1 < len(events):
            continue
        for row, text in enumerate(screen.texts()):
            if shown.get(row, State(row, (), 0, None)).text != text:
                if row in shown:
                    states.append(shown[row]._replace(end=now))
                shown[row] = State(row, text, now, None)
        hidden = max(0, len(screen.lines) - ROWS)
        if hidden > (scrolls[-1][1] if scrolls else 0):
            scrolls.append((now, hidden))
        if clock:
            clock[-1] = clock[-1]._replace(end=now)
        minutes, seconds = divmod(round(before), 60)
        clock.append(State(0, (("dim", f"{minutes}:{seconds:02d}"),), now, None))
    return [*states, *shown.values()], clock, scrolls, now + END


def draw(command: str, events: list[Event]) -> str:
    """Return the SVG; without animations (as with a reader's setting against motion) it is the last picture."""
    states, clock, scrolls, end = play(events)
    width, height = COLUMNS * CHARACTER + 2 * MARGIN, BAR + ROWS * ROW + 2 * MARGIN
    rules, texts, times = [], [], []
    for state in states:
        if state.text:
            texts.append(_text(state, MARGIN, 13 + state.row * ROW, end, rules))
    for state in clock:
        times.append(_text(state, width - MARGIN - 6 * CHARACTER, 20, end, rules))
    if scrolls:
        steps = [f"{100 * at / end:.2f}% {{ transform: translateY({-rows * ROW}px) }}" for at, rows in scrolls]
        rules.append(f"@keyframes scroll {{ 0% {{ transform: none }} {' '.join(steps)} }}")
        rules.append(f"#lines {{ transform: translateY({-scrolls[-1][1] * ROW}px);")
        rules.append(f"  animation: scroll {end:.1f}s infinite step-end }}")
    title = html.escape(command)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}">',
            f"<title>{title}</title>",
            STYLE + "\n".join(rules),
            f"text, #lines {{ animation-delay: {FIRST - end:.1f}s !important }}",
            "@media (prefers-reduced-motion) { * { animation: none !important } }",
            "</style>",
            f'<rect width="{width:.0f}" height="{height}" rx="8" fill="#161b22"/>',
            f'<text x="{MARGIN}" y="20">$ <tspan class="green">{title}</tspan></text>',
            f'<text x="{width - MARGIN - len(CLOCK + 7 * " ") * CHARACTER:.0f}" y="20" class="dim">{CLOCK}</text>',
            *times,
            f'<line x2="{width:.0f}" y1="{BAR}" y2="{BAR}" stroke="#30363d"/>',
            f'<svg y="{BAR + MARGIN}" width="{width:.0f}" height="{ROWS * ROW}"><g id="lines">',
            *texts,
            "</g></svg>",
            "</svg>",
            "",
        ]
    )


def _text(state: State, x: float, y: float, end: float, rules: list[str]) -> str:
    """Return the element of one state, and add its animation to `rules`."""
    name = f"a{len(rules)}"
    start, stop = 100 * state.start / end, 100 * (state.end or end) / end
    gone = f" {stop:.2f}% {{ opacity: 0 }}" if state.end else ""
    rules.append(f"@keyframes {name} {{ 0% {{ opacity: 0 }} {start:.2f}% {{ opacity: 1 }}{gone} }}")
    hidden = "; opacity: 0" if state.end else ""
    style = f"animation: {name} {end:.1f}s infinite step-end{hidden}"
    parts = [
        f'<tspan class="{colour}">{html.escape(text)}</tspan>' if colour else html.escape(text)
        for colour, text in state.text
    ]
    return f'<text x="{x:.0f}" y="{y}" style="{style}">{"".join(parts)}</text>'


if __name__ == "__main__":
    picture, command = sys.argv[1:]
    Path(picture).write_text(draw(command, list(record(command))), encoding="utf-8")
