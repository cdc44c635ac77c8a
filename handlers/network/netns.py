"""Named network namespaces below /run/netns, and how to act inside one.

`ip netns` sees them too. Acting inside happens in a short-lived thread of its own: setns(2) changes the calling thread
only, so no other part of the process ever finds itself in a pod's network.
"""

import ctypes
import importlib
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

DIRECTORY = Path("/run/netns")
HERE = Path("/proc/self/ns/net")  # of the main thread, which never leaves its namespace

_MS_BIND = 0x1000
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


def call_in[T](netns: Path, action: Callable[[], T]) -> T:
    """Run `action` in a thread that is inside `netns`, and return what it returns.

    Raises what `action` raises, and OSError when the namespace cannot be entered. Blocks the caller meanwhile.
    """

    def enter() -> T:
        with netns.open("rb") as handle:
            os.setns(handle.fileno(), os.CLONE_NEWNET)
        return action()

    return _in_thread(enter)


def open_socket(netns: Path, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """Open a socket inside `netns`; it stays there wherever it is used."""
    return call_in(netns, lambda: socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol))


def create(name: str) -> Path:
    """Make a network namespace that lives on without a process, and return its path.

    Raises FileExistsError when a namespace of that name is there. The leftover of a crash between the file and
    the mount is used again.
    """
    DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
    path = path_of(name)
    if _is_namespace(path):
        raise FileExistsError(f"network namespace {name} exists")
    path.touch(mode=0o444)

    def unshare_and_keep() -> None:
        os.unshare(os.CLONE_NEWNET)
        _mount("/proc/thread-self/ns/net", path)

    _in_thread(unshare_and_keep)
    return path


def remove(name: str) -> None:
    """Drop the name; the namespace goes when its last process and socket has gone. Absent is no error."""
    path = path_of(name)
    if _is_namespace(path):
        _unmount(path)
    path.unlink(missing_ok=True)


def names() -> list[str]:
    """Return the names of all namespaces that are mounted in the directory, sorted."""
    if not DIRECTORY.is_dir():
        return []
    return sorted(path.name for path in DIRECTORY.iterdir() if _is_namespace(path))


def path_of(name: str) -> Path:
    """Return where the namespace of that name is or would be."""
    return DIRECTORY / name


def iproute() -> Any:
    """Open pyroute2's IPRoute in the calling thread's namespace. 19 MiB and 0.4 s at first: never in a pause."""
    module: Any = importlib.import_module("pyroute2")  # its annotations do not pass strict checking
    return module.IPRoute()


def _is_namespace(path: Path) -> bool:
    try:
        return path.stat().st_dev == HERE.stat().st_dev
    except FileNotFoundError:
        return False


def _in_thread[T](action: Callable[[], T]) -> T:
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="netns") as pool:
        return pool.submit(action).result()


def _mount(source: str, target: Path) -> None:
    if _libc.mount(source.encode(), os.fsencode(target), None, _MS_BIND, None) != 0:
        raise OSError(ctypes.get_errno(), f"mount: {os.strerror(ctypes.get_errno())}", str(target))


def _unmount(target: Path) -> None:
    if _libc.umount2(os.fsencode(target), _MNT_DETACH) != 0:
        raise OSError(ctypes.get_errno(), f"umount: {os.strerror(ctypes.get_errno())}", str(target))
