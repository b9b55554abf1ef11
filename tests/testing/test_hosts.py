"""Simulated hosts reach one another, an eavesdropper hears them, and nothing stays behind."""

import os
import sys
from collections.abc import Iterator
from typing import Literal

import pytest

from sealane.testing.capture import Capture, CaptureRefused, start_capture
from sealane.testing.hosts import SimulatedHost, make_hosts, namespaces_work
from sealane.testing.problems import RigError
from sealane.testing.wiretap import Wiretap, flip_bit

NETWORKS = ["loopback", pytest.param("netns", marks=pytest.mark.skipif(not namespaces_work(), reason="needs root"))]
SERVE = """
import socket, sys
server = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("listens", flush=True)
connection = server.accept()[0]
while data := connection.recv(4096):
    print(data, flush=True)
"""
SEND = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2]))).sendall(sys.argv[3].encode())"


@pytest.fixture(params=NETWORKS)
def hosts(request: pytest.FixtureRequest) -> Iterator[list[SimulatedHost]]:
    with make_hosts(["a", "b", "mallory"], network=request.param) as made:
        yield made


def test_hosts_talk_and_the_eavesdropper_hears(hosts: list[SimulatedHost]) -> None:
    a, b, _ = hosts
    capture = start_capture(a, port=b.port)
    if isinstance(capture, CaptureRefused):
        pytest.skip(capture.reason)
    server = b.start(sys.executable, "-c", SERVE, b.address, str(b.port))
    server.wait_for("listens")
    a.run(sys.executable, "-c", SEND, b.address, str(b.port), "hear this")
    server.wait_for("hear this")
    capture.stop()
    assert capture.packets > 3
    assert capture.count(b"hear this") >= 1
    assert not capture.contains(b"never said")


def test_a_wiretap_on_the_attackers_host(hosts: list[SimulatedHost]) -> None:
    a, b, mallory = hosts
    server = b.start(sys.executable, "-c", SERVE, b.address, str(b.port))
    server.wait_for("listens")
    with Wiretap((b.address, b.port), tampers=[flip_bit("forward", offset=0)], host=mallory) as wire:
        a.run(sys.executable, "-c", SEND, *map(str, wire.address), "hear this")
        server.wait_for("iear this")
    assert "hear this" not in server.output
    assert (wire.connections, wire.failures) == (1, [])


def test_two_hosts_share_a_cable() -> None:
    with make_hosts(["a", "b"]) as (a, b):
        assert a.address != b.address
        assert len(bytes(a.scratch)) < 60
        if a.namespace:
            assert "1: lo" in b.run("ip", "-o", "link").stdout
            assert "10.83" not in os.popen("ip -o address").read()


def test_environment_and_failures(hosts: list[SimulatedHost]) -> None:
    a = hosts[0]
    assert a.run("sh", "-c", "echo $SEALANE_STATE_DIR").stdout == f"{a.paths.state}\n"
    with pytest.raises(RigError, match=r"sh on a ended with 3: .*oh no"):
        a.run("sh", "-c", "echo oh no; exit 3")
    ended = a.start("sh", "-c", "echo sorry")
    with pytest.raises(RigError, match="sorry"):
        ended.wait_for("never")


@pytest.mark.parametrize("network", NETWORKS)
def test_nothing_stays_behind_even_after_a_failure(network: Literal["netns", "loopback"]) -> None:
    made: list[SimulatedHost] = []

    def fail() -> None:
        with make_hosts(["a", "b"], network=network) as hosts:
            made.extend(hosts)
            hosts[0].start("sh", "-c", "setsid sleep 1000 & echo ready; exec sleep 1000").wait_for("ready")
            assert len(hosts[0].processes()) >= 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    for host in made:
        assert host.processes() == []
        assert not host.directory.parent.exists()
        assert host.namespace is None or not host.namespace.exists()


def test_a_user_without_rights_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with make_hosts(["a"], network="loopback") as (a,):
        a.interface = "no-such-interface"
        refused = start_capture(a)
        assert not isinstance(refused, Capture)
        assert "no-such-interface" in refused.reason
