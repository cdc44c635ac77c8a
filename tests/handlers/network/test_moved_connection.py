"""A TCP connection moved between two nodes, with the hold as it is used in a migration.

TCP_REPAIR does here for one socket what CRIU does for a process (tcp(7) has none of it: linux/tcp.h, and CRIU's soccr).
"""

import fcntl
import select
import socket
import struct
import termios
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from handlers.network import frames, netns, sandbox
from handlers.network.hold import Hold
from handlers.network.routes import Route, point

pytestmark = pytest.mark.kernel

POD, PORT = "10.77.1.10", 7000
TCP = socket.IPPROTO_TCP
REPAIR, QUEUE, QUEUE_SEQ, OPTIONS, TIMESTAMP, WINDOW = 19, 20, 21, 22, 24, 29
RECEIVED, SENT = 1, 2
MSS, WINDOW_SCALE, SACK, TIMESTAMPS = 2, 3, 4, 8


@dataclass
class Connection:
    peer: tuple[str, int]
    sequence: dict[int, int]
    queued: dict[int, bytes]
    options: bytes
    timestamp: int
    window: bytes


def queued(sock: socket.socket, ioctl: int) -> int:
    return struct.unpack("i", fcntl.ioctl(sock, ioctl, bytes(4)))[0]


def dump(sock: socket.socket) -> Connection:
    sock.setblocking(False)  # a timeout would make Python wait for the socket to be readable first
    sock.setsockopt(TCP, REPAIR, 1)
    info = sock.getsockopt(TCP, socket.TCP_INFO, 104)
    sequence, data = {}, {}
    for queue, ioctl in ((RECEIVED, termios.FIONREAD), (SENT, termios.TIOCOUTQ)):
        sock.setsockopt(TCP, QUEUE, queue)
        size = queued(sock, ioctl)
        data[queue] = sock.recv(size, socket.MSG_PEEK | socket.MSG_DONTWAIT) if size else b""
        sequence[queue] = (struct.unpack("I", sock.getsockopt(TCP, QUEUE_SEQ, 4))[0] - size) % 2**32
    has, scale = info[5], info[6]  # of struct tcp_info: options, window scales
    options = struct.pack("II", MSS, sock.getsockopt(TCP, socket.TCP_MAXSEG))
    if has & 4:
        options += struct.pack("II", WINDOW_SCALE, scale & 15 | scale >> 4 << 16)
    if has & 2:
        options += struct.pack("II", SACK, 0)
    if has & 1:
        options += struct.pack("II", TIMESTAMPS, 0)
    window = sock.getsockopt(TCP, WINDOW, 20)
    return Connection(sock.getpeername(), sequence, data, options, sock.getsockopt(TCP, TIMESTAMP), window)


def restore(where: Path, state: Connection) -> socket.socket:
    sock = netns.open_socket(where, socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(TCP, REPAIR, 1)
    for queue, sequence in state.sequence.items():
        sock.setsockopt(TCP, QUEUE, queue)
        sock.setsockopt(TCP, QUEUE_SEQ, struct.pack("I", sequence))
    sock.bind((POD, PORT))
    sock.connect(state.peer)
    sock.setsockopt(TCP, OPTIONS, state.options)
    sock.setsockopt(TCP, TIMESTAMP, state.timestamp)
    for queue, data in state.queued.items():
        sock.setsockopt(TCP, QUEUE, queue)
        if data:
            sock.send(data)
    sock.setsockopt(TCP, WINDOW, state.window)
    return sock


def counters(where: Path) -> dict[str, int]:
    def read() -> dict[str, int]:
        lines = Path("/proc/thread-self/net/netstat").read_text().splitlines()
        names, values = (line.split()[1:] for line in lines[:2])
        return dict(zip(names, map(int, values), strict=True))

    return netns.call_in(where, read)


def read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        assert part, "the connection was closed"
        data += part
    return data


@pytest.fixture
def connected(lab):
    """The two nodes' sandboxes, and both ends of a connection to the one on node-a."""
    with ExitStack() as opened:
        source = lab.pod("source", "node-a")
        target = lab.pod("target", "node-b", held=True)
        lab.route("node-a")
        listener = opened.enter_context(netns.open_socket(source.netns, socket.AF_INET, socket.SOCK_STREAM))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((POD, PORT))
        listener.listen()
        client = opened.enter_context(netns.open_socket(lab.client, socket.AF_INET, socket.SOCK_STREAM))
        client.connect((POD, PORT))
        served = opened.enter_context(listener.accept()[0])
        for end in (client, served):
            end.setsockopt(TCP, socket.TCP_NODELAY, 1)
            end.settimeout(5)
        for _ in range(5):
            client.sendall(b"ping")
            served.sendall(read(served, 4))
            read(client, 4)
        yield lab, source, target, client, served


@pytest.mark.parametrize("pause", [0.05, 0.7])
def test_a_connection_moves_and_its_client_waits_for_no_timer(connected, pause):
    lab, source, target, client, served = connected
    with (
        closing(Hold.prepare(source)) as at_source,
        closing(Hold.adopt(target)) as at_target,
    ):
        before = counters(lab.client)
        at_source.engage()
        served.sendall(b"half an answer, ")  # written between hold and freeze
        client.sendall(b"a request")  # meets nobody
        state = dump(served)
        assert state.queued[RECEIVED] == b""
        assert state.queued[SENT].endswith(b"half an answer, ")
        sent = at_source.take_sent()
        select.select([], [], [], pause)
        moved = restore(target.netns, state)
        with closing(moved):
            moved.settimeout(5)
            moved.setsockopt(TCP, REPAIR, 0)  # sends a window probe; the hold keeps it
            # The hand-over: the owner has changed.
            block = frames.pack(at_source.take())
            start = time.monotonic()
            point(Route(POD, dev=target.host_dev), node=target.node)
            lab.route("node-b")
            at_target.release(frames.unpack(block), sent)
            assert read(moved, 9) == b"a request"
            moved.sendall(b"then all of it")
            assert read(client, 30) == b"half an answer, then all of it"
            assert time.monotonic() - start < 0.15
            if pause < 0.2:
                assert counters(lab.client)["TCPTimeouts"] == before["TCPTimeouts"]
            # The loser stays mute to its end, and what still came there is forwarded.
            sandbox.destroy("source", node=source.node)
            client.sendall(b"x" * 300_000)
            assert read(moved, 300_000) == b"x" * 300_000
            assert counters(target.netns)["TCPTimeouts"] == 0


def test_frames_that_came_to_the_old_node_are_forwarded(connected):
    _, source, target, client, served = connected
    with (
        closing(Hold.prepare(source)) as at_source,
        closing(Hold.adopt(target)) as at_target,
    ):
        at_source.engage()
        moved = restore(target.netns, dump(served))
        with closing(moved):
            moved.settimeout(5)
            moved.setsockopt(TCP, REPAIR, 0)
            at_target.release()
            client.sendall(b"late")  # its route still leads to the old node
            assert select.select([at_source], [], [], 1)[0]
            start = time.monotonic()
            assert at_target.play(at_source.take()) >= 1
            assert read(moved, 4) == b"late"
            assert time.monotonic() - start < 0.1
