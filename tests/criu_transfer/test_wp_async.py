"""Write tracking on real, running processes, compared byte by byte with what they hold when frozen."""

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from criu_transfer import kernel, uffd
from criu_transfer.errors import TrackerUnavailable
from criu_transfer.maps import read_maps
from criu_transfer.proctree import Process
from criu_transfer.tracker import wp_async
from criu_transfer.tracker.base import Tracker
from criu_transfer.tracker.wp_async import ProcessTracker
from tests.criu_transfer.tracked import Child, Model, freeze, pages, present

pytestmark = pytest.mark.kernel

PAGE = kernel.PAGE_SIZE
MIB = 1 << 20
CGROUP = Path("/sys/fs/cgroup/test-wp-async")

Spawn = Callable[..., Child]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    children: list[Child] = []

    def make(program: str, user: int | None = None) -> Child:
        children.append(Child(program, user))
        return children[-1]

    yield make
    for child in children:
        child.close()


@pytest.fixture
def tracker() -> Iterator[ProcessTracker]:
    with ProcessTracker() as tracker:
        yield tracker


def attach(tracker: Tracker, process: Process) -> None:
    tracker.attach(process, time.monotonic() + 5)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    CGROUP.mkdir()
    yield CGROUP
    (CGROUP / "cgroup.kill").write_text("1")
    (CGROUP / "cgroup.freeze").write_text("0")
    limit = time.monotonic() + 5
    while "populated 1" in (CGROUP / "cgroup.events").read_text():
        assert time.monotonic() < limit
    CGROUP.rmdir()


# Four threads write pages; one moves, drops, replaces and protects memory; one forks. Sizes are small, so that every
# page is hit again and again.
RACER = """
area = make(4 * MIB)
shifting = make(2 * MIB)
def writer(seed):
    rnd = random.Random(seed)
    while True:
        write(area + rnd.randrange(1024) * PAGE, rnd.randrange(1, 256))
def mover():
    rnd = random.Random(99)
    chunk = 16 * PAGE
    while True:
        at = shifting + rnd.randrange(32) * chunk
        what = rnd.randrange(5)
        if what == 0: make(chunk, at); put(at, rnd.randrange(1, 256), chunk)
        elif what == 1: libc.madvise(P(at), S(chunk), 4); put(at, rnd.randrange(1, 256), chunk // 2)
        elif what == 2:
            to = shifting + rnd.randrange(32) * chunk
            if to != at:
                assert libc.mremap(P(at), S(chunk), S(chunk), 3, P(to)) != 2**64 - 1
                make(chunk, at)
        elif what == 3: libc.mprotect(P(at), S(chunk), 0); libc.mprotect(P(at), S(chunk), 3)
        else: put(at, rnd.randrange(1, 256), chunk)
def forker():
    while True:
        pid = os.fork()
        if pid == 0: put(area, 7); os._exit(0)
        os.waitpid(pid, 0)
for seed in range(4): threading.Thread(target=writer, args=(seed,), daemon=True).start()
threading.Thread(target=mover, daemon=True).start()
say(area, shifting)
forker()
"""


@pytest.mark.parametrize("attempt", range(3))
def test_rounds_of_a_running_process_give_its_frozen_memory(
    spawn: Spawn, tracker: ProcessTracker, cgroup: Path, attempt: int
) -> None:
    child = spawn(RACER)
    (cgroup / "cgroup.procs").write_text(str(child.pid))
    attach(tracker, child.process)
    model = Model(child.pid)
    for _ in range(12 + attempt):
        model.copy(tracker.scan())
    freeze(cgroup)
    model.copy(tracker.scan(frozen=True))
    assert tracker.scan(frozen=True) == []
    truth = Model(child.pid)
    truth.copy(present(child.pid, clean=False))
    assert len(truth.pages) > 1024
    clean = {page for start, end in present(child.pid, clean=True) for page in range(start, end, PAGE)}
    # Whatever is not clean here would be dumped; after a scan in the freeze, that must be nothing that we track.
    assert {page for page in truth.pages if page not in clean and page in tracker.tracked} == set()
    held = clean - model.owed
    wrong = [hex(page) for page, content in truth.pages.items() if page in held and model.pages.get(page) != content]
    assert wrong == []


