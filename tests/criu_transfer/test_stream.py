import os
import select
import socket
import ssl
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from criu_transfer.errors import DeadlinePassed, PeerGone, ProtocolError
from criu_transfer.stream import Credentials, Listener, Stream, connect, wait

HOST = "127.0.0.1"


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


@pytest.fixture
def pool():
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture
def listener(nodes):
    listener = Listener(HOST, range(1), nodes[1])
    yield listener
    listener.close()


@pytest.fixture
def rejections() -> list[str]:
    return []


@pytest.fixture
def accepting(pool, listener, rejections):
    def start(seconds: float = 5.0) -> Future[Stream]:
        return pool.submit(listener.accept, "source", soon(seconds), None, rejections.append)

    return start


@pytest.fixture
def pair(nodes, listener, accepting):
    accepted = accepting()
    with connect(HOST, listener.port, nodes[0], "target", soon()) as source, accepted.result() as target:
        yield source, target


def received(stream: Stream, count: int) -> bytes:
    buffer = bytearray(count)
    stream.recv_exact(memoryview(buffer), soon())
    return bytes(buffer)


def test_bytes_arrive_whole_and_in_order_both_ways(pair, pool) -> None:
    source, target = pair
    blob = os.urandom(5 << 20)
    sending = pool.submit(source.send, blob, soon())
    assert received(target, len(blob)) == blob
    sending.result()
    target.send(b"done", soon())
    assert received(source, 4) == b"done"
    assert (source.peer, target.peer) == ("target", "source")


def test_the_connection_is_tls_1_3(pair) -> None:
    assert {stream._sock.version() for stream in pair} == {"TLSv1.3"}


def test_older_tls_is_refused(nodes, listener, accepting, rejections) -> None:
    accepted = accepting()
    context = nodes[0].context(server=False)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((HOST, listener.port)) as sock, pytest.raises(ssl.SSLError):
        context.wrap_socket(sock)
    assert_right_peer_still_gets_in(nodes, listener, accepted)
    assert len(rejections) == 1


def assert_right_peer_still_gets_in(nodes, listener: Listener, accepted: Future[Stream]) -> None:
    with connect(HOST, listener.port, nodes[0], "target", soon()) as source, accepted.result() as target:
        source.send(b"here", soon())
        assert received(target, 4) == b"here"


@pytest.mark.parametrize(
    "stranger",
    [
        ("other", "source", None),
        ("main", "intruder", None),
        ("main", "nameless", ""),
        ("main", "double", "URI:spiffe://spotguard/node/source,URI:spiffe://spotguard/node/intruder"),
        ("main", "dns", "DNS:spiffe://spotguard/node/source"),
    ],
)
def test_wrong_clients_are_closed_and_listening_goes_on(authority, nodes, listener, accepting, stranger) -> None:
    name, node, san = stranger
    stranger = authority(name).issue(node, names=san)
    accepted = accepting()
    stranger = Credentials(stranger.cert, stranger.key, nodes[0].ca)
    # In TLS 1.3 the client learns only by reading that its certificate was refused.
    with pytest.raises(PeerGone), connect(HOST, listener.port, stranger, "target", soon()) as stream:
        received(stream, 1)
    assert_right_peer_still_gets_in(nodes, listener, accepted)


def test_plain_bytes_and_silent_clients_do_not_block_the_right_one(nodes, listener, accepting, rejections, monkeypatch):
    monkeypatch.setattr("criu_transfer.stream._HANDSHAKE", 0.1)
    accepted = accepting()
    with socket.create_connection((HOST, listener.port)) as garbage, socket.create_connection((HOST, listener.port)):
        garbage.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert_right_peer_still_gets_in(nodes, listener, accepted)
    assert len(rejections) == 2


@pytest.mark.parametrize(("authority_name", "node"), [("other", "target"), ("main", "intruder")])
def test_a_wrong_server_is_refused(authority, nodes, pool, authority_name, node) -> None:
    listener = Listener(HOST, range(1), authority(authority_name).issue(node))
    accepting = pool.submit(listener.accept, "source", soon(0.3), None, lambda _: None)
    with pytest.raises(ProtocolError, match=r"TLS with target failed|not spiffe"):
        connect(HOST, listener.port, nodes[0], "target", soon())
    with pytest.raises(PeerGone), accepting.result() as stream:
        received(stream, 1)
    listener.close()


