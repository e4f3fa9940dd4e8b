"""Colours, where there is a terminal and NO_COLOR is not set, and the completion of commands in bash and zsh."""

import argparse
import os
from typing import Literal, TextIO

Colour = Literal["red", "green", "yellow"]
CODES: dict[Colour, int] = {"red": 31, "green": 32, "yellow": 33}
COMPLETION = """\
# bash and zsh: eval "$(ssl-core completion)" in ~/.bashrc or ~/.zshrc
if [ -n "${{ZSH_VERSION-}}" ]; then autoload -Uz compinit bashcompinit && compinit -i && bashcompinit; fi
_ssl_core() {{
  local words=
  if [ "$COMP_CWORD" = 1 ]; then words="{commands}"
  elif [ "${{2#-}}" != "$2" ]; then
    case "${{COMP_WORDS[1]}}" in
{options}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$2"))
}}
complete -o default -F _ssl_core ssl-core"""


def coloured(text: str, colour: Colour, stream: TextIO) -> str:
    """Return `text` in a colour if `stream` is a terminal that shows it."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\x1b[{CODES[colour]}m{text}\x1b[0m"


def completion(commands: dict[str, argparse.ArgumentParser]) -> str:
    """Return a script that completes the names of commands and their options; other words are files."""
    options = []
    for name, command in commands.items():
        words = " ".join(word for word in command._option_string_actions if word.startswith("--"))
        options.append(f'      {name}) words="{words}" ;;')
    return COMPLETION.format(commands=" ".join(commands), options="\n".join(options))
