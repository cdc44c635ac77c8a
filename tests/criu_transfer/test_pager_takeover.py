"""What a pager leaves behind: the ledger, the line to its keeper, and the killing when it was not enough."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_transfer.errors import StateMissing
from criu_transfer.keeper import kill_cgroup
from criu_transfer.takeover import Close, HandOver, Kind, Ledger, Link, Record, State, Tell, receive

PAGE = 4096
LAZY = {1: [(0x10000, 0x40000)], 2: [(0x50000, 0x60000), (0x60000, 0x70000)]}


def records() -> st.SearchStrategy[list[tuple[int, int, int, int]]]:
    """Kind, process, page, other page: made sense of against the state at that point."""
    return st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 100), st.integers(0, 100)), max_size=30
    )


def sensible(state: State, step: tuple[int, int, int, int], next_key: int) -> Record:
    kind, process, page, other = step
    keys = list(state.memories)
    if kind == 0 or not keys:
        return Record(Kind.ADOPT, next_key, process % 3 + 1)
    key = keys[process % len(keys)]
    return [
        Record(Kind.FORK, key, next_key),
        Record(Kind.DROP, key, page * PAGE, (page + other + 1) * PAGE),
        Record(Kind.MOVE, key, page * PAGE, (other + 200) * PAGE, PAGE * 8),
        Record(Kind.DONE, key),
    ][kind - 1]


@given(records(), st.sets(st.integers(0, 29)))
def test_the_ledger_gives_back_the_state_wherever_snapshots_were_taken(
    steps: list[tuple[int, int, int, int]], snapshots: set[int]
) -> None:
    ledger = Ledger()
    state = State(LAZY)
    for number, step in enumerate(steps):
        record = sensible(state, step, number + 1)
        ledger.note(record)
        state.apply(record)
        if number in snapshots:
            ledger.snapshot(state.memories)
            assert ledger.records == 0
        loaded = ledger.load(LAZY)
        assert {key: (each.vpid, list(each.missing)) for key, each in loaded.memories.items()} == {
            key: (each.vpid, list(each.missing)) for key, each in state.memories.items()
        }
    ledger.close()


def test_what_another_process_wrote_is_seen_and_busy_makes_it_uncertain() -> None:
    ledger = Ledger()
    pid = os.fork()
    if pid == 0:
        ledger.note(Record(Kind.ADOPT, 1, 1))
        ledger.busy = True
        ledger.restored = True
        os._exit(0)
    os.waitpid(pid, 0)
    assert ledger.restored
    with pytest.raises(StateMissing, match="with an event in its hands"):
        ledger.load(LAZY)
    ledger.busy = False
    assert list(ledger.load(LAZY).memories) == [1]
    ledger.close()


def test_a_ledger_that_names_what_is_not_there_is_damaged() -> None:
    ledger = Ledger()
    ledger.note(Record(Kind.DROP, 7, 0, PAGE))
    with pytest.raises(StateMissing, match="damaged"):
        ledger.load(LAZY)
    ledger.close()


def test_messages_arrive_in_order_with_their_descriptors() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link = Link(theirs)
    fd = os.memfd_create("handed")
    link.hand_over(3, fd)
    link.tell({"event": "filled", "bytes": 5})
    link.close(3)
    theirs.close()
    handed = receive(ours)
    assert isinstance(handed, HandOver)
    assert handed.key == 3
    assert os.fstat(handed.fd).st_ino == os.fstat(fd).st_ino
    assert receive(ours) == Tell({"event": "filled", "bytes": 5})
    assert receive(ours) == Close(3)
    assert receive(ours) is None
    ours.close()
    os.close(fd)
    os.close(handed.fd)


def test_a_descriptor_on_its_way_outlives_the_pager() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        fd = os.memfd_create("handed")
        os.write(fd, b"alive")
        Link(theirs).hand_over(1, fd)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    theirs.close()
    handed = receive(ours)
    assert isinstance(handed, HandOver)
    assert os.pread(handed.fd, 5, 0) == b"alive"
    assert receive(ours) is None
    os.close(handed.fd)
    ours.close()


def test_a_dead_keeper_does_not_stop_the_pager() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    link = Link(theirs)
    link.tell({"event": "filled"})
    link.close(1)
    link.hand_over(1, 0)
    theirs.close()


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = [subprocess.Popen(["sleep", "100"]) for _ in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_without_cgroup_kill_the_processes_are_killed_one_by_one(
    tmp_path: Path, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    """A cgroup of Linux before 5.14, or of version 1, looks like this; the 0 is a process of another pid namespace."""
    first, second = sleepers
    (tmp_path / "child").mkdir()
    (tmp_path / "cgroup.procs").write_text(f"{first.pid}\n0\n")
    (tmp_path / "child" / "cgroup.procs").write_text(f"{second.pid}\n")
    (tmp_path / "freezer.state").write_text("FROZEN")
    watcher = os.fork()
    if watcher == 0:
        kill_cgroup(tmp_path)
        os._exit(0)
    assert [process.wait(10) for process in sleepers] == [-signal.SIGKILL] * 2
    (tmp_path / "cgroup.procs").write_text("")
    (tmp_path / "child" / "cgroup.procs").write_text("0\n")
    assert os.waitpid(watcher, 0)[1] == 0
    assert (tmp_path / "freezer.state").read_text() == "THAWED"


def test_a_cgroup_that_is_gone_has_been_killed(tmp_path: Path) -> None:
    kill_cgroup(tmp_path / "gone")
