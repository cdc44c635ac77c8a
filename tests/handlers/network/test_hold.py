import array
import errno
import fcntl
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from handlers.errors import GiveUp
from handlers.network import netns, nft, sandbox
from handlers.network.hold import KERNEL_LIMIT, Hold, find_holds, is_held
from handlers.network.sandbox import Sandbox

pytestmark = pytest.mark.kernel

POD, PORT = "10.77.1.10", 7000
ETH_P_ALL = 3
SO_RCVBUFFORCE = 33


@contextmanager
def connection(lab, box: Sandbox) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield the client's and the pod's end of one TCP connection."""
    with ExitStack() as opened:
        listener = opened.enter_context(netns.open_socket(box.netns, socket.AF_INET, socket.SOCK_STREAM))
        listener.bind((POD, PORT))
        listener.listen()
        client = opened.enter_context(netns.open_socket(lab.client, socket.AF_INET, socket.SOCK_STREAM))
        client.settimeout(5)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.connect((POD, PORT))
        served, _ = listener.accept()
        opened.enter_context(served)
        served.settimeout(5)
        served.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # Nagle would wait for ACKs that are held
        exchange(client, served)
        listener.close()
        yield client, served


@contextmanager
def held(box: Sandbox) -> Iterator[Hold]:
    with closing(Hold.prepare(box)) as hold:
        hold.engage()
        yield hold


def exchange(client: socket.socket, served: socket.socket, times: int = 3) -> None:
    for _ in range(times):
        client.sendall(b"ping")
        assert read(served, 4) == b"ping"
        served.sendall(b"pong")
        assert read(client, 4) == b"pong"


def read(source: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = source.recv(size - len(data))
        assert part, "the connection was closed"
        data += part
    return data


def silent(sock: socket.socket, seconds: float) -> bool:
    """Wait, and tell whether nothing came: no data, no FIN, no RST."""
    return not select.select([sock], [], [], seconds)[0]


def unacknowledged(sock: socket.socket) -> int:
    size = array.array("i", [0])
    fcntl.ioctl(sock, termios.TIOCOUTQ, size)
    return size[0]


def timeouts(where: Path) -> int:
    """How often TCP's retransmission timer ran out in this namespace."""

    def count() -> int:
        names, values = (line.split() for line in Path("/proc/thread-self/net/netstat").read_text().splitlines()[:2])
        return int(dict(zip(names, values, strict=True))["TCPTimeouts"])

    return netns.call_in(where, count)


class Sniffer:
    """Sees every frame that reaches the client."""

    def __init__(self, lab) -> None:
        self.socket = netns.open_socket(lab.client, socket.AF_PACKET, socket.SOCK_RAW)
        self.socket.bind(("eth0", ETH_P_ALL))
        self.socket.setblocking(False)

    def from_pod(self, seconds: float) -> list[bytes]:
        """Return the TCP flags of each frame from the pod that comes within that time, and what came before."""
        flags, end = [], time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and select.select([self.socket], [], [], left)[0]:
            frame, sender = self.socket.recvfrom(70000)
            if sender[2] != socket.PACKET_OUTGOING and frame[26:30] == socket.inet_aton(POD):
                flags.append(frame[47:48])
        return flags


def test_nothing_is_acknowledged_and_nothing_lost_while_held(lab):
    box = lab.pod("one", "node-a")
    lab.route("node-a")
    data = b"x" * 10_000
    with connection(lab, box) as (client, served), held(box) as hold:
        before = timeouts(lab.client)
        client.sendall(data)
        assert silent(client, 0.1)
        assert silent(served, 0)
        assert unacknowledged(client) == len(data)
        taken = hold.take()
        assert sum(map(len, taken)) > len(data)
        released = hold.release(taken)
        assert read(served, len(data)) == data
        assert released.played >= len(taken)
        assert released.dropped == 0
        exchange(client, served)
        assert timeouts(lab.client) == before
        assert not is_held(box)


def test_a_long_hold_ends_with_the_release_and_not_with_the_clients_timer(lab):
    box = lab.pod("one", "node-a")
    lab.route("node-a")
    with connection(lab, box) as (client, served), held(box) as hold:
        client.sendall(b"ping")
        # The client's timer runs at about 0.2, 0.6 and 1.4 s: just after 0.6 s is the worst moment.
        assert silent(client, 0.7)
        start = time.monotonic()
        hold.release()
        assert read(served, 4) == b"ping"
        served.sendall(b"pong")
        assert read(client, 4) == b"pong"
        assert time.monotonic() - start < 0.1


