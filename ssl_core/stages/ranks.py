"""Start the processes (ranks) of a training with torch's elastic launcher, and explain their end in one line."""

import logging
import os
import pickle
import re
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ssl_core import late_compiler
from ssl_core.experiments.processes import Stop, end_with_parent
from ssl_core.stages.nodes import LOOPBACK, START_SECONDS, Team

SIGNALLED = {128 + signal.SIGINT, 128 + signal.SIGTERM}  # exit codes of ranks that saved and stopped
# Messages of gloo, NCCL and the store for the end of another process.
CONNECTION = re.compile("Connection (closed|reset)|Broken pipe|gloo/|NCCL|DistStoreError|DistNetworkError")
CONSEQUENCE = re.compile(f"{CONNECTION.pattern}|exit code ({'|'.join(map(str, SIGNALLED))})$")
LAUNCHER = "torch.distributed.elastic.multiprocessing.api"


def start_ranks(work: Callable[[Any], None], job: Any, run_id: str, processes: int, team: Team | None = None) -> None:
    """Call `work(job)` in this process or in each of several; `run_id` names the run, `team` has the other nodes."""
    if processes == 1 and team is None:
        return work(job)
    check_gpus(processes)
    nodes = team.size if team else 1
    launch = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        run_id=run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{LOOPBACK}:0",
        local_addr=LOOPBACK,
        rdzv_configs={"join_timeout": START_SECONDS},
        max_restarts=0,
    )
    if team is not None:
        launch.rdzv_backend, launch.rdzv_endpoint = "static", team.endpoint
        launch.rdzv_configs = {"rank": team.rank, "timeout": START_SECONDS}
    logging.getLogger(LAUNCHER).addFilter(_is_cause)
    try:
        elastic_launch(launch, _work_as_rank)(pickle.dumps((work, job)), os.getpid())
    except SignalException as error:
        if team is not None:
            with suppress(Stop):  # the others stop because this node does
                team.raise_failure(seconds=0)
        raise Stop(128 + error.sigval) from None
    except DistError:
        if team is not None:
            team.raise_failure()
        raise
    except RendezvousError as error:
        raise ValueError(
            f"the {processes} processes of training.gpus did not meet on {LOOPBACK} ({type(error).__name__}): "
            "enable the loopback interface (`ip link set lo up`) and run again"
        ) from error
    except ChildFailedError as error:
        killed = [failure for failure in error.failures.values() if failure.exitcode == -signal.SIGKILL]
        failure = next(iter([*killed, *error.failures.values()]))  # the others fail because one was killed
        reason = dict(failure.message)["message"] if isinstance(failure.message, dict) else str(failure.message)
        if failure.exitcode in SIGNALLED:  # by a signal to another node
            raise Stop(failure.exitcode) from None
        if killed:
            reason = "it was killed, most likely for want of memory; lower batch_size or run again to go on"
        elif team is not None and CONNECTION.search(reason):
            team.raise_failure()
        raise ValueError(f"process {failure.local_rank} of {processes} failed: {reason}") from None


def check_gpus(processes: int) -> None:
    """Raise `ValueError` if this machine has GPUs, but fewer than processes."""
    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        raise ValueError(f"training.gpus is {processes}, this machine has {torch.cuda.device_count()}: ask for fewer")


def _is_cause(entry: logging.LogRecord) -> bool:
    """Return whether the launcher prints this traceback: not that of a rank that ended because another one did."""
    return not (entry.exc_info and CONSEQUENCE.search(str(entry.exc_info[1])))


@record  # writes the message of an error for the launcher
def _work_as_rank(pickled: bytes, launcher: int) -> None:
    end_with_parent(launcher)  # the launcher holds the lock of the experiment
    late_compiler.postpone()  # before the imports of `work`
    work, job = pickle.loads(pickled)
    work(job)
