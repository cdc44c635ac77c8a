"""What is seen of processes from outside."""

import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator

import pytest

from criu_transfer import kernel, soundness
from criu_transfer.errors import DumpFailed
from criu_transfer.maps import Vma, read_maps
from criu_transfer.proctree import Process, read_process

pytestmark = pytest.mark.kernel
MIB = 1 << 20
CHILD = """
import ctypes, mmap, os, sys
private = b"x" * (20 << 20)
shared = mmap.mmap(-1, 10 << 20)
shared.write(b"y" * (10 << 20))
def parasite():
    fd = os.memfd_create("CRIUMFD")
    os.ftruncate(fd, 4096)
    return mmap.mmap(fd, 4096)
print("ready", flush=True)
for line in sys.stdin:
    kept = {"map": lambda: mmap.mmap(-1, 1 << 20), "parasite": parasite}[line.strip()]()
    print("done", flush=True)
"""


class Child:
    def __init__(self) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._line() == "ready"
        found = read_process(self.popen.pid)
        assert found
        self.process = found

    def do(self, what: str) -> None:
        assert self.popen.stdin
        self.popen.stdin.write(f"{what}\n")
        assert self._line() == "done"

    def _line(self) -> str:
        assert self.popen.stdout
        assert select.select([self.popen.stdout], [], [], 20)[0], "the child says nothing"
        return self.popen.stdout.readline().strip()

    def maps(self) -> dict[int, list[Vma]]:
        return {self.process.pid: read_maps(self.process.pid)}


@pytest.fixture
def child() -> Iterator[Child]:
    made = Child()
    yield made
    made.popen.kill()
    made.popen.communicate()


def test_memory_is_the_private_and_the_shared(child: Child) -> None:
    found = soundness.memory_bytes([child.process])
    assert 30 * MIB < found < 60 * MIB
    assert soundness.memory_bytes([child.process, child.process]) == 2 * found
    child.popen.kill()
    child.popen.wait()
    assert soundness.memory_bytes([child.process]) == 0
    assert soundness.memory_bytes([]) == 0


def test_swapped_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    status = "Name:\tx\nVmRSS:\t 999 kB\nRssAnon:\t  8 kB\nRssFile:\t 500 kB\nRssShmem:\t 16 kB\nVmSwap:\t 32 kB\n"
    monkeypatch.setattr(soundness, "_status", lambda _: status)
    assert soundness.memory_bytes([Process(1, 1, 0)]) == 56 * 1024


def test_a_whole_process_is_sound(child: Child) -> None:
    before = child.maps()
    soundness.check([child.process], before)
    soundness.check([child.process], None)


def test_a_traced_process_is_not_sound(child: Child) -> None:
    kernel.ptrace(kernel.PTRACE_SEIZE, child.process.pid)
    try:
        with pytest.raises(DumpFailed, match=rf"process {child.process.pid} is still traced by {os.getpid()}"):
            soundness.check([child.process], None)
    finally:
        kernel.ptrace(kernel.PTRACE_INTERRUPT, child.process.pid)
        os.waitpid(child.process.pid, 0x40000000)  # __WALL: its stop
        kernel.ptrace(kernel.PTRACE_DETACH, child.process.pid)
    soundness.check([child.process], None)


def test_a_parasite_is_found(child: Child) -> None:
    child.do("parasite")
    with pytest.raises(DumpFailed, match="parasite is still in process"):
        soundness.check([child.process], None)


def test_mappings_that_have_changed_are_found(child: Child) -> None:
    before = child.maps()
    child.do("map")
    with pytest.raises(DumpFailed, match="are not what they were before the dump"):
        soundness.check([child.process], before)
    soundness.check([child.process], None)


def test_processes_that_have_gone_or_come_are_found(child: Child) -> None:
    gone = {child.process.pid: read_maps(child.process.pid), 1 << 22: []}
    with pytest.raises(DumpFailed, match=re.escape(f"processes [{1 << 22}] are gone")):
        soundness.check([child.process], gone)
    with pytest.raises(DumpFailed, match="not what they were"):
        soundness.check([child.process], {})
