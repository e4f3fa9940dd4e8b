"""Several nodes, here agents on one host: who meets whom, and one line for each mistake."""

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ssl_core.stages import nodes, pretrain
from tests.slurm.cluster import is_open
from tests.waiting import wait_until

JOB = {"threads": 1}


@pytest.fixture
def rendezvous(monkeypatch: pytest.MonkeyPatch) -> str:
    """A free port of the loopback address, in the environment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv(nodes.RENDEZVOUS, address)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return address


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that wait one second for each other."""
    monkeypatch.setattr(nodes, "START_SECONDS", 1)


def lead(size: int = 2) -> None:
    with nodes.lead(size, JOB, {}):
        pass


def join(check: Callable[[nodes.Message], Any] = lambda message: None) -> None:
    with nodes.join() as (link, message):
        check(message)
        with nodes.start(link, message).outcome_is_sent():
            pass


def refuse(message: nodes.Message) -> None:
    raise ValueError("code differs")


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    """Threads for the other nodes."""
    with ThreadPoolExecutor() as threads:
        yield threads


def test_nodes_without_a_place_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (nodes.RENDEZVOUS, "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ValueError, match=r"training\.nodes is 2: run it under SLURM .* or set SSL_RENDEZVOUS=host:port"
    ):
        lead()


@pytest.mark.parametrize("text", ["", "host", "host:", ":29500", "host:port", "host:70000"])
def test_a_place_that_is_no_host_and_port(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nodes.RENDEZVOUS, text)
    with pytest.raises(ValueError, match=r"SSL_RENDEZVOUS is .*: set it to host:port of the first node"):
        join()


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid"])
def test_the_first_node_leads_at_its_own_address(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nodes.RENDEZVOUS, f"{host}:29500")
    with pytest.raises(ValueError, match=f"{host} is not an address of this machine"):
        lead()


def test_a_port_in_use(rendezvous: str) -> None:
    with (
        socket.create_server(("127.0.0.1", int(rendezvous.split(":")[1]))),
        pytest.raises(ValueError, match=r"port \d+ is not free \(Address already in use\): choose another"),
    ):
        lead()


def test_a_node_that_never_comes(rendezvous: str, impatient: None) -> None:
    with pytest.raises(ValueError, match=r"1 of 2 nodes \(training\.nodes\) met within 1 s: run `ssl-core join`"):
        lead()


def test_a_first_node_that_never_comes(rendezvous: str, impatient: None) -> None:
    with pytest.raises(ValueError, match=f"no training waited for this node at {rendezvous} within 1 s"):
        join()


def test_a_third_node_of_two_is_not_needed(
    rendezvous: str, background: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "START_SECONDS", 2)
    others = [background.submit(join) for _ in range(2)]
    lead()
    messages = [str(other.exception()) for other in others if other.exception()]
    assert len(messages) == 1
    assert "if it runs, it has all its nodes" in messages[0]


def test_the_first_node_has_the_reason_of_another(rendezvous: str, background: ThreadPoolExecutor) -> None:
    other = background.submit(join, refuse)
    with pytest.raises(ValueError, match=r"node 127\.0\.0\.1: code differs"):
        lead()
    assert str(other.exception()) == "code differs"


def test_another_program_at_the_port_is_no_node(
    rendezvous: str, impatient: None, background: ThreadPoolExecutor
) -> None:
    first = background.submit(lead)
    wait_until(lambda: is_open(rendezvous.split(":")[1]), seconds=5)  # a connection without a word
    with pytest.raises(ValueError, match="1 of 2 nodes"):
        first.result()


@pytest.mark.parametrize(
    ("training", "identical"),
    [
        ({"nodes": 2}, {"gpus": 2}),
        ({"gpus": 2, "nodes": 2}, {"gpus": 4}),
        ({"nodes": 1}, {}),
        ({"gpus": 1}, {"gpus": 1}),
    ],
)
def test_gpus_and_nodes_count_by_their_product(training: dict[str, int], identical: dict[str, int]) -> None:
    others = {"seed": 0}
    text = pretrain._identifying_spec({"training": {**others, **training}})
    assert text == pretrain._identifying_spec({"training": {**others, **identical}})


def test_the_interface_is_the_one_of_the_address() -> None:
    assert nodes._interface("127.0.0.1") == "lo"
    assert os.environ.get(nodes.RENDEZVOUS) is None
