import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from criu_transfer import wire
from criu_transfer.errors import DeadlinePassed, GiveUp, PeerGone, ProtocolError, StateMissing, StoreFull
from criu_transfer.messages import Ack, End, Hello, Mark, Mode, ProcessInfo, Totals
from criu_transfer.ranges import RangeSet
from criu_transfer.sender import Sender
from criu_transfer.session import Expected, Limits, Session
from criu_transfer.stream import Stream
from criu_transfer.wire import HEADER, MAGIC, PAGE, Header, Type, encode_runs, frame

pytestmark = pytest.mark.kernel

MIB = 1 << 20
HELLO = Hello("m1", "source", "target", 64 * MIB, 64 * MIB, 64 * MIB)


@dataclass(frozen=True)
class Process:
    pid: int
    vpid: int
    starttime: int


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


class Target:
    """The receiving side in a thread; `wanted` is what the fake rewriting takes for left out, by vpid."""

    def __init__(self, stream: Stream, folder: Path) -> None:
        self.image_dir, self.upper = folder / "images", folder / "upper"
        self.image_dir.mkdir()
        self.upper.mkdir()
        self.events, self.wanted, self.rewrites = [], {}, 0
        self.expected = Expected(
            "m1", "source", "target", Limits(64 * MIB, 64 * MIB, 64 * MIB), self.image_dir, {"upper": self.upper}
        )
        self.stream = stream
        self.pool = ThreadPoolExecutor(1)
        self.result = None

    def start(self) -> None:
        self.session = Session(
            self.stream, self.expected, emit=self.events.append, make_lazy=self.make_lazy, deadline=soon(20)
        )
        self.result = self.pool.submit(self.run)

    def run(self):
        with self.stream:
            return self.session.run()

    def make_lazy(self, _image_dir: Path, sources) -> dict:
        self.rewrites += 1
        for vpid, ranges in self.wanted.items():
            for start, end in ranges:
                if vpid not in sources or not sources[vpid].coverage.covers(start, end):
                    raise StateMissing(f"process {vpid}: {start:#x} was not received")
        return {vpid: list(ranges) for vpid, ranges in self.wanted.items()}

    def plan(self, complete, child, vpid: int = 7) -> str:
        """Read the child's pages back as letters."""
        letters = []
        for number in range(len(child.plan)):
            page = os.pread(complete.sources[vpid].fd, PAGE, child.base + number * PAGE)
            assert page == page[:1] * PAGE
            letters.append("-" if not page[0] else chr(page[0]))
        return "".join(letters)


@pytest.fixture
def target(streams, tmp_path, monkeypatch):
    monkeypatch.setattr("criu_transfer.session._FINISH_SECONDS", 0.1)
    target = Target(streams[1], tmp_path)
    yield target
    streams[0].close()
    target.pool.shutdown()


@pytest.fixture
def sender(streams, target):
    target.start()
    sender = Sender(streams[0])
    sender.hello(HELLO, soon())
    return sender


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "dump"
    folder.mkdir()
    (folder / "inventory.img").write_bytes(b"inventory")
    (folder / "pages-1.img").write_bytes(random.Random(4).randbytes(300_000))
    (folder / "parent").symlink_to("../parent")
    return folder


def known(child) -> Process:
    return Process(child.pid, 7, 1)


def test_a_whole_migration(sender, target, child, images, tmp_path) -> None:
    source = child("aab--c" * 50 + "x")
    process, everything = known(source), [source.range(0, 301)]
    upper = tmp_path / "source-upper"
    upper.mkdir()
    (upper / "file").write_text("first")
    sender.announce(process, soon())
    sender.announce(process, soon())
    stats = sender.send_pages(process, everything, soon())
    assert (stats.bytes, stats.zero_bytes, stats.owed) == (201 * PAGE, 100 * PAGE, ())
    assert sender.send_tree("upper", upper, soon()).bytes == 5
    marked = sender.mark(soon())
    assert marked.ack == Ack(1, 201 * PAGE, 301 * PAGE, 1)
    assert marked.bytes == 201 * PAGE + 5
    assert marked.throughput > 0

    source.put(3, "d")
    source.put(0, "-")
    (upper / "file").write_text("second")
    sender.send_pages(process, [source.range(0, 1), source.range(3, 4)], soon())
    sender.send_tree("upper", upper, soon(), pids=[source.pid])
    sender.mark(soon())
    assert (target.upper / "file").stat().st_mtime_ns == (upper / "file").stat().st_mtime_ns
    assert sender.send_images(images, soon()).entries == 4  # the directory itself is one
    target.wanted = {7: everything}
    ack = sender.end({7: process}, Mode.LIVE, soon())

    complete = target.result.result()
    assert ack.held == 201 * PAGE
    assert target.plan(complete, source) == "-" + ("aab--c" * 50 + "x")[1:3] + "d" + ("aab--c" * 50 + "x")[4:]
    assert (target.upper / "file").read_text() == "second"
    assert (target.image_dir / "pages-1.img").read_bytes() == (images / "pages-1.img").read_bytes()
    assert complete.lazy == {7: everything}
    assert [event["event"] for event in target.events] == ["mark", "mark"]


