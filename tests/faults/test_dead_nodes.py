"""One of two nodes is killed, cut off or stopped: the other ends with one line, and the same commands continue."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from ssl_core.data import remote_shards
from ssl_core.data.object_store import object_store
from tests.data.s3_server import running_server
from tests.waiting import wait_until

from .conftest import COMMANDS, SPEC, Undisturbed, Warm, contents
from .test_dead_ranks import MINUTE, whole

__all__ = ["whole"]  # a fixture: the files of two processes on one node
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
TRAINING = [*COMMANDS["pretrain"], "--spec", json.dumps({**SPEC, "training": {**SPEC["training"], "nodes": 2}})]
ANY_KEY = {"AWS_ACCESS_KEY_ID": "AKIAANYKEY", "AWS_SECRET_ACCESS_KEY": "any-secret"}
LOST = "lost: it was killed, switched off or cut off; run the same command again to continue"
Nodes = tuple["subprocess.Popen[str]", "subprocess.Popen[str]"]


def start(
    folder: Path,
    address: str,
    *,
    namespaces: Sequence[str] = ("", ""),
    variables: Sequence[Mapping[str, str]] = ({}, {}),
) -> Nodes:
    """Start the first node and the other one, each in a network namespace if it is named, and in a process group."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    commands = (["pretrain", *TRAINING], ["join"])
    started = []
    for namespace, arguments, more in zip(namespaces, commands, variables, strict=True):
        inside = ["ip", "netns", "exec", namespace] if namespace else []
        started.append(
            subprocess.Popen(
                [*inside, str(Path(sys.executable).with_name("ssl-core")), *arguments],
                cwd=folder,
                env={**os.environ, "SSL_RENDEZVOUS": f"{address}:{port}", "SSL_TRACKING": "off", **more},
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    return started[0], started[1]


def finish(nodes: Nodes) -> list[tuple[int, str]]:
    """Return status and output of both nodes."""
    outputs = [node.communicate(timeout=300)[1] for node in nodes]
    return [(node.returncode, output) for node, output in zip(nodes, outputs, strict=True)]


def assert_continues(folder: Path, address: str, whole: dict[str, bytes], namespaces: Sequence[str] = ("", "")) -> None:
    (first, output), (other, _) = finish(start(folder, address, namespaces=namespaces))
    assert (first, other) == (0, 0), output
    assert "continuing at step" in output
    assert without_nodes(contents(folder)) == without_nodes(whole)


def without_nodes(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files without the numbers of nodes and of their processes, which the summary lists as settings."""
    summary = json.loads(files["results/tiny/pretrain.json"])
    for key in ("gpus", "nodes"):
        del summary["resolved"]["training"][key]
    return {**files, "results/tiny/pretrain.json": json.dumps(summary).encode()}


@pytest.fixture
def project(undisturbed: Undisturbed, tmp_path: Path) -> Path:
    return shutil.copytree(undisturbed.before["pretrain"], tmp_path / "project")


@pytest.fixture
def namespaces() -> Iterator[Sequence[str]]:
    """Two network namespaces, 10.77.0.1 and 10.77.0.2, with a cable between them."""
    names = [f"ssl{os.getpid()}n{number}" for number in (1, 2)]
    if os.geteuid() != 0 or shutil.which("ip") is None or subprocess.call(["ip", "netns", "add", names[0]]):
        pytest.skip("network namespaces need root and `ip`")
    subprocess.run(["ip", "netns", "add", names[1]], check=True)
    cable = ["ip", "link", "add", "cable", "netns", names[0], "type", "veth", "peer", "cable", "netns", names[1]]
    subprocess.run(cable, check=True)
    for number, name in enumerate(names, start=1):
        subprocess.run(["ip", "-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable"], check=True)
        for device in ("lo", "cable"):
            subprocess.run(["ip", "-n", name, "link", "set", device, "up"], check=True)
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_node_ends_the_other_within_a_minute(
    victim: int, project: Path, warm: Warm, whole: dict[str, bytes]
) -> None:
    nodes = start(project, "127.0.0.1")
    wait_until((project / "checkpoints" / "tiny.pt").exists)
    nodes[victim].kill()
    killed = time.monotonic()
    status, output = finish(nodes)[1 - victim]
    assert time.monotonic() - killed < MINUTE
    assert status == 2
    assert [line for line in output.splitlines() if line.startswith("error: ")] == [f"error: node 127.0.0.1: {LOST}"]
    assert_continues(project, "127.0.0.1", whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("victim", [0, 1])
def test_both_nodes_save_on_a_signal_to_one(
    victim: int, number: signal.Signals, project: Path, whole: dict[str, bytes]
) -> None:
    nodes = start(project, "127.0.0.1")
    wait_until((project / "checkpoints" / "tiny.pt").exists)
    if number == signal.SIGINT:
        os.killpg(nodes[victim].pid, number)  # as a terminal does
    else:
        nodes[victim].send_signal(number)
    ended = finish(nodes)
    assert ended[victim][0] == 128 + number, ended
    assert ended[1 - victim][0] == 128 + signal.SIGTERM, ended
    assert "Traceback" not in ended[0][1] + ended[1][1]
    assert_continues(project, "127.0.0.1", whole)


def test_a_cut_cable_ends_both_nodes_within_a_minute(
    project: Path, namespaces: Sequence[str], whole: dict[str, bytes]
) -> None:
    nodes = start(project, "10.77.0.1", namespaces=namespaces)
    wait_until((project / "checkpoints" / "tiny.pt").exists)
    subprocess.run(["ip", "-n", namespaces[1], "link", "set", "cable", "down"], check=True)
    cut = time.monotonic()
    for status, output in finish(nodes):
        assert status == 2
        assert LOST in output
    assert time.monotonic() - cut < MINUTE
    subprocess.run(["ip", "-n", namespaces[1], "link", "set", "cable", "up"], check=True)
    assert_continues(project, "10.77.0.1", whole, namespaces=namespaces)


def test_nodes_with_a_cache_each_train_from_object_storage(
    project: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first node sends the address of the shards to the other one."""
    with running_server(tmp_path) as server:
        server.call("PUT", "/bucket")
        for name, value in {**ANY_KEY, "AWS_ENDPOINT_URL": server.endpoint}.items():
            monkeypatch.setenv(name, value)
        address = {"SSL_SHARDS": "s3://bucket/shards"}
        with monkeypatch.context() as patch:
            patch.setenv("SSL_SHARDS", address["SSL_SHARDS"])
            object_store.cache_clear()
            remote_shards.upload(project / "datasets" / "tiny.yaml", project / "shards" / "tiny")
        for file in (project / "shards" / "tiny").glob("*-0*"):
            file.unlink()
        server.requests()
        caches = [tmp_path / "first", tmp_path / "other"]
        variables = [{"SSL_CACHE": str(caches[0]), **address}, {"SSL_CACHE": str(caches[1])}]
        (first, output), (other, errors) = finish(start(project, "127.0.0.1", variables=variables))
        assert (first, other) == (0, 0), output + errors
        requests = Counter(server.requests())
    assert results(without_nodes(contents(project))) == results(without_nodes(whole))
    assert set(requests.values()) == {2}  # one per node
    copies = [{path.name for path in cache.rglob("train-0*")} for cache in caches]
    assert copies == [{"train-000000.tar", "train-000000.idx"}] * 2
    assert all(f"/{name}" in "".join(requests) for name in copies[0])


def results(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.startswith("results/")}
