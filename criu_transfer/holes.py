"""Holes in sparse files: the one system call for them that Python lacks."""

import ctypes
import os

_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02  # linux/falloc.h

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free a part of a file, which reads as zeros then; the size stays. Raises OSError (fallocate(2))."""
    if _fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, length) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"punching a hole: {os.strerror(code)}")
