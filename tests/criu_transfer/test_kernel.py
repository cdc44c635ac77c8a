"""System call wrappers, tried on a child and on this process."""

import ctypes
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from criu_transfer import kernel

PAGE = kernel.PAGE_SIZE

# Maps six pages, numbers them, makes the fourth unreadable; then waits.
CHILD = """
import ctypes, mmap, os, sys
area = mmap.mmap(-1, 6 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(6):
    area[page * 4096 : (page + 1) * 4096] = bytes([page + 1]) * 4096
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + 3 * 4096), ctypes.c_size_t(4096), 0)
pipe, _ = os.pipe()
print(start, _, flush=True)
sys.stdout.flush()
print(os.read(pipe, 5), flush=True)
"""


class Child:
    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
        assert self.process.stdout
        self.out = self.process.stdout
        self.start, self.pipe = (int(word) for word in self.out.readline().split())


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.process.kill()
    child.process.wait()
    child.out.close()


@pytest.mark.kernel
def test_remote_ranges_are_read_one_after_the_other(child: Child) -> None:
    buffer = bytearray(4 * PAGE)
    pages = [child.start + 2 * PAGE, child.start, child.start + 4 * PAGE]
    assert kernel.process_vm_readv(child.process.pid, buffer, [(page, page + PAGE) for page in pages]) == 3 * PAGE
    assert buffer == b"\x03" * PAGE + b"\x01" * PAGE + b"\x05" * PAGE + bytes(PAGE)
    many = [(child.start + i, child.start + i + 1) for i in range(PAGE - 512, PAGE + 512)]
    view = memoryview(buffer)[PAGE:]
    assert kernel.process_vm_readv(child.process.pid, view, many) == 1024
    assert view[:1024] == b"\x01" * 512 + b"\x02" * 512
    assert kernel.process_vm_readv(child.process.pid, buffer, []) == 0


@pytest.mark.kernel
def test_reading_ends_at_an_unreadable_page(child: Child) -> None:
    buffer = bytearray(6 * PAGE)
    whole = (child.start, child.start + 6 * PAGE)
    assert kernel.process_vm_readv(child.process.pid, buffer, [whole]) == 3 * PAGE
    assert buffer[2 * PAGE : 4 * PAGE] == b"\x03" * PAGE + bytes(PAGE)
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        kernel.process_vm_readv(child.process.pid, buffer, [(child.start + 3 * PAGE, child.start + 4 * PAGE)])
    assert caught.value.errno == errno.EFAULT


@pytest.mark.kernel
def test_reading_a_process_that_is_gone(child: Child) -> None:
    child.process.kill()
    child.process.wait()
    with pytest.raises(ProcessLookupError):
        kernel.process_vm_readv(child.process.pid, bytearray(PAGE), [(child.start, child.start + PAGE)])


def test_requests_that_cannot_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="fit"):
        kernel.process_vm_readv(1, bytearray(PAGE), [(0, PAGE + 1)])
    with pytest.raises(ValueError, match="fit"):
        kernel.process_vm_readv(1, bytearray(PAGE), [(0, 1)] * (kernel.MAX_IOVECS + 1))


@pytest.mark.kernel
def test_a_descriptor_is_taken_from_another_process(child: Child) -> None:
    pidfd = os.pidfd_open(child.process.pid)
    taken = kernel.pidfd_getfd(pidfd, child.pipe)
    os.write(taken, b"hello")
    assert child.out.readline() == b"b'hello'\n"
    assert not os.get_inheritable(taken)
    with pytest.raises(OSError, match=r"\[Errno"):
        kernel.pidfd_getfd(pidfd, 999)
    os.close(taken)
    os.close(pidfd)


@pytest.mark.kernel
def test_pagemap_scan_finds_pages_and_says_where_it_ended() -> None:
    area = mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for page in (3, 4, 10, 20):
        area[page * PAGE] = 1
    vector = kernel.region_vector(2)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        present = kernel.PAGE_IS_PRESENT
        found, walked = kernel.pagemap_scan(
            pagemap, start, start + 64 * PAGE, vector, anyof=present, return_mask=present
        )
        assert found == 2
        assert list(vector) == [
            start + 3 * PAGE,
            start + 5 * PAGE,
            present,
            start + 10 * PAGE,
            start + 11 * PAGE,
            present,
        ]
        assert start + 11 * PAGE <= walked <= start + 20 * PAGE
        found, walked = kernel.pagemap_scan(
            pagemap, walked, start + 64 * PAGE, vector, anyof=present, return_mask=present
        )
        assert (found, vector[0], walked) == (1, start + 20 * PAGE, start + 64 * PAGE)
        with pytest.raises(PermissionError):
            kernel.pagemap_scan(
                pagemap,
                start,
                start + PAGE,
                vector,
                flags=kernel.PM_SCAN_CHECK_WPASYNC | kernel.PM_SCAN_WP_MATCHING,
                anyof=present,
                return_mask=present,
            )
    finally:
        os.close(pagemap)
