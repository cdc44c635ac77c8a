"""Thin calls of userfaultfd(2): ioctls and the messages read from the descriptor.

Layouts and numbers are those of Linux's include/uapi/linux/userfaultfd.h, the same on x86_64 and arm64. The pager and
its keeper run on this module: it imports the standard library's small parts only.
"""

import ctypes
import errno
import fcntl
import os
import platform
import struct
from typing import NamedTuple

# userfaultfd(2), flag: only faults taken in user mode are handled. Without it an unprivileged process gets EPERM.
USER_MODE_ONLY = 1
SYSCALL_NUMBERS = {"x86_64": 323, "aarch64": 282}

# UFFDIO_API features.
FEATURE_EVENT_FORK = 1 << 1
FEATURE_EVENT_REMAP = 1 << 2
FEATURE_EVENT_REMOVE = 1 << 3
FEATURE_EVENT_UNMAP = 1 << 6
FEATURE_WP_UNPOPULATED = 1 << 13
FEATURE_WP_ASYNC = 1 << 15

# UFFDIO_REGISTER modes.
MODE_MISSING = 1
MODE_WP = 2

# Flags of a page fault message.
FAULT_WRITE = 1 << 0
FAULT_WP = 1 << 1

MESSAGE_BYTES = 32

_API = 0xAA
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_UNREGISTER = 0x8010AA01
_UFFDIO_WAKE = 0x8010AA02
_UFFDIO_COPY = 0xC028AA03
_UFFDIO_ZEROPAGE = 0xC020AA04
_DONTWAKE = 1

_RANGE = struct.Struct("=QQ")
_API_ARG = struct.Struct("=QQQ")  # api, features, ioctls
_REGISTER_ARG = struct.Struct("=QQQQ")  # start, length, mode, ioctls
_COPY_ARG = struct.Struct("=QQQQq")  # dst, src, length, mode, copied
_ZERO_ARG = struct.Struct("=QQQq")  # start, length, mode, zeroed

# struct uffd_msg: u8 event, 7 bytes reserved, then three u64 of which each event uses its own.
_MESSAGE = struct.Struct("=B7xQQQ")


class PageFault(NamedTuple):
    """A thread waits for the page at `address` (page aligned); `flags` are FAULT_*."""

    address: int
    flags: int


class Fork(NamedTuple):
    """The process forked; `fd` is the child's userfaultfd, already open in the reader."""

    fd: int


class Remap(NamedTuple):
    """mremap(2) moved `length` bytes; what was missing at `old` is now missing at `new`. An Unmap of `old` follows."""

    old: int
    new: int
    length: int


class Remove(NamedTuple):
    """madvise(2) dropped [start, end): these pages are zero from now on."""

    start: int
    end: int


class Unmap(NamedTuple):
    """[start, end) is no longer mapped."""

    start: int
    end: int


Event = PageFault | Fork | Remap | Remove | Unmap


def create(flags: int = os.O_CLOEXEC | os.O_NONBLOCK) -> int:
    """Open a userfaultfd for this process; falls back to USER_MODE_ONLY where the kernel demands it.

    Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    number = SYSCALL_NUMBERS[platform.machine()]
    for extra in (0, USER_MODE_ONLY):
        fd = int(libc.syscall(ctypes.c_long(number), ctypes.c_long(flags | extra)))
        if fd >= 0:
            return fd
        code = ctypes.get_errno()
        if code != errno.EPERM:
            break
    raise OSError(code, f"userfaultfd: {os.strerror(code)}")


def api(fd: int, features: int = 0) -> int:
    """Do the handshake that must come first; returns the features the kernel has. OSError EINVAL: one is missing."""
    arg = bytearray(_API_ARG.pack(_API, features, 0))
    fcntl.ioctl(fd, _UFFDIO_API, arg)
    return int(_API_ARG.unpack(arg)[1])


def register(fd: int, start: int, length: int, mode: int) -> int:
    """Watch [start, start + length); returns the bits of the ioctls that work there.

    OSError EINVAL: nothing mapped, or a mapping that cannot be watched; EBUSY: another userfaultfd has it;
    ENOMEM or ESRCH: the process is gone.
    """
    arg = bytearray(_REGISTER_ARG.pack(start, length, mode, 0))
    fcntl.ioctl(fd, _UFFDIO_REGISTER, arg)
    return int(_REGISTER_ARG.unpack(arg)[3])


def unregister(fd: int, start: int, length: int) -> None:
    """Stop watching [start, start + length) and wake who waits there. Raises OSError as `register`."""
    fcntl.ioctl(fd, _UFFDIO_UNREGISTER, _RANGE.pack(start, length))


def wake(fd: int, start: int, length: int) -> None:
    """Let the threads that wait for a page in [start, start + length) try again."""
    fcntl.ioctl(fd, _UFFDIO_WAKE, _RANGE.pack(start, length))


def copy(fd: int, dst: int, src: int, length: int, *, dontwake: bool = False) -> int:
    """Fill missing pages at `dst` with `length` bytes from `src`, an address of this process; wake the waiters.

    Returns the bytes copied. Fewer than `length`: the kernel stopped at a page, go on from there to learn why.
    OSError when nothing was copied: EEXIST (the page is there: wake it), EAGAIN (an event is under way: read the
    descriptor first), ENOENT (not mapped as it was), ESRCH (the process is gone), EFAULT (`src` is not readable).
    """
    arg = bytearray(_COPY_ARG.pack(dst, src, length, _DONTWAKE if dontwake else 0, 0))
    try:
        fcntl.ioctl(fd, _UFFDIO_COPY, arg)
    except OSError as error:
        done = int(_COPY_ARG.unpack(arg)[4])
        if error.errno == errno.EAGAIN and done > 0:
            return done
        raise
    return length


def zeropage(fd: int, start: int, length: int, *, dontwake: bool = False) -> int:
    """Fill missing pages with zeros; returns the bytes filled and raises as `copy` does."""
    arg = bytearray(_ZERO_ARG.pack(start, length, _DONTWAKE if dontwake else 0, 0))
    try:
        fcntl.ioctl(fd, _UFFDIO_ZEROPAGE, arg)
    except OSError as error:
        done = int(_ZERO_ARG.unpack(arg)[3])
        if error.errno == errno.EAGAIN and done > 0:
            return done
        raise
    return length


def parse(message: bytes | memoryview) -> Event:
    """Decode one 32-byte message. Raises ValueError when its length or its event is unknown."""
    if len(message) != MESSAGE_BYTES:
        raise ValueError(f"a userfaultfd message has {MESSAGE_BYTES} bytes, not {len(message)}")
    kind, a, b, c = _MESSAGE.unpack(message)
    match kind:
        case 0x12:
            return PageFault(b & ~0xFFF, a)
        case 0x13:
            return Fork(a & 0xFFFFFFFF)
        case 0x14:
            return Remap(a, b, c)
        case 0x15:
            return Remove(a, b)
        case 0x16:
            return Unmap(a, b)
        case _:
            raise ValueError(f"unknown userfaultfd event {kind:#x}")


def read_events(fd: int, limit: int = 64) -> list[Event]:
    """Read up to `limit` waiting messages, in order; an empty list when a non-blocking descriptor has none."""
    try:
        data = memoryview(os.read(fd, MESSAGE_BYTES * limit))
    except BlockingIOError:
        return []
    return [parse(data[at : at + MESSAGE_BYTES]) for at in range(0, len(data), MESSAGE_BYTES)]