def test_debt_is_what_criu_left_out_and_the_ledger_lacks(sender, target, child, images) -> None:
    source = child("abcdef")
    process = known(source)
    sender.announce(process, soon())
    sender.send_pages(process, [source.range(0, 2)], soon())
    left_out = [source.range(1, 3), source.range(4, 6)]
    stats = sender.pay_debt(process, left_out, soon())
    assert stats.bytes == 3 * PAGE
    assert sender.ledger(process) == RangeSet([source.range(0, 3), source.range(4, 6)])
    sender.send_images(images, soon())
    target.wanted = {7: left_out}
    sender.end({7: process}, Mode.LIVE, soon())
    assert target.plan(target.result.result(), source) == "abc-ef"


def test_debt_that_cannot_be_read_is_state_missing(sender, child) -> None:
    source = child("aua")
    sender.announce(known(source), soon())
    with pytest.raises(StateMissing, match="cannot be read"):
        sender.pay_debt(known(source), [source.range(0, 3)], soon())
    assert list(sender.owed(known(source))) == [source.range(1, 2)]


def test_missing_state_is_answered_and_can_be_paid(sender, target, child, images) -> None:
    source = child("abc")
    process = known(source)
    sender.announce(process, soon())
    sender.send_pages(process, [source.range(0, 2)], soon())
    sender.send_images(images, soon())
    target.wanted = {7: [source.range(0, 3)]}
    with pytest.raises(StateMissing, match="was not received"):
        sender.end({7: process}, Mode.LIVE, soon())
    assert not target.result.done()
    sender.pay_debt(process, [source.range(0, 3)], soon())
    sender.end({7: process}, Mode.LIVE, soon())
    assert target.plan(target.result.result(), source) == "abc"
    assert target.rewrites == 2
    assert [event["event"] for event in target.events] == ["state-missing"]


def test_missing_images_are_answered(sender, target, images) -> None:
    with pytest.raises(StateMissing, match="images came"):
        sender.end({}, Mode.STOP_AND_COPY, soon())
    sender.send_images(images, soon())
    tree = sender._trees.pop("images")
    with pytest.raises(StateMissing, match="3 images came, of 0"):
        sender.end({}, Mode.STOP_AND_COPY, soon())
    sender._trees["images"] = tree
    sender.end({}, Mode.STOP_AND_COPY, soon())
    assert target.result.result().mode is Mode.STOP_AND_COPY


def test_an_ended_process_frees_its_memory(sender, target, child) -> None:
    source = child("abc")
    sender.announce(known(source), soon())
    sender.send_pages(known(source), [source.range(0, 3)], soon())
    sender.gone(known(source), soon())
    sender.gone(known(source), soon())
    assert sender.mark(soon()).ack.held == 0


def test_two_incarnations_of_a_pid_have_two_memories(sender, target, child, images) -> None:
    first, second = child("aa"), child("bb")
    for number, source in enumerate((first, second)):
        process = Process(source.pid, 7, number)
        sender.announce(process, soon())
        sender.send_pages(process, [source.range(0, 2)], soon())
    sender.send_images(images, soon())
    sender.end({7: Process(second.pid, 7, 1)}, Mode.LIVE, soon())
    assert target.plan(target.result.result(), second) == "bb"


def test_a_stopped_round_owes_the_rest(sender, child) -> None:
    source = child("abc")
    sender.announce(known(source), soon())
    stats = sender.send_pages(known(source), [source.range(0, 3)], soon(), stop=lambda: True)
    assert stats.owed == (source.range(0, 3),)
    assert not sender.ledger(known(source))


