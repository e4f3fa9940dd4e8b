"""Nodes that train together: the first one runs the stage, each other one runs `ssl-core join`.

The first node listens at SSL_RENDEZVOUS (host:port) or, under SLURM, at a free port, and starts the others with `srun`.
It sends the job to them; messages are lines of JSON. The connections last to the end: a node sends its outcome before
it ends, so a connection that closes without one means that the node was lost.
"""

import json
import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ssl_core.data import remote_shards
from ssl_core.experiments.processes import Stop

RENDEZVOUS = "SSL_RENDEZVOUS"
LOOPBACK = "127.0.0.1"
START_SECONDS = 300  # until all nodes must have met
ANSWER_SECONDS = 10  # until a node must have answered to a first message
GRACE_SECONDS = 5  # after the end of another node: most processes notice it by themselves
LAST_SECONDS = 10  # for processes to end after SIGTERM when another node is lost; most wait for it and cannot
LOST_SECONDS = 20  # until the kernel reports that a node is off or its cable is out
DONE, STOPPED = "done", "stopped"  # outcomes; any other one is an error message
LONGEST_MESSAGE = 2**24

Message = dict[str, Any]


class Link:
    """A connection to another node."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(ANSWER_SECONDS)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
            connection.setsockopt(socket.IPPROTO_TCP, option, LOST_SECONDS // 4)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        self.connection = connection
        self.name: str = connection.getpeername()[0]
        self._lines = connection.makefile("rwb")

    def send(self, **message: Any) -> None:
        """Send a message; a lost node is noticed when its answer is read."""
        with suppress(OSError, ValueError):  # it is broken or closed
            self._lines.write(json.dumps(message).encode() + b"\n")
            self._lines.flush()

    def receive(self) -> Message:
        """Return the next message; an empty one if the node has ended, or is none."""
        try:
            message = json.loads(self._lines.readline(LONGEST_MESSAGE))
        except (OSError, ValueError):
            return {}
        return message if isinstance(message, dict) else {}

    def close(self) -> None:
        """Close the connection, also while another thread waits for a message."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self._lines.close()
        self.connection.close()


class Team:
    """This node and its connections to the others: the first node's to each, another's to the first."""

    def __init__(self, rank: int, size: int, endpoint: str, links: Sequence[Link]) -> None:
        self.rank, self.size = rank, size
        self.endpoint = endpoint  # of the store through which the processes meet
        self._links = links
        self._outcomes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._ending = threading.Event()
        # gloo would resolve the host's name, which often means the loopback address
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(links[0].connection.getsockname()[0]))
        for link in links:
            link.connection.settimeout(None)
            threading.Thread(target=self._watch, args=(link,), daemon=True).start()

    def _watch(self, link: Link) -> None:
        """End this process after the other node, since its own processes may wait for the other's without end."""
        lost = "lost: it was killed, switched off or cut off; run the same command again to continue"
        outcome = link.receive().get("outcome", lost)
        if outcome == DONE:
            return
        self._outcomes.put(outcome if outcome == STOPPED else f"node {link.name}: {outcome}")
        grace = START_SECONDS if outcome == STOPPED else GRACE_SECONDS  # this node may still save its checkpoint
        if not self._ending.wait(grace):
            os.kill(os.getpid(), signal.SIGTERM)
        if outcome != STOPPED and not self._ending.wait(LAST_SECONDS):
            for process in multiprocessing.active_children():
                process.kill()

    def raise_failure(self, seconds: float = GRACE_SECONDS) -> None:
        """Raise the error of another node (`Stop` if it was stopped) if it comes within `seconds`."""
        with suppress(queue.Empty):
            outcome = self._outcomes.get(timeout=seconds)
            if outcome == STOPPED:
                raise Stop(128 + signal.SIGTERM) from None
            raise ValueError(outcome) from None

    @contextmanager
    def outcome_is_sent(self) -> Iterator["Team"]:
        """Send the outcome of the block to the other nodes."""
        outcome = STOPPED
        try:
            yield self
            outcome = DONE
        except Exception as error:
            outcome = str(error)
            raise
        finally:
            self._ending.set()
            for link in self._links:
                link.send(outcome=outcome)


@contextmanager
def lead(nodes: int, job: Message, identity: dict[str, str]) -> Iterator[Team]:
    """Wait for the other nodes as the first one, and send them the job.

    `identity` has the versions of code and data, which must be the same on all nodes.
    """
    with (
        _listen(nodes) as server,
        _start_others(nodes, server.getsockname()[1], job["threads"]) as others,
        ExitStack() as connections,
    ):
        links = _welcome(server, nodes, others, connections)
        for rank, link in enumerate(links, start=1):
            link.send(rank=rank, nodes=nodes, job=job, identity=identity, shards=remote_shards.address())
        for link in links:
            link.connection.settimeout(None)  # it may copy shards for hours
            answer = link.receive()
            if not answer.get("ready"):
                raise ValueError(f"node {link.name}: {answer.get('outcome', 'it ended before the training started')}")
        store = TCPStore(LOOPBACK, 0, is_master=True, multi_tenant=True, wait_for_workers=False)
        for link in links:
            link.send(port=store.port)
        with Team(0, nodes, f"{LOOPBACK}:{store.port}", links).outcome_is_sent() as team:
            yield team


@contextmanager
def join() -> Iterator[tuple[Link, Message]]:
    """Connect to the first node; yield the connection and the first message. An error is sent to the first node."""
    host, port = _endpoint()
    link, message = _connect(host, port)
    with closing(link):
        try:
            yield link, message
        except ValueError as error:
            link.send(outcome=str(error))
            raise


