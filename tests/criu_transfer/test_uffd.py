"""userfaultfd's ioctls and messages, tried on this process and on a forked child."""

import contextlib
import ctypes
import errno
import mmap
import os
import struct
import threading
from collections.abc import Iterator

import pytest

from criu_transfer import uffd

PAGE = 4096


def address_of(area: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(area))


@pytest.fixture
def fd() -> Iterator[int]:
    fd = uffd.create()
    yield fd
    os.close(fd)


@pytest.fixture
def area() -> mmap.mmap:
    return mmap.mmap(-1, 16 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@pytest.fixture
def source() -> mmap.mmap:
    source = mmap.mmap(-1, 16 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    source[:] = b"".join(bytes([i + 1]) * PAGE for i in range(16))
    return source


@pytest.mark.kernel
def test_copy_and_zeropage_fill_missing_pages(fd: int, area: mmap.mmap, source: mmap.mmap) -> None:
    uffd.api(fd)
    start = address_of(area)
    uffd.register(fd, start, 16 * PAGE, uffd.MODE_MISSING)
    assert uffd.copy(fd, start, address_of(source), 4 * PAGE) == 4 * PAGE
    assert uffd.zeropage(fd, start + 4 * PAGE, 12 * PAGE) == 12 * PAGE
    assert area[: 4 * PAGE] == source[: 4 * PAGE]
    assert area[4 * PAGE :] == bytes(12 * PAGE)


@pytest.mark.kernel
def test_copy_reports_how_far_it_came(fd: int, area: mmap.mmap, source: mmap.mmap) -> None:
    uffd.api(fd)
    start, src = address_of(area), address_of(source)
    uffd.register(fd, start, 16 * PAGE, uffd.MODE_MISSING)
    uffd.copy(fd, start + 3 * PAGE, src, PAGE)
    assert uffd.copy(fd, start, src, 8 * PAGE) == 3 * PAGE
    with pytest.raises(FileExistsError):
        uffd.copy(fd, start + 3 * PAGE, src, 5 * PAGE)
    assert uffd.zeropage(fd, start + 4 * PAGE, 4 * PAGE) == 4 * PAGE
    with pytest.raises(FileExistsError):
        uffd.zeropage(fd, start, PAGE)


@pytest.mark.kernel
def test_unregister_gives_zero_pages_back(fd: int, area: mmap.mmap) -> None:
    uffd.api(fd)
    start = address_of(area)
    uffd.register(fd, start, 16 * PAGE, uffd.MODE_MISSING)
    uffd.unregister(fd, start, 16 * PAGE)
    assert area[0] == 0
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        uffd.copy(fd, start + PAGE, address_of(mmap.mmap(-1, PAGE)), PAGE)
    assert caught.value.errno == errno.ENOENT


@pytest.mark.kernel
def test_a_fault_is_read_served_and_woken(fd: int, area: mmap.mmap, source: mmap.mmap) -> None:
    os.set_blocking(fd, True)
    uffd.api(fd)
    start = address_of(area)
    uffd.register(fd, start, 16 * PAGE, uffd.MODE_MISSING)
    seen: list[uffd.Event] = []

    def serve() -> None:
        seen.extend(uffd.read_events(fd))
        uffd.copy(fd, start + 2 * PAGE, address_of(source), PAGE, dontwake=True)
        uffd.wake(fd, start + 2 * PAGE, PAGE)

    # The reader of the page must be a process of its own: a fault taken under the interpreter lock would hang us.
    server = threading.Thread(target=serve, daemon=True)
    server.start()
    ctypes.CDLL(None).memcpy(ctypes.create_string_buffer(8), ctypes.c_void_p(start + 2 * PAGE + 5), 8)
    server.join(10)
    assert seen == [uffd.PageFault(start + 2 * PAGE, 0)]
    os.set_blocking(fd, False)
    assert uffd.read_events(fd) == []


@pytest.mark.kernel
def test_remove_unmap_and_remap_events(fd: int, area: mmap.mmap) -> None:
    features = uffd.FEATURE_EVENT_REMOVE | uffd.FEATURE_EVENT_UNMAP | uffd.FEATURE_EVENT_REMAP
    assert uffd.api(fd, features) & features == features
    start = address_of(area)
    uffd.register(fd, start, 16 * PAGE, uffd.MODE_MISSING)
    os.set_blocking(fd, True)
    libc = ctypes.CDLL(None)
    libc.mremap.restype = ctypes.c_void_p
    seen: list[uffd.Event] = []

    def read() -> None:
        while len(seen) < 4:
            seen.extend(uffd.read_events(fd))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    target = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    new, size = address_of(target), ctypes.c_size_t(PAGE)
    libc.madvise(ctypes.c_void_p(start), size, mmap.MADV_DONTNEED)
    may_move_fixed = 3
    libc.mremap(ctypes.c_void_p(start + 8 * PAGE), size, size, may_move_fixed, ctypes.c_void_p(new))
    libc.munmap(ctypes.c_void_p(start + 9 * PAGE), size)
    reader.join(10)
    for watched in (start, new):  # or freeing the memory would wait for somebody to read the event
        uffd.unregister(fd, watched, PAGE if watched == new else 16 * PAGE)
    assert seen == [
        uffd.Remove(start, start + PAGE),
        uffd.Remap(start + 8 * PAGE, new, PAGE),
        uffd.Unmap(start + 8 * PAGE, start + 9 * PAGE),
        uffd.Unmap(start + 9 * PAGE, start + 10 * PAGE),
    ]


@pytest.mark.kernel
def test_fork_brings_the_childs_descriptor(fd: int, area: mmap.mmap) -> None:
    uffd.api(fd, uffd.FEATURE_EVENT_FORK)
    start = address_of(area)
    uffd.register(fd, start, 16 * PAGE, uffd.MODE_MISSING)
    os.set_blocking(fd, True)
    seen: list[uffd.Event] = []
    reader = threading.Thread(target=lambda: seen.extend(uffd.read_events(fd)), daemon=True)
    reader.start()
    libc = ctypes.CDLL(None)
    pid = libc.syscall(57) if os.uname().machine == "x86_64" else libc.syscall(220, 17, 0, 0, 0, 0)
    if pid == 0:
        libc._exit(0)
    reader.join(10)
    os.waitpid(pid, 0)
    (event,) = seen
    assert isinstance(event, uffd.Fork)
    os.close(event.fd)


def test_messages_are_decoded_and_others_refused() -> None:
    def message(kind: int, *words: int) -> bytes:
        return struct.pack("=B7x", kind) + struct.pack("=3Q", *words)

    assert uffd.parse(message(0x12, 3, 0x7000123, 9)) == uffd.PageFault(0x7000000, 3)
    assert uffd.parse(message(0x13, (0xDEAD << 32) | 7, 0, 0)) == uffd.Fork(7)
    assert uffd.parse(message(0x14, 1, 2, 3)) == uffd.Remap(1, 2, 3)
    assert uffd.parse(message(0x15, 1, 2, 3)) == uffd.Remove(1, 2)
    assert uffd.parse(message(0x16, 1, 2, 3)) == uffd.Unmap(1, 2)
    with pytest.raises(ValueError, match="unknown"):
        uffd.parse(message(0x99, 0, 0, 0))
    with pytest.raises(ValueError, match="bytes"):
        uffd.parse(b"\x12")


@pytest.mark.kernel
def test_wrong_calls_say_why(fd: int) -> None:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        uffd.register(fd, 0x1000, PAGE, uffd.MODE_MISSING)  # no handshake yet
    assert caught.value.errno == errno.EINVAL
    with contextlib.suppress(OSError):
        uffd.api(fd, 1 << 63)
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        uffd.api(fd, 1 << 63)
    assert caught.value.errno == errno.EINVAL