def test_the_store_limit_comes_back_as_store_full(streams, target, child) -> None:
    target.start()
    sender = Sender(streams[0])
    sender.hello(replace(HELLO, max_memory=PAGE), soon())
    source = child("ab")
    sender.announce(known(source), soon())
    sender.send_pages(known(source), [source.range(0, 2)], soon())
    with pytest.raises(StoreFull, match="announced"):
        sender.mark(soon())
    with pytest.raises(StoreFull):
        target.result.result()


def test_an_error_reaches_a_source_that_is_in_the_middle_of_sending(streams, target, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("criu_transfer.session._FINISH_SECONDS", 5.0)
    target.start()
    sender = Sender(streams[0])
    sender.hello(replace(HELLO, max_files=MIB), soon())
    tree = tmp_path / "large"
    tree.mkdir()
    for number in range(24):
        (tree / str(number)).write_bytes(random.Random(number).randbytes(4 * MIB))
    with pytest.raises(StoreFull):
        sender.send_tree("upper", tree, soon())
    assert sender._totals().files < 24 * 4 * MIB
    streams[0].close()
    with pytest.raises(StoreFull):
        target.result.result()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"migration": "other"}, "receiver of m1"),
        ({"source": "other"}, "receiver of m1"),
        ({"max_memory": 64 * MIB + 1}, "max_memory"),
        ({"versions": (9,)}, "no common version"),
    ],
)
def test_refusals_name_the_reason(streams, target, change, message) -> None:
    target.start()
    with pytest.raises(GiveUp, match=message):
        Sender(streams[0]).hello(replace(HELLO, **change), soon())
    with pytest.raises(GiveUp, match=message):
        target.result.result()


def test_progress_is_told_seldom_and_at_each_mark(streams, target, child) -> None:
    target.start()
    told: list[Totals] = []
    sender = Sender(streams[0], progress=told.append)
    sender.hello(HELLO, soon())
    source = child("a" * 4)
    sender.announce(known(source), soon())
    for _ in range(50):
        sender.send_pages(known(source), [source.range(0, 4)], soon())
    sender.mark(soon())
    assert told[-1].data == 200 * PAGE
    assert len(told) < 10


def test_dropped_pages_are_zeros_in_the_largest_process(streams, target, child, images) -> None:
    target.start()
    sender = Sender(streams[0], drop_pages=3)
    sender.hello(HELLO, soon())
    small, large = child("ab"), child("c" * 30 + "-" * 30 + "d" * 30)
    for source, vpid in ((small, 1), (large, 7)):
        process = Process(source.pid, vpid, 1)
        sender.announce(process, soon())
        sender.send_pages(process, [source.range(0, len(source.plan))], soon())
        sender.pay_debt(process, [source.range(0, len(source.plan))], soon())
    sender.send_images(images, soon())
    sender.end({1: Process(small.pid, 1, 1), 7: Process(large.pid, 7, 1)}, Mode.LIVE, soon())
    complete = target.result.result()
    assert target.plan(complete, small, 1) == "ab"
    got = target.plan(complete, large)
    assert got.count("-") == 30 + 2  # one third of the process holds nothing that could be lost
    assert got[0] == got[60] == "-"


def test_a_receiver_that_vanishes_is_peer_gone(streams, sender, target, child) -> None:
    source = child("a" * 10)
    sender.announce(known(source), soon())
    target.stream.abort()
    target.stream.close()
    with pytest.raises(PeerGone):
        sender.mark(soon())
    with pytest.raises(PeerGone):
        sender.send_pages(known(source), [source.range(0, 10)], soon())
    assert not sender.ledger(known(source))


def test_a_deadline_that_has_passed(sender, child) -> None:
    with pytest.raises(DeadlinePassed):
        sender.mark(soon(-1))


# --- receivers that lie


