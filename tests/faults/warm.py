"""A server that has imported everything a stage needs and forks a new process for each command.

A forked stage starts without seconds of imports, so that a test can kill many. The server reads lines of JSON from
standard input: `{"arguments": [...], "folder": ..., "log": ...}` runs `ssl-core` with the arguments and answers with
the process id and, once the process has ended, with its status; `{"mount": [...]}` runs `mount`.
"""

import json
import os
import signal
import subprocess
import sys
from typing import Any

import torch

from ssl_core import cli, late_compiler

late_compiler.postpone()  # as the command line does, before the stages import torchvision

import ssl_core.evaluations.knn  # noqa: E402
import ssl_core.methods.ressl  # noqa: E402
import ssl_core.stages.evaluate  # noqa: E402
import ssl_core.stages.pretrain  # noqa: E402
import ssl_core.stages.shard  # noqa: E402, F401


def stage(command: dict[str, Any]) -> None:
    """Run `ssl-core` as the leader of a process group, as a shell starts it; never returns."""
    os.setsid()
    os.chdir(command["folder"])
    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    status = 1
    try:
        status = cli.main(command["arguments"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(status)


def main() -> None:
    """Answer commands until standard input ends."""
    torch.set_num_threads(1)
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(os.getpid(), file=answer, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "mount" in command:
            print(subprocess.run(["mount", *command["mount"]]).returncode, file=answer, flush=True)
            continue
        process = os.fork()
        if process == 0:
            stage(command)
        print(process, file=answer, flush=True)
        print(os.waitpid(process, 0)[1], file=answer, flush=True)


if __name__ == "__main__":
    main()
