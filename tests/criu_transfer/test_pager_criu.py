"""The pager under real restores: every byte is checked by the restored processes themselves."""

import json
import os
import secrets
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from criu_transfer.errors import RestoreFailed, TransferError
from criu_transfer.images import (
    PE_PARENT,
    PE_PRESENT,
    Entry,
    Pagemap,
    pagemap_path,
    pages_path,
    process_ids,
    read_pagemap,
    write_pagemap,
)
from criu_transfer.pager import Hook, serve
from criu_transfer.ranges import RangeSet
from criu_transfer.rewrite import make_lazy, total_bytes

pytestmark = [pytest.mark.criu, pytest.mark.kernel]

PAGE = 4096
PATIENCE = 30.0
# Other runs on this machine see the same tree of cgroups.
CGROUP = Path(f"/sys/fs/cgroup/pager-test-{secrets.token_hex(4)}")


@dataclass
class Source:
    fd: int
    coverage: RangeSet


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the process tree that checks itself."""
    program = tmp_path_factory.mktemp("workload") / "workload"
    source = Path(__file__).with_name("test_pager_workload.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-pthread", "-o", program, source], check=True)
    return program


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """Make the container's cgroup; nothing may be left in it."""
    CGROUP.mkdir()
    yield CGROUP
    (CGROUP / "cgroup.kill").write_text("1")
    wait_until(lambda: not (CGROUP / "cgroup.procs").read_text(), "the cgroup is empty")
    CGROUP.rmdir()