@pytest.mark.parametrize(
    "answer",
    [
        frame(Type.ACK, Ack(2, 0, 0, 0).encode()),
        frame(Type.ACCEPT, b'{"version":1}'),
        frame(Type.MARK, b"{}"),
        frame(Type.ACK, b"{}"),
        b"\0" * 24,
        frame(Type.ERROR, b'{"kind":"new","reason":"","fatal":true}'),
    ],
)
@pytest.mark.parametrize("early", [True, False])
def test_a_lying_receiver_is_a_protocol_error(streams, target, answer, early) -> None:
    def read_and_answer() -> None:
        head = memoryview(bytearray(HEADER.size))
        streams[1].recv_exact(head, soon())
        streams[1].recv_exact(memoryview(bytearray(wire.decode_header(head).payload)), soon())
        streams[1].send(answer, soon())

    if early:
        streams[1].send(answer, soon())
    else:
        target.pool.submit(read_and_answer)
    with pytest.raises(ProtocolError):
        Sender(streams[0]).mark(soon())


def test_a_version_that_was_not_offered(streams) -> None:
    streams[1].send(frame(Type.ACCEPT, b'{"version":2}'), soon())
    with pytest.raises(ProtocolError, match="not offered"):
        Sender(streams[0]).hello(HELLO, soon())


# --- sources that lie

RUN = encode_runs([(0, PAGE)])
ZERO = frame(Type.ZERO, RUN, offset=1)
PROCESS = frame(Type.PROCESS, ProcessInfo(7, 1).encode())


def end(**changes) -> bytes:
    values = {"sequence": 1, "mode": Mode.LIVE, "processes": {}, "images": 0, "totals": Totals()} | changes
    return frame(Type.END, End(**values).encode())


@pytest.mark.parametrize(
    "frames",
    [
        [b"GET / HTTP/1.1\r\nHost: target\r\n\r\n"],
        [ZERO],
        [PROCESS, PROCESS],
        [frame(Type.GONE)],
        [frame(Type.PAGES, RUN + bytes(PAGE), offset=1)],
        [frame(Type.HELLO, HELLO.encode(), offset=MAGIC)],
        [frame(Type.ACK, Ack(1, 0, 0, 0).encode())],
        [frame(Type.FILE_DATA, b"x", number=1)],
        [frame(Type.FILE_DELETE, b'{"tree":"images","path":"x"}')],
        [frame(Type.FILE_DELETE, b'{"tree":"etc","path":"x"}')],
        [frame(Type.MARK, Mark(1, Totals(data=1)).encode())],
        [PROCESS, ZERO, frame(Type.MARK, Mark(1, Totals(zero=PAGE, frames=1)).encode())],
        [end(processes={7: 0})],
        [PROCESS, end(processes={8: 0}, totals=Totals(frames=1))],
        [wire.encode_header(Header(Type.FILE_HOLE, 1, 0, 1))],
        [HEADER.pack(Type.PAGES, 0, 0, 0, 1, 1 << 40)],
    ],
)
def test_a_lying_source_is_told_and_left(streams, target, frames, monkeypatch) -> None:
    finish, finished = target.stream.finish, []
    # A close right after the error could overtake it, though seldom where all is on one machine.
    monkeypatch.setattr(target.stream, "finish", lambda deadline: (finished.append(1), finish(deadline)))
    target.start()
    sender = Sender(streams[0])
    sender.hello(HELLO, soon())
    streams[0].send(b"".join(frames), soon())
    kind, payload = sender._receive(soon())
    assert kind is Type.ERROR
    assert b'"kind":"protocol"' in payload
    with pytest.raises(ProtocolError):
        target.result.result()
    assert finished


def test_hello_comes_first(streams, target) -> None:
    target.start()
    streams[0].send(PROCESS, soon())
    with pytest.raises(ProtocolError, match="HELLO must come first"):
        target.result.result(timeout=5)


def test_the_memory_is_freed_when_the_source_goes(streams, sender, target, child) -> None:
    source = child("a" * 10)
    sender.announce(known(source), soon())
    sender.send_pages(known(source), [source.range(0, 10)], soon())
    sender.mark(soon())
    streams[0].close()
    with pytest.raises(PeerGone):
        target.result.result(timeout=5)
    assert target.session._store.held == 0


def test_a_full_disk_is_store_full(streams, target, monkeypatch) -> None:
    monkeypatch.setattr(
        "criu_transfer.filesink.os.pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    target.start()
    sender = Sender(streams[0])
    sender.hello(HELLO, soon())
    sender.send_images(make(target.upper.parent / "dump"), soon())
    with pytest.raises(StoreFull, match="no room"):
        sender.mark(soon())
    with pytest.raises(StoreFull):
        target.result.result()


def make(folder: Path) -> Path:
    folder.mkdir()
    (folder / "file").write_text("x")
    return folder
