"""The process that the self-test tracks: it makes memory, and changes it in every way that was ever dangerous.

Run as a script. It prints one JSON line {case: [[start, length], ...]} when its memory is made and another when it has
been changed, and waits for a line on standard input after each; in between it writes none of that memory.
"""

import ctypes
import json
import mmap
import os
import signal
import sys
from collections.abc import Callable

PAGE = 4096
PAGES = 16
SIZE = PAGES * PAGE
HUGE = 2 << 20

MREMAP_MAYMOVE_FIXED = 3
MAP_FIXED = 0x10
PROT_NONE = 0
MADV_DONTNEED = 4
MADV_HUGEPAGE = 14

_libc = ctypes.CDLL(None, use_errno=True)
for _name in ("mmap", "mremap"):
    getattr(_libc, _name).restype = ctypes.c_void_p

Areas = dict[str, list[tuple[int, int]]]


def _address(value: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(value)


def _size(value: int) -> ctypes.c_size_t:
    return ctypes.c_size_t(value)


def _checked(result: int | None) -> int:
    if result is None or result in {-1, 2**64 - 1}:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def say(areas: object) -> None:
    """Print one line in one write: the forked child says something at the same time (pipe(7), PIPE_BUF)."""
    os.write(sys.stdout.fileno(), json.dumps(areas).encode() + b"\n")


def make(length: int = SIZE, at: int = 0) -> int:
    """Map fresh private memory; at a given address it takes the place of what is there."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (MAP_FIXED if at else 0)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    return _checked(_libc.mmap(_address(at), _size(length), protection, flags, -1, ctypes.c_long(0)))


def fill(start: int, seed: int, length: int = SIZE) -> None:
    """Give every page a content of its own."""
    for page in range(length // PAGE):
        ctypes.memset(start + page * PAGE, (seed + page) % 251 + 1, PAGE)


def move(old: int, new: int) -> None:
    """Move SIZE bytes over what is mapped at `new`."""
    size = _size(SIZE)
    _checked(_libc.mremap(_address(old), size, size, MREMAP_MAYMOVE_FIXED, _address(new)))


def advise(start: int, advice: int, length: int = SIZE) -> None:
    """Call madvise(2); a kernel without huge pages may refuse."""
    _libc.madvise(_address(start), _size(length), advice)


def protect(start: int, protection: int) -> None:
    """Call mprotect(2)."""
    _checked(_libc.mprotect(_address(start), _size(SIZE), protection))


def read_into(start: int) -> None:
    """Let the kernel write: read(2) from a pipe."""
    reader, writer = os.pipe()
    os.write(writer, bytes(range(256)) * 16)
    _checked(_libc.read(reader, _address(start), _size(PAGE)))
    os.close(reader)
    os.close(writer)


def grow_stack(depth: int = 3000) -> None:
    """Use more of the main thread's stack than before."""
    nested: list[object] = []
    for _ in range(depth):
        nested = [nested]
    repr(nested)


def fork_writer(start: int) -> int:
    """Fork a child that writes half of what it shares with us; returns its pid. It ends with us."""
    pid = os.fork()
    if pid == 0:
        _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        fill(start, 90, SIZE // 2)
        say({"forked": [[start, SIZE]]})
        signal.pause()
        os._exit(0)
    return pid


def dropped(start: int) -> None:
    """Give the first pages back, half of them written anew."""
    advise(start, MADV_DONTNEED, 8 * PAGE)
    fill(start, 50, 4 * PAGE)


def remapped(start: int) -> None:
    """Put other memory into the same place."""
    _checked(_libc.munmap(_address(start), _size(SIZE)))
    fill(make(at=start), 60)


def protected(start: int) -> None:
    """Write after a time without access."""
    protect(start, PROT_NONE)
    protect(start, mmap.PROT_READ | mmap.PROT_WRITE)
    fill(start, 70, 2 * PAGE)


CHANGES: dict[str, Callable[[int], None]] = {
    "quiet": lambda _start: None,
    "written": lambda start: fill(start + 3 * PAGE, 40, 2 * PAGE),
    "dropped": dropped,
    "remapped": remapped,
    "protected": protected,
    "by read": read_into,
    "by another process": lambda _start: None,  # the tester writes
    "copied on write": lambda start: fill(start, 80, 2 * PAGE),  # after the fork
}


def main() -> None:
    """Make, report, change, report."""
    areas = {name: make() for name in CHANGES}
    source, target = make(), make()
    huge = (make(3 * HUGE) + HUGE - 1) & -HUGE
    advise(huge, MADV_HUGEPAGE, HUGE)
    for seed, start in enumerate([*areas.values(), source, target]):
        fill(start, seed)
    fill(huge, 7, HUGE)
    made: Areas = {name: [(start, SIZE)] for name, start in areas.items()}
    made |= {"moved": [(source, SIZE), (target, SIZE)], "huge page": [(huge, HUGE)]}
    say(made)
    sys.stdin.readline()
    child = fork_writer(areas["copied on write"])
    for name, start in areas.items():
        CHANGES[name](start)
    move(source, target)
    fill(huge + 37 * PAGE, 30, PAGE)
    grow_stack()
    made["moved"] = [(target, SIZE)]
    say({**made, "pid of forked": [[child, 0]]})
    sys.stdin.readline()


if __name__ == "__main__":
    main()
