"""Snakemake from a server that has imported it and forks a process per command, which saves two seconds per command."""

import atexit
import faulthandler
import importlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# What a run imports. The package is not among it, since each project may have a copy of its own.
IMPORTED = ("snakemake.cli", "snakemake.assets", "snakemake.report.html_reporter", "snakemake.storage", "docutils.core")
IMPORTED += ("docutils.parsers.rst.directives", "jinja2", "jsonschema", "numpy", "pydantic", "requests", "tabulate")
STALLED_SECONDS = 200  # after them a run prints the stacks of its threads


def run_snakemake(folder: Path, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run Snakemake in `folder` and wait until it ends."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with TemporaryDirectory() as scratch:
        command = {"arguments": arguments, "folder": str(folder), "environment": environment, "scratch": scratch}
        print(json.dumps(command), file=server.stdin, flush=True)
        try:
            status = int(server.stdout.readline())
        except BaseException:  # the time limit of the test
            print(Path(scratch, "stderr").read_text(encoding="utf-8"))
            raise
        out, err = (Path(scratch, name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(arguments, status, out, err)


@cache
def _server() -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(server.communicate)  # ends it by closing its standard input
    return server


def _serve() -> None:
    """Answer each command with the exit status of its process."""
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            _become(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def _become(command: dict[str, Any]) -> None:
    """Turn this process into a run of Snakemake; never returns."""
    os.chdir(command["folder"])
    os.environ.clear()
    os.environ.update(command["environment"])
    sys.argv = ["snakemake", *command["arguments"]]
    sys.path[:1] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(command["scratch"], name), os.O_WRONLY | os.O_CREAT), number)
    faulthandler.dump_traceback_later(STALLED_SECONDS)
    from snakemake.cli import main

    main(command["arguments"])
    sys.exit()


if __name__ == "__main__":
    _serve()