def test_a_scan_returns_what_was_written_since_the_last(spawn: Spawn, tracker: ProcessTracker) -> None:
    child = spawn("""
a = make(64 * PAGE); put(a, 1, 32 * PAGE); say(a)
input(); put(a + 3 * PAGE, 2); put(a + 40 * PAGE, 2, 2 * PAGE); b = make(8 * PAGE); put(b, 1, 5 * PAGE); say(b)
input(); libc.madvise(P(a), S(8 * PAGE), 4); ctypes.string_at(a + 2 * PAGE, 1); put(a + PAGE, 3); say()
input(); say()
""")
    (start,) = child.said
    attach(tracker, child.process)
    assert pages(tracker.scan(), start, 64 * PAGE) == set(range(32))
    assert pages(tracker.scan(), start, 64 * PAGE) == set()
    new = int(child.tell())
    ranges = tracker.scan()
    assert pages(ranges, start, 64 * PAGE) == {3, 40, 41}
    assert pages(ranges, new, 8 * PAGE) == {0, 1, 2, 3, 4}  # memory that is new is reported whole
    assert ranges == sorted(ranges)
    child.tell()
    assert pages(tracker.scan(), start, 64 * PAGE) == {1}  # dropped pages and zeros that were only read are in none
    assert start in tracker.tracked
    assert new in tracker.tracked


def test_only_private_anonymous_memory_is_tracked(spawn: Spawn, tracker: ProcessTracker, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(4 * PAGE))
    child = spawn(f"""
f = open({str(file)!r}, 'r+b')
private = mmap.mmap(f.fileno(), 4 * PAGE, flags=mmap.MAP_PRIVATE); private[:] = b'x' * 4 * PAGE
shared = make(4 * PAGE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS); put(shared, 1, 4 * PAGE)
try: droppable = make(4 * PAGE, flags=0x28)
except AssertionError: droppable = shared
locked = make(4 * PAGE); libc.mlock(P(locked), S(4 * PAGE)); put(locked, 1, 4 * PAGE)
say(ctypes.addressof(ctypes.c_char.from_buffer(private)), shared, droppable, locked)
input()
""")
    private, shared, droppable, locked = child.said
    attach(tracker, child.process)
    ranges = tracker.scan()
    for start in (private, shared, droppable):
        assert pages(ranges, start, 4 * PAGE) == set()
        assert start not in tracker.tracked
    assert pages(ranges, locked, 4 * PAGE) == {0, 1, 2, 3}
    vmas = {vma.path: vma for vma in read_maps(child.pid)}
    assert vmas["[stack]"].start in tracker.tracked
    assert vmas["[heap]"].start in tracker.tracked
    assert vmas["[vdso]"].start not in tracker.tracked


def test_memory_replaced_in_its_place_is_reported_whole(spawn: Spawn, tracker: ProcessTracker) -> None:
    """The mappings look the same as before, but the new one is not registered."""
    child = spawn("""
a = make(16 * PAGE); make(PAGE, a + 15 * PAGE, prot=1); put(a, 1, 15 * PAGE); say(a)
input(); libc.munmap(P(a), S(15 * PAGE)); make(15 * PAGE, a); put(a, 2, 10 * PAGE); say()
input(); make(4 * PAGE, a + 4 * PAGE); put(a + 4 * PAGE, 3, 2 * PAGE); say()
input()
""")
    (start,) = child.said
    attach(tracker, child.process)
    assert pages(tracker.scan(), start, 15 * PAGE) == set(range(15))
    child.tell()
    assert pages(tracker.scan(), start, 15 * PAGE) == set(range(10))
    assert start in tracker.tracked
    child.tell()
    assert pages(tracker.scan(), start, 15 * PAGE) >= {4, 5}
    assert pages(tracker.scan(), start, 15 * PAGE) == set()


