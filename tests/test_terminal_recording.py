"""The recording of a terminal: colours, lines that are written over, shortened waits, and a picture that is small."""

import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from tests.markdown import ROOT
from tests.test_notebook import module


@pytest.fixture(scope="module")
def recording() -> ModuleType:
    return module("docs/scripts/record_terminal.py")


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter() if element.tag[-4:] == "text"]


def test_a_command_is_shown_with_its_output_and_without_escapes(recording: ModuleType) -> None:
    command = r"printf '\033[32mgreen\033[0m <1>\n  0 %%\r100 %%\n'; pwd"
    svg = recording.draw(command, list(recording.record(command)))
    shown = texts(svg)
    assert f"$ {command}" in shown
    assert {"green <1>", "100 %", "~/ssl_core"} <= set(shown)
    assert '<tspan class="green">green </tspan>' in svg
    assert "\x1b" not in svg


def test_pauses_are_shortened_and_the_clock_shows_the_real_time(recording: ModuleType) -> None:
    events = [recording.Event(1, "begin\n"), recording.Event(3601, "\r 1 of 2"), recording.Event(7201, "\r 2 of 2")]
    states, clock, _, end = recording.play(events)
    assert end < 20
    assert [state.text[0][1] for state in clock] == ["0:01", "60:01", "120:01"]
    assert [(state.text[0][1], state.end is None) for state in states] == [
        (" 1 of 2", False),
        ("begin", True),
        (" 2 of 2", True),
    ]


def test_the_end_is_shown_first(recording: ModuleType) -> None:
    events = [recording.Event(1, "begin\n"), recording.Event(2, "end\n")]
    end = recording.play(events)[-1]
    assert f"animation-delay: {5 - end:.1f}s" in recording.draw("true", events)
    assert "animation-delay: -48.4s" in (ROOT / "docs/terminal.svg").read_text(encoding="utf-8")


def test_the_picture_of_the_readme_is_small_and_has_no_path_of_a_machine() -> None:
    text = Path(ROOT / "docs/terminal.svg").read_text(encoding="utf-8")
    assert len(text) < 200_000
    assert re.search("/(home|root|work|tmp/)", text) is None
    assert any("linear/v1 on demo/test" in line for line in texts(text))
