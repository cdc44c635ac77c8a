"""The memory of a process at rest, as the pager takes it out of the receiver's store."""

import ctypes
import errno
import mmap
import os
from collections.abc import Iterable

from criu_transfer.errors import StateMissing
from criu_transfer.holes import punch_hole
from criu_transfer.ranges import RangeSet


class Buffer:
    """Memory of ours with a known address: pages are read into it and the kernel copies them from there.

    Copying from a mapping of the store instead saves a copy and is slower: each page faults (2.6 against 3.1 GiB/s).
    """

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size)
        self.view = memoryview(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))


class StoreFile:
    """One file of the store; its offsets are the addresses that the process had. Forked processes share one."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def segment(self, start: int, end: int) -> tuple[bool, int]:
        """Look at the file from `start` on: whether there are bytes or a hole, and where that ends, at most `end`."""
        try:
            data = os.lseek(self._fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing but a hole up to the end of the file
                raise
            return False, end
        if data > start:
            return False, min(data, end)
        return True, min(os.lseek(self._fd, start, os.SEEK_HOLE), end)

    def read(self, buffer: Buffer, offset: int, length: int) -> None:
        """Read bytes that `segment` has found. Raises StateMissing when they are not there."""
        if os.preadv(self._fd, [buffer.view[:length]], offset) != length:
            raise StateMissing(f"the store ends before {offset + length:#x}")

    def free(self, spent: RangeSet, needed: Iterable[tuple[int, int]]) -> None:
        """Free the RAM of `spent`, except for `needed`: what other processes still have to get from here."""
        kept = RangeSet()
        for low, high in needed:
            kept.add(low, high)
        for low, high in spent:
            for here, there in kept.missing(low, high):
                punch_hole(self._fd, here, there - here)