def test_a_scan_that_fails_half_way_counts_all_as_written(
    spawn: Spawn, tracker: ProcessTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory replaced between registering and scanning: the first half is protected, then the kernel says EPERM."""
    child = spawn("a = make(16 * PAGE); put(a, 1, 16 * PAGE); say(a)\ninput()")
    (start,) = child.said
    attach(tracker, child.process)
    tracker.scan()
    scan, register, failing = kernel.pagemap_scan, uffd.register, [True]

    def fail_once(pagemap: int, begin: int, end: int, vector: object, **options: int) -> tuple[int, int]:
        if failing and begin <= start < end and options["mask"] & kernel.PAGE_IS_WRITTEN:
            failing.clear()
            raise PermissionError(errno.EPERM, "not registered")
        return scan(pagemap, begin, end, vector, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(kernel, "pagemap_scan", fail_once)
    assert pages(tracker.scan(), start, 16 * PAGE) == set(range(16))
    assert start in tracker.tracked
    assert pages(tracker.scan(), start, 16 * PAGE) == set()

    begin = next(a for a, b in tracker._registered if a <= start < b)

    def refuse(fd: int, at: int, length: int, mode: int) -> int:
        if at == begin:
            raise OSError(errno.EINVAL, "not there")
        return register(fd, at, length, mode)

    failing.append(True)
    monkeypatch.setattr(uffd, "register", refuse)
    assert pages(tracker.scan(), start, 16 * PAGE) == set(range(16))
    assert start not in tracker.tracked


def test_a_process_that_runs_another_program_or_exits(spawn: Spawn, tracker: ProcessTracker) -> None:
    child = spawn("say(1); input(); os.execv('/bin/sh', ['sh', '-c', 'echo 2; read x; echo 3'])")
    attach(tracker, child.process)
    tracker.scan()
    assert child.tell() == "2"
    with pytest.raises(TrackerUnavailable):
        tracker.scan()
    tracker.detach()
    attach(tracker, child.process)
    assert tracker.scan()
    assert child.tell() == "3"
    child.popen.wait(5)
    with pytest.raises(TrackerUnavailable):
        tracker.scan()


def test_detaching_gives_everything_back(spawn: Spawn, tracker: ProcessTracker) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    child = spawn("a = make(16 * PAGE); put(a, 1, 16 * PAGE); say(a)\ninput(); say('on')")
    opened = set(Path("/proc/self/fd").iterdir())
    (start,) = child.said
    for _ in range(2):
        attach(tracker, child.process)
        with pytest.raises(ValueError, match="attached"):
            attach(tracker, child.process)
        tracker.scan()
        assert pages(present(child.pid, clean=True), start, 16 * PAGE) == set(range(16))
        tracker.detach()
        tracker.detach()
        assert pages(present(child.pid, clean=True), start, 16 * PAGE) == set()
        assert len(tracker.tracked) == 0
    with pytest.raises(TrackerUnavailable, match="attached"):
        tracker.scan()
    assert set(Path("/proc/self/fd").iterdir()) == opened
    assert len(opened) == len(before) + 2
    assert child.tell() == "on"


@pytest.mark.parametrize("step", ["pidfd_getfd", "api", "is_alive"])
def test_a_failed_attach_leaves_nothing(
    spawn: Spawn, tracker: ProcessTracker, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    child = spawn("say(1); input(); say('on')")
    opened = set(Path("/proc/self/fd").iterdir())
    theirs = set(Path(f"/proc/{child.pid}/fd").iterdir())

    def fail(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr({"pidfd_getfd": kernel, "api": uffd, "is_alive": wp_async}[step], step, fail)
    with pytest.raises(TrackerUnavailable, match="too many"):
        attach(tracker, child.process)
    monkeypatch.undo()
    assert set(Path("/proc/self/fd").iterdir()) == opened
    assert set(Path(f"/proc/{child.pid}/fd").iterdir()) == theirs
    attach(tracker, child.process)
    assert tracker.scan()
    assert child.tell() == "on"


def test_another_process_under_the_same_pid_is_refused(spawn: Spawn, tracker: ProcessTracker) -> None:
    child = spawn("say(1); input()")
    stranger = Process(child.pid, child.process.vpid, child.process.starttime - 1)
    with pytest.raises(TrackerUnavailable, match="gone"):
        attach(tracker, stranger)
    child.close()
    with pytest.raises(TrackerUnavailable):
        attach(tracker, child.process)


# Refuses userfaultfd by killing the process: struct sock_filter[] {load nr; equal? ; allow; kill}.
SECCOMP = """
import struct
code = struct.pack('HBBI', 0x20, 0, 0, 0) + struct.pack('HBBI', 0x15, 1, 0, 323)
code += struct.pack('HBBI', 6, 0, 0, 0x7fff0000) + struct.pack('HBBI', 6, 0, 0, 0x80000000)
room = ctypes.create_string_buffer(code)
program = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', 4, ctypes.addressof(room)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program) == 0
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls")
def test_under_a_seccomp_filter_and_as_another_user(spawn: Spawn, tracker: ProcessTracker) -> None:
    child = spawn(SECCOMP + "say(1)\ninput(); say('on')\ninput(); libc.syscall(323, 1)", user=65534)
    attach(tracker, child.process)
    assert tracker.scan()
    assert child.tell() == "on"
    assert child.popen.stdin
    child.popen.stdin.write(b"\n")
    assert child.popen.wait(5) == -signal.SIGSYS  # the filter is as it was


def test_processes_forked_meanwhile_have_no_descriptor_of_ours(spawn: Spawn, tracker: ProcessTracker) -> None:
    child = spawn("""
found = []
def fork():
    while going:
        pid = os.fork()
        if pid == 0:
            for number in range(64):
                try: link = os.readlink(f'/proc/self/fd/{number}')
                except OSError: continue
                if 'userfaultfd' in link: os._exit(1)
            os._exit(0)
        found.append(os.waitpid(pid, 0)[1])
going = True
threads = [threading.Thread(target=fork) for _ in range(3)]
[t.start() for t in threads]
say(1); input(); going = False
[t.join() for t in threads]
say(len(found), sum(found))
""")
    for _ in range(20):
        attach(tracker, child.process)
        tracker.detach()
    forks, leaks = (int(word) for word in child.tell().split())
    assert forks > 3
    assert leaks == 0


def test_a_huge_reservation_costs_little(
    spawn: Spawn, tracker: ProcessTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = spawn("""
big = make(4 << 40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, prot=0)
libc.mprotect(P(big + (1 << 40)), S(512 * MIB), 3); put(big + (1 << 40) + 300 * MIB, 1, 3 * PAGE); say(big)
input(); put(big + (1 << 40), 1); say()
input()
""")
    (big,) = child.said
    attach(tracker, child.process)
    scan, calls = kernel.pagemap_scan, [0]

    def count(*arguments: Any, **options: Any) -> tuple[int, int]:
        calls[0] += 1
        return scan(*arguments, **options)

    monkeypatch.setattr(kernel, "pagemap_scan", count)
    assert pages(tracker.scan(), big + (1 << 40), 512 * MIB) == {300 * 256, 300 * 256 + 1, 300 * 256 + 2}
    assert calls[0] < 1000  # 4 TiB are 16,384 pieces
    child.tell()
    assert pages(tracker.scan(), big + (1 << 40), 512 * MIB) == {0}


def test_no_scan_holds_the_memory_lock_for_long(
    spawn: Spawn, tracker: ProcessTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = spawn("a = make(300 * MIB); libc.madvise(P(a), S(300 * MIB), 15); put(a, 1, 300 * MIB); say(a)\ninput()")
    (start,) = child.said
    attach(tracker, child.process)
    scan = kernel.pagemap_scan
    spans: list[tuple[int, int]] = []

    def watch(pagemap: int, begin: int, end: int, vector: object, **options: int) -> tuple[int, int]:
        if not options.get("max_pages"):
            spans.append((begin, end))
        return scan(pagemap, begin, end, vector, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(kernel, "pagemap_scan", watch)
    assert len(pages(tracker.scan(), start, 300 * MIB)) == 300 * 256
    assert max(end - begin for begin, end in spans) <= 256 * MIB
    assert len([span for span in spans if start <= span[0] < start + 300 * MIB]) == 2


def test_huge_pages_are_left_whole(spawn: Spawn, tracker: ProcessTracker) -> None:
    child = spawn("""
a = (make(8 * MIB) + 2 * MIB - 1) & -(2 * MIB)
libc.madvise(P(a), S(4 * MIB), 14); put(a, 1, 4 * MIB); say(a)
input()
""")
    (start,) = child.said

    def huge() -> int:
        text = Path(f"/proc/{child.pid}/smaps_rollup").read_text()
        return int(text.split("AnonHugePages:")[1].split()[0])

    before = huge()
    if not before:
        pytest.skip("this kernel makes no huge pages")
    attach(tracker, child.process)
    assert len(pages(tracker.scan(), start, 4 * MIB)) == 1024
    assert pages(tracker.scan(), start, 4 * MIB) == set()
    assert huge() == before


def test_guard_pages_are_no_content(spawn: Spawn, tracker: ProcessTracker) -> None:
    child = spawn(
        "a = make(8 * PAGE); put(a, 1, 8 * PAGE)\nr = libc.madvise(P(a), S(2 * PAGE), 102); say(a, r)\ninput()"
    )
    start, result = child.said
    if result:
        pytest.skip("this kernel has no guard pages")
    attach(tracker, child.process)
    known = bool(tracker._excluded & kernel.PAGE_IS_GUARD)
    assert pages(tracker.scan(), start, 8 * PAGE) == (set(range(2, 8)) if known else set(range(8)))


def test_pages_that_are_reported_twice_are_given_once_and_in_order() -> None:
    plain = [(0x1000, 0x3000), (0x3000, 0x4000), (0x8000, 0x9000)]
    assert wp_async.in_order(plain) is plain
    assert wp_async.in_order([(0x1000, 0x3000), (0x2000, 0x5000)]) == [(0x1000, 0x5000)]
    assert wp_async.in_order([(0x8000, 0x9000), (0x1000, 0x2000)]) == [(0x1000, 0x2000), (0x8000, 0x9000)]
