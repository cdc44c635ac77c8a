import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from criu_transfer.errors import GiveUp, StateMissing
from criu_transfer.messages import Hello, Mode
from criu_transfer.sender import Sender
from criu_transfer.stream import connect
from criu_transfer.wire import PAGE

pytestmark = pytest.mark.kernel

MIB = 1 << 20
HELLO = Hello("m1", "source", "target", 64 * MIB, 64 * MIB, 64 * MIB)
# The real receiver with rewriting and paging replaced: every page of process 7 is wanted, and the "pager" writes the
# memory it was given to a file, or, told so by a file "hang", waits as a keeper does.
FAKE = """
import os, sys
from pathlib import Path
from criu_transfer import receiver
from criu_transfer.errors import StateMissing
def make_lazy(image_dir, sources):
    missing = (image_dir / "missing")
    if missing.exists() and missing.read_text() == "yes":
        raise StateMissing("a page is missing")
    return {vpid: list(source.coverage) for vpid, source in sources.items()}
def serve(configuration, complete, control):
    control.watch_by_signal()
    control.emit({"event": "pager-listening"})
    image_dir = configuration.expected.image_dir
    for vpid, ranges in complete.lazy.items():
        content = b"".join(os.pread(complete.sources[vpid].fd, end - start, start) for start, end in ranges)
        (image_dir / f"memory-{vpid}").write_bytes(content)
    if (image_dir / "hang").exists():
        reader, _ = os.pipe()
        os.read(reader, 1)
    control.emit({"event": "filled"})
sys.exit(receiver.main(make_lazy=make_lazy, serve=serve))
"""


@dataclass(frozen=True)
class Process:
    pid: int
    vpid: int
    starttime: int


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


class Receiver:
    """A running receiver process, as its agent holds it."""

    def __init__(self, config: dict, program: list[str]) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(10)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, *program, "--control-fd", str(theirs.fileno())], pass_fds=(theirs.fileno(),)
            )
        self.lines = self.sock.makefile("rb")
        self.say(config)

    def say(self, message: dict) -> None:
        self.sock.sendall(json.dumps(message).encode() + b"\n")

    def event(self, name: str) -> dict:
        event = json.loads(self.lines.readline() or b'{"event":"(closed)"}')
        assert event["event"] == name, event
        return event

    def hang_up(self) -> None:
        self.lines.close()
        self.sock.close()

    def exit(self) -> int:
        return self.process.wait(timeout=10)


@pytest.fixture
def config(nodes, tmp_path) -> dict:
    (tmp_path / "images").mkdir()
    (tmp_path / "upper").mkdir()
    return {
        "migration": "m1",
        "source": "source",
        "target": "target",
        "host": "127.0.0.1",
        "ports": [0, 0],
        "cert": str(nodes[1].cert),
        "key": str(nodes[1].key),
        "ca": str(nodes[1].ca),
        "image_dir": str(tmp_path / "images"),
        "trees": {"upper": str(tmp_path / "upper")},
        "limits": {"max_memory": 64 * MIB, "max_images": 64 * MIB, "max_files": 64 * MIB},
        "cgroup": "/sys/fs/cgroup/none",
    }


@pytest.fixture
def start(config):
    running = []

    def start(*program: str, **changes: object) -> Receiver:
        running.append(Receiver(config | changes, list(program or ("-c", FAKE))))
        return running[-1]

    yield start
    for receiver in running:
        receiver.hang_up()
        receiver.process.kill()
        receiver.process.wait()


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "dump"
    folder.mkdir()
    (folder / "inventory.img").write_bytes(b"inventory")
    return folder


@pytest.fixture
def send(nodes):
    """Connect to a receiver and greet it."""
    streams = []

    def connected(receiver: Receiver, port: int = 0) -> Sender:
        port = port or receiver.event("listening")["port"]
        streams.append(connect("127.0.0.1", port, nodes[0], "target", soon()))
        sender = Sender(streams[-1])
        sender.hello(HELLO, soon())
        receiver.event("connected")
        return sender

    yield connected
    for stream in streams:
        stream.close()


def send_memory(sender: Sender, source, images: Path) -> Process:
    process = Process(source.pid, 7, 1)
    sender.announce(process, soon())
    sender.send_pages(process, [source.range(0, len(source.plan))], soon())
    sender.send_images(images, soon())
    return process


def test_a_live_migration_to_its_end(start, send, child, images, tmp_path) -> None:
    receiver, source = start(), child("ab-c")
    sender = send(receiver)
    process = send_memory(sender, source, images)
    sender.mark(soon())
    assert receiver.event("mark")["held"] == 3 * PAGE
    sender.end({7: process}, Mode.LIVE, soon())
    complete = receiver.event("state-complete")
    assert (complete["mode"], complete["rewrite_s"] >= 0) == ("live", True)
    receiver.event("pager-listening")
    receiver.event("filled")
    memory = (tmp_path / "images/memory-7").read_bytes()
    assert memory == b"a" * PAGE + b"b" * PAGE + bytes(PAGE) + b"c" * PAGE
    receiver.say({"do": "keep"})
    assert receiver.exit() == 0


