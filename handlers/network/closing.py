"""Closes connections of a pod that cannot go on where it has moved to.

What stood on an address of the old node (masquerading, a node port) has lost its way. Left alone, the application
would write into it until TCP gives up, a quarter of an hour later; aborted, it hears of it at once (ECONNABORTED) and
connects anew. Source: SOCK_DESTROY of linux/sock_diag.h, the kernel's tcp_abort(); the owner may be frozen.
"""

import errno
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

from handlers.network import netlink
from handlers.network.conntrack import Tuple

_SOCK_DESTROY = 21
_ALL_STATES = 0xFFFFFFFF
_NO_COOKIE = 0xFFFFFFFF
_REQUEST = struct.Struct("=BBBBI")  # inet_diag_req_v2: family, protocol, extensions, padding, states; then the socket
_SOCKET = struct.Struct(">HH16s16s")  # inet_diag_sockid: ports and addresses, all in network order
_REST = struct.Struct("=III")  # interface, cookie


def close(namespace: Path, connections: Iterable[Tuple]) -> list[Tuple]:
    """Abort TCP connections, each given as the pod sees it (its own end is the source); return those that were there.

    Raises OSError when the kernel cannot (CONFIG_INET_DIAG_DESTROY); one that is not there is no error.
    """
    closed = []
    with netlink.Socket(namespace, netlink.SOCK_DIAG) as diag:
        for ends in connections:
            try:
                diag.execute(netlink.message(_SOCK_DESTROY, netlink.ACK, _request(ends)))
            except OSError as error:
                if error.errno not in {errno.ENOENT, errno.ESTALE}:
                    raise
            else:
                closed.append(ends)
    return closed


def _request(ends: Tuple) -> bytes:
    family = socket.AF_INET if ends.source.version == 4 else socket.AF_INET6
    head = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, _ALL_STATES)
    named = _SOCKET.pack(ends.source_port, ends.destination_port, ends.source.packed, ends.destination.packed)
    return head + named + _REST.pack(0, _NO_COOKIE, _NO_COOKIE)