def test_nobody_there_is_peer_gone(nodes) -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(PeerGone, match="cannot connect"):
        connect(HOST, port, nodes[0], "target", soon())


def test_a_silent_server_costs_the_deadline_and_no_more(nodes) -> None:
    with socket.create_server((HOST, 0)) as server:
        began = time.monotonic()
        with pytest.raises(PeerGone, match="stalled"):
            connect(HOST, server.getsockname()[1], nodes[0], "target", soon(0.1))
        assert time.monotonic() - began < 0.2


def test_nobody_comes(accepting) -> None:
    with pytest.raises(PeerGone, match="stalled"):
        accepting(0.05).result()


def test_a_stalled_peer_ends_reading_and_writing_at_the_deadline(pair) -> None:
    source, target = pair
    for stalled in (
        lambda deadline: target.recv_exact(memoryview(bytearray(1)), deadline),
        lambda deadline: source.send(bytes(64 << 20), deadline),
    ):
        began = time.monotonic()
        with pytest.raises(PeerGone, match="stalled"):
            stalled(soon(0.1))
        assert 0.1 <= time.monotonic() - began < 0.25


def test_a_trickle_does_not_stretch_the_deadline(pair) -> None:
    source, target = pair
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.01):
            source.send(b"x", soon())

    thread = threading.Thread(target=trickle)
    thread.start()
    began = time.monotonic()
    try:
        with pytest.raises((PeerGone, DeadlinePassed)):
            target.recv_exact(memoryview(bytearray(1 << 20)), soon(0.15))
        assert time.monotonic() - began < 0.4
    finally:
        stop.set()
        thread.join()


def test_a_deadline_that_has_passed_is_said_before_anything_is_done(pair, nodes, listener) -> None:
    for late in (
        lambda: pair[0].send(b"x", soon(-1)),
        lambda: pair[1].recv_exact(memoryview(bytearray(1)), soon(-1)),
        lambda: connect(HOST, listener.port, nodes[0], "target", soon(-1)),
    ):
        with pytest.raises(DeadlinePassed):
            late()


def test_a_closed_connection_is_peer_gone(pair) -> None:
    source, target = pair
    source.send(b"last", soon())
    source.close()
    with pytest.raises(PeerGone, match="closed"):
        received(target, 5)


def test_abort_from_another_thread_ends_a_wait(pair, pool) -> None:
    source, target = pair
    reading = pool.submit(received, target, 1)
    target.abort()
    with pytest.raises(PeerGone):
        reading.result(timeout=1)
    with pytest.raises(PeerGone):
        received(source, 1)


def test_finish_lets_the_last_words_arrive_although_the_peer_is_still_sending(pair, pool) -> None:
    source, target = pair
    target.send(b"ERROR", soon())
    finishing = pool.submit(target.finish, soon())
    for _ in range(8):
        source.send(bytes(1 << 20), soon())
    assert source.readable()
    assert received(source, 5) == b"ERROR"
    source.close()
    finishing.result(timeout=2)


def test_readable_neither_waits_nor_lies(pair) -> None:
    source, target = pair
    assert not source.readable()
    target.send(b"ab", soon())
    wait(source._sock.fileno(), select.POLLIN, soon())
    assert source.readable()
    assert received(source, 1) == b"a"
    assert source.readable()  # the rest has left the socket and waits inside OpenSSL
    assert received(source, 1) == b"b"
    assert not source.readable()


def test_a_watched_descriptor_is_served_while_waiting(pair) -> None:
    _, target = pair
    reader, writer = socket.socketpair()

    class Watch:
        def fileno(self) -> int:
            return reader.fileno()

        def ready(self) -> None:
            raise KeyboardInterrupt(reader.recv(9))

    target._watch = Watch()
    writer.send(b"stop")
    with pytest.raises(KeyboardInterrupt):
        target.recv_exact(memoryview(bytearray(1)), soon())
    reader.close()
    writer.close()


def test_a_port_of_the_range_is_taken(nodes) -> None:
    first = Listener(HOST, range(1), nodes[1])
    second = Listener(HOST, range(first.port, first.port + 20), nodes[1])
    assert first.port < second.port < first.port + 20
    with pytest.raises(OSError, match="in use"):
        Listener(HOST, range(first.port, first.port + 1), nodes[1])
    first.close()
    second.close()
