"""System calls that Python's standard library lacks: remote memory, PAGEMAP_SCAN, ptrace.

Numbers and layouts: Linux's include/uapi/linux/{fs,ptrace}.h and the man pages named in each docstring. All functions
raise OSError with the kernel's errno.
"""

import ctypes
import fcntl
import os
import struct
from array import array
from collections.abc import Sequence

PAGE_SIZE = 4096
MAX_IOVECS = 1024

# `_libc` releases the interpreter lock around a call. `_held` does not: calls that never block and that run while an
# application is stopped must not wait for other Python threads to hand the lock back.
_libc = ctypes.CDLL(None, use_errno=True)
_held = ctypes.PyDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_held.ptrace.restype = ctypes.c_long
_held.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_held.syscall.restype = ctypes.c_long
_held.waitpid.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


def _failed(call: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{call}: {os.strerror(code)}")


def process_vm_readv(pid: int, buffer: memoryview | bytearray, ranges: Sequence[tuple[int, int]]) -> int:
    """Read [start, end) ranges of a process, one after the other, into a writable buffer (process_vm_readv(2)).

    Returns the bytes read: fewer than asked when a page in the middle cannot be read, what came before it is in the
    buffer. OSError EFAULT: the first page cannot be read; ESRCH: the process is gone; ValueError: more than MAX_IOVECS
    ranges, or the buffer is too small. The process may run meanwhile.
    """
    total = sum(end - start for start, end in ranges)
    if len(ranges) > MAX_IOVECS or total > len(buffer):
        raise ValueError(f"{len(ranges)} ranges of {total} bytes do not fit one call with {len(buffer)} bytes")
    if not total:
        return 0
    remote = array("Q", [number for start, end in ranges for number in (start, end - start)])
    local = array("Q", [ctypes.addressof(ctypes.c_char.from_buffer(buffer)), total])
    done = int(_libc.process_vm_readv(pid, local.buffer_info()[0], 1, remote.buffer_info()[0], len(ranges), 0))
    if done < 0:
        raise _failed("process_vm_readv")
    return done


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """Take a duplicate (close-on-exec) of another process's descriptor (pidfd_getfd(2))."""
    taken = int(_held.syscall(ctypes.c_long(438), ctypes.c_long(pidfd), ctypes.c_long(fd), ctypes.c_long(0)))
    if taken < 0:
        raise _failed("pidfd_getfd")
    return taken


# --- PAGEMAP_SCAN (Documentation/admin-guide/mm/pagemap.rst), kernel >= 6.7

PAGE_IS_WPALLOWED = 1 << 0
PAGE_IS_WRITTEN = 1 << 1
PAGE_IS_FILE = 1 << 2
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
PAGE_IS_PFNZERO = 1 << 5
PAGE_IS_HUGE = 1 << 6
PAGE_IS_SOFT_DIRTY = 1 << 7
PAGE_IS_GUARD = 1 << 8  # kernel >= 6.15

PM_SCAN_WP_MATCHING = 1
PM_SCAN_CHECK_WPASYNC = 2

_PAGEMAP_SCAN = 0xC0606610
# size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, return_mask
_SCAN_ARG = struct.Struct("=12Q")


def region_vector(regions: int) -> "array[int]":
    """Make room for the answers of pagemap_scan: three words (start, end, categories) a region."""
    return array("Q", bytes(24 * regions))


def pagemap_scan(
    pagemap: int,
    start: int,
    end: int,
    vector: "array[int]",
    *,
    flags: int = 0,
    inverted: int = 0,
    mask: int = 0,
    anyof: int = 0,
    return_mask: int = 0,
    max_pages: int = 0,
) -> tuple[int, int]:
    """Find pages by category; returns (regions found, address where the walk ended).

    A page matches when all categories of `mask` hold after turning over those in `inverted`, and one of `anyof`.
    OSError EPERM under CHECK_WPASYNC: part of the range is not registered. A failed call may already have protected
    pages whose regions it did not report: the caller must then take the whole range for written.
    """
    room = vector.buffer_info()
    arg = bytearray(
        _SCAN_ARG.pack(96, flags, start, end, 0, room[0], room[1] // 3, max_pages, inverted, mask, anyof, return_mask)
    )
    found = int(fcntl.ioctl(pagemap, _PAGEMAP_SCAN, arg))
    return found, int(_SCAN_ARG.unpack(arg)[4])


# --- ptrace(2)

PTRACE_CONT = 7
PTRACE_DETACH = 17
PTRACE_SYSCALL = 24
PTRACE_SETOPTIONS = 0x4200
PTRACE_GETREGSET = 0x4204
PTRACE_SETREGSET = 0x4205
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B
PTRACE_GET_RSEQ_CONFIGURATION = 0x420F

PTRACE_O_TRACESYSGOOD = 1
PTRACE_O_SUSPEND_SECCOMP = 1 << 21
PTRACE_EVENT_STOP = 128

_NT_PRSTATUS = 1
_WALL = 0x40000000


def ptrace(request: int, tid: int, address: int = 0, data: int = 0) -> int:
    """Call ptrace(2). Only the thread that seized `tid` may go on with it."""
    result = int(_held.ptrace(request, tid, address, data))
    if result < 0:
        raise _failed(f"ptrace {request:#x} of {tid}")
    return result


def get_registers(tid: int) -> bytes:
    """Read the general registers of a stopped thread, in the layout of its own mode (32 bit gives fewer bytes)."""
    room = ctypes.create_string_buffer(1024)
    vector = array("Q", [ctypes.addressof(room), len(room)])
    ptrace(PTRACE_GETREGSET, tid, _NT_PRSTATUS, vector.buffer_info()[0])
    return room.raw[: vector[1]]


def set_registers(tid: int, registers: bytes) -> None:
    """Write what get_registers gave, changed or not."""
    room = ctypes.create_string_buffer(registers, len(registers))
    vector = array("Q", [ctypes.addressof(room), len(registers)])
    ptrace(PTRACE_SETREGSET, tid, _NT_PRSTATUS, vector.buffer_info()[0])


def get_signal_mask(tid: int) -> int:
    """Read the blocked signals of a stopped thread, bit 0 = signal 1."""
    room = ctypes.c_uint64()
    ptrace(PTRACE_GETSIGMASK, tid, 8, ctypes.addressof(room))
    return room.value


def set_signal_mask(tid: int, mask: int) -> None:
    """Write the blocked signals of a stopped thread."""
    room = ctypes.c_uint64(mask)
    ptrace(PTRACE_SETSIGMASK, tid, 8, ctypes.addressof(room))


def rseq_area(tid: int) -> int:
    """Return the address of a stopped thread's struct rseq, 0 when it has none or the kernel cannot tell (< 5.13)."""
    room = ctypes.create_string_buffer(24)
    try:
        ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid, len(room), ctypes.addressof(room))
    except OSError:
        return 0
    return int.from_bytes(room.raw[:8], "little")


def wait_nohang(tid: int) -> int | None:
    """Return the wait status of a traced thread, None when nothing happened to it yet (waitpid(2), __WALL)."""
    status = ctypes.c_int()
    found = int(_held.waitpid(tid, ctypes.addressof(status), os.WNOHANG | _WALL))
    if found < 0:
        raise _failed(f"waitpid {tid}")
    return status.value if found else None


def tgkill(pid: int, tid: int, signal: int) -> None:
    """Send a signal to one thread of a process (tgkill(2))."""
    if _held.tgkill(pid, tid, signal) < 0:
        raise _failed("tgkill")


def getsockopt(fd: int, level: int, option: int, length: int) -> bytes:
    """Read a socket option of any descriptor (getsockopt(2)), without making a socket object that would own it."""
    room = ctypes.create_string_buffer(length)
    size = ctypes.c_uint(length)
    if _held.getsockopt(fd, level, option, room, ctypes.byref(size)) < 0:
        raise _failed("getsockopt")
    return room.raw[: size.value]
