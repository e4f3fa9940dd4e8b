"""Locks, one writer per output, stages that end with the workflow that started them, and a message for SIGBUS.

A lock is a `flock`, which the kernel releases when the process dies, so no lock outlives its process. The content of a
writer's lock file names the writer for messages.
"""

import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ssl_core.experiments import bundled

# Environment variables
WORKFLOW = "SSL_CORE_WORKFLOW"  # the Snakemake process, as `Process.text`
PACKAGE = "SSL_CORE_PACKAGE"  # the folder of the package that it imports
JOB_VARIABLES = ("SLURM_JOB_ID",)
PR_SET_PDEATHSIG = 1


class Stop(SystemExit):
    """Raised after a signal to stop, with the state saved; the exit status is the shell's for that signal."""


def keep_interrupts_from_forks() -> None:
    """Make processes that this one forks from now on ignore Ctrl-C from their first instruction: it handles it for all.

    A worker that first had to ignore the signal itself was killed by one that came before, and the stage reported that.
    """

    def block() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        unblock()

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=ignore)


class Process(NamedTuple):
    """A process of a host; its start time tells it from a later process with the same id."""

    host: str
    id: int
    started: int  # clock ticks since the host booted

    @property
    def text(self) -> str:
        """Return the process in one word, which `parse` reads."""
        return f"{self.host}:{self.id}:{self.started}"

    @classmethod
    def parse(cls, text: str) -> "Process | None":
        """Return the process of `text`, or None for any other word."""
        host, _, numbers = text.partition(":")
        number, _, started = numbers.partition(":")
        return cls(host, int(number), int(started)) if number.isdecimal() and started.isdecimal() else None

    @classmethod
    def with_id(cls, number: int) -> "Process | None":
        """Return the living process with this id on this host."""
        fields = _stat(number)
        return cls(socket.gethostname(), number, int(fields[19])) if fields else None

    def has_ended(self) -> bool:
        """Return whether it was a process of this host that has ended; processes of other hosts cannot be seen."""
        return self.host == socket.gethostname() and Process.with_id(self.id) != self


def ancestors() -> list[Process]:
    """Return the parent of this process, its parent and so on."""
    processes = []
    fields = _stat(os.getpid())
    while fields and int(fields[1]) > 1:
        parent = Process.with_id(int(fields[1]))
        if parent is None:
            break
        processes.append(parent)
        fields = _stat(parent.id)
    return processes


def _stat(number: int) -> list[str] | None:
    """Return the fields of /proc/<number>/stat from the state on, or None if the process has ended."""
    try:
        text = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name of a program may contain blanks
    return None if fields[0] in ("Z", "X") else fields


# Stages end with their workflow


def announce_workflow() -> None:
    """Name this process as the workflow of the stages that it starts, unless it belongs to a workflow itself."""
    current = Process.with_id(os.getpid())
    if current is not None and not _workflow_ancestors():
        os.environ[WORKFLOW] = current.text
        os.environ[PACKAGE] = str(bundled.PACKAGE)


def end_with_workflow() -> None:
    """Send SIGTERM to this process when the workflow that started it ends, or a process between them.

    A stage that outlived its workflow would write files while the next workflow makes them again. Without a workflow
    nothing happens. Raises ValueError if the workflow has ended already, or runs other code than this process.
    """
    workflow = _workflow()
    if workflow is not None and workflow.has_ended():
        raise ValueError("the workflow that started this stage has ended; run the workflow again")
    watched = _workflow_ancestors()
    package = str(bundled.PACKAGE)
    if watched and os.environ.get(PACKAGE, package) != package:
        raise ValueError(
            f"the workflow runs the code of {os.environ[PACKAGE]}, its stage that of {package}: put the `ssl-core` "
            "beside the workflow's `snakemake` first on the PATH, or run `make install`"
        )
    descriptors = []
    with suppress(OSError, AttributeError):  # a system without pidfd
        descriptors = [os.pidfd_open(process.id) for process in watched]
    if descriptors:
        threading.Thread(target=_end_with, args=(descriptors,), daemon=True).start()


