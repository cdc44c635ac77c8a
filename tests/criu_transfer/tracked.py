"""Processes that change their memory, for the tests of trackers, and what one knows of that memory from outside."""

import contextlib
import errno
import select
import subprocess
import sys
import time
from pathlib import Path

from criu_transfer import kernel
from criu_transfer.maps import read_maps
from criu_transfer.proctree import read_process

PAGE = kernel.PAGE_SIZE

PRELUDE = """
import ctypes, mmap, os, random, signal, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
P, S = ctypes.c_void_p, ctypes.c_size_t
PAGE, MIB = 4096, 1 << 20
def make(length, at=0, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=3):
    start = libc.mmap(P(at), S(length), prot, flags | (0x10 if at else 0), -1, ctypes.c_long(0))
    assert start != 2**64 - 1
    return start
def put(page, byte, length=PAGE): ctypes.memset(page, byte, length)
def write(page, byte, length=PAGE): libc.memset(P(page), byte, S(length))  # without the interpreter's lock
def say(*words): print(*words, flush=True)
"""


class Child:
    """A Python program that prints lines; its first line is kept in `said`."""

    def __init__(self, program: str, user: int | None = None) -> None:
        command = [sys.executable, "-c", PRELUDE + program]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, user=user)
        self.said = [int(word) for word in self.read().split()]
        process = read_process(self.popen.pid)
        assert process
        self.process = process
        self.pid = process.pid

    def read(self) -> str:
        assert self.popen.stdout
        ready, _, _ = select.select([self.popen.stdout], [], [], 10)
        assert ready, "the child says nothing"
        return str(self.popen.stdout.readline().decode().rstrip("\n"))

    def tell(self, line: str = "") -> str:
        """Let it go on, and wait for its answer."""
        assert self.popen.stdin
        self.popen.stdin.write(line.encode() + b"\n")
        return self.read()

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout):
            if stream:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def pages(ranges: list[tuple[int, int]], start: int, length: int) -> set[int]:
    """Number the pages of [start, start + length) that are in `ranges`."""
    found = set[int]()
    for a, b in ranges:
        found.update((page - start) // PAGE for page in range(max(a, start), min(b, start + length), PAGE))
    return found


class Model:
    """What a receiver would hold: the bytes of each page when it was last copied.

    `owed`: pages that could not be read when they were to be copied (PROT_NONE just then, or gone). The sender keeps
    the same account, and pays it when all is frozen.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pages: dict[int, bytes] = {}
        self.owed: set[int] = set()

    def copy(self, ranges: list[tuple[int, int]]) -> None:
        buffer = bytearray(PAGE)
        for start, end in ranges:
            for page in range(start, end, PAGE):
                try:
                    kernel.process_vm_readv(self.pid, buffer, [(page, page + PAGE)])
                except OSError as error:
                    assert error.errno in {errno.EFAULT, errno.ENOMEM}  # noqa: PT017 - gone or unreadable meanwhile
                    self.pages.pop(page, None)
                    self.owed.add(page)
                else:
                    self.pages[page] = bytes(buffer)
                    self.owed.discard(page)


def present(pid: int, *, clean: bool) -> list[tuple[int, int]]:
    """List the pages that a dump would contain; `clean`: only those that the kernel says were not written."""
    vector = kernel.region_vector(100_000)
    excluded = kernel.PAGE_IS_FILE | kernel.PAGE_IS_PFNZERO | (kernel.PAGE_IS_WRITTEN if clean else 0)
    there = kernel.PAGE_IS_PRESENT | kernel.PAGE_IS_SWAPPED
    found = []
    with Path(f"/proc/{pid}/pagemap").open("rb") as pagemap:
        for vma in read_maps(pid):
            if vma.anonymous:
                count, _ = kernel.pagemap_scan(
                    pagemap.fileno(), vma.start, vma.end, vector,
                    inverted=excluded, mask=excluded, anyof=there, return_mask=there,
                )  # fmt: skip
                found += [(vector[3 * i], vector[3 * i + 1]) for i in range(count)]
    return found


def freeze(cgroup: Path) -> None:
    (cgroup / "cgroup.freeze").write_text("1")
    limit = time.monotonic() + 5
    while "frozen 1" not in (cgroup / "cgroup.events").read_text():
        assert time.monotonic() < limit
