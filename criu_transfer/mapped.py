"""A store's file seen as memory of ours, to copy from without a detour through Python."""

import ctypes
import errno
import mmap
import os
from collections.abc import Iterable

from criu_transfer.holes import punch_hole
from criu_transfer.ranges import RangeSet

_WINDOW = 64 << 20
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong)


class MappedStore:
    """The memory of one process at rest, at the offsets equal to its addresses. Forked processes fill from one store.

    Windows of 64 MiB are mapped where they are needed, for the file is as long as an address space.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._windows: dict[int, int] = {}

    def segment(self, start: int, end: int) -> tuple[bool, int]:
        """Look at the file from `start` on: whether there are bytes or a hole, and where that ends, at most `end`.

        The end of a window ends it too.
        """
        end = min(end, (start // _WINDOW + 1) * _WINDOW)
        try:
            data = os.lseek(self._fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing but a hole up to the end of the file
                raise
            return False, end
        if data > start:
            return False, min(data, end)
        return True, min(os.lseek(self._fd, start, os.SEEK_HOLE), end)

    def address(self, offset: int) -> int:
        """Return where the byte at `offset` is mapped, and with it the rest of its window."""
        number, inside = divmod(offset, _WINDOW)
        base = self._windows.get(number)
        if base is None:
            base = self._windows[number] = self._map(number * _WINDOW)
        return base + inside

    def free(self, spent: RangeSet, needed: Iterable[tuple[int, int]]) -> None:
        """Free the RAM of `spent`, except for `needed`: what other processes still have to get from here."""
        kept = RangeSet()
        for low, high in needed:
            kept.add(low, high)
        for low, high in spent:
            for here, there in kept.missing(low, high):
                punch_hole(self._fd, here, there - here)

    def _map(self, offset: int) -> int:
        address = _libc.mmap(None, _WINDOW, mmap.PROT_READ, mmap.MAP_SHARED, self._fd, offset)
        if address is None or address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"mapping a store: {os.strerror(code)}")
        return int(address)