def _end_with(descriptors: Sequence[int]) -> None:
    select.select(descriptors, [], [])  # a descriptor is readable when its process has ended
    with suppress(OSError, ValueError):  # the terminal may be closed
        print("the workflow that started this stage has ended: stopping", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _workflow() -> Process | None:
    return Process.parse(os.environ.get(WORKFLOW, ""))


def _workflow_ancestors() -> list[Process]:
    """Return the ancestors of this process up to its workflow; none if the workflow is no ancestor."""
    chain, workflow = ancestors(), _workflow()
    if workflow is None or workflow not in chain:
        return []
    return chain[: chain.index(workflow) + 1]


def remove_stale_locks(folder: Path) -> None:
    """Remove the locks that a killed Snakemake left in `folder`, so that nobody has to call it with --unlock.

    Every workflow shares a `flock` on one file until it ends. If no other one shares it, and the last one ran on this
    host, Snakemake's locks are stale. Without `flock` nothing happens.
    """
    host = socket.gethostname().encode()
    with suppress(OSError):
        folder.mkdir(exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(folder / "workflows.lock", flags, 0o644)  # open until this process ends
        with suppress(BlockingIOError):  # another workflow runs
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locks = list((folder / "locks").glob("*.lock"))
            if locks and os.pread(descriptor, 1 << 16, 0) == host:
                for lock in locks:
                    lock.unlink()
                print("removed the locks of a workflow that was killed", file=sys.stderr, flush=True)
                locks = []
            if not locks:  # others belong to another host
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, host, 0)
        fcntl.flock(descriptor, fcntl.LOCK_SH)


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent, which has the id `parent`, ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


# A mapped file that is cut short


def report_bus_error(check: Callable[[], object]) -> None:
    """On SIGBUS print the `ValueError` of `check`, which names the changed file, and exit with status 2.

    The kernel sends SIGBUS to a process that reads a memory-mapped file behind its new end. A handler of Python's
    `signal` would run after the read, which never returns; this one is called by the kernel, in the thread that reads.
    """
    global _bus_error_handler  # the kernel calls it, so it must live as long as the process
    system_signal = ctypes.CDLL(None).signal
    system_signal.argtypes, system_signal.restype = [ctypes.c_int, SignalHandler], ctypes.c_void_p

    def report(_number: int) -> None:
        reason = "all shards are whole; look for a changed file of weights or a failing disk"
        try:
            check()
        except ValueError as error:
            reason = str(error)
        finally:
            print(f"error: a file was cut short while it was read (SIGBUS): {reason}", file=sys.stderr, flush=True)
            os._exit(2)

    _bus_error_handler = SignalHandler(report)
    system_signal(signal.SIGBUS, _bus_error_handler)


SignalHandler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_bus_error_handler: object = None


# Locks


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold a lock file, which stays: alone or with others that share it.

    Without `wait` a `BlockingIOError` is raised if another stage holds it.
    """
    descriptor = _open_lock(path)
    try:
        if not _lock(descriptor, shared=shared):
            if not wait:
                raise BlockingIOError
            print(f"waiting for another stage, which holds {path}", file=sys.stderr, flush=True)
            _lock(descriptor, shared=shared, wait=True)
        yield
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def _lock(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file; without `wait` return whether no other process holds it."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


# One writer


@contextmanager
def one_writer(path: Path, subject: str) -> Iterator[None]:
    """Hold the lock file `path` of `subject`; it is removed at the end.

    A writer whose workflow was killed is about to end and is waited for. Raises ValueError with the name of any other
    writer, before anything is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(path, subject)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is released, so that it cannot be another writer's
        os.close(descriptor)


def _acquire(path: Path, subject: str) -> int:
    """Return the open and locked file."""
    while True:
        descriptor = _open_lock(path)
        if not _lock_for_writing(descriptor):
            writer = _read_writer(descriptor)
            if not _is_orphan(writer):
                os.close(descriptor)
                raise ValueError(f"{subject} is being written by {_describe(writer)}: wait until it ends, or end it")
            print(f"{subject}: waiting for {_describe(writer)}, whose workflow has ended", file=sys.stderr, flush=True)
            _lock(descriptor, wait=True)
        if _is_file_at(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(_this_writer()).encode())
            return descriptor
        os.close(descriptor)  # the writer before removed this file


def _lock_for_writing(descriptor: int) -> bool:
    try:
        return _lock(descriptor)
    except OSError as error:  # a network file system without locks
        print(f"warning: no protection against a second writer: flock: {error.strerror}", file=sys.stderr)
        return True


def _is_file_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _this_writer() -> dict[str, object]:
    job = next((os.environ[name] for name in JOB_VARIABLES if name in os.environ), None)
    current = Process.with_id(os.getpid())
    return {
        "process": current.text if current else "",
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "job": job,
        "workflow": [process.text for process in _workflow_ancestors()],
    }


def _read_writer(descriptor: int) -> dict[str, object]:
    """Return the content of a lock file; nothing if its writer has not written it yet."""
    try:
        writer = json.loads(os.pread(descriptor, 1 << 16, 0))
    except ValueError:
        return {}
    return writer if isinstance(writer, dict) else {}


def _is_orphan(writer: dict[str, object]) -> bool:
    """Return whether the workflow of a writer, or a process between them, has ended on this host."""
    texts = writer.get("workflow")
    processes = [Process.parse(str(text)) for text in texts] if isinstance(texts, list) else []
    return any(process is not None and process.has_ended() for process in processes)


def _describe(writer: dict[str, object]) -> str:
    process = Process.parse(str(writer.get("process")))
    if process is None:
        return "another process"
    job = f", job {writer['job']}" if writer.get("job") else ""
    return f"process {process.id} on {process.host} (since {writer.get('since')}{job})"