def test_stop_and_copy_goes_through_the_real_rewriting_and_waits_to_be_let_go(start, send, images) -> None:
    receiver = start("-m", "criu_transfer.receiver")
    sender = send(receiver)
    sender.send_images(images, soon())
    sender.end({}, Mode.STOP_AND_COPY, soon())
    assert receiver.event("state-complete")["mode"] == "stop-and-copy"
    assert receiver.event("filled")["bytes"] == 0
    receiver.say({"do": "keep"})
    assert receiver.exit() == 0


def test_missing_state_can_be_paid(start, send, child, images) -> None:
    (images / "missing").write_text("yes")
    receiver, source = start(), child("a")
    sender = send(receiver)
    process = send_memory(sender, source, images)
    with pytest.raises(StateMissing):
        sender.end({7: process}, Mode.LIVE, soon())
    receiver.event("state-missing")
    (images / "missing").write_text("no")
    sender.send_images(images, soon())
    sender.end({7: process}, Mode.LIVE, soon())
    receiver.event("state-complete")


def test_wrong_peers_do_not_disturb(start, send, authority) -> None:
    receiver = start()
    port = receiver.event("listening")["port"]
    stranger = authority("main").issue("stranger")
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"\x16\x03\x01garbage, that is no client hello")
        receiver.event("rejected")
    with pytest.raises(GiveUp), connect("127.0.0.1", port, stranger, "target", soon()) as stream:
        Sender(stream).hello(HELLO, soon())
    assert "stranger" in receiver.event("rejected")["reason"]
    send(receiver, port)
    with pytest.raises(GiveUp, match="cannot connect"):
        connect("127.0.0.1", port, stranger, "target", soon())


def test_a_source_that_goes_is_told_to_the_agent(start, send) -> None:
    receiver = start()
    send(receiver)._stream.close()
    assert receiver.event("failed")["kind"] == "PeerGone"
    assert receiver.exit() == 1


def test_a_deadline_ends_the_wait_for_the_source(start) -> None:
    receiver = start(deadline=soon(0.3))
    receiver.event("listening")
    assert receiver.event("failed")["kind"] == "PeerGone"
    assert receiver.exit() == 1


@pytest.mark.parametrize("stage", ["listening", "connected", "keeping", "waiting"])
def test_it_never_outlives_an_agent_that_did_not_say_so(start, send, child, images, stage) -> None:
    receiver = start()
    if stage == "listening":
        receiver.event("listening")
    else:
        sender = send(receiver)
        if stage == "keeping":
            (images / "hang").touch()
        if stage != "connected":
            process = send_memory(sender, child("a"), images)
            sender.end({7: process}, Mode.LIVE, soon())
            receiver.event("state-complete")
            receiver.event("pager-listening")
        if stage == "waiting":
            receiver.event("filled")
    receiver.hang_up()
    assert receiver.exit() == 3


def test_it_ends_when_the_agent_goes_before_it_has_said_what_to_receive() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-m", "criu_transfer.receiver", "--control-fd", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
    assert process.wait(timeout=10) == 3


def test_it_outlives_an_agent_that_said_so(start, send, child, images) -> None:
    (images / "hang").touch()
    receiver = start()
    sender = send(receiver)
    sender.end({7: send_memory(sender, child("a"), images)}, Mode.LIVE, soon())
    receiver.event("state-complete")
    receiver.event("pager-listening")
    receiver.say({"do": "keep"})
    receiver.hang_up()
    with pytest.raises(subprocess.TimeoutExpired):
        receiver.process.wait(timeout=0.3)
    os.kill(receiver.process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ports": [5, 4]}, "ports"),
        ({"ports": "0"}, "ports"),
        ({"image_dir": "relative"}, "absolute"),
        ({"trees": {"images": "/tmp"}}, "no tree can be named"),
        ({"trees": {"upper": 1}}, "absolute"),
        ({"limits": {"max_memory": -1}}, "max_memory"),
        ({"deadline": "soon"}, "deadline"),
        ({"surprise": 1}, "surprise"),
        ({"cert": "/nowhere"}, "No such file"),
    ],
)
def test_a_wrong_configuration_is_named(start, change, message) -> None:
    receiver = start(**change)
    assert message in receiver.event("failed")["error"]
    assert receiver.exit() == 1


def test_words_that_it_does_not_know(start) -> None:
    receiver = start()
    receiver.event("listening")
    receiver.say({"do": "dance"})
    assert "dance" in receiver.event("failed")["error"]
    assert receiver.exit() == 1


def test_it_imports_next_to_nothing() -> None:
    program = "import criu_transfer.receiver, sys; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    loaded = set(output.split())
    heavy = {"asyncio", "structlog", "aiohttp", "pyroute2", "pycriu", "google.protobuf", "tenacity", "subprocess"}
    assert "criu_transfer.session" in loaded
    assert not heavy & loaded
