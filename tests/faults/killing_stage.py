"""Run a stage of `ssl-core` and kill a process of its workflow at a chosen moment; tests put it on the PATH.

`kill.json` in the project's folder names the victim and the number of the file that the stage, or a worker of it, is
about to rename to its final name; 0 is the start. Two stages of one name at the same time are recorded in `twice.txt`.
"""

import fcntl
import json
import os
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

from ssl_core import cli
from ssl_core.experiments import processes

PLAN = Path("kill.json")
STAGE = os.getpid()
rename = os.replace


def victim(name: str) -> int:
    """Return the id of the process with this role in the tree of a workflow."""
    workflow = processes.Process.parse(os.environ[processes.WORKFLOW])
    assert workflow is not None
    return {"workflow": workflow.id, "shell": os.getppid(), "stage": STAGE, "worker": os.getpid()}[name]


def kill_at(moment: int) -> None:
    """Kill the victim if the plan has this moment; a plan is carried out once."""
    plan = json.loads(PLAN.read_text()) if PLAN.exists() else {}
    if plan.get("file") == moment:
        PLAN.unlink()
        os.kill(victim(plan["victim"]), signal.SIGKILL)


def main() -> None:
    numbers = count(1)

    def replace(*arguments: Any) -> None:
        kill_at(next(numbers))
        rename(*arguments)

    with open(f".{sys.argv[1]}.running", "w") as running, mock.patch("os.replace", replace):
        try:
            fcntl.flock(running, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            Path("twice.txt").write_text(sys.argv[1])
        kill_at(0)
        sys.exit(cli.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