def test_what_the_pod_sends_while_held_goes_out_at_the_release(lab):
    box = lab.pod("one", "node-a")
    lab.route("node-a")
    with connection(lab, box) as (client, served), held(box) as hold:
        served.sendall(b"answer")
        assert silent(client, 0.05)
        sent = hold.take_sent()
        assert len(sent) >= 1
        assert hold.release(sent=sent).sent >= 1
        assert read(client, 6) == b"answer"
        assert hold.release().sent == 0


def test_destroying_a_held_pod_tells_the_client_nothing(lab):
    box = lab.pod("one", "node-a")
    lab.route("node-a")
    with connection(lab, box) as (client, served), held(box):  # never released: this side has lost
        sniffer = Sniffer(lab)
        with closing(sniffer.socket):
            served.close()  # a FIN
            client.sendall(b"meets a closed socket")  # would be answered by an RST
            sandbox.destroy("one", node=box.node)
            assert silent(client, 0.3)
            assert sniffer.from_pod(0.3) == []


def test_the_sniffer_of_the_test_before_would_have_seen_it(lab):
    box = lab.pod("one", "node-a")
    lab.route("node-a")
    with connection(lab, box) as (client, served):
        sniffer = Sniffer(lab)
        with closing(sniffer.socket):
            served.close()
            assert any(flags[0] & 1 for flags in sniffer.from_pod(0.2))
            assert not silent(client, 0)


