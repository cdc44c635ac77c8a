"""Connections that a pod's kernel has accepted and its application has not: what a dump would lose.

CRIU leaves them out (`--tcp-skip-in-flight`), and their clients may have data acknowledged. So after hold and freeze:
look, and when there are any, thaw and release, let the application accept them, and try again. The same goes for
handshakes that wait for their last ACK: that ACK is held, and where it is played the listener would answer with RST.

Source: inet_diag (linux/inet_diag.h), for a listening socket `rqueue` is the length of the accept queue.
"""

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from handlers.network import netlink

_SOCK_DIAG_BY_FAMILY = 20
_SYN_RECV, _LISTEN, _NEW_SYN_RECV = 3, 10, 12
_REQUEST = struct.Struct("=BBBBI48x")  # inet_diag_req_v2: family, protocol, extensions, padding, states, socket id
_ANSWER = struct.Struct("=BBBB2H32x12xIIIII")  # inet_diag_msg: family, state, timer, retransmits, ports, ..., rqueue


@dataclass(frozen=True, slots=True)
class Backlog:
    """What is between a pod's kernel and its application: established but not accepted, and not yet established."""

    unaccepted: int
    handshakes: int

    def __bool__(self) -> bool:
        return bool(self.unaccepted or self.handshakes)


def undelivered(namespace: Path) -> Backlog:
    """Count the connections of a pod's namespace that are in no process's hands yet. Takes 1 ms or less.

    Raises OSError when the kernel has no inet_diag (module `tcp_diag`).
    """
    unaccepted = handshakes = 0
    with netlink.Socket(namespace, netlink.SOCK_DIAG) as diag:
        for family in (socket.AF_INET, socket.AF_INET6):
            for state, queued in _sockets(diag, family):
                if state == _LISTEN:
                    unaccepted += queued
                else:
                    handshakes += 1
    return Backlog(unaccepted, handshakes)


def _sockets(diag: netlink.Socket, family: int) -> Iterator[tuple[int, int]]:
    states = 1 << _SYN_RECV | 1 << _LISTEN | 1 << _NEW_SYN_RECV
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, states)
    for _, body in diag.dump(netlink.message(_SOCK_DIAG_BY_FAMILY, netlink.DUMP, request)):
        _, state, *_, queued, _, _, _ = _ANSWER.unpack_from(body)
        yield state, queued