def start(link: Link, message: Message) -> Team:
    """Wait until all nodes are ready."""
    host, _ = _endpoint()
    link.connection.settimeout(None)  # further nodes may copy shards for hours
    link.send(ready=True)
    port = link.receive().get("port")
    if port is None:
        raise ValueError(f"the first node ({host}) ended before the training started: its output has the reason")
    return Team(message["rank"], message["nodes"], f"{host}:{port}", [link])


def _endpoint() -> tuple[str, int]:
    """Return host and port of SSL_RENDEZVOUS."""
    text = os.environ.get(RENDEZVOUS, "")
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"{RENDEZVOUS} is {text!r}: set it to host:port of the first node, as in 10.0.0.1:29500")
    return host, int(port)


def _listen(nodes: int) -> socket.socket:
    """Return the listening socket of the first node. It takes connections on all addresses of this machine."""
    if RENDEZVOUS not in os.environ:
        if "SLURMD_NODENAME" in os.environ:  # in a job, on its first node
            return socket.create_server(("", 0))
        raise ValueError(
            f"training.nodes is {nodes}: run it under SLURM (workflow/profiles/slurm), or set {RENDEZVOUS}=host:port "
            "with an address of this machine and run `ssl-core join` with the same setting on the other nodes"
        )
    host, port = _endpoint()
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
    except OSError as error:
        raise ValueError(
            f"{RENDEZVOUS}: {host} is not an address of this machine ({error.strerror}): set the address at which the "
            "other nodes reach this one, and run `ssl-core join` there"
        ) from None
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise ValueError(
            f"{RENDEZVOUS}: port {port} is not free ({os.strerror(error.errno or 0)}): choose another"
        ) from None
    print(
        f"waiting for {nodes - 1} more node(s): run `{RENDEZVOUS}={host}:{port} ssl-core join` there", file=sys.stderr
    )
    return server


def _welcome(
    server: socket.socket, nodes: int, others: "subprocess.Popen[str] | None", connections: ExitStack
) -> list[Link]:
    """Return the connections of the other nodes in the order in which they came; `connections` closes them."""
    server.settimeout(1)
    links: list[Link] = []
    end = time.monotonic() + START_SECONDS
    while len(links) < nodes - 1:
        if others is not None and others.poll() is not None:
            raise ValueError("srun ended before the other nodes came: its output has the reason")
        if time.monotonic() > end:
            raise ValueError(
                f"{len(links) + 1} of {nodes} nodes (training.nodes) met within {START_SECONDS} s: run `ssl-core join` "
                f"on the others, with {RENDEZVOUS} set to an address and port of this node that no firewall blocks"
            )
        with suppress(TimeoutError):
            link = connections.enter_context(closing(Link(server.accept()[0])))
            if "joining" in link.receive():
                links.append(link)
    return links


def _connect(host: str, port: int) -> tuple[Link, Message]:
    """Return the connection to the first node and its message, which has the job."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        try:
            link = Link(socket.create_connection((host, port), ANSWER_SECONDS))
        except socket.gaierror as error:
            raise ValueError(f"{RENDEZVOUS}: the host {host!r} is not known here ({error.strerror})") from None
        except OSError:  # the first node does not listen yet
            time.sleep(1)
            continue
        link.send(joining=socket.gethostname())
        link.connection.settimeout(START_SECONDS)  # the first node waits for all others
        message = link.receive()
        if "job" in message:
            return link, message
        link.close()
        time.sleep(1)
    raise ValueError(
        f"no training waited for this node at {host}:{port} within {START_SECONDS} s: start one with training.nodes "
        f"there, with the same {RENDEZVOUS}; if it runs, it has all its nodes"
    )


@contextmanager
def _start_others(nodes: int, port: int, threads: int) -> Iterator["subprocess.Popen[str] | None"]:
    """Under SLURM run `ssl-core join` on the other nodes of the job; by hand the user does."""
    if RENDEZVOUS in os.environ:
        yield None
        return
    # SLURM_JOB_NODELIST has the nodes of this step only, of which Snakemake's plugin makes one.
    nodelist = _slurm("squeue", "--noheader", "--jobs", os.environ["SLURM_JOB_ID"], "--format", "%N")
    hosts = _slurm("scontrol", "show", "hostnames", nodelist).split()
    if len(hosts) != nodes:
        raise ValueError(
            f"SLURM gave this job {len(hosts)} node(s), training.nodes is {nodes}: set the job's `nodes` to it"
        )
    hosts.remove(os.environ["SLURMD_NODENAME"])
    # Options of the surrounding step are in variables, which srun would take for its own.
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SRUN_"))}
    variables |= {name: os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_CONF") if name in os.environ}
    variables[RENDEZVOUS] = f"{socket.gethostname()}:{port}"
    step = ["srun", "--overlap", f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", f"--nodelist={','.join(hosts)}"]
    step += [f"--cpus-per-task={threads}", "--kill-on-bad-exit=0"]
    program = str(Path(sys.executable).with_name("ssl-core"))
    others = subprocess.Popen(
        [*step, program, "join", "--threads", str(threads)], env=variables, start_new_session=True, text=True
    )
    try:
        yield others
    finally:
        with suppress(subprocess.TimeoutExpired):
            others.wait(GRACE_SECONDS)
        others.terminate()
        others.wait()


def _slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _interface(address: str) -> str:
    """Return the network interface that has this address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return "lo"
