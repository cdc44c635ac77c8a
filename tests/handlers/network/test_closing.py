"""Connections that cannot go on are aborted, also while their owner is frozen."""

import errno
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from handlers.network import closing, conntrack, netns
from handlers.network.conntrack import Entry, Tuple

pytestmark = pytest.mark.kernel
HERE = ipaddress.ip_address("127.0.0.1")
NODE = ipaddress.ip_address("10.77.0.11")
POD = ipaddress.ip_address("10.77.1.10")
PEER = ipaddress.ip_address("192.0.2.7")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
        with ours, theirs:
            yield ours, theirs


def ends_of(one: socket.socket) -> Tuple:
    return Tuple(HERE, one.getsockname()[1], HERE, one.getpeername()[1])


def test_an_aborted_connection_is_heard_of_at_once(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = pair
    absent, there = Tuple(HERE, 1, HERE, 2), ends_of(ours)
    assert closing.close(netns.HERE, [absent, there]) == [there]
    with pytest.raises(OSError, match="abort") as heard:
        ours.send(b"x")
    assert heard.value.errno == errno.ECONNABORTED


def test_others_are_left_alone(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    assert closing.close(netns.HERE, []) == []
    assert closing.close(netns.HERE, [Tuple(HERE, ours.getsockname()[1], HERE, 9)]) == []
    ours.send(b"x")
    assert theirs.recv(1) == b"x"


def test_a_namespace_that_is_not_there_is_an_error() -> None:
    with pytest.raises(OSError, match="No such file"):
        closing.close(Path("/run/netns/nobody"), [Tuple(HERE, 1, HERE, 2)])


def test_the_pod_s_own_end_comes_first() -> None:
    """Outwards behind the node's address, and inwards through a port of the node."""
    out = Entry(6, Tuple(POD, 40000, PEER, 443), Tuple(PEER, 443, NODE, 40000), 100)
    inwards = Entry(6, Tuple(PEER, 5000, NODE, 30080), Tuple(POD, 80, NODE, 5000), 100)
    assert conntrack.unkeepable([out, inwards], [str(NODE)]) == [out, inwards]
    assert conntrack.as_the_pod_sees(out, str(POD)) == Tuple(POD, 40000, PEER, 443)
    assert conntrack.as_the_pod_sees(inwards, str(POD)) == Tuple(POD, 80, NODE, 5000)