class Lab:
    """One process tree: dumped whole by CRIU, then restored lazily from images without memory."""

    def __init__(self, directory: Path, workload: Path, cgroup: Path) -> None:
        self.images = directory / "images"
        self.images.mkdir()
        self.directory = directory
        self._workload = workload
        self._cgroup = cgroup
        os.mkfifo(directory / "report")
        self._report = os.open(directory / "report", os.O_RDWR | os.O_NONBLOCK)
        self._lines: list[str] = []
        self.events: list[dict[str, object]] = []

    def dump(self, pages: int, children: int = 0, *, mode: str = "changing") -> None:
        command = [str(self._workload), str(self.directory), str(pages), str(children)]
        if mode != "changing":
            command.append(mode)
        null = subprocess.DEVNULL
        with subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True) as process:
            for _ in range(children + 1):
                assert self.line() == "ready"
            self._criu("dump", "-t", str(process.pid))

    def serve(self, hook: Hook = lambda _: None, *, gate: int | None = None, patience: float = 5) -> None:
        """Leave memory out of the images and start the keeper, which starts the pager; collect its notifications."""
        self.sources = {vpid: leave_out(self.images, vpid) for vpid in process_ids(self.images)}
        self.lazy = make_lazy(self.images, self.sources)
        self._notes, theirs = socket.socketpair()
        self.keeper = os.fork()
        if self.keeper:
            theirs.close()
            self.event("pager-listening")
            return
        code = 9
        try:
            self._notes.close()
            serve(
                self.images,
                self.lazy,
                self.sources,
                cgroup=self._cgroup,
                notify=lambda event: theirs.sendall(json.dumps(event).encode() + b"\n"),
                deadline_for_connect=time.monotonic() + patience,
                fill_gate=gate,
                hook=hook,
            )
            code = 0
        except TransferError as error:
            code = 3 if isinstance(error, RestoreFailed) else 4
        finally:
            os._exit(code)

    def restore(self) -> None:
        self._criu("restore", "-d", "--lazy-pages")

    def keeper_status(self) -> int:
        pidfd = os.pidfd_open(self.keeper)
        try:
            assert select.select([pidfd], [], [], PATIENCE)[0], f"the keeper goes on; events {self.events}"
        finally:
            os.close(pidfd)
        self._collect(0)
        return os.waitstatus_to_exitcode(os.waitpid(self.keeper, 0)[1])

    def event(self, name: str) -> dict[str, object]:
        """Wait for a notification."""
        deadline = time.monotonic() + PATIENCE
        while not (found := [event for event in self.events if event["event"] == name]):
            assert self._collect(deadline - time.monotonic()), f"no {name} among {self.events}"
        return found[0]

    def _collect(self, seconds: float) -> bool:
        if not select.select([self._notes], [], [], max(0, seconds))[0]:
            return False
        data = self._notes.recv(65536)
        self.events += [json.loads(line) for line in data.splitlines()]
        return bool(data)

    def go(self) -> None:
        (self.directory / "go").touch()

    def line(self) -> str:
        """Wait for a line of the tree's report."""
        if not self._lines:
            assert select.select([self._report], [], [], PATIENCE)[0], f"no report; events {self.events}"
            self._lines = os.read(self._report, 65536).decode().splitlines()
        return self._lines.pop(0)

    def assert_all_well(self, count: int) -> None:
        lines = [self.line() for _ in range(count)]
        assert all(line.startswith("ok ") for line in lines), lines

    def _criu(self, action: str, *options: str) -> None:
        command = [
            "criu",
            action,
            "-D",
            str(self.images),
            "-v1",
            "-o",
            f"{action}.log",
            "--manage-cgroups=ignore",
            *options,
        ]
        enter = f"echo $$ >{self._cgroup}/cgroup.procs; exec " + " ".join(command)
        done = subprocess.run(["sh", "-c", enter], check=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        assert done.returncode == 0, (self.images / f"{action}.log").read_text()

    def hang_up(self) -> None:
        """Be an agent that dies: the notifications' other end closes."""
        self._notes.close()

    def close(self) -> None:
        os.close(self._report)
        self._notes.close()


def leave_out(images: Path, vpid: int) -> Source:
    """Turn dumped pages into pages in a parent that does not exist, their bytes into a store; a few stay dumped."""
    pagemap = read_pagemap(pagemap_path(images, vpid))
    path = pages_path(images, pagemap.pages_id)
    content = path.read_bytes()
    source = Source(os.memfd_create(f"store-{vpid}"), RangeSet())
    os.ftruncate(source.fd, 1 << 47)
    entries: list[Entry] = []
    kept = b""
    for at, pages, flags in pagemap.entries:
        assert flags & PE_PRESENT
        size = pages * PAGE
        data, content = content[:size], content[size:]
        # The last of 50 pages and more stays dumped: the lists of real dumps are mixed.
        left = pages - 1 if pages >= 50 else pages
        os.pwrite(source.fd, data[: left * PAGE], at)
        source.coverage.add(at, at + left * PAGE)
        entries.append((at, left, PE_PARENT))
        if left < pages:
            entries.append((at + left * PAGE, 1, PE_PRESENT))
            kept += data[left * PAGE :]
    path.write_bytes(kept)
    write_pagemap(pagemap_path(images, vpid), Pagemap(pagemap.pages_id, entries))
    return source


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"never: {what}"
        select.select([], [], [], 0.01)


@pytest.fixture
def lab(tmp_path: Path, workload: Path, cgroup: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path, workload, cgroup)
    yield lab
    lab.close()


def once(directory: Path, moment: str, count: int) -> Hook:
    """Kill the pager at its count-th `moment`, the first time only."""
    marker = directory / "killed"
    left = [count]

    def hook(now: str) -> None:
        left[0] -= now == moment
        if left[0] == 0 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def test_a_quiet_tree_gets_its_memory_and_the_stores_are_emptied(lab: Lab) -> None:
    lab.dump(1500, children=2, mode="quiet")
    lab.serve()
    held = {vpid: os.fstat(source.fd).st_blocks * 512 for vpid, source in lab.sources.items()}
    lab.restore()
    assert lab.event("restored-processes")["n"] == 3
    lab.go()
    lab.assert_all_well(3)
    assert lab.keeper_status() == 0
    assert lab.event("filled")["bytes"] == total_bytes(lab.lazy)
    for vpid, source in lab.sources.items():
        # What was not lazy, a few pages of libraries, is in the images now and stays in the store too.
        assert os.fstat(source.fd).st_blocks * 512 < held[vpid] / 20


def test_memory_that_changes_while_it_comes_is_what_it_should_be(lab: Lab) -> None:
    lab.dump(1500, children=2)
    lab.serve()
    lab.restore()
    lab.go()
    lab.assert_all_well(3)
    assert lab.keeper_status() == 0


def test_faults_alone_bring_everything_while_the_gate_is_shut(lab: Lab) -> None:
    lab.dump(1501, children=1)
    gate, theirs = socket.socketpair()
    lab.serve(gate=gate.fileno())
    gate.close()
    lab.restore()
    lab.go()
    lab.assert_all_well(2)
    assert not [event for event in lab.events if event["event"] == "filled"]
    theirs.send(b"open")
    assert lab.keeper_status() == 0
    assert int(str(lab.event("filled")["faults"])) > 1500
    theirs.close()


def test_the_background_alone_fills_split_mappings_and_forgets_those_that_a_child_lacks(lab: Lab) -> None:
    lab.dump(300, mode="idle")
    gate, opener = socket.socketpair()
    lab.serve(gate=gate.fileno())
    lab.restore()
    lab.go()
    assert [lab.line(), lab.line()] == ["idle", "idle"]
    opener.send(b"open")
    assert lab.keeper_status() == 0
    (lab.directory / "read").touch()
    lab.assert_all_well(2)
    gate.close()
    opener.close()


@pytest.mark.parametrize("mode", ["quiet", "changing"])
@pytest.mark.parametrize("count", [1, 9])
def test_another_pager_carries_on_when_one_is_killed_between_copies(lab: Lab, count: int, mode: str) -> None:
    lab.dump(1500, children=1, mode=mode)
    lab.serve(once(lab.directory, "filled", count))
    lab.restore()
    lab.go()
    lab.assert_all_well(2)
    assert lab.keeper_status() == 0
    assert lab.event("pager-died")["carried_on"] is True


def test_threads_whose_faults_a_dead_pager_had_read_are_not_left_waiting(lab: Lab) -> None:
    lab.dump(300, children=2, mode="quiet")
    shut, gate = socket.socketpair()
    lab.serve(once(lab.directory, "read", 25), gate=gate.fileno())
    lab.restore()
    lab.go()
    lab.assert_all_well(3)
    assert lab.event("pager-died")["carried_on"] is True
    shut.send(b"open")
    assert lab.keeper_status() == 0
    shut.close()
    gate.close()


def test_the_container_is_killed_when_the_pager_dies_with_an_event_in_its_hands(lab: Lab) -> None:
    lab.dump(1500, children=1)
    shut, theirs = socket.socketpair()
    lab.serve(once(lab.directory, "event", 2), gate=shut.fileno())
    lab.restore()
    lab.go()
    assert lab.keeper_status() == 4
    assert lab.event("pager-died")["carried_on"] is False
    assert "signal 9" in str(lab.event("killed")["reason"])
    assert not (CGROUP / "cgroup.procs").read_text()
    theirs.close()
    shut.close()


def test_a_frozen_container_is_killed_too(lab: Lab) -> None:
    lab.dump(1500, mode="quiet")
    lab.serve(lambda moment: os.kill(os.getpid(), signal.SIGKILL) if moment == "filled" else None)
    (CGROUP / "cgroup.freeze").write_text("0")
    lab.restore()
    (CGROUP / "cgroup.freeze").write_text("1")
    assert lab.keeper_status() == 4
    assert [event["carried_on"] for event in lab.events if event["event"] == "pager-died"] == [True] * 3 + [False]
    assert not (CGROUP / "cgroup.procs").read_text()
    (CGROUP / "cgroup.freeze").write_text("0")


def test_the_pager_goes_on_without_its_keeper_and_without_the_agent(lab: Lab) -> None:
    lab.dump(1500)
    shut, gate = socket.socketpair()
    lab.serve(gate=gate.fileno())
    gate.close()
    lab.restore()
    lab.hang_up()
    os.kill(lab.keeper, signal.SIGKILL)
    os.waitpid(lab.keeper, 0)
    shut.send(b"open")
    lab.go()
    lab.assert_all_well(1)
    shut.close()


def test_a_dead_agent_does_not_stop_the_fill(lab: Lab) -> None:
    lab.dump(1500)
    lab.serve(once(lab.directory, "filled", 3))
    lab.hang_up()
    lab.restore()
    lab.go()
    lab.assert_all_well(1)
    pidfd = os.pidfd_open(lab.keeper)
    assert select.select([pidfd], [], [], PATIENCE)[0]
    os.close(pidfd)
    assert os.waitpid(lab.keeper, 0)[1] == 0


def test_a_restore_that_never_comes_is_given_up(lab: Lab) -> None:
    lab.serve(patience=0.1)
    assert lab.keeper_status() == 3
    assert "did not ask for memory in time" in str(lab.event("killed")["reason"])


def test_a_restore_that_breaks_off_leaves_nothing_running(lab: Lab) -> None:
    with subprocess.Popen(["sh", "-c", f"echo $$ >{CGROUP}/cgroup.procs; exec sleep 100"]) as half_restored:
        wait_until(lambda: str(half_restored.pid) in (CGROUP / "cgroup.procs").read_text(), "it is in the cgroup")
        lab.serve()
        with socket.socket(socket.AF_UNIX) as criu:
            criu.connect(str(lab.images / "lazy-pages.socket"))
        assert lab.keeper_status() == 3
        assert half_restored.wait(PATIENCE) == -signal.SIGKILL
    assert "went away" in str(lab.event("killed")["reason"])