HOLD_AND_DIE = """
import os, signal, sys
from handlers.network import sandbox
from handlers.network.hold import Hold
from pathlib import Path
hold = Hold.prepare(sandbox.find("one", node=Path(sys.argv[1])))
hold.engage()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_hold_outlives_its_process_and_is_adopted(lab):
    box = lab.pod("one", "node-a")
    lab.route("node-a")
    with connection(lab, box) as (client, served):
        dead = subprocess.run([sys.executable, "-c", HOLD_AND_DIE, str(box.node)], check=False)
        assert dead.returncode == -signal.SIGKILL
        client.sendall(b"first")
        assert silent(served, 0.05)
        found = sandbox.find("one", node=box.node)
        assert found == box
        assert find_holds([found]) == [box]
        with closing(Hold.adopt(found)) as hold:
            client.sendall(b"second")
            assert silent(served, 0.05)
            hold.release()
            assert read(served, 11) == b"firstsecond"
            assert hold.release().played == 0
        exchange(client, served)
        with pytest.raises(GiveUp, match="not held"):
            Hold.adopt(box)


@contextmanager
def numbered(lab, count: int) -> Iterator[None]:
    """Send `count` numbered datagrams to the pod, meanwhile."""

    def send() -> None:
        with netns.open_socket(lab.client, socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.connect((POD, PORT))
            for number in range(count):
                sender.send(struct.pack("I", number))

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


def datagrams(receiver: socket.socket) -> list[int]:
    numbers = []
    while not silent(receiver, 0.05):
        numbers.append(struct.unpack("I", receiver.recv(4))[0])
    return numbers


@pytest.fixture
def box_with_receiver(lab):
    box = lab.pod("one", "node-a")
    lab.route("node-a")
    with netns.open_socket(box.netns, socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        receiver.bind((POD, PORT))
        yield box, receiver


def test_held_datagrams_arrive_once_and_in_order(lab, box_with_receiver):
    box, receiver = box_with_receiver
    with held(box) as hold:
        for _ in range(3):
            with numbered(lab, 500):
                pass
        first, *rest = hold.take()
        with numbered(lab, 10):
            pass
        assert hold.release([first, *rest]).played == 1510
    assert datagrams(receiver) == [*range(500)] * 3 + [*range(10)]


def test_a_frame_that_comes_while_the_rules_are_set_is_kept(lab, box_with_receiver, monkeypatch):
    box, receiver = box_with_receiver
    with closing(Hold.prepare(box)) as hold:
        set_rules = hold._pod_rules.execute

        def and_at_once_a_frame(request: bytes) -> None:
            set_rules(request)
            with numbered(lab, 1):
                pass

        monkeypatch.setattr(hold._pod_rules, "execute", and_at_once_a_frame)
        hold.engage()
        monkeypatch.undo()
        hold.release()
    assert datagrams(receiver) == [0]


def test_no_new_frame_overtakes_those_that_are_played(lab, box_with_receiver, monkeypatch):
    box, receiver = box_with_receiver
    with held(box) as hold:
        with numbered(lab, 3):
            pass
        play = hold._host_end.send

        def after_a_new_frame(outgoing: Iterator[bytes]) -> int:
            with numbered(lab, 1):
                pass
            return play(outgoing)

        monkeypatch.setattr(hold._host_end, "send", after_a_new_frame)
        hold.release()
    assert datagrams(receiver)[:3] == [0, 1, 2]


def test_nothing_is_lost_when_a_hold_begins_and_ends_under_load(lab, box_with_receiver):
    """Frames may come twice, or late, while the rules are being switched; lost they never are."""
    box, receiver = box_with_receiver
    with numbered(lab, 8000):
        for _ in range(5):
            with held(box) as hold:
                select.select([], [], [], 0.02)
                assert hold.release(hold.take()).dropped == 0
    assert set(datagrams(receiver)) == set(range(8000))


def test_taking_over_a_hold_leaves_no_gap(lab, box_with_receiver):
    box, receiver = box_with_receiver
    with held(box), numbered(lab, 8000):
        for _ in range(30):
            Hold.adopt(box).close()
    assert silent(receiver, 0)


def test_a_hold_that_lacks_one_direction_is_completed(lab, box_with_receiver):
    box, receiver = box_with_receiver
    with held(box) as hold:
        nft.release(hold._pod_rules, nft.release_request(box.pod_table))
    with closing(Hold.adopt(box)) as hold, numbered(lab, 10):
        pass
    assert silent(receiver, 0)


def test_the_oldest_frames_are_kept_when_there_are_too_many(lab, box_with_receiver):
    box, receiver = box_with_receiver
    with held(box) as hold:
        with numbered(lab, KERNEL_LIMIT // 500):  # a small frame takes more than 500 bytes of kernel memory
            pass
        taken = hold.take()
        assert hold.dropped > 0
        hold.release(taken)
    got = datagrams(receiver)
    assert 1000 < len(got) < KERNEL_LIMIT // 500
    assert got == list(range(len(got)))


def test_a_hold_may_be_asked_for_twice_and_again_after_its_release(lab, box_with_receiver):
    box, receiver = box_with_receiver
    with held(box) as hold:
        for _ in range(2):
            hold.engage()
            with numbered(lab, 2):
                pass
            hold.engage()
            assert is_held(box)
            assert silent(receiver, 0)
            assert hold.release().played == 2
            assert not is_held(box)
            assert datagrams(receiver) == [0, 1]


def test_a_hold_that_cannot_be_completed_is_taken_back(lab, monkeypatch):
    box = lab.pod("one", "node-a")
    with closing(Hold.prepare(box)) as hold:

        def refuse(request: bytes) -> None:
            raise OSError(errno.ENOMEM, "no memory")

        monkeypatch.setattr(hold._host_rules, "execute", refuse)
        with pytest.raises(GiveUp, match="no memory"):
            hold.engage()
        assert not is_held(box)


def test_releasing_after_a_restart_works_held_or_not(lab, box_with_receiver):
    box, receiver = box_with_receiver
    with held(box), numbered(lab, 1):
        pass
    for _ in range(2):
        with closing(Hold.prepare(box)) as hold:
            assert hold.release().dropped == 0
        assert not is_held(box)
    with numbered(lab, 1):
        pass
    assert datagrams(receiver) == [0]


def test_frames_that_are_not_the_pods_are_not_played(lab, box_with_receiver):
    box, receiver = box_with_receiver
    with held(box) as hold:
        with numbered(lab, 2):
            pass
        good, other = hold.take()
        at = other.index(socket.inet_aton(POD))
        other = other[:at] + socket.inet_aton("10.77.1.99") + other[at + 4 :]
        released = hold.release([good, other, b"garbage", b""])
    assert (released.played, released.dropped) == (1, 3)
    assert datagrams(receiver) == [0]


def test_the_event_loop_hears_of_frames(lab, box_with_receiver):
    box, _ = box_with_receiver
    with held(box) as hold:
        hold.take()
        with numbered(lab, 1):
            pass
        assert select.select([hold], [], [], 1)[0] == [hold]
        assert len(hold.take()) == 1
        assert hold.take() == []


def test_a_hold_is_engaged_and_released_within_a_few_milliseconds(lab):
    box = lab.pod("one", "node-a")
    spent = []
    for _ in range(10):
        with closing(Hold.prepare(box)) as hold:
            start = time.perf_counter()
            hold.engage()
            middle = time.perf_counter()
            hold.release()
            spent.append((middle - start, time.perf_counter() - middle))
    engage, release = (statistics.median(column) * 1e3 for column in zip(*spent, strict=True))
    print(f"engage {engage:.2f} ms, release {release:.2f} ms")
    assert min(column[0] for column in spent) < 0.002
    assert min(column[1] for column in spent) < 0.002


def test_a_sandbox_that_is_gone_cannot_be_held(lab):
    box = lab.pod("one", "node-a")
    sandbox.destroy("one", node=box.node)
    with pytest.raises(GiveUp):
        Hold.prepare(box)
